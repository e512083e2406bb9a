"""Several tasks at once: a shared adapter below, one of each task's own above it, each with its head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from interleaf import bundled
from interleaf.errors import ConfigError
from interleaf.evaluate import open_adapter
from interleaf.settings import TrainSettings
from interleaf.studies import multitask
from interleaf.studies.multitask import Mixture, Part, prepare_multitask, train_multitask


@pytest.fixture
def settings(reviews: Path, tmp_path: Path) -> list[TrainSettings]:
    rows = pd.read_json(bundled.resolve("bundled:bbc"), lines=True)
    topics = tmp_path / "topics.csv"
    rows.groupby("label").head(10).to_csv(topics, index=False)
    first = TrainSettings(
        base="bundled:minilm",
        train=str(reviews),
        out=str(tmp_path / "movies"),
        adapter_options={"layers": "last:1"},
        epochs=2,
        max_length=12,
        batch_size=8,
        learning_rate=1e-2,
        examples=0,
    )
    return [first, dataclasses.replace(first, train=str(topics), out=str(tmp_path / "topics"), dev_fraction=0.2)]


def test_each_task_has_its_own_labels_above_what_is_shared(settings: list[TrainSettings], tmp_path: Path) -> None:
    parts = prepare_multitask(settings, str(tmp_path / "shared"))
    found = train_multitask(parts, str(tmp_path / "shared"))
    shared = load_file(tmp_path / "shared" / "adapter_model.safetensors")
    assert shared
    assert not any("classifier" in key for key in shared)
    for part, labels in zip(parts, (2, 5), strict=True):
        opened = open_adapter(part.settings.out)
        assert str(opened.model.active_setup) == f"stack(shared, {part.name})"
        assert len(opened.task.labels) == labels
        again = opened.task.evaluate(opened.model, opened.tokenizer, part.splits.dev)
        assert again == found[part.name]


def test_a_moved_pair_of_folders_is_found(settings: list[TrainSettings], tmp_path: Path) -> None:
    parts = prepare_multitask(settings, str(tmp_path / "shared"))
    train_multitask(parts, str(tmp_path / "shared"))
    (tmp_path / "elsewhere").mkdir()
    for name in ("shared", "movies"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    opened = open_adapter(tmp_path / "elsewhere" / "movies")
    assert str(opened.model.active_setup) == "stack(shared, movies)"


def test_a_batch_trains_what_is_shared_and_its_own_task_only(
    settings: list[TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture in which one task never comes leaves that task's adapter and head as they began."""
    monkeypatch.setattr(Mixture, "shares", lambda self: {"movies": 1.0})
    kept: dict[str, dict[str, torch.Tensor]] = {}

    def remembering(*args: Any) -> Any:
        made = original(*args)
        kept.update({name: _copy(made, name) for name in ("shared", "movies", "topics")})
        kept["model"] = made
        return made

    original = multitask._model
    monkeypatch.setattr(multitask, "_model", remembering)
    train_multitask(prepare_multitask(settings, str(tmp_path / "shared")), str(tmp_path / "shared"))
    moved = {
        name: any(not torch.equal(v, kept[name][k]) for k, v in _copy(kept["model"], name).items())
        for name in ("shared", "movies", "topics")
    }
    assert moved == {"shared": True, "movies": True, "topics": False}


def _copy(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in multitask._live(model, name).items()}


def _part(name: str, rows: int, settings: TrainSettings, **more: Any) -> Part:
    made: Any = Part(dataclasses.replace(settings, name=name, batch_size=4, **more), _Task(), None, None)  # type: ignore[arg-type]
    made.rows = [{"row": i} for i in range(rows)]
    return made


class _Task:
    best_metric = "f1_macro"


@pytest.mark.parametrize(("temperature", "share"), [(1, 0.9), (2, 0.75), (1000, 0.5)])
def test_tasks_are_drawn_by_temperature(settings: list[TrainSettings], temperature: float, share: float) -> None:
    mixture = Mixture([_part("large", 900, settings[0]), _part("small", 100, settings[0])], temperature, 0)
    drawn = [mixture[i][0]["task"] for i in range(2000)]
    assert drawn.count("large") / 2000 == pytest.approx(share, abs=0.03)
    assert all(len({row["task"] for row in mixture[i]}) == 1 for i in range(20))


def test_a_task_goes_through_all_its_rows(settings: list[TrainSettings]) -> None:
    mixture = Mixture([_part("only", 12, settings[0])], 2, 0)
    assert sorted(row["row"] for i in range(3) for row in mixture[i]) == list(range(12))


def test_a_task_that_gets_no_better_leaves_the_mixture(settings: list[TrainSettings]) -> None:
    done, other = _part("done", 10, settings[0], patience=2), _part("other", 10, settings[0], patience=2)
    done.scores, other.scores = [0.5, 0.7, 0.7, 0.6], [0.5, 0.7, 0.6]
    assert done.stale()
    assert not other.stale()
    done.running = False
    assert {Mixture([done, other], 2, 0)[i][0]["task"] for i in range(20)} == {"other"}


def test_what_cannot_be_trained_together_is_refused(settings: list[TrainSettings], tmp_path: Path) -> None:
    first, second = settings
    for given, why in [
        ([first], "two configs or more"),
        ([first, dataclasses.replace(second, base="elsewhere")], "on elsewhere"),
        ([first, dataclasses.replace(second, name="movies")], "one name"),
        ([first, dataclasses.replace(second, out=first.out, name="b")], "one folder"),
        ([first, dataclasses.replace(second, name="shared")], "one name"),
    ]:
        with pytest.raises(ConfigError, match=why):
            prepare_multitask(given, str(tmp_path / "shared"))
