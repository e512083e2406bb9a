"""Unions: several methods in one named adapter, PEFT's own included."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import interleaf
from interleaf import BottleneckConfig, UnionConfig
from interleaf.errors import AdapterError, ConfigError, SiteError
from tests.resumable import Rows
from tests.zoo import GENERATORS, TINY, base_weights, build, inputs, logits, mixed_and_alone, randomise, same

PFEIFFER = BottleneckConfig(positions=["ffn"], bottleneck_dim=4, activation="gelu")
PARTS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "loha": LoHaConfig(r=4, target_modules="all-linear"),
    "lokr": LoKrConfig(r=4, target_modules="all-linear"),
    "ia3": IA3Config(target_modules="all-linear"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6),
}
CHIEF = ["lora", "prefix", "prompt"]


def cases(families: list[str]) -> list[tuple[str, str]]:
    """The chief parts on all these families, the others on Llama."""
    return [(f, p) for f in families for p in CHIEF] + [("llama", p) for p in PARTS if p not in CHIEF]


VIRTUAL = ("prefix", "projected", "prompt", "p-tuning")
EVERY_PART = pytest.mark.parametrize("part", list(PARTS))


def union(part: str | PeftConfig, *more: Any, **settings: Any) -> UnionConfig:
    first = copy.deepcopy(PARTS[part] if isinstance(part, str) else part)
    return UnionConfig(parts=[first, *(more or [PFEIFFER])], **settings)


def adapted(name: str, config: Any, **settings: Any) -> Any:
    model = interleaf.adapt(build(name))
    model.add_adapter("a", config, modules_to_save=[], **settings)
    randomise(model, std=0.2)
    return model


@pytest.mark.parametrize(("name", "part"), [*cases(list(TINY)), ("bert", "projected"), ("bert", "loha")])
def test_it_is_trained_saved_loaded_switched_and_deleted_as_one(name: str, part: str, tmp_path: Path) -> None:
    base = build(name)
    before, weights, modules = logits(base), base_weights(base), [n for n, _ in base.named_modules()]
    model: Any = interleaf.adapt(base)
    model.add_adapter("a", union(part))
    assert torch.equal(logits(model), before) == (part not in VIRTUAL)

    model.train_adapter("a")
    model.eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter_slot.adapters.a." in n or ".modules_to_save.a." in n for n in trained)
    randomise(model, std=0.2)
    out = model(**inputs(model)).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert [n for n in trained if model.get_parameter(n).grad is None] == []
    assert same(base_weights(model), weights)
    after = logits(model)
    assert after.shape == before.shape

    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_adapter(tmp_path / "a", "a")
    fresh = interleaf.adapt(build(name))
    fresh.load_adapter(tmp_path / "a", "other_name")
    assert torch.equal(logits(fresh), after)
    assert torch.equal(logits(PeftModel.from_pretrained(build(name), str(tmp_path / "a"))), after)
    model.delete_adapter("a")
    assert same(dict(model.state_dict()), weights)
    assert [n for n, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), before)


# ---- a part gives what PEFT's own gives


def ours_and_pefts(name: str, config: PeftConfig) -> tuple[Any, Any]:
    model = adapted(name, union(config, BottleneckConfig(positions=["ffn"], scaling=0.0)))
    theirs = get_peft_model(build(name), copy.deepcopy(config))
    return model, theirs.eval()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in ("bert", "gpt2", "llama", "t5") for part in ("lora", "dora")),
        ("bert", "loha"),
        ("t5", "lokr"),
    ],
)
def test_a_part_on_linear_maps_is_pefts_own(name: str, part: str) -> None:
    """PEFT's all-linear counts maps outside the layers too, so that they are named here."""
    maps = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}
    config = copy.deepcopy(PARTS[part])
    config.target_modules = maps.get(name, ["q", "wo"])  # type: ignore[attr-defined]
    config.fan_in_fan_out = name == "gpt2"  # type: ignore[attr-defined]
    model, theirs = ours_and_pefts(name, config)
    ours = {n.replace(".map.adapter_slot.adapters.a.", "."): p for n, p in model.named_parameters()}
    copied = 0
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[key.removeprefix("base_model.model.").replace(".default", ".part")])
                copied += 1
    assert copied >= 4
    torch.testing.assert_close(logits(model), logits(theirs))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ia3_scales_what_goes_in_and_what_comes_out_as_pefts_own(name: str) -> None:
    config = IA3Config(task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM")
    model, theirs = ours_and_pefts(name, config)
    ours = {n.replace(".map.adapter_slot.adapters.a.", "."): p for n, p in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "ia3" in key:
                parameter.copy_(ours[key.removeprefix("base_model.model.").replace(".default", ".part")])
    torch.testing.assert_close(logits(model), logits(theirs))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2"])
def test_a_prefix_is_pefts_own(name: str) -> None:
    """PEFT's own moves the text's positions by the prefix, ours does not: here they are moved back."""
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, theirs = ours_and_pefts(name, config)
    encoders = [p for n, p in model.named_parameters() if n.endswith(".encoder.embedding.weight")]
    assert len(encoders) == 2
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(torch.cat(encoders, dim=1))
    moved = torch.arange(7).expand(2, 7) - 3
    torch.testing.assert_close(logits(model), logits(theirs, position_ids=moved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "part"), [*((n, "prompt") for n in ("llama", "gpt2", "bert", "t5", "bart")), ("bert", "p-tuning")]
)
def test_a_prompt_is_pefts_own(name: str, part: str) -> None:
    config = copy.deepcopy(PARTS[part])
    config.task_type = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    config.num_transformer_submodules = 1  # type: ignore[attr-defined]
    model, theirs = ours_and_pefts(name, config)
    encoder = next(m.encoder for m in model.modules() if type(m).__name__ == "Prompt")
    theirs.prompt_encoder.default.load_state_dict(encoder.state_dict())
    found, expected = logits(model), logits(theirs)
    if name in ("llama", "gpt2"):  # ours line up with the text
        assert expected.shape[1] == 10
        expected = expected[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_with_a_prompt_is_that_of_the_logits() -> None:
    model = adapted("llama", union("prompt"))
    ids = inputs(model)["input_ids"]
    out = model(**inputs(model), labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


# ---- generation, batches, precision, compilation


@pytest.mark.parametrize(("name", "part"), cases(GENERATORS))
def test_cached_generation_equals_uncached(name: str, part: str) -> None:
    model = adapted(name, union(part))
    asked = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    asked["attention_mask"][0, :2] = 0  # left padding
    options: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached, base = (
        m.generate(**asked, **options, use_cache=c) for m, c in ((model, True), (model, False), (build(name), True))
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cached.logits[0], base.logits[0], atol=1e-3)


@pytest.mark.parametrize("part", VIRTUAL)
def test_padding_does_not_change_what_virtual_tokens_do(part: str) -> None:
    model = adapted("bert", union(part))
    ids = inputs(model)["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        short, long = model(ids).logits, model(padded, attention_mask=mask).logits
    torch.testing.assert_close(short, long)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_prefix_does_the_same_in_both_attentions(name: str, kind: str) -> None:
    model = adapted(name, union("prefix", gated=True))
    with_mask = logits(model)
    model.set_attn_implementation(kind)
    torch.testing.assert_close(logits(model), with_mask)
    given: Any = {"decoder_input_ids": inputs(model)["decoder_input_ids"]} if name == "t5" else {}
    with torch.no_grad():
        torch.testing.assert_close(model(inputs(model)["input_ids"], **given).logits, with_mask)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert", "lora"),
        ("llama", "lora"),
        ("t5", "lora"),
        ("mixtral", "lora"),
        ("llama", "ia3"),
        ("llama", "dora"),
        ("bert", "loha"),
    ],
)
def test_a_row_gets_in_a_batch_what_it_gets_alone(name: str, part: str) -> None:
    model = adapted(name, union(part))
    model.add_adapter("b", union("lora"), modules_to_save=[])
    randomise(model, std=0.2)
    mixed, alone = mixed_and_alone(model)
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    for setup in ("average(a, b)", "split(a, b, splits=[2, 9])", "parallel(a, b)"):
        model.set_adapter(setup)
        assert logits(model).isfinite().all(), setup


@pytest.mark.parametrize("part", ["prefix", "prompt"])
def test_virtual_tokens_stack_but_take_a_whole_batch(part: str) -> None:
    model = adapted("llama", union(part))
    one = logits(model)
    model.add_adapter("b", union("prefix"))
    randomise(model, std=0.2)
    model.set_adapter(["a", "b"])
    assert not torch.allclose(logits(model), one)
    for setup in ("parallel(a, b)", "split(a, b, splits=[2, 9])", "average(a, b)", "batch_split(a, b, batch_sizes=1)"):
        with pytest.raises(AdapterError, match="virtual tokens"):
            model.set_adapter(setup)
    model.set_adapter("a")
    with pytest.raises(AdapterError, match="virtual tokens"):
        logits(model, adapter_names=["a", "b"])
    torch.testing.assert_close(logits(model), one)


def test_beside_a_prompt_no_adapter_can_be_for_chosen_tokens() -> None:
    model = adapted("llama", union("prompt", BottleneckConfig(tokens="first:2")))
    with pytest.raises(AdapterError, match="virtual tokens run"):
        logits(model)
    model.delete_adapter("a")
    model.add_adapter("a", union("prefix", BottleneckConfig(tokens="first:2")))
    assert logits(model).isfinite().all()


@EVERY_PART
def test_it_moves_compiles_and_checkpoints(part: str) -> None:
    model = adapted("llama", union(part))
    after = logits(model)
    if part in CHIEF:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(copy.deepcopy(model)), after)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train_adapter("a")
    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key])
    model.gradient_checkpointing_disable()
    model.eval().to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@EVERY_PART
