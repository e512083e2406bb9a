"""Adapters made by AdapterHub's library give here the logits they gave there, and are written back as they were.

The fixtures are made by `tests/fixtures/make_adapterhub.py` with `adapters` 1.3 in a virtual environment of its own.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import interleaf
from interleaf import adapterhub
from interleaf.errors import AdapterError, StoreError
from tests.fixtures import make_adapterhub as fixtures
from tests.fixtures.make_adapterhub import HERE, inputs, logits
from tests.zoo import base_weights, randomise, same

MODELS = ["bert", "roberta", "t5", "bart", "gpt2", "llama", "qwen3"]
KINDS = {
    *("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus", "gated", "normed", "per_layer"),
    *("everywhere", "compacter", "compacter++", "par_compacter", "seq_bn_inv", "double_seq_bn_inv"),
}
CASES = [(p.parent.name, p.name) for p in sorted(HERE.glob("*/*")) if p.name in KINDS]
FUSIONS = ["dynamic", "static"]
HEADS = [(p.parent.parent.name, p.name) for p in sorted(HERE.glob("*/heads/*")) if p.name != "tagging"]


@functools.cache
def _loaded(name: str) -> Any:
    auto: Any = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(name, AutoModelForCausalLM)
    auto = AutoModelForSeq2SeqLM if name in ("t5", "bart") else auto
    return auto.from_pretrained(HERE / name / "base").eval()


def base(name: str) -> Any:
    return interleaf.adapt(copy.deepcopy(_loaded(name)))


def classifier(name: str, auto: Any = AutoModelForSequenceClassification, labels: int = 3) -> Any:
    return interleaf.adapt(fixtures.classifier(name, auto, labels).eval())


def expected(folder: Path, name: str = "logits") -> torch.Tensor:
    return load_file(folder / "expected.safetensors")[name]


def gap(model: Any, folder: Path, name: str = "logits") -> float:
    return float((logits(model) - expected(folder, name)).abs().max())


def test_every_model_has_every_kind() -> None:
    # of Qwen3, AdapterHub itself refuses AdapterPlus
    assert len(CASES) == len(MODELS) * len(KINDS) - 1


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_adapter_comes_and_goes_as_it_was(name: str, kind: str, tmp_path: Path) -> None:
    model, folder = base(name), HERE / name / kind
    plain = logits(model)
    assert model.load_adapter(folder) == "task"
    assert gap(model, folder) < 1e-5
    assert not torch.allclose(plain, expected(folder), atol=1e-3)
    adapterhub.save(model, tmp_path / "hub", "task")
    model.save_adapter(tmp_path / "own", "task")
    model.delete_adapter("task")
    assert torch.equal(logits(model), plain)
    # where norms come first, AdapterPlus is written as the `seq_bn` that it is there
    equal = kind != "adapter_plus" or name in ("bert", "roberta", "bart")
    assert_same_files(folder, tmp_path / "hub", "adapter.safetensors", settings=equal)
    for again in (tmp_path / "hub", tmp_path / "own"):
        model.load_adapter(again)
        assert gap(model, folder) < 1e-5
        model.delete_adapter("task")


@pytest.mark.parametrize("name", MODELS)
def test_fusions_and_compositions_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model, folder = base(name), HERE / name / "fusion"
    for part in ("one", "two"):
        model.load_adapter(folder / part)
    for form in FUSIONS:
        model.load_adapter(folder / form)
        assert model.active_adapters() == ["one,two"]
        assert gap(model, folder, form) < 1e-5
        adapterhub.save(model, tmp_path / form, "one,two")
        assert_same_files(folder / form, tmp_path / form, "model_adapter_fusion.safetensors")
        model.delete_adapter("one,two")
    # of Qwen3, AdapterHub itself refuses Parallel
    setups = ["stack(one, two)", "batch_split(one, two, batch_sizes=[1, 1])", "parallel(one, two)"]
    for setup in setups[: 2 if name == "qwen3" else 3]:
        model.set_adapter(setup)
        assert gap(model, folder, setup.partition("(")[0]) < 1e-5


@pytest.mark.parametrize(("name", "form"), HEADS)
def test_a_head_comes_on_request(name: str, form: str, tmp_path: Path) -> None:
    model, folder = classifier(name), HERE / name / "heads" / form
    plain = logits(model)
    model.load_adapter(folder, "bare")
    assert not torch.allclose(logits(model), expected(folder), atol=1e-3)
    model.load_adapter(folder, with_head=True)
    assert gap(model, folder) < 1e-5
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    model.save_adapter(tmp_path / "own", "task")
    if form in ("static", "pooled") or name == "roberta":
        adapterhub.save(model, tmp_path / "hub", "task", with_head=True)
    else:  # the pooler plays a part of it
        with pytest.raises(StoreError, match=r"trains bert\.pooler, classifier beside the adapter"):
            adapterhub.save(model, tmp_path / "hub", "task", with_head=True)
    model.delete_adapter(["bare", "task"])
    assert torch.equal(logits(model), plain)
    for saved, options in ((tmp_path / "own", {}), (tmp_path / "hub", {"with_head": True})):
        if saved.exists():
            again = classifier(name)
            again.load_adapter(saved, **options)
            assert gap(again, folder) < 1e-5


def test_a_head_for_every_token() -> None:
    model, folder = classifier("bert", AutoModelForTokenClassification), HERE / "bert" / "heads" / "tagging"
    model.load_adapter(folder, with_head=True)
    assert gap(model, folder) < 1e-5


def retold(folder: Path, source: str, **changed: Any) -> Path:
    """Copy a folder with a head and change what is told of it."""
    shutil.copytree(HERE / "bert" / "heads" / source, folder)
    told = json.loads((folder / "head_config.json").read_text())
    (folder / "head_config.json").write_text(json.dumps({**told, "config": {**told["config"], **changed}}))
    return folder


def test_heads_of_the_same_form_for_other_tasks(tmp_path: Path) -> None:
    labels, model = retold(tmp_path / "labels", "pooled", head_type="multilabel_classification"), classifier("bert")
    model.load_adapter(labels, with_head=True)
    assert gap(model, labels) < 1e-5
    answers = retold(tmp_path / "answers", "tagging", head_type="question_answering", num_labels=2)
    head = {key: tensor[:2] for key, tensor in load_file(answers / "model_head.safetensors").items()}
    save_file(head, answers / "model_head.safetensors")
    model = classifier("bert", AutoModelForQuestionAnswering, labels=2)
    model.load_adapter(answers, with_head=True)
    with torch.no_grad():
        out = model(**inputs(model))
    both = torch.stack([out.start_logits, out.end_logits], dim=-1)
    torch.testing.assert_close(both, expected(answers)[..., :2])


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    heads = HERE / "bert" / "heads"
    other = retold(tmp_path / "other", "flexible", activation_function="relu")
    unknown = retold(tmp_path / "unknown", "flexible", head_type="dependency_parsing")
    classes = classifier("bert"), classifier("bert", AutoModelForTokenClassification)
    refused = [
        (base("bert"), heads / "static", "has no task head"),
        (classes[1], heads / "static", "is a BertForSequenceClassification's, this model is a BertForTokenClass"),
        (classes[0], heads / "tagging", "another function than the head of BertForSequenceClassification"),
        (classes[0], other, "another function"),
        (classes[0], unknown, "a dependency_parsing head has no equal"),
        (classes[1], heads / "flexible", "has 2 linear maps, the head of BertForTokenClassification 1"),
        (classifier("bert", labels=5), heads / "static", r"has shape \(3,\), the model wants \(5,\)"),
        (classes[0], HERE / "bert" / "seq_bn", "holds no prediction head"),
    ]
    for model, folder, said in refused:
        model.add_adapter("before", modules_to_save=[])
        before, weights, labels = logits(model), base_weights(model), model.config.id2label
        with pytest.raises(StoreError, match=said):
            model.load_adapter(folder, with_head=True)
        assert torch.equal(logits(model), before)
        assert model.active_adapters() == ["before"]
        assert same(base_weights(model), weights)
        assert model.config.id2label == labels
        model.delete_adapter("before")


def test_ours_come_with_their_head_unless_it_is_not_wanted(tmp_path: Path) -> None:
    """So an adapter can be put beside another task's, whose labels are others."""
    model: Any = classifier("bert")
    model.add_adapter("ours")
    model.save_adapter(tmp_path / "ours", "ours")
    other: Any = classifier("bert", labels=7)
    with pytest.raises(StoreError, match="has shape"):
        other.load_adapter(tmp_path / "ours")
    other.load_adapter(tmp_path / "ours", with_head=False)
    assert other.adapters["ours"].modules_to_save == []
    same_labels: Any = classifier("bert")
    same_labels.load_adapter(tmp_path / "ours", with_head=True)
    assert same_labels.adapters["ours"].modules_to_save == ["classifier"]


