"""DPO, GRPO and a reward model through TRL, with the adapter switched off as the reference."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import interleaf
from interleaf import bundled
from interleaf.errors import ConfigError, DataError
from interleaf.evaluate import open_adapter
from interleaf.settings import TrainSettings
from interleaf.studies.align import AlignSettings, align, make_trainer, reward_of, rows_for
from interleaf.tasks.rows import read_rows
from tests.test_generation import save_base
from tests.test_trunk_cache import without_dropout
from tests.zoo import randomise

trl = pytest.importorskip("trl")


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    rows = [{"prompt": "a word", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return TrainSettings(
        base=save_base(tmp_path, "llama"),
        train=str(path),
        out=str(tmp_path / "out"),
        adapter_options={"bottleneck_dim": 4},
        epochs=1,
        batch_size=4,
        max_length=16,
        learning_rate=1e-2,
        dev_fraction=0.34,
    )


def test_dpo_with_the_adapter_off_gives_the_loss_of_two_models(settings: TrainSettings) -> None:
    how = AlignSettings("dpo", beta=0.3)
    train, dev = rows_for(settings, how)
    ours = make_trainer(settings, how, train, dev)
    assert ours.ref_model is None, "there is no second model"
    randomise(ours.model, std=0.3)
    batch = next(iter(ours.get_train_dataloader()))
    policy = copy.deepcopy(ours.model)
    plain = interleaf.adapt(copy.deepcopy(ours.model.get_base_model()))
    plain.delete_adapter("default")
    two = trl.DPOTrainer(
        model=policy.get_base_model(),
        ref_model=plain,
        args=dataclasses.replace(ours.args, output_dir=settings.out, eval_strategy="no"),
        train_dataset=train,
        processing_class=ours.processing_class,
    )
    with torch.no_grad():
        alone = ours.compute_loss(ours.model, dict(batch))
        both = two.compute_loss(two.model, dict(batch))
    torch.testing.assert_close(alone, both)
    assert abs(float(alone) - 0.6931) > 1e-3, "the adapter does something"


def test_a_preference_is_learnt_and_saved(settings: TrainSettings) -> None:
    done = align(dataclasses.replace(settings, epochs=8, name="mine"), AlignSettings("dpo"))
    losses = [one["eval_loss"] for one in done.history if "eval_loss" in one]
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    model = interleaf.adapt(AutoModelForCausalLM.from_pretrained(settings.base))
    model.load_adapter(done.path)
    assert model.active_adapters() == ["mine"]
    assert json.loads((done.path / "interleaf.json").read_text())["run"]["align"]["method"] == "dpo"
    opened = open_adapter(done.path)
    [said] = opened.predict(["a word"])
    with opened.model.disable_adapter():
        [before] = opened.predict(["a word"])
    assert said != before


def test_grpo_runs_with_a_reward_that_is_computed(settings: TrainSettings) -> None:
    how = AlignSettings("grpo", reward="matches", pattern=".*", answers=4, answer_tokens=4, steps=2)
    done = align(settings, how)
    rewards = [one["reward"] for one in done.history if "reward" in one]
    assert rewards == [1.0, 1.0]


def test_a_reward_model_prefers_what_is_preferred(reviews: Path, tmp_path: Path) -> None:
    base = tmp_path / "minilm"
    shutil.copytree(bundled.resolve("bundled:minilm"), base)
    without_dropout(base, hidden_dropout_prob=0.0)
    settings = TrainSettings(
        base=str(base),
        train=str(reviews),
        out=str(tmp_path / "rewards"),
        adapter_options={"layers": "last:2"},
        epochs=3,
        batch_size=8,
        max_length=32,
        learning_rate=1e-2,
        dev_fraction=0.25,
    )
    done = align(settings, AlignSettings("reward", prefer="positive"))
    assert done.history
    assert any(one.get("eval_accuracy", 0) >= 0.5 for one in done.history)
    assert any("score" in key or "classifier" in key for key in _tensors(done.path))


def test_labelled_texts_are_paired_and_a_space_goes_with_the_word_after_it(reviews: Path, settings: Any) -> None:
    how = AlignSettings("dpo", prefer="positive", prompt="A film review: ")
    train, dev = rows_for(dataclasses.replace(settings, train=str(reviews)), how)
    labels = {row["text"]: row["label"] for row in read_rows(str(reviews)).to_list()}
    assert dev is not None
    for row in [*train, *dev]:
        assert row["prompt"] == "A film review:"
        assert row["chosen"][0] == row["rejected"][0] == " "
        assert (labels[row["chosen"][1:]], labels[row["rejected"][1:]]) == ("positive", "negative")


def _tensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_rewards_are_what_they_say() -> None:
    prompts = ["def f(x):\n", "def f(x):\n"]
    answers = ["    return x + 1\n", "    return (\n"]
    assert reward_of(AlignSettings(reward="parses"))(prompts, answers) == [1.0, 0.0]
    wrong = ["    return x + 1\n", "    return x\n"]
    tests = {"test": ["def check(f):\n    assert f(1) == 2\n"] * 2, "entry_point": ["f", "f"]}
    assert reward_of(AlignSettings(reward="tests"))(prompts, wrong, **tests) == [1.0, 0.0]
    yes = reward_of(AlignSettings(reward="matches", pattern=r"\w+\."))
    assert yes(["", ""], [" Yes. ", "Yes, it is."]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("how", "error", "why"),
    [
        ({"method": "ppo"}, ConfigError, "dpo, grpo, reward"),
        ({"reward": "matches"}, ConfigError, "go together"),
        ({"answers": 1}, ConfigError, "2 or more"),
        ({"method": "dpo", "prefer": "good"}, DataError, "label"),
        ({"method": "grpo", "reward": "tests"}, DataError, "no column 'test'"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(
    settings: TrainSettings, how: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        align(settings, AlignSettings(**how))
    assert not Path(settings.out).exists()
