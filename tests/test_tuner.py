"""Adapters are a genuine PEFT method: every way of attaching that PEFT and transformers have works."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import interleaf
from interleaf import AdaptedModel, BottleneckConfig, tuner
from interleaf.errors import AdapterError, BaseModelError, StoreError
from tests.zoo import TINY, base_weights, build, logits, randomise, same

EVERY_TINY = pytest.mark.parametrize("name", list(TINY))


@EVERY_TINY
def test_get_peft_model_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    before, weights = logits(build(name)), base_weights(build(name))
    model = get_peft_model(build(name), BottleneckConfig())
    model.eval()
    assert torch.equal(logits(model), before)
    randomise(model)
    after = logits(model)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(again), after)
    bare = again.unload()
    assert same(dict(bare.state_dict()), weights)
    assert torch.equal(logits(bare), before)


def test_task_type_and_auto_classes_work(tmp_path: Path) -> None:
    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        BottleneckConfig(task_type="SEQ_CLS"),
    )
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_several_adapters_are_switched_and_deleted() -> None:
    model = get_peft_model(build("bert"), BottleneckConfig()).eval()
    randomise(model)
    one = logits(model)
    model.add_adapter("two", BottleneckConfig(positions=["ffn"]))
    model.set_adapter("two")
    two = logits(model)
    assert not torch.equal(one, two)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)


@EVERY_TINY
def test_transformers_own_add_adapter_brings_the_verbs(name: str, tmp_path: Path) -> None:
    model: Any = build(name)
    before = logits(model)
    model.add_adapter(BottleneckConfig(), "my_adapter")
    assert isinstance(model, AdaptedModel)
    assert torch.equal(logits(model), before)
    model.train_adapter("my_adapter")
    model.eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    fresh: Any = build(name)
    fresh.load_adapter(str(tmp_path), adapter_name="other_name")
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.active_adapters() == ["other_name"]


def test_a_saved_adapter_is_read_by_peft(tmp_path: Path) -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "houlsby")
    randomise(model)
    model.save_adapter(tmp_path / "a", "a")
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / "a")), logits(model))


def test_lora_lives_on_the_same_model(tmp_path: Path) -> None:
    model = interleaf.adapt(build("bert"))
    before = logits(model)
    model.add_adapter("b", "pfeiffer")
    randomise(model)
    bottleneck = logits(model)
    model.add_adapter("l", LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"]))
    randomise(model)
    lora = logits(model)
    model.save_adapter(tmp_path / "l", "l")
    model.set_adapter("b")
    assert torch.equal(logits(model), bottleneck)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    fresh = interleaf.adapt(build("bert"))
    fresh.load_adapter(tmp_path / "l")
    torch.testing.assert_close(logits(fresh), lora)


def test_merging_is_refused_clearly() -> None:
    model = get_peft_model(build("bert"), BottleneckConfig())
    for verb in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="cannot be merged"):
            verb()


def test_names_are_checked() -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a")
    with pytest.raises(AdapterError, match="an adapter 'a' already"):
        model.add_adapter("a")
    with pytest.raises(AdapterError, match=r"no adapter 'b' on this model. There are: a"):
        model.set_adapter("b")
    with pytest.raises(AdapterError, match="has a dot"):
        model.add_adapter("a.b")
    assert list(model.adapters) == ["a"]


def test_adapt_takes_hugging_face_models_only() -> None:
    with pytest.raises(BaseModelError, match="not a Linear"):
        interleaf.adapt(torch.nn.Linear(2, 2))
    with pytest.raises(BaseModelError, match="PeftModel"):
        interleaf.adapt(get_peft_model(build("bert"), BottleneckConfig()))


def test_the_summary_counts_what_is_there() -> None:
    base = build("bert")
    parameters = sum(p.numel() for p in base.parameters())
    model = interleaf.adapt(base)
    model.add_adapter("a", "pfeiffer", bottleneck_dim=4)
    summary = model.adapter_summary()[0]
    assert (summary.name, summary.kind, summary.sites, summary.active) == ("a", "bottleneck", 2, True)
    assert summary.adapter_parameters == 2 * (32 * 4 + 4 + 4 * 32 + 32)
    assert summary.head_parameters == 2 * 32 + 2
    assert summary.base_parameters == parameters
    assert summary.size_bytes == 4 * (summary.adapter_parameters + summary.head_parameters)


def test_the_internals_we_touch_are_the_ones_we_know() -> None:
    """Fails loudly when PEFT or transformers change under us: read tuner.py and adjust it."""
    from peft.tuners import tuners_utils
    from peft.utils import register_peft_method
    from transformers import Trainer

    assert Version("0.21.2") <= Version(peft.__version__) < Version("0.22")
    assert Version("5.23") <= Version(importlib.metadata.version("transformers")) < Version("6")
    assert PeftType["BOTTLENECK"] == "BOTTLENECK"
    assert PeftType("BOTTLENECK") in list(PeftType)
    assert callable(register_peft_method)
    for name in ("inject_adapter", "set_adapter", "_mark_only_adapters_as_trainable", "delete_adapter", "unload"):
        assert hasattr(tuners_utils.BaseTuner, name), name
    for name in ("set_adapter", "enable_adapters", "_move_adapter_to_device_of_base_layer"):
        assert hasattr(tuners_utils.BaseTunerLayer, name), name
    tuner.teach_trainer(AdaptedModel)
    for name in ("_load_from_checkpoint", "_load_best_model"):
        assert getattr(Trainer, name).__module__ == "interleaf.tuner", name


def _written_in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[0, 0] += 1


def _other_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() + 1, requires_grad=False)


@pytest.mark.parametrize("change", [_written_in_place, _other_parameter])
def test_a_base_that_was_changed_since_the_last_load_is_another_base(
    change: Callable[[nn.Linear], None], tmp_path: Path
) -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "pfeiffer")
    model.save_adapter(tmp_path / "a", "a")
    model.load_adapter(tmp_path / "a", "b")
    change(model.get_submodule("bert.encoder.layer.0.attention.self.query"))
    with pytest.raises(StoreError, match="made for another base: other pretrained weights"):
        model.load_adapter(tmp_path / "a", "c")
    model.bert.encoder.layer[1] = build("bert").bert.encoder.layer[0]
    with pytest.raises(StoreError, match="made for another base"):
        model.load_adapter(tmp_path / "a", "c")


def test_layers_that_come_later_are_found_and_switching_touches_only_what_changes() -> None:
    model = interleaf.adapt(build("bert"))
    for name in "abc":
        model.add_adapter(name, "pfeiffer")
    assert [p.requires_grad for p in model.parts("c")["classifier"].parameters()] == [True, True]
    model.set_adapter("a")
    trains = {n: {p.requires_grad for part in model.parts(n).values() for p in part.parameters()} for n in "abc"}
    assert trains == {"a": {True}, "b": {False}, "c": {False}}
    model.delete_adapter("b")
    model.add_adapter("b", "houlsby")
    assert len(model.parts("b")) == 2 * len(model.parts("a")) - 1
    model.set_adapter("b")
    assert model.active_adapters() == ["b"]
