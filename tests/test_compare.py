"""An adapter beside full fine-tuning, LoRA and the head alone: what each gives, costs, and forgets."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from interleaf import report
from interleaf.compare import ARMS, ArmRun, CompareSettings, compare_settings, halves, run_arm
from interleaf.errors import ConfigError, DataError, TrainingError
from interleaf.settings import TrainSettings
from interleaf.train import make_task, prepare
from tests.test_bad_input import run
from tests.test_generation import save_base, translates, write


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tasks that can be told apart by a word, for MiniLM."""
    folder = tmp_path_factory.mktemp("texts")
    made = {}
    for name, (one, other) in {"new": ("awful", "lovely"), "old": ("rain", "money")}.items():
        rows = [{"text": f"it is {(one, other)[i % 2]}, {i}", "label": (one, other)[i % 2]} for i in range(48)]
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
        made[name] = str(folder / f"{name}.csv")
    return made


@pytest.fixture(scope="module")
def classifier(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    return TrainSettings(
        base="bundled:minilm",
        train=texts["new"],
        out=str(tmp_path_factory.mktemp("runs") / "out"),
        adapter_options={"reduction_factor": 24},
        max_length=12,
        epochs=2,
        batch_size=8,
        dev_fraction=0.25,
        learning_rate=5e-3,
        earlier=texts["old"],
    )


@pytest.fixture
def translator(tmp_path: Path) -> TrainSettings:
    other = [{"source": f"the colour {i}", "target": f"a cor {i}"} for i in range(12)]
    earlier = write(tmp_path / "other.jsonl", other)
    return translates(tmp_path, "t5", dev_fraction=0.25, learning_rate=1e-2, earlier=earlier)


# ---- one arm


@pytest.fixture(scope="module")
def ran(classifier: TrainSettings) -> dict[str, ArmRun]:
    return {arm: run_arm(classifier, CompareSettings(learning_rates={"full": 1e-3}), arm, seed=0) for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_its_own_weights_and_no_others(ran: dict[str, ArmRun], arm: str) -> None:
    found = ran[arm]
    head, whole = 2 * 384 + 2, 22_713_216 + 2 * 384 + 2
    known = {"head": head, "full": whole}
    assert found.trained_parameters == known.get(arm, found.trained_parameters)
    assert head < found.trained_parameters < whole / 20 or arm in known
    assert found.stored_bytes == pytest.approx(4 * found.trained_parameters, rel=0.2, abs=3_000)
    assert found.metrics["rows"] == 6, "half of the held-out rows"
    assert 0 < found.seconds_to_best <= found.seconds
    assert found.peak_memory_bytes > 10**8


def test_full_fine_tuning_takes_more_arithmetic_than_an_adapter_and_the_head_least(ran: dict[str, ArmRun]) -> None:
    assert 0 < ran["head"].flops_per_step < ran["adapter"].flops_per_step < ran["full"].flops_per_step


@pytest.mark.parametrize("arm", ARMS)
def test_what_was_forgotten_is_measured_and_an_adapter_switched_off_is_the_base(
    ran: dict[str, ArmRun], arm: str
) -> None:
    told = ran[arm].forgetting
    assert told is not None
    if arm in ("adapter", "lora"):
        assert told["off"] == told["before"]
    else:
        assert told["off"] is None
    if arm == "head":
        assert told["on"] == told["before"], "the trunk is as it was"
    assert told["lost"] == (told["before"] - told["on"]) / told["before"]


def test_rows_that_chose_the_epoch_are_not_measured(classifier: TrainSettings) -> None:
    task = make_task(classifier)
    splits = task.load(classifier.train, dev_fraction=0.25)
    chosen, held = halves(splits, seed=3)
    assert not set(chosen.dev["text"]) & set(held["text"])
    assert sorted([*chosen.dev["text"], *held["text"]]) == sorted(splits.dev["text"])
    with pytest.raises(DataError, match="two held-out rows at least"):
        halves(type(splits)(splits.train, splits.dev.select([0])), seed=0)


# ---- the command


def test_a_comparison_is_run_printed_stored_and_reported(
    translator: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**translator.as_dict(), "out": translator.out, "compare": {"seeds": [0], "arms": ["adapter", "head"]}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert run(monkeypatch, "compare", config, "--out", tmp_path / "compared", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert list(found["arms"]) == ["adapter"], "a translator has no head"
    adapter = found["arms"]["adapter"]
    assert adapter["scores"]["bleu"]["half_width"] is None, "one seed has no interval"
    assert adapter["forgetting"]["off_minus_before"] == 0
    assert adapter["forgetting"]["measure"] == "loss on other text"
    assert report.read([tmp_path / "compared"])[0].title.startswith("Comparison of adapter on ")
    assert not Path(translator.out).exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"arm": ["full"]}, "unknown setting 'arm'. Known: arms, learning_rates, lora, seeds"),
        ({"arms": ["prompt"]}, "there is no arm 'prompt'. There are: adapter, lora, full, head"),
        ({"seeds": []}, "name one arm and one seed at least"),
        ({"seeds": 3}, "compare: 'int' object is not iterable"),
        ({"learning_rates": {"full": "fast"}}, "could not convert string to float"),
    ],
)
def test_a_wrong_section_is_refused(translator: TrainSettings, section: dict[str, Any], said: str) -> None:
    settings = TrainSettings(**{**translator.as_dict(), "out": "out", "compare": section})
    with pytest.raises(ConfigError, match=said):
        compare_settings(settings)