def test_it_is_frozen_unless_it_is_to_train_on(tmp_path: Path) -> None:
    model = classifier("bert")
    for trains in (False, True):
        torch.manual_seed(3)
        model.load_adapter(HERE / "bert" / "heads" / "static", with_head=True, is_trainable=trains)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
        trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == ({"bert", "classifier"} if trains else set())
        model.delete_adapter("task")


def assert_same_files(theirs: Path, ours: Path, weights: str, settings: bool = True) -> None:
    old = theirs / weights.replace("adapter.safetensors", "pytorch_adapter.bin")
    left = load_file(theirs / weights) if (theirs / weights).exists() else torch.load(old)
    right = load_file(ours / weights)
    if "compacter" in theirs.name and theirs.parent.name == "t5":  # made by a class that has a prefix
        left = {key.removeprefix("transformer."): tensor for key, tensor in left.items()}
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
    for key in ("model_name", "model_class") if "compacter" in theirs.name else ("model_name",):
        told.pop(key), said.pop(key)
    assert said == told


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


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "prefix_tuning"},
        {"architecture": "lora"},
        {"architecture": "union"},
        {"inv_adapter": "glow"},
        {"residual_before_ln": "post_add"},
        {"original_ln_after": False},
        {"is_parallel": True, "original_ln_after": False},
        {"ln_after": True, "adapter_residual_before_ln": True},
        {"ln_after": True, "scaling": 2.0},
        {"ln_after": True, "use_gating": True},
        {"phm_layer": True, "scaling": "learned"},
        {"phm_layer": True, "ln_before": True},
        {"phm_layer": True, "shared_phm_rule": False},
        {"non_linearity": "unheard"},
        {"of_tomorrow": True},
        {"output_adapter": False},
    ],
    ids=str,
)
def test_options_without_an_equal_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    model, folder = base("bert"), tmp_path / "changed"
    plain = logits(model)
    shutil.copytree(HERE / "bert" / "seq_bn", folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "config": {**told["config"], **changed}}))
    with pytest.raises(StoreError, match=r"docs/adapterhub.md|is not known here|nowhere in this model"):
        model.load_adapter(folder)
    assert torch.equal(logits(model), plain)
    assert not model.adapters


