"""Adapters made by AdapterHub's library give here the logits they gave there, and are written back as they were.

The fixtures are made by `tests/fixtures/make_adapterhub.py` with `adapters` 1.3 in a virtual environment of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import interleaf
from interleaf import adapterhub
from interleaf.errors import StoreError
from tests.fixtures.make_adapterhub import HERE, inputs, logits
from tests.zoo import base_weights, same

MODELS = ["bert", "roberta", "t5", "bart", "gpt2", "llama", "qwen3"]
KINDS = {
    *("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus", "gated", "normed", "per_layer"),
    *("compacter", "compacter++", "seq_bn_inv", "double_seq_bn_inv"),
}
# T5's Compacter is saved by AdapterHub without its rule
LOST = [("t5", "compacter"), ("t5", "compacter++")]
FOUND = [(p.parent.name, p.name) for p in sorted(HERE.glob("*/*")) if p.name in KINDS]
CASES = [case for case in FOUND if case not in LOST]


def base(name: str) -> Any:
    auto: Any = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(name, AutoModelForCausalLM)
    auto = AutoModelForSeq2SeqLM if name in ("t5", "bart") else auto
    return interleaf.adapt(auto.from_pretrained(HERE / name / "base").eval())


def expected(folder: Path) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")["logits"]


def gap(model: Any, folder: Path) -> float:
    return float((logits(model) - expected(folder)).abs().max())


def test_every_model_has_every_kind() -> None:
    # of Qwen3, AdapterHub itself refuses AdapterPlus
    assert len(FOUND) == len(MODELS) * len(KINDS) - 1


@pytest.mark.parametrize(("name", "kind"), LOST)
def test_what_adapterhub_itself_lost_is_refused(name: str, kind: str) -> None:
    with pytest.raises(StoreError, match=r"1 weights are missing, the first is shared_parameters.task.phm_rule"):
        base(name).load_adapter(HERE / name / kind)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_imported_adapter_gives_the_same_logits(name: str, kind: str) -> None:
    model = base(name)
    plain = logits(model)
    assert model.load_adapter(HERE / name / kind) == "task"
    assert gap(model, HERE / name / kind) < 1e-5
    assert not torch.allclose(plain, expected(HERE / name / kind), atol=1e-3)
    model.delete_adapter("task")
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_fusion_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model, folder = base(name), HERE / name / "fusion"
    for part in ("one", "two", "fused"):
        model.load_adapter(folder / part)
    assert model.active_adapters() == ["one,two"]
    assert gap(model, folder) < 1e-5
    adapterhub.save(model, tmp_path / "fused", "one,two")
    assert_same_files(folder / "fused", tmp_path / "fused", "model_adapter_fusion.safetensors")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_is_written_as_it_was_and_stored_as_our_own(name: str, kind: str, tmp_path: Path) -> None:
    model, folder = base(name), HERE / name / kind
    model.load_adapter(folder)
    adapterhub.save(model, tmp_path / "hub", "task")
    if (folder / "adapter.safetensors").exists():
        # where norms come first, AdapterPlus is written as the `seq_bn` that it is there
        equal = kind != "adapter_plus" or name in ("bert", "roberta", "bart")
        assert_same_files(folder, tmp_path / "hub", "adapter.safetensors", settings=equal)
    again = base(name)
    again.load_adapter(tmp_path / "hub")
    assert gap(again, folder) < 1e-5
    model.save_adapter(tmp_path / "own", "task")
    own = base(name)
    own.load_adapter(tmp_path / "own")
    assert gap(own, folder) < 1e-5


def assert_same_files(theirs: Path, ours: Path, weights: str, settings: bool = True) -> None:
    left, right = load_file(theirs / weights), load_file(ours / weights)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    if not settings:
        return
    config = "adapter_config.json" if (theirs / "adapter_config.json").exists() else "adapter_fusion_config.json"
    told, said = (json.loads((folder / config).read_text()) for folder in (theirs, ours))
    for key in ("init_weights", "phm_dim", "inv_adapter_reduction_factor", "learn_phm", "reduction_factor"):
        told["config"].pop(key, None), said["config"].pop(key, None)
    if "leave_out" in told["config"]:
        assert said["config"].pop("cross_adapter") in (told["config"].pop("cross_adapter"), False)
    assert {k: v for k, v in said.items() if k != "model_name"} == {k: v for k, v in told.items() if k != "model_name"}


def broken(tmp_path: Path, name: str = "bert", kind: str = "double_seq_bn") -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path / "broken"
    shutil.copytree(HERE / name / kind, folder)
    return folder, load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_a_missing_layer_or_weight_is_refused(name: str, tmp_path: Path) -> None:
    """AdapterHub loads both without an error."""
    model = base(name)
    weights = base_weights(model)
    for part, said in (("1.", "no weights for"), ("adapter_up.bias", "are missing")):
        folder, tensors = broken(tmp_path / part, name)
        kept = {k: t for k, t in tensors.items() if not (f"layers.{part}" in k or f"layer.{part}" in k or part in k)}
        save_file(kept, folder / "adapter.safetensors")
        with pytest.raises(StoreError, match=said):
            model.load_adapter(folder)
        assert same(dict(model.state_dict()), weights)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another architecture: llama, this model is bert"):
        base("bert").load_adapter(HERE / "llama" / "seq_bn")
    folder, tensors = broken(tmp_path)
    save_file({**tensors, "bert.surplus": torch.zeros(1)}, folder / "adapter.safetensors")
    with pytest.raises(StoreError, match=r"have no place in this model, the first is bert\.surplus"):
        base("bert").load_adapter(folder)
    (folder / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:99])
    with pytest.raises(StoreError, match="damaged"):
        base("bert").load_adapter(folder)
    told = json.loads((HERE / "bert" / "seq_bn" / "adapter_config.json").read_text())
    for change in ({"architecture": "prefix_tuning"}, {"residual_before_ln": "post_add"}, {"inv_adapter": "glow"}):
        folder = tmp_path / next(iter(change))
        shutil.copytree(HERE / "bert" / "seq_bn", folder)
        (folder / "adapter_config.json").write_text(json.dumps({**told, "config": {**told["config"], **change}}))
        with pytest.raises(StoreError, match=r"docs/adapterhub.md|no equal here|does not run"):
            base("bert").load_adapter(folder)


def test_legacy_names_and_other_prefixes_are_understood(tmp_path: Path) -> None:
    folder, tensors = broken(tmp_path)
    legacy = {k.replace("output.adapters.", "output.attention_text_task_adapters."): t for k, t in tensors.items()}
    for renamed in (legacy, {k.removeprefix("bert."): t for k, t in tensors.items()}):
        save_file(renamed, folder / "adapter.safetensors")
        model = base("bert")
        model.load_adapter(folder)
        assert gap(model, folder) < 1e-5


def test_the_models_own_head_stays() -> None:
    """AdapterHub lets a loaded adapter overwrite the language-model head."""
    model = base("bert")
    before = model.get_output_embeddings().weight.clone()
    model.load_adapter(HERE / "bert" / "seq_bn")
    assert torch.equal(model.get_output_embeddings().weight, before)


@pytest.mark.parametrize("name", MODELS)
def test_our_own_adapters_are_exported_where_there_is_an_equal(name: str, tmp_path: Path) -> None:
    model = base(name)
    model.add_adapter("ours", "houlsby", reduction_factor=4)
    adapterhub.save(model, tmp_path / "ours", "ours")
    again = base(name)
    again.load_adapter(tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model))
    for preset in ("textbook", "loreft", "glow"):
        model.add_adapter(preset, preset)
        with pytest.raises(StoreError, match="AdapterHub has no"):
            adapterhub.save(model, tmp_path / preset, preset)
        assert not (tmp_path / preset).exists()
    assert inputs(model)["input_ids"].shape == (2, 6)