def test_on_a_half_precision_model(part: str) -> None:
    base = build("llama").to(torch.bfloat16)
    before = logits(base)
    model: Any = interleaf.adapt(base)
    model.add_adapter("a", union(part))
    assert torch.equal(logits(model), before) == (part not in VIRTUAL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("part", ["lora", "prefix", "prompt"])
def test_pefts_and_transformers_ways_of_attaching(part: str, tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), union(part)).eval()
    randomise(model)
    after = logits(model)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), str(tmp_path / "peft"))), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))
    other: Any = build("llama")
    other.add_adapter(union(part), "mine")
    randomise(other)
    other.save_pretrained(tmp_path / "transformers")
    again: Any = build("llama")
    again.load_adapter(str(tmp_path / "transformers"), adapter_name="mine")
    assert torch.equal(logits(again), logits(other))


@pytest.mark.parametrize("way", ["peft", "base.add_adapter", "adapt"])
def test_a_stopped_training_resumes_as_if_it_had_not_stopped(way: str, tmp_path: Path) -> None:
    def trained(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        base: Any = build("bert")
        config = UnionConfig(
            parts=[LoraConfig(r=2, lora_dropout=0.1), copy.deepcopy(PARTS["prefix"]), PFEIFFER], gated=True
        )
        set_seed(1)
        if way == "peft":
            model: Any = get_peft_model(base, config)
        elif way == "base.add_adapter":
            (model := base).add_adapter(config, "mine")
        else:
            (model := interleaf.adapt(base)).add_adapter("mine", config)
            model.train_adapter("mine")
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=Rows()).train(
            resume_from_checkpoint=get_last_checkpoint(args.output_dir) if resume else None
        )
        return {k: v.clone() for k, v in model.state_dict().items() if "adapter_slot" in k or "modules_to_save" in k}

    trained("stopped", 2)
    assert not list((tmp_path / "stopped").rglob("model.safetensors"))
    assert same(trained("stopped", 4, resume=True), trained("whole", 4))


