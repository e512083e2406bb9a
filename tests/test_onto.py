"""Training from a stored adapter, onto stored adapters, and fusing them, with `interleaf train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from interleaf import bundled
from interleaf.compose import Fuse
from interleaf.errors import ConfigError, StoreError
from interleaf.evaluate import open_adapter
from interleaf.settings import TrainSettings
from interleaf.train import prepare

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def settings(reviews: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        base="bundled:minilm",
        train=str(reviews),
        out=str(tmp_path / "first"),
        name="first",
        adapter_options={"layers": "last:2"},
        limit=40,
        epochs=2,
        max_length=16,
        batch_size=8,
        learning_rate=1e-2,
        examples=0,
    )


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """News of several topics, 10 of each."""
    rows = pd.read_json(bundled.resolve("bundled:bbc"), lines=True)
    path = tmp_path / "topics.csv"
    rows.groupby("label").head(10).to_csv(path, index=False)
    return path


class Interrupted(TrainerCallback):
    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def trained(settings: TrainSettings, **changed: Any) -> Path:
    made = dataclasses.replace(settings, **changed)
    prepare(made).train()
    return Path(made.out)


def test_a_run_starts_from_a_stored_adapter_with_a_head_of_its_own(
    settings: TrainSettings, topics: Path, tmp_path: Path
) -> None:
    first = trained(settings)
    run = prepare(
        dataclasses.replace(
            settings, start=str(first), train=str(topics), out=str(tmp_path / "next"), adapter_options={}, name="next"
        )
    )
    stored = load_file(first / WEIGHTS)
    here = dict(run.model.state_dict())
    same = [k for k in stored if "adapter_slot" in k]
    assert same
    for key in same:
        name = key.removeprefix("base_model.model.").replace(".adapters.", ".adapters.next.")
        assert torch.equal(here[name], stored[key]), key
    run.train()
    assert len(open_adapter(tmp_path / "next").task.labels) > 2


def test_an_adapter_is_trained_onto_others_that_stay_as_they_are(
    settings: TrainSettings, topics: Path, tmp_path: Path
) -> None:
    first = trained(settings)
    before = load_file(first / WEIGHTS)
    run = prepare(
        dataclasses.replace(settings, onto=[str(first)], train=str(topics), out=str(tmp_path / "second"), name="second")
    )
    assert str(run.model.active_setup) == "stack(first, second)"
    told = run.train()
    for key, tensor in before.items():
        if "adapter_slot" in key:
            name = key.removeprefix("base_model.model.").replace(".adapters.", ".adapters.first.")
            assert torch.equal(run.model.state_dict()[name], tensor)
    opened = open_adapter(tmp_path / "second")
    assert str(opened.model.active_setup) == "stack(first, second)", "it needs what it was trained onto"
    assert opened.task.evaluate(opened.model, opened.tokenizer, run.splits.dev) == {
        k: v for k, v in told.metrics.items() if k != "base"
    }
    assert not any("first" in key for key in load_file(tmp_path / "second" / WEIGHTS))


def test_stored_adapters_are_fused(settings: TrainSettings, topics: Path, tmp_path: Path) -> None:
    first = trained(settings)
    second = trained(settings, train=str(topics), out=str(tmp_path / "second"), name="second")
    fused = dataclasses.replace(
        settings,
        onto=[str(first), str(second)],
        adapter="fusion",
        adapter_options={},
        out=str(tmp_path / "fused"),
        name="fused",
    )
    run = prepare(fused)
    told = run.train()
    opened = open_adapter(fused.out)
    assert opened.model.active_setup == Fuse("first", "second", name="fused")
    assert opened.task.evaluate(opened.model, opened.tokenizer, run.splits.dev) == {
        k: v for k, v in told.metrics.items() if k != "base"
    }


def test_such_a_run_resumes(settings: TrainSettings, tmp_path: Path) -> None:
    first = trained(settings)
    second = dataclasses.replace(settings, onto=[str(first)], out=str(tmp_path / "whole"), name="second", epochs=2)
    prepare(second).train()
    stopped = dataclasses.replace(second, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped).train(Interrupted())
    prepare(dataclasses.replace(stopped, resume=True)).train()
    whole, resumed = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "stopped" / WEIGHTS)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_contradictions_are_refused(settings: TrainSettings, tmp_path: Path) -> None:
    first = str(trained(settings))
    for changed, error, why in [
        ({"start": first}, ConfigError, "keeps its settings"),
        ({"onto": [first]}, ConfigError, "two adapters are called 'first'"),
        ({"onto": [first], "adapter": "fusion", "adapter_options": {}, "name": "f"}, ConfigError, "two stored"),
        ({"onto": [str(tmp_path / "nowhere")], "name": "f"}, StoreError, "nowhere"),
    ]:
        with pytest.raises(error, match=why):
            prepare(dataclasses.replace(settings, out=str(tmp_path / "no"), **changed))
    assert not (tmp_path / "no").exists()