def test_fusions_without_an_equal_are_refused(tmp_path: Path) -> None:
    model, fusion = base("bert"), HERE / "bert" / "fusion"
    with pytest.raises(AdapterError, match="needs the adapter 'one'"):
        model.load_adapter(fusion / "dynamic")
    model.load_adapter(HERE / "bert" / "gated", "one")
    model.load_adapter(fusion / "two")
    with pytest.raises(StoreError, match="before gate and ln_after"):
        model.load_adapter(fusion / "dynamic")
    model.delete_adapter("one")
    model.load_adapter(HERE / "bert" / "double_seq_bn", "one")
    with pytest.raises(StoreError, match=r"connection \['serial', 'stream'\]"):
        model.load_adapter(fusion / "dynamic")
    model.delete_adapter("one")
    model.load_adapter(HERE / "bert" / "seq_bn_inv", "one")
    with pytest.raises(StoreError, match="without invertible ones"):
        model.load_adapter(fusion / "dynamic")
    model.delete_adapter("one")
    model.load_adapter(fusion / "one")
    for options, said in (({"query": "output"}, "query='output'"), ({"temperature": 2.0}, "temperature")):
        settings: dict[str, Any] = {"children": ["one", "two"], "query": "stream", **options}
        model.add_adapter("mixed", interleaf.FusionConfig(**settings))
        with pytest.raises(StoreError, match=said):
            adapterhub.save(model, tmp_path / "mixed", "mixed")
        model.delete_adapter("mixed")


def as_of_old(folder: Path, **more: Any) -> None:
    """Make the files what the first version of AdapterHub's library would have written."""
    told = json.loads((folder / "adapter_config.json").read_text())
    new = ("phm", "inv", "init_", "factorized", "shared", "learn", "hyper", "scaling", "use_gating", "is_parallel")
    newer = (*new, "dropout", "stochastic", "cross_adapter", "leave_out")
    kept = {key: value for key, value in told["config"].items() if not key.startswith(newer)}
    activation = {"gelu": "gelu_orig", "gelu_new": "gelu"}.get(kept["non_linearity"], kept["non_linearity"])
    old = {"non_linearity": activation, "new_attention_norm": False, "attention_type": "sent-lvl-dynamic"}
    told = {k: v for k, v in told.items() if k not in ("version", "model_class")}
    (folder / "adapter_config.json").write_text(
        json.dumps({**told, "config": {**kept, **old, **more}, "type": "text_task"})
    )