# ---- gates


def test_a_gate_weighs_what_each_part_adds() -> None:
    model = adapted("llama", union("prefix", LoraConfig(r=4), PFEIFFER, gated=True))
    open_gates = logits(model)
    with model.observe() as seen:
        logits(model)
    places = {site for _, site in seen}
    for end in ("self_attn", "q_proj.map", "v_proj.map", "mlp.down_proj"):
        found = [seen["a", p]["gate"] for p in places if p.endswith(end)]
        assert [tuple(gate.shape) for gate in found] == [(2, 7, 1)] * 2, end
        assert all(bool(((gate > 0) & (gate < 1)).all()) for gate in found)
        assert all(float(gate.std()) > 0 for gate in found), "each token has its own"
    gates = {n: p for n, p in model.named_parameters() if ".gate." in n}
    assert len(gates) == 2 * 2 * 4

    def set_gates(bias: float) -> torch.Tensor:
        with torch.no_grad():
            for key, parameter in gates.items():
                parameter.fill_(bias if key.endswith("bias") else 0.0)
        return logits(model)

    torch.testing.assert_close(set_gates(-100.0), logits(build("llama")))
    wide_open = set_gates(100.0)
    assert not torch.allclose(wide_open, open_gates)
    plain = adapted("llama", union("prefix", LoraConfig(r=4), PFEIFFER))
    ours = {n.replace(".part.lora", ".lora").replace(".a.part.", ".a."): p for n, p in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            parameter.copy_(ours[key])
    torch.testing.assert_close(logits(plain), wide_open)


def test_gates_at_one_site_are_told_apart() -> None:
    model = adapted("bert", UnionConfig(parts=[PFEIFFER, "pfeiffer"], gated=True))
    with model.observe() as seen:
        logits(model)
    assert {tuple(sorted(found)) for found in seen.values()} == {("gate_1", "gate_2")}


def test_what_cannot_be_gated_is_refused() -> None:
    model = interleaf.adapt(build("llama"))
    with pytest.raises(ConfigError, match="adds nothing at a site"):
        model.add_adapter("a", union("prompt", gated=True))
    with pytest.raises(ConfigError, match="invertible part cannot be gated"):
        model.add_adapter("a", UnionConfig(parts=["nice", "pfeiffer"], gated=True))
    assert model.adapters == {}


# ---- files


def test_the_config_is_plain_json_in_a_stable_order(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "o_proj", "up_proj"]
    texts = []
    for i, order in enumerate((names, names[::-1])):
        model = interleaf.adapt(build("llama"))
        model.add_adapter("a", union(LoraConfig(target_modules=order), copy.deepcopy(PARTS["p-tuning"])))
        model.save_adapter(tmp_path / str(i), "a")
        texts.append((tmp_path / str(i) / "adapter_config.json").read_text("utf-8"))
    assert texts[0] == texts[1]
    parts = json.loads(texts[0])["parts"]
    assert [part["peft_type"] for part in parts] == ["LORA", "P_TUNING"]
    assert parts[0]["target_modules"] == sorted(names)
    assert parts[1]["encoder_reparameterization_type"] == "MLP"


def test_pefts_choice_of_maps_is_written_down() -> None:
    for name, expected in (("bert", ["query", "value"]), ("distilbert", "all-linear")):
        model = adapted(name, union("lora"))
        assert model.adapters["a"].parts[0].target_modules == expected
        assert not any("classifier.map" in n for n, _ in model.named_modules())


def test_the_heads_of_the_parts_are_the_unions() -> None:
    config = UnionConfig(parts=[LoraConfig(modules_to_save=["classifier"]), "pfeiffer"])
    assert config.modules_to_save == ["classifier"]
    assert config.parts[0].modules_to_save is None


# ---- refusals


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (LoraConfig(bias="all"), "bias='all' cannot be a part"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' cannot be a part"),
        (LoraConfig(layer_replication=[[0, 1], [0, 2]]), "layer_replication"),
        (LoraConfig(target_modules=["nothing"]), "LORA finds no place in LlamaForCausalLM"),
        (VeraConfig(), "shared state"),
        (AdaLoraConfig(total_step=10), "ADALORA cannot be a part"),
        (peft.LNTuningConfig(), "LN_TUNING"),
        (PrefixTuningConfig(), "needs num_virtual_tokens"),
        (PrefixTuningConfig(num_virtual_tokens=3, token_dim=5), "token_dim=5, but here it is 16"),
    ],
)
def test_what_cannot_be_a_part_is_refused_and_nothing_changes(part: PeftConfig, words: str) -> None:
    model = interleaf.adapt(build("llama"))
    before, state = logits(model), [n for n, _ in model.named_modules()]
    with pytest.raises((ConfigError, SiteError), match=words):
        model.add_adapter("a", UnionConfig(parts=[part, "pfeiffer"]))
    assert model.adapters == {}
    assert [n for n, _ in model.named_modules()] == state
    assert torch.equal(logits(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_are_checked() -> None:
    cpt = CPTConfig(task_type="CAUSAL_LM", tokenizer_name_or_path="x", cpt_token_ids=[1], cpt_mask=[1])
    with pytest.raises(ConfigError, match="CPT cannot be a part"):
        UnionConfig(parts=[cpt, "pfeiffer"])
    with pytest.raises(ConfigError, match="'NOTHING' is no adapter kind"):
        UnionConfig(parts=[{"peft_type": "NOTHING"}, "pfeiffer"])
    with pytest.raises(ConfigError, match="unknown setting 'rank' of a LORA part"):
        UnionConfig(parts=[{"peft_type": "LORA", "rank": 3}, "pfeiffer"])
    with pytest.raises(ConfigError, match="'7' is no adapter kind"):
        UnionConfig(parts=[7, "pfeiffer"])


def test_an_attention_that_cannot_take_a_prefix_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = interleaf.adapt(MambaForCausalLM(MambaConfig(**sizes)))
    with pytest.raises(SiteError, match="a prefix"):
        model.add_adapter("a", UnionConfig(parts=[PARTS["prefix"], BottleneckConfig(positions=["block"])]))
    other = adapted("llama", union("prefix"))
    asked = ALL_ATTENTION_FUNCTIONS.get_interface("flex_attention", None)
    with pytest.raises(SiteError, match="cannot run with the attention 'flex_attention'"):
        asked(other.model.layers[0].self_attn, *[torch.zeros(1, 4, 3, 8)] * 3, None)
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(SiteError, match="cannot run with the attention 'flex_attention'"):
        other.add_adapter("b", union("prefix"))


def test_a_multiplicative_part_keeps_what_ran_before_it() -> None:
    """OFT turns what goes into the map: the change that another adapter made to its output stays."""
    model = interleaf.adapt(build("llama"))
    model.add_adapter("lora", UnionConfig(parts=[LoraConfig(target_modules=["q_proj"]), "pfeiffer"]))
    randomise(model)
    before = logits(model)
    model.add_adapter("a", union(OFTConfig(target_modules=["q_proj"], oft_block_size=8)))
    model.set_adapter("stack(lora, a)")
    torch.testing.assert_close(logits(model), before)
    randomise(model, std=0.1)
    assert not torch.allclose(logits(model), before)
