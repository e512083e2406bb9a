"""An initialisation is learnt over episodes, by Reptile or first-order MAML."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from interleaf import bundled
from interleaf.errors import ConfigError, DataError
from interleaf.settings import TrainSettings
from interleaf.store import read
from interleaf.studies import meta
from interleaf.studies.meta import MetaSettings, fomaml, prepare_pool, reptile, study
from interleaf.train import prepare
from tests.test_trunk_cache import without_dropout


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    rows = pd.read_json(bundled.resolve("bundled:bbc"), lines=True)
    path = tmp_path / "topics.csv"
    rows.groupby("label").head(30).to_csv(path, index=False)
    base = tmp_path / "minilm"
    shutil.copytree(bundled.resolve("bundled:minilm"), base)
    without_dropout(base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return TrainSettings(
        base=str(base),
        train=str(path),
        out=str(tmp_path / "meta"),
        adapter_options={"layers": "last:1", "bottleneck_dim": 4},
        max_length=12,
        learning_rate=1e-2,
    )


SMALL = MetaSettings(shots=3, steps=2, rounds=4, held_out=2)


def ended(settings: TrainSettings, how: MetaSettings, start: list[torch.Tensor], batches: list[Any]) -> Any:
    """Take an episode's steps by hand: AdamW without a memory of directions, gradients clipped as the Trainer does."""
    pool = prepare_pool(settings, how)
    model = meta.fresh(pool, settings)
    adapter, head = meta._trained(model, settings.name)
    with torch.no_grad():
        for weights, kept in zip(adapter, start, strict=True):
            weights.copy_(kept)
        for weights in head:
            weights.zero_()
    optimizer = torch.optim.AdamW([*adapter, *head], lr=settings.learning_rate, betas=(0.0, 0.999), weight_decay=0.0)
    collate = pool.task.collator(pool.tokenizer)
    for number, rows in enumerate(batches):
        optimizer.zero_grad()
        model(**collate(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *head], 1.0)
        if how.method == "fomaml" and number == len(batches) - 1:
            break
        optimizer.step()
    return adapter


def test_reptiles_update_is_the_one_computed_by_hand(settings: TrainSettings) -> None:
    """Two episodes: each time the start moves towards the end, all of the way and then half."""
    how = dataclasses.replace(SMALL, rounds=2)
    pool = prepare_pool(settings, how)
    start = [w.detach().clone() for w in meta._trained(meta.fresh(pool, settings), settings.name)[0]]
    rng = random.Random(settings.seed)
    for rate in (1.0, 0.5):
        classes = rng.sample(pool.seen, 2)
        end = ended(settings, how, start, [pool.episode(classes, 3, rng) for _ in range(how.steps)])
        start = [kept + rate * (weights.detach() - kept) for kept, weights in zip(start, end, strict=True)]
    learnt = meta.learn(pool, settings, how)
    for weights, expected in zip(meta._trained(learnt, settings.name)[0], start, strict=True):
        torch.testing.assert_close(weights.detach(), expected, rtol=1e-3, atol=2e-5)


def test_first_order_maml_takes_the_gradient_of_other_rows_at_the_end(settings: TrainSettings) -> None:
    how = dataclasses.replace(SMALL, rounds=1, method="fomaml", outer_rate=1e-2)
    pool = prepare_pool(settings, how)
    start = [w.detach().clone() for w in meta._trained(meta.fresh(pool, settings), settings.name)[0]]
    rng = random.Random(settings.seed)
    classes = rng.sample(pool.seen, 2)
    rows, others = pool.episode(classes, 3, rng), pool.episode(classes, 3, rng)
    end = ended(settings, how, start, [rows, rows, others])
    learnt = meta._trained(meta.learn(pool, settings, how), settings.name)[0]
    for weights, kept, ending in zip(learnt, start, end, strict=True):
        # Adam's first step goes by the gradient's sign
        step = 1e-2 * ending.grad / (ending.grad.abs() + 1e-8)
        torch.testing.assert_close(weights.detach(), kept - step, rtol=1e-3, atol=1e-5)


def test_reptile_and_fomaml_move_the_start() -> None:
    start = [torch.tensor([1.0, 2.0])]
    ended = torch.nn.Parameter(torch.tensor([3.0, 0.0]))
    rates: Iterator[float] = iter([0.5, 0.25])
    step = reptile([ended], rates)
    step(start)
    assert start[0].tolist() == [2.0, 1.0]
    step(start)
    assert start[0].tolist() == [2.25, 0.75]
    ended.grad = torch.tensor([5.0, -0.1])
    fomaml([ended], 0.1)(start)
    torch.testing.assert_close(start[0], torch.tensor([2.15, 0.85]))


def test_measuring_leaves_the_start_as_it_is(settings: TrainSettings) -> None:
    pool = prepare_pool(settings, SMALL)
    model = meta.fresh(pool, settings)
    before = [w.detach().clone() for w in meta._trained(model, settings.name)[0]]
    scores = meta.measure(model, pool, settings, SMALL, steps=2)
    assert len(scores) == len(pool.tasks(2)) == 1
    assert all(0 <= score <= 1 for score in scores)
    assert all(torch.equal(a, b) for a, b in zip(before, meta._trained(model, settings.name)[0], strict=True))
    assert meta.measure(model, pool, settings, SMALL, steps=2) == scores


def test_a_run_starts_where_it_was_learnt_to(settings: TrainSettings, tmp_path: Path) -> None:
    found = study(settings, SMALL)
    assert set(found.accuracy) == {"random", "multi-task", "reptile"}
    assert {len(scores) for by_steps in found.accuracy.values() for scores in by_steps.values()} == {1}
    assert read(settings.out).record["run"]["meta"]["rounds"] == 4
    run = prepare(
        dataclasses.replace(settings, start=settings.out, adapter_options={}, out=str(tmp_path / "new"), epochs=1)
    )
    learnt = {k: v for k, v in read(settings.out).tensors.items() if "adapter_slot" in k}
    here = run.model.state_dict()
    for key, tensor in learnt.items():
        name = key.removeprefix("base_model.model.").replace(".adapters.", ".adapters.adapter.")
        assert torch.equal(here[name], tensor)


def test_held_out_classes_are_not_seen_and_pieces_have_so_many_words(settings: TrainSettings) -> None:
    pool = prepare_pool(settings, dataclasses.replace(SMALL, words=5, held_out=3))
    assert not set(pool.seen) & set(pool.held_out)
    assert len(pool.seen) == 2
    assert len(pool.tasks(2)) == 3
    assert meta._pieces({"text": ["a b c d e", "f"], "labels": [4, 1]}, 2) == {"text": ["a b", "c d"], "labels": [4, 4]}


@pytest.mark.parametrize(
    ("changed", "error", "why"),
    [
        ({"method": "maml"}, ConfigError, "reptile or fomaml"),
        ({"ways": 1}, ConfigError, "too few"),
        ({"held_out": 4}, DataError, "not 2 for a task on either side"),
        ({"shots": 16}, DataError, "has 30 rows; a task needs 32"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused(
    settings: TrainSettings, changed: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        prepare_pool(settings, dataclasses.replace(SMALL, **changed))