def test_what_would_not_be_a_fair_comparison_is_refused(translator: TrainSettings) -> None:
    for unfair in ({"adapter_options": {"layers": "auto"}}, {"forget_budget": 0.1}):
        with pytest.raises(ConfigError, match="compare: "):
            compare_settings(replace(translator, **unfair))


# ---- a budget for forgetting


def test_training_stops_where_too_much_was_forgotten(translator: TrainSettings, tmp_path: Path) -> None:
    free = prepare(TrainSettings(**{**translator.as_dict(), "out": str(tmp_path / "free"), "epochs": 6})).train()
    told = free.metrics["forgetting"]
    assert told["off"] == told["before"]
    assert told["lost"] < 0, "these pairs teach the other ones too"
    harmless = {**translator.as_dict(), "out": str(tmp_path / "kept"), "epochs": 6, "forget_budget": 0.5}
    assert prepare(TrainSettings(**harmless)).train().metrics["loss"] == free.metrics["loss"]


def test_a_budget_that_was_passed_at_once_saves_nothing(classifier: TrainSettings) -> None:
    settings = TrainSettings(
        **{**classifier.as_dict(), "out": classifier.out, "forget_budget": 0, "learning_rate": 0.5, "weight_decay": 0.1}
    )
    with pytest.raises(TrainingError, match=r"was lost already when first measured .* Nothing was saved"):
        prepare(settings).train()
    assert not Path(settings.out).exists()
    assert not Path(settings.out + ".checkpoints").exists()


def test_a_budget_wants_something_to_measure() -> None:
    with pytest.raises(ConfigError, match="and `earlier` data to measure on"):
        TrainSettings(base="b", train="t", out="o", forget_budget=0.1)


# ---- by hand


def test_chat_streams_answers_and_switches_the_adapter(
    translator: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path, "llama")
    settings = TrainSettings(**{**translator.as_dict(), "base": base, "out": translator.out, "earlier": None})
    made = prepare(settings)
    made.train()
    text = "the number 3"
    (learnt,) = made.task.predict(made.model, made.tokenizer, [text])
    with made.model.disable_adapter():
        (plain,) = made.task.predict(made.model, made.tokenizer, [text])
    assert learnt["answer"] != plain["answer"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n/off\n{text}\n/on\n\n{text}\n"))
    assert run(monkeypatch, "chat", base, settings.out, "--max-new-tokens", 5) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in said] == [learnt["answer"], plain["answer"], learnt["answer"]]


def test_an_adapter_is_measured_switched_off_too(
    translator: TrainSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prepare(translator).train()
    words = ("evaluate", translator.out, translator.train, "--limit", 10, "--json")
    assert run(monkeypatch, *words, "--task-set", "num_beams=2") == 0
    on = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, *words, "--off") == 0
    off = json.loads(capsys.readouterr().out)
    assert on["rows"] == off["rows"] == 10
    assert on["loss"] < off["loss"]
    assert math.isclose(off["loss"], result.metrics["base"]["loss"], rel_tol=0.1)
    assert run(monkeypatch, *words, "--task-set", "beams=2") == 2
    assert "translation has no 'beams'" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--limit", 0) == 2


def test_a_classifier_switched_off_has_no_head_to_measure(
    classifier: TrainSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = TrainSettings(**{**classifier.as_dict(), "out": str(tmp_path / "out")})
    prepare(settings).train()
    assert run(monkeypatch, "evaluate", settings.out, settings.train, "--off") == 2
    assert "has no head for classification" in capsys.readouterr().err