@pytest.mark.parametrize("activation", ["swish", "gelu", "gelu_new"])
def test_files_of_the_first_version_are_read(activation: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(HERE / "bert" / "double_seq_bn", folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    told["config"]["non_linearity"] = activation
    (folder / "adapter_config.json").write_text(json.dumps(told))
    now, model = base("bert"), base("bert")
    now.load_adapter(folder)
    # a task adapter of old tells of an inverse that it has not
    as_of_old(folder, invertible_adapter={"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2})
    model.load_adapter(folder)
    assert torch.equal(logits(model), logits(now))


def test_a_language_adapter_of_the_first_version_is_read(tmp_path: Path) -> None:
    folder, tensors = broken(tmp_path, kind="seq_bn_inv")
    as_of_old(folder, invertible_adapter={"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2})
    old = {"invertible_adapters.": "invertible_lang_adapters.", "output.adapters.": "output.layer_text_lang_adapters."}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert sum("_lang_adapters" in key for key in tensors) == len(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    model = base("bert")
    model.load_adapter(folder)
    assert gap(model, HERE / "bert" / "seq_bn_inv") < 1e-5


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
    for preset in ("textbook", "loreft", "glow") if name == "bert" else ():
        model.add_adapter(preset, preset)
        with pytest.raises(StoreError, match="AdapterHub has no"):
            adapterhub.save(model, tmp_path / preset, preset)
        assert not (tmp_path / preset).exists()
    assert inputs(model)["input_ids"].shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "modules"), [("bert", "word_embeddings"), ("llama", "embed_tokens"), ("t5", "embed_tokens")]
)
def test_an_adapter_has_embeddings_of_its_own(name: str, modules: str, tmp_path: Path) -> None:
    model = base(name)
    plain, weights = logits(model), base_weights(model)
    model.add_adapter("a", "pfeiffer", modules_to_save=[modules])
    assert torch.equal(logits(model), plain)
    model.train_adapter("a")
    model.eval()
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad and modules in n}
    model(**inputs(model)).logits.square().sum().backward()
    assert trains
    for parameter in trains.values():
        assert parameter.grad is not None
        parameter.data += torch.randn(parameter.shape)
    changed = logits(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    model.save_adapter(tmp_path / "a", "a")
    model.delete_adapter("a")
    assert same(base_weights(model), weights)
    model.load_adapter(tmp_path / "a")
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize("config", [LoraConfig(), LoraConfig(use_dora=True), IA3Config()], ids=["lora", "dora", "ia3"])
def test_other_methods_come_from_peft(config: Any, tmp_path: Path) -> None:
    model = base("llama")
    plain = logits(model)
    model.add_adapter("a", config)
    torch.testing.assert_close(logits(model), plain)
    randomise(model, std=0.1)
    changed = logits(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    model.save_adapter(tmp_path / "a", "a")
    again = base("llama")
    again.load_adapter(tmp_path / "a")
    torch.testing.assert_close(logits(again), changed)


def test_the_page_for_those_who_come_from_adapterhub_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (HERE.parent.parent.parent / "docs" / "adapterhub.md").read_text("utf-8")
    folders = {"base": "base", "their-adapter": "double_seq_bn", "their-classifier": "heads/static"}
    for name, source in folders.items():
        shutil.copytree(HERE / "bert" / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code) == 3
    exec("\n".join(code), {})
    assert (tmp_path / "for-adapterhub" / "adapter.safetensors").exists()
    assert (tmp_path / "classifier-for-adapterhub" / "model_head.safetensors").exists()


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_imported_adapters_share_the_model_with_others(name: str) -> None:
    """The others read nothing, or sit at the same place; what reads comes later and names a norm."""
    model, fusion = base(name), HERE / name / "fusion"
    model.add_adapter("own", "houlsby")
    own = logits(model)
    for part in ("one", "two", "dynamic"):
        model.load_adapter(fusion / part)
    assert gap(model, fusion, "dynamic") < 1e-5
    model.load_adapter(HERE / name / "double_seq_bn", "other")
    assert gap(model, HERE / name / "double_seq_bn") < 1e-5
    model.set_adapter("own")
    assert torch.equal(logits(model), own)


def test_two_that_read_different_places_are_refused_before_anything_is_changed() -> None:
    model = base("llama")
    model.load_adapter(HERE / "llama" / "everywhere")
    names, before = [n for n, _ in model.named_parameters()], logits(model)
    beside = ["self_attn.q_proj -> self_attn.q_proj", "mlp -> mlp.down_proj"]
    with pytest.raises(AdapterError, match="the new one reads"):
        model.add_adapter("b", interleaf.BottleneckConfig(connection="parallel", target_modules=beside))
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.equal(logits(model), before)
    assert list(model.adapters) == model.active_adapters() == ["task"]
