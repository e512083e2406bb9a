"""Sites are found in any architecture by structure alone."""

from __future__ import annotations

import pytest
import torch
from benchmarks import tiny_models
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import interleaf
from interleaf.errors import SiteError
from interleaf.sites import find_sites, select_sites, target_sites
from tests.zoo import COMMON, TINY, build, inputs

DECODER = {"attention": "self_attn -> self_attn.o_proj", "ffn": "mlp -> mlp.down_proj", "block": " -> "}
BERT = {"attention": "attention -> attention.output.dense", "ffn": "intermediate -> output.dense", "block": " -> "}

EXPECTED = {
    "bert": {"bert.encoder.layer": BERT},
    "roberta": {"roberta.encoder.layer": BERT},
    "distilbert": {
        "distilbert.transformer.layer": {
            "attention": "attention -> attention.out_lin",
            "ffn": "ffn -> ffn.lin2",
            "block": " -> ",
        }
    },
    "gpt2": {"transformer.h": {"attention": "attn -> attn.c_proj", "ffn": "mlp -> mlp.c_proj", "block": " -> "}},
    "llama": {"model.layers": DECODER},
    "qwen3": {"model.layers": DECODER},
    "mixtral": {"model.layers": {**DECODER, "ffn": "mlp -> mlp"}},
    "t5": {
        "encoder.block": {
            "attention": "layer.0 -> layer.0.SelfAttention.o",
            "ffn": "layer.1 -> layer.1.DenseReluDense.wo",
            "block": " -> ",
        },
        "decoder.block": {
            "attention": "layer.0 -> layer.0.SelfAttention.o",
            "cross_attention": "layer.1 -> layer.1.EncDecAttention.o",
            "ffn": "layer.2 -> layer.2.DenseReluDense.wo",
            "block": " -> ",
        },
    },
    "bart": {
        "model.encoder.layers": {
            "attention": "self_attn -> self_attn.out_proj",
            "ffn": "fc1 -> fc2",
            "block": " -> ",
        },
        "model.decoder.layers": {
            "attention": "self_attn -> self_attn.out_proj",
            "cross_attention": "encoder_attn -> encoder_attn.out_proj",
            "ffn": "fc1 -> fc2",
            "block": " -> ",
        },
    },
}


@pytest.mark.parametrize("name", list(TINY))
def test_the_sites_of_each_family(name: str) -> None:
    got: dict[str, dict[str, str]] = {}
    for site in find_sites(build(name)):
        block = f"{site.stack}.{site.layer}"
        read, write = (part.removeprefix(block).removeprefix(".") for part in (site.read, site.write))
        assert site.width == 32
        if site.layer == 1:
            got.setdefault(site.stack, {})[site.position] = f"{read} -> {write}"
    assert got == EXPECTED[name]


def test_albert_keeps_its_layers_in_groups() -> None:
    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=40)
    sites = find_sites(AlbertForSequenceClassification(config))
    assert [s.position for s in sites] == ["attention", "ffn", "block"]
    assert sites[1].write.endswith("albert_layers.0.ffn_output")


def test_a_feed_forward_as_wide_as_the_model_is_still_one_sublayer() -> None:
    config = BertConfig(**{**COMMON, "intermediate_size": 32})
    sites = [s for s in find_sites(BertForSequenceClassification(config)) if s.layer == 0]
    assert [s.write.rpartition("layer.0.")[2] for s in sites[:2]] == ["attention.output.dense", "output.dense"]


ODD_WRITES = {
    # the model's name says nothing of what a child is: "ssm" in GptOssMLP, "conv" in ConvBertOutput
    "gpt_oss": ["attention self_attn.o_proj", "ffn mlp"],
    "seed_oss": ["attention self_attn.o_proj", "ffn mlp.down_proj"],
    "cohere_compass_text": ["attention self_attn.o_proj", "ffn mlp.down_proj"],
    "convbert": ["attention attention.output.dense", "ffn output.dense"],
    "recurrent_gemma": ["attention temporal_block", "ffn mlp_block.down_proj"],
    "seamless_m4t": ["attention self_attn.out_proj", "ffn ffn.fc2"],
    "xlstm": ["attention mlstm_layer.out_proj", "ffn ffn.proj_down"],
    # a list of attentions, a list of feed-forwards
    "longcat_flash": [
        "ffn mlp",
        "attention self_attn.0.o_proj",
        "attention self_attn.1.o_proj",
        "ffn mlps.0.down_proj",
        "ffn mlps.1.down_proj",
    ],
    # the last map of the width is a gate
    "minimax": ["attention self_attn.out_proj", "ffn mlp"],
    "rwkv": ["attention attention.output", "ffn feed_forward"],
    # raw maps beside the one that writes; norms with maps; low-rank helpers beside the sublayers
    "funnel": ["attention attention.post_proj", "ffn ffn.linear_2"],
    "axk2": ["attention self_attn.o_proj", "ffn mlp"],
    "gemma3n_text": ["attention self_attn.o_proj", "ffn mlp.down_proj"],
    # a block in a block
    "zamba": [
        "attention shared_transf.self_attn.o_proj",
        "ffn shared_transf.feed_forward.down_proj",
        "attention mamba_decoder.mamba",
    ],
    # mixers that are all there is, and none at all
    "mamba": ["attention mixer"],
    "fnet": ["ffn output.dense"],
    "mobilebert": ["attention attention.output.dense", "ffn output.bottleneck.dense"],
}


