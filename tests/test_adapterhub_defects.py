"""What went wrong in AdapterHub's library does not go wrong here: its eight groups of defects, clause by clause.

Clauses that another test covers are named here and not tested again.

1. Cached generation of a prepared model without adapters: below.
2. The average of equal adapters: `test_the_average_of_equal_adapters_is_one_of_them` in `test_compose.py`.
3. Every layer uses its own norm: below.
4. A missing layer, an adapter for another architecture: `test_a_missing_layer_or_weight_is_refused`,
   `test_what_does_not_fit_is_refused` in `test_adapterhub.py`. Loading under another name; Compacter saved from a bare
   model: below.
5. Half precision: `test_a_fresh_adapter_on_a_half_precision_model_is_the_identity` in `test_kinds.py`; imported
   adapters, LoRA and prefix tuning: below. The device of new parameters: below.
6. GLOW: `test_kinds.py` over all presets; in a union with a bottleneck: below. LoReFT with a cache:
   `test_cached_generation_equals_uncached` in `test_kinds.py`, `test_generation_with_chosen_tokens` in
   `test_compose.py`. Loading draws no random numbers: `test_loading_draws_no_random_numbers` in `test_properties.py`;
   from AdapterHub's files: below. Whole numbers as scaling, a parallel Compacter, a fusion's temperature: below.
7. Taken off again, copied and pickled: `test_deleted_it_was_never_there` and
   `test_copies_and_pickles_are_the_same_model` in `test_properties.py`; once all are gone: below. No adapters, no
   cost: below.
8. Gradient checkpointing: `test_gradient_checkpointing_gives_the_same_gradients` in `test_properties.py`,
   `test_gradient_checkpointing_and_compilation` in `test_compose.py`. Resume: `test_resume.py`. In `test_compose.py`
   too: rows of the base in a batch (`test_every_row_has_its_own_adapter`), `parallel(fuse(...))`
   (`test_parallel_puts_outputs_side_by_side`), a head in Hugging Face's own class
   (`test_each_adapter_brings_its_own_head`). Weights that were gathered elsewhere (ZeRO-3), copies on other devices:
   below.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

import interleaf
from interleaf import BottleneckConfig, CompacterConfig, FusionConfig, UnionConfig, adapterhub
from interleaf.adapter import Registry
from interleaf.errors import AdapterError, ConfigError
from interleaf.slot import slots
from tests.fixtures.make_adapterhub import HERE
from tests.zoo import COMMON, base_weights, build, inputs, logits, randomise, same


def with_adapter(name: str, config: Any = "houlsby", **options: Any) -> Any:
    """A model of the zoo with the adapter `a`, as if trained."""
    model: Any = interleaf.adapt(build(name))
    model.add_adapter("a", config, **options)
    randomise(model, std=0.1)
    return model.eval()


# ---- 1. cached generation


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_without_an_adapter_generation_is_the_bases_with_and_without_a_cache(name: str) -> None:
    torch.manual_seed(0)
    mistral = MistralConfig(num_key_value_heads=2, sliding_window=None, **COMMON)
    base: Any = build("llama") if name == "llama" else MistralForCausalLM(mistral).eval()
    asked, options = inputs(base), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    plain = base.generate(**asked, **options)
    model = interleaf.adapt(base)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**asked, **options, use_cache=use_cache), plain)
    model.add_adapter("a")
    model.delete_adapter("a")
    assert torch.equal(model.generate(**asked, **options), plain)


# ---- 3. each layer's own norm


class Reference(nn.Module):
    """A linear map followed by a plain adapter, in the place of the map."""

    def __init__(self, linear: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.linear, self.adapter = linear, copy.deepcopy(adapter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.adapter.up(self.adapter.activation(self.adapter.down(y)))


def test_each_layer_of_gemma2_uses_its_own_norm() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(num_key_value_heads=2, head_dim=8, **{**COMMON, "num_hidden_layers": 3})
    base = Gemma2ForCausalLM(config).eval()
    for name, parameter in base.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.5)
    reference = copy.deepcopy(base)
    model: Any = interleaf.adapt(base)
    model.add_adapter("a", "houlsby", reduction_factor=4)
    randomise(model)
    for slot in slots(model):
        parent, _, child = slot.site.write.rpartition(".")
        linear = reference.get_submodule(slot.site.write)
        setattr(reference.get_submodule(parent), child, Reference(linear, slot.adapters["a"]))
    assert len(slots(model)) == 6
    torch.testing.assert_close(logits(model), logits(reference))


def test_an_imported_adapter_uses_the_norm_of_its_layer() -> None:
    model: Any = interleaf.adapt(AutoModel.from_pretrained(HERE / "bert" / "base"))
    model.load_adapter(HERE / "bert" / "seq_bn")
    norms = [slot.adapters["task"].__dict__["norm"] for slot in slots(model)]
    assert norms == [layer.output.LayerNorm for layer in model.encoder.layer]


# ---- 4. nothing stays random


@pytest.mark.parametrize("preset", sorted(Registry.presets()))
def test_under_another_name_it_is_the_same_adapter(preset: str, tmp_path: Path) -> None:
    model = with_adapter("bert", preset)
    expected = logits(model)
    model.save_adapter(tmp_path / "a", "a")
    again: Any = interleaf.adapt(build("bert"))
    again.load_adapter(tmp_path / "a", "other")
    assert list(again.adapters) == ["other"]
    assert torch.equal(logits(again), expected)


def test_prompt_tuning_under_another_name_is_the_same(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, adapter_name="other")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_a_compacter_saved_from_a_bare_model_has_its_rule(tmp_path: Path) -> None:
    path = HERE / "bert" / "base"
    bare: Any = interleaf.adapt(AutoModel.from_pretrained(path, add_pooling_layer=False).eval())
    bare.add_adapter("a", "compacter", phm_dim=2)
    randomise(bare)
    bare.save_adapter(tmp_path / "own", "a")
    adapterhub.save(bare, tmp_path / "hub", "a")
    assert any("phm_rule" in key for key in load_file(tmp_path / "hub" / "adapter.safetensors"))
    again: Any = interleaf.adapt(AutoModel.from_pretrained(path, add_pooling_layer=False).eval())
    again.load_adapter(tmp_path / "own")
    headed: Any = interleaf.adapt(AutoModelForSequenceClassification.from_pretrained(path).eval())
    headed.load_adapter(tmp_path / "hub")
    tokens = {k: v % 40 for k, v in inputs(bare).items()}
    with torch.no_grad():
        expected = bare(**tokens)[0]
        assert torch.equal(again(**tokens)[0], expected)
        assert torch.equal(headed.bert(**tokens)[0], expected)


# ---- 5. half precision and devices


@pytest.mark.parametrize("method", ["bottleneck", "imported", "lora", "prefix"])
def test_it_runs_in_half_precision(method: str) -> None:
    base: Any = build("llama")
    if method == "imported":
        base = AutoModelForSequenceClassification.from_pretrained(HERE / "llama" / "base", pad_token_id=0)
    model: Any = interleaf.adapt(base.to(torch.bfloat16).eval())
    if method == "imported":
        model.load_adapter(HERE / "llama" / "par_bn")
    elif method == "prefix":
        model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    else:
        model.add_adapter("a", LoraConfig() if method == "lora" else "houlsby")
    tokens = {k: v % 40 for k, v in inputs(base).items()}
    out = logits(model, **tokens)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_what_is_new_is_made_where_the_model_is() -> None:
    model: Any = interleaf.adapt(build("bert")).to("meta", torch.float64)
    model.add_adapter("a")
    model.add_adapter("b", "compacter")
    model.add_adapter("fused", FusionConfig(children=["a", "b"]))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


# ---- 6. single options


def test_a_whole_number_is_a_scaling() -> None:
    whole, real = (with_adapter("bert", "parallel", scaling=scaling) for scaling in (4, 4.0))
    assert torch.equal(logits(whole), logits(real))
    assert not torch.equal(logits(whole), logits(with_adapter("bert", "parallel", scaling=1.0)))


def test_a_bottleneck_has_a_glow_beside_it(tmp_path: Path) -> None:
    model = with_adapter("llama", UnionConfig(parts=["pfeiffer", "glow"]))
    changed = logits(model)
    model.save_adapter(tmp_path / "a", "a")
    model.delete_adapter("a")
    assert not torch.allclose(logits(model), changed)
    model.load_adapter(tmp_path / "a")
    assert torch.equal(logits(model), changed)


def test_a_parallel_compacter_adds_what_it_makes_of_the_layers_input() -> None:
    config = CompacterConfig(positions=["ffn"], connection="parallel", phm_dim=2, scaling=3, activation="silu")
    model = with_adapter("bert", config)
    slot = slots(model)[0]
    adapter: Any = slot.adapters["a"]
    x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    maps = []
    for side in (adapter.down, adapter.up):
        products = [torch.kron(a, b) for a, b in zip(adapter.rule, side.left @ side.right, strict=True)]
        maps.append(torch.stack(products).sum(0))
    hidden = nn.functional.silu(x @ maps[0] + adapter.down.bias)
    torch.testing.assert_close(adapter(x, y), y + 3 * (hidden @ maps[1] + adapter.up.bias))
    with pytest.raises(ConfigError, match="expected serial, parallel or stream"):
        CompacterConfig(connection="skip")


def test_a_fusions_temperature_stays_and_is_saved(tmp_path: Path) -> None:
    model: Any = interleaf.adapt(build("bert"))
    for name, std in (("a", 1), ("b", 0.5)):
        model.add_adapter(name)
        randomise(model, std)
    model.add_adapter("a,b", FusionConfig(children=["a", "b"], temperature=20.0))
    randomise(model, std=1)
    first = logits(model.eval())
    for _ in range(3):
        assert torch.equal(logits(model), first)
    for name in ("a", "b", "a,b"):
        model.save_adapter(tmp_path / name, name)
    again: Any = interleaf.adapt(build("bert"))
    for name in ("a", "b", "a,b"):
        again.load_adapter(tmp_path / name)
    assert torch.equal(logits(again), first)
    for slot in slots(again):
        slot.adapters["a,b"].temperature = 1.0
    assert not torch.allclose(logits(again), first)


def test_a_seed_in_a_file_does_not_touch_the_global_generator(tmp_path: Path) -> None:
    folder = tmp_path / "seeded"
    shutil.copytree(HERE / "bert" / "seq_bn", folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    told["config"]["init_weights_seed"] = 42
    (folder / "adapter_config.json").write_text(json.dumps(told))
    model: Any = interleaf.adapt(AutoModel.from_pretrained(HERE / "bert" / "base"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model.load_adapter(folder)
    assert torch.equal(torch.rand(3), expected)


# ---- 7. nothing is left behind, nothing is paid for


def test_no_adapters_no_hooks() -> None:
    base = build("llama")
    before = [(name, type(module)) for name, module in base.named_modules() if name]
    model = interleaf.adapt(base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules() if name] == before
    assert type(model).forward is type(build("llama")).forward


def test_once_they_are_gone_it_is_copied_and_pickled_as_before() -> None:
    model: Any = with_adapter("bert")
    model.delete_adapter("a")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(build("bert")))
        assert same(dict(twin.state_dict()), base_weights(build("bert")))


# ---- 8. training


@pytest.mark.parametrize("way", ["adapt", "peft"])
def test_weights_gathered_elsewhere_are_those_that_are_saved(way: str, tmp_path: Path) -> None:
    """ZeRO-3 hands the Trainer a state dict it gathered; what the model itself holds is empty then."""
    model: Any = with_adapter("bert") if way == "adapt" else get_peft_model(build("bert"), BottleneckConfig())
    name = "a" if way == "adapt" else "default"
    gathered = {key: torch.full_like(tensor, 3) for key, tensor in model.state_dict().items()}
    own = {_plain(key.replace(f".{name}.", ".")) for key in gathered if f".{name}." in key}
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments)._save(str(tmp_path / "saved"), state_dict=gathered)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {_plain(key) for key in saved} == own
    assert all((tensor == 3).all() for tensor in saved.values())


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".modules_to_save", "")


def test_a_copy_runs_with_its_own_weights_and_its_own_setup() -> None:
    """As copies for several devices do."""
    model = with_adapter("bert", modules_to_save=[])
    model.add_adapter("b", "pfeiffer")
    randomise(model)
    model.set_adapter("a")
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    with torch.no_grad():
        for slot in slots(twin):
            for parameter in slot.parameters():
                parameter.zero_()
    assert torch.equal(logits(twin), logits(build("bert")))
    twin.set_adapter("b")
    twin(**inputs(twin), adapter_names=["b", ""])
    twin.disable_adapters()
    assert model.active_adapters() == ["a"]
    assert torch.equal(logits(model), expected)


def test_copies_without_hooks_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel's replicas share the hooks of the model they are made from: they never run with its weights."""
    from torch.nn.parallel import replicate as module

    def spread(tensors: list[Tensor], devices: list[Any], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    replicate: Any = module if callable(module) else module.replicate
    for name, substitute in (("_broadcast_coalesced_reshape", spread), ("_get_device_index", lambda d, _: d)):
        monkeypatch.setitem(replicate.__globals__, name, substitute)
    plain = build("bert")
    expected = logits(plain)
    assert all(torch.equal(logits(copied), expected) for copied in replicate(plain, [0, 1]))
    for copied in replicate(with_adapter("bert"), [0, 1]):
        with pytest.raises(AdapterError, match="torchrun"):
            logits(copied)
