"""A budget of bottleneck units is shared out over the places while an adapter trains; what is left is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import interleaf
from interleaf.adapters import BottleneckConfig
from interleaf.errors import ConfigError
from interleaf.evaluate import open_adapter
from interleaf.settings import TrainSettings
from interleaf.slot import slots
from interleaf.train import prepare
from interleaf.widths import Pruning, allowed, most_important, narrow
from tests.zoo import TINY, build, logits, randomise


@pytest.fixture
def settings(reviews: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        base="bundled:minilm",
        train=str(reviews),
        out=str(tmp_path / "pruned"),
        adapter="houlsby",
        adapter_options={"layers": "last:2", "bottleneck_dim": 12},
        unit_budget=9,
        limit=60,
        epochs=4,
        max_length=16,
        batch_size=8,
        examples=0,
    )


def test_a_trained_adapter_has_the_widths_that_were_left(settings: TrainSettings) -> None:
    run = prepare(settings)
    result = run.train()
    tensors = load_file(Path(settings.out) / "adapter_model.safetensors")
    widths = [len(tensor) for name, tensor in tensors.items() if name.endswith("down.weight")]
    assert sum(widths) == 9
    assert all(w >= 1 for w in widths)
    assert len(widths) == 4
    evaluator = open_adapter(settings.out)
    loaded = [slot.adapters["adapter"].down.out_features for slot in slots(evaluator.model)]
    assert sorted(loaded) == sorted(widths)
    again = run.task.evaluate(evaluator.model, run.tokenizer, run.splits.dev)
    assert again["loss"] == result.metrics["loss"] if "loss" in again else again == result.metrics


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("form", [{}, {"down_dim": 6}, {"connection": "parallel"}, {"scaling": "channel"}])
def test_an_adapter_computes_the_same_without_its_idle_units(name: str, form: dict[str, Any], tmp_path: Path) -> None:
    model: Any = interleaf.adapt(build(name))
    model.add_adapter("a", BottleneckConfig(bottleneck_dim=8, **form))
    randomise(model)
    kept = {}
    for number, slot in enumerate(slots(model)):
        kept[slot.site.write] = 1 + number % 4
        with torch.no_grad():
            adapter: Any = slot.adapters["a"]
            adapter.up.weight[:, kept[slot.site.write] :] = 0
    before = logits(model)
    assert narrow(model, "a") == kept
    torch.testing.assert_close(logits(model), before)
    model.save_adapter(tmp_path / "a", "a")
    fresh: Any = interleaf.adapt(build(name))
    fresh.load_adapter(tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))


def test_units_are_taken_away_by_a_cubic_and_then_no_more() -> None:
    left = [allowed(step, 100, total=64, budget=10) for step in range(101)]
    assert left[:10] == [64] * 10
    assert left[50:] == [10] * 51
    assert left == sorted(left, reverse=True)
    assert left[30] == 10 + round(54 * 0.5**3)


def test_the_most_important_units_stay_and_one_of_each_place() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.0]), torch.tensor([5.0, 4.0, 3.0, 0.05])]
    chosen = [part.tolist() for part in most_important(scores, 4)]
    assert chosen == [[False, True, False], [True, True, True, False]]


def test_what_is_important_is_what_the_loss_rests_on() -> None:
    """The score is the first-order change of the loss when a unit's output weights become nought."""
    model: Any = interleaf.adapt(build("bert"))
    model.add_adapter("a", BottleneckConfig(bottleneck_dim=4))
    randomise(model, std=0.01)
    pruning = Pruning(model, "a", 8, "loss")
    from tests.zoo import inputs

    loss = model(**inputs(model), labels=torch.tensor([0, 1])).loss
    loss.backward()
    pruning.on_optimizer_step(None, _State(0, 1000), None)
    adapter: Any = next(iter(pruning.adapters.values()))
    for unit in range(4):
        kept = adapter.up.weight[:, unit].clone()
        with torch.no_grad():
            adapter.up.weight[:, unit] = 0
            changed = model(**inputs(model), labels=torch.tensor([0, 1])).loss - loss
            adapter.up.weight[:, unit] = kept
        assert float(pruning.scores[0][unit]) == pytest.approx(0.15 * abs(float(changed)), rel=0.05, abs=2e-8)


@dataclasses.dataclass
class _State:
    global_step: int
    max_steps: int


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"unit_budget": 3}, r"expected 4 \(one unit a place\) to 47"),
        ({"unit_budget": 48}, "fewer than the adapter has at first"),
        ({"adapter": "loreft", "adapter_options": {}}, "is for bottleneck adapters"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(settings: TrainSettings, changed: dict[str, Any], why: str) -> None:
    run = prepare(dataclasses.replace(settings, **changed))
    with pytest.raises(ConfigError, match=why):
        run.train()
    assert not Path(settings.out).exists()