@pytest.mark.parametrize("kind", ODD_WRITES)
def test_where_an_odd_block_writes(kind: str) -> None:
    layer = 0 if kind == "recurrent_gemma" else 1
    sites = [s for s in find_sites(tiny_models.build(kind)[0]) if s.layer == layer]
    block = next(s.write for s in sites if s.position == "block")
    found = [f"{s.position} {s.write.removeprefix(block + '.')}" for s in sites if s.write.startswith(f"{block}.")]
    assert found == ODD_WRITES[kind]


@pytest.mark.parametrize("kind", ["bert", "llama", "mixtral", "bart", "lfm2", "modernbert", "jetmoe", "mobilebert"])
def test_sites_do_not_depend_on_sizes_that_happen_to_be_equal(kind: str) -> None:
    base, square = (find_sites(tiny_models.build(kind, tiny_models.SHAPES[s])[0]) for s in ("base", "square"))
    for left, right in zip((s for s in base if s.layer == 0), square, strict=True):
        assert (left.read, left.write, left.position) == (right.read, right.write, right.position)


def test_sparse_layers_among_dense_ones() -> None:
    sites = find_sites(tiny_models.build("nllb-moe", tiny_models.SHAPES["deep"])[0])
    ffns = [s.write.rpartition("layers.")[2] for s in sites if s.position == "ffn" and "encoder" in s.stack]
    assert ffns == ["0.ffn.fc2", "1.ffn.fc2", "2.ffn.fc2", "3.ffn"]


def test_encoder_and_decoder_have_widths_of_their_own() -> None:
    decoder = BertConfig(**{**COMMON, "hidden_size": 48}, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**COMMON), decoder)
    model = EncoderDecoderModel(config=config)
    widths = {s.stack: s.width for s in find_sites(model)}
    assert widths == {"encoder.encoder.layer": 32, "decoder.bert.encoder.layer": 48}
    interleaf.adapt(model).add_adapter("a", "parallel", positions=["attention", "ffn", "block"])
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[8, 9]])}
    assert model(**given).logits.shape == (1, 2, 99)


def test_both_towers_of_a_dual_encoder_and_the_text_alone_of_a_model_that_reads_pictures() -> None:
    clip = {s.stack for s in find_sites(tiny_models.build("clip", head="beyond")[0])}
    assert clip == {"text_model.encoder.layers", "vision_model.encoder.layers"}
    assert {s.stack for s in find_sites(tiny_models.build("gemma3")[0])} == {"model.language_model.layers"}


def test_a_position_that_an_architecture_lacks_is_named_with_what_there_is() -> None:
    with pytest.raises(SiteError, match=r"no position 'ffn'\. It has: attention, block"):
        interleaf.adapt(tiny_models.build("mamba")[0]).add_adapter("a", "houlsby")


def test_an_adapted_model_has_the_same_sites() -> None:
    model = interleaf.adapt(build("t5"))
    before = find_sites(model)
    model.add_adapter("a", "houlsby")
    assert find_sites(model) == before


def test_layers_and_positions_are_chosen() -> None:
    sites = find_sites(build("bart"))
    for layers, numbers in (("all", [0, 1]), ("first:1", [0]), ("last:1", [1]), ([1], [1]), ([-2], [0])):
        kept = select_sites(sites, ["ffn"], layers)
        assert [s.layer for s in kept] == numbers * 2  # in the encoder and in the decoder
    assert {s.stack for s in select_sites(sites, ["cross_attention"])} == {"model.decoder.layers"}


@pytest.mark.parametrize(
    ("positions", "layers", "said"),
    [
        (["atention"], "all", "no position 'atention'. It has: attention, block, ffn"),
        (["ffn"], "last:3", "n from 1 to 2"),
        (["ffn"], "middle:1", "expected 'all', 'first:n', 'last:n' or a list"),
        (["ffn"], [2], "there is no layer 2; they run from 0 to 1"),
        (["ffn"], [], "match no site"),
        (["cross_attention"], "all", "match no site"),
    ],
)
def test_what_is_not_there_is_an_error(positions: list[str], layers: str | list[int], said: str) -> None:
    with pytest.raises(SiteError) as raised:
        select_sites(find_sites(build("bert")), positions, layers)
    assert said in str(raised.value)


def test_target_modules_name_any_module() -> None:
    model = build("llama")
    assert [s.write for s in target_sites(model, ["o_proj"], 32)] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]
    assert len(target_sites(model, r".*\.1\.mlp", 32)) == 1
    for targets in (["o_proj", "nothing"], ".*nothing"):
        with pytest.raises(SiteError, match="nothing"):
            target_sites(model, targets, 32)


def test_a_model_without_layers_or_config_says_what_to_do() -> None:
    with pytest.raises(SiteError, match="`input_dim`"):
        find_sites(nn.Linear(3, 3))
    with pytest.raises(SiteError, match="`target_modules`"):
        find_sites(nn.Linear(3, 3), width=3)


def test_the_parallel_adapter_of_cross_attention_reads_the_decoder() -> None:
    """BART registers `k_proj`, which reads the encoder, first; the source here is longer than the target."""
    model = interleaf.adapt(build("bart"))
    model.add_adapter("a", "parallel", positions=["cross_attention"])
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, interleaf.Bottleneck):
            module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        model(**inputs(model))
    assert seen == [(2, 5, 32)] * 2


def test_a_module_that_is_never_called_is_no_place_for_an_adapter() -> None:
    model, given = tiny_models.build("wavlm", head="beyond")
    adapted = interleaf.adapt(model)
    adapted.add_adapter("a", "houlsby")
    with pytest.raises(SiteError, match=r"layers\.0\.attention\.out_proj is never called by .*layers\.0\.attention,"):
        adapted(**given)
    with adapted.disable_adapter():
        adapted(**given)
    adapted.delete_adapter("a")
    adapted.add_adapter("a", "houlsby", positions=["ffn"])
    adapted(**given)
