"""Several adapters trained at once: each is what it is alone, whatever the others do."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from interleaf.cli.cohort_cmd import varied
from interleaf.cohort import prepare_cohort, train_cohort
from interleaf.cohort.joined import Call, run_joined, that_fit
from interleaf.errors import ConfigError, TrainingError
from interleaf.settings import TrainSettings
from interleaf.train import prepare
from interleaf.trunk_cache import states
from tests.test_generation import pairs, write
from tests.test_trunk_cache import encoder, generator, minilm

__all__ = ["encoder", "minilm"]


def weights(path: Path | None) -> dict[str, torch.Tensor]:
    assert path is not None
    return load_file(path / "adapter_model.safetensors")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs' calls each joined call had in it."""
    counts: list[int] = []

    def counted(layer: Any, name: str, calls: list[Call]) -> list[Any]:
        counts.append(len(calls))
        return run_joined(layer, name, calls)

    monkeypatch.setattr("interleaf.cohort.run_joined", counted)
    return counts


def assert_same_as_alone(settings: list[TrainSettings]) -> None:
    together = train_cohort(prepare_cohort(settings))
    for one, result in zip(settings, together, strict=True):
        alone = prepare(replace(one, out=one.out + "-alone")).train()
        assert result.trunk_cache == alone.trunk_cache
        assert result.metrics.keys() == alone.metrics.keys()
        for name, tensor in weights(alone.path).items():
            torch.testing.assert_close(weights(result.path)[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


# ---- equal to the run alone


def test_members_of_an_encoders_cohort_are_what_they_are_alone(encoder: TrainSettings, joined: list[int]) -> None:
    encoder = replace(encoder, adapter_options={"layers": "last:2"})
    settings = [
        encoder,
        replace(encoder, out=encoder.out + "-rate", learning_rate=3e-3),
        replace(encoder, out=encoder.out + "-long", epochs=3, adapter="houlsby", adapter_options={"layers": "last:1"}),
        replace(encoder, out=encoder.out + "-seed", seed=1, batch_size=4, adapter="parallel"),
    ]
    assert_same_as_alone(settings)
    assert max(joined) >= 3


def test_members_of_a_decoders_cohort_are_what_they_are_alone(tmp_path: Path, joined: list[int]) -> None:
    first = generator(tmp_path, "llama", layers="last:1")
    wide = {"layers": "last:1", "bottleneck_dim": 8}
    other = {"learning_rate": 3e-3, "seed": 1, "dev": write(tmp_path / "dev.jsonl", pairs(6))}
    assert_same_as_alone(
        [
            first,
            replace(first, out=first.out + "-wide", adapter_options=wide),
            replace(first, out=first.out + "-other", **other),
        ]
    )
    assert 2 in joined


def test_members_of_an_encoder_decoders_cohort_are_what_they_are_alone(tmp_path: Path, joined: list[int]) -> None:
    first = generator(tmp_path, "t5")
    assert_same_as_alone([first, replace(first, out=first.out + "-rate", learning_rate=3e-3, adapter="houlsby")])
    assert 2 in joined


def test_tasks_with_heads_of_their_own_share_a_base(encoder: TrainSettings, tmp_path: Path, joined: list[int]) -> None:
    colours = ["red", "green", "blue"]
    rows = [f"it is {colours[i % 3]} number {i},{colours[i % 3]}" for i in range(60)]
    (tmp_path / "colours.csv").write_text("\n".join(["text,label", *rows]))
    other = replace(encoder, train=str(tmp_path / "colours.csv"), out=str(tmp_path / "colours"), adapter_options={})
    assert_same_as_alone([replace(encoder, adapter_options={}), other])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the limit is a CPU's")
def test_calls_are_joined_up_to_what_a_cpu_has_caches_for() -> None:
    def call(tokens: int) -> Call:
        return Call(0, 8, tokens, False, False, False, None, (), {}, ())

    assert that_fit([call(1000), call(1000), call(1000)]) == 2
    assert that_fit([call(5000), call(10)]) == 1
    assert that_fit([call(100)]) == 1


# ---- one trunk pass


def test_the_frozen_layers_run_once_for_all(
    encoder: TrainSettings, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    real = states._fill
    monkeypatch.setattr(states, "_fill", lambda *a: (filled.append(1), real(*a))[1])
    few = tmp_path / "few.csv"
    few.write_text("\n".join(reviews.read_text("utf-8").splitlines()[:61]), "utf-8")
    # other splits of the same rows
    settings = [replace(encoder, train=str(few), limit=None, out=f"{encoder.out}-{s}", seed=s) for s in (0, 1, 2)]
    train_cohort(prepare_cohort(settings))
    assert len(filled) <= 1


def test_models_hold_the_same_weights(encoder: TrainSettings) -> None:
    runs = prepare_cohort([encoder, replace(encoder, out=encoder.out + "-2", seed=1)])
    train_cohort(runs)
    layers = [run.model.get_submodule("bert.encoder.layer.5.output.dense") for run in runs]
    assert layers[0].weight.data_ptr() == layers[1].weight.data_ptr()
    assert "forward" not in vars(runs[0].model.get_submodule("bert.encoder.layer.5"))


# ---- each by itself


class Fails(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise TrainingError("it was told to fail")


def test_one_that_fails_leaves_the_others_as_they_are(encoder: TrainSettings) -> None:
    settings = [replace(encoder, out=f"{encoder.out}-{i}", seed=i) for i in range(3)]
    with pytest.raises(TrainingError, match=r"1 of 3 runs failed, the others were saved\..*-1: it was told to fail"):
        train_cohort(prepare_cohort(settings), lambda number: (Fails(),) if number == 1 else ())
    assert [Path(one.out).exists() for one in settings] == [True, False, True]
    assert not any(thread.name.startswith("cohort") for thread in threading.enumerate())


class Interrupts(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_an_interrupt_ends_all(encoder: TrainSettings) -> None:
    settings = [replace(encoder, out=f"{encoder.out}-{i}") for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        train_cohort(prepare_cohort(settings), lambda number: (Interrupts(),) if number == 1 else ())
    assert not any(thread.name.startswith("cohort") for thread in threading.enumerate())


def test_patience_stops_one_and_not_the_other(encoder: TrainSettings) -> None:
    bored = replace(encoder, out=encoder.out + "-bored", epochs=4, patience=1, learning_rate=1e-9)
    steady = replace(encoder, out=encoder.out + "-steady", epochs=4, learning_rate=1e-9)
    results = train_cohort(prepare_cohort([bored, steady]))
    assert [max(entry["epoch"] for entry in result.history) for result in results] == [2, 4]


# ---- bad input


def test_what_cannot_be_trained_together_is_refused_at_once(encoder: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs in it"):
        prepare_cohort([])
    with pytest.raises(ConfigError, match="two runs of a cohort have one `out`"):
        prepare_cohort([encoder, encoder])
    with pytest.raises(ConfigError, match="expected one base"):
        prepare_cohort([encoder, replace(encoder, base="other", out=str(tmp_path / "o"))])
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        prepare_cohort([replace(encoder, activation_checkpointing=True)])


def test_values_vary_settings_of_the_run_and_of_the_adapter(encoder: TrainSettings) -> None:
    made = varied(encoder, {"learning_rate": ["1e-3", 0.01], "bottleneck_dim": [4, 8]})
    assert [(one.learning_rate, one.adapter_options["bottleneck_dim"]) for one in made] == [
        (0.001, 4),
        (0.001, 8),
        (0.01, 4),
        (0.01, 8),
    ]
    assert len({one.out for one in made}) == 4
    assert varied(encoder, {}) == [encoder]
    with pytest.raises(ConfigError, match="expected a list, such as seed="):
        varied(encoder, {"seed": 3})
    with pytest.raises(ConfigError, match="epochs='many': expected float"):
        varied(encoder, {"epochs": ["many"]})
