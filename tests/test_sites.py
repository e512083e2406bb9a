"""Sites are found in any architecture by structure alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

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
