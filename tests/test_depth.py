"""`layers: auto` finds the smallest number of upper layers that keeps quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from interleaf.depth import _near
from interleaf.errors import ConfigError
from interleaf.settings import TrainSettings
from interleaf.train import prepare
from tests.test_trunk_cache import generator


@pytest.mark.parametrize(("tolerance", "found"), [(1.0, 1), (-1.0, 2)])
def test_fewer_layers_are_taken_if_their_score_is_near(tmp_path: Path, tolerance: float, found: int) -> None:
    settings = replace(generator(tmp_path, "llama", layers="auto"), layers_tolerance=tolerance)
    run = prepare(settings)
    assert {site.layer for site in run.sites()} == set(range(2 - found, 2))
    assert run.settings.adapter_options["layers"] == f"last:{found}"
    assert [tried.layers for tried in run.plan().tried_layers] == [2, 1]
    assert all(tried.score > 0 and tried.seconds > 0 for tried in run.plan().tried_layers)


def test_a_classifier_is_probed_too(reviews: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        base="bundled:minilm",
        train=str(reviews),
        out=str(tmp_path / "out"),
        adapter_options={"layers": "auto"},
        layers_tolerance=1.0,
        limit=24,
        epochs=1,
        max_length=16,
    )
    run = prepare(settings)
    assert [tried.layers for tried in run.plan().tried_layers] == [6, 1]
    assert run.plan().trunk_cache == "the lowest 5 of 6 layers are run once and stored"


def test_what_is_near_depends_on_what_is_better() -> None:
    assert _near(0.80, 0.81, 0.01, "f1_macro")
    assert not _near(0.79, 0.81, 0.01, "f1_macro")
    assert _near(1.01, 1.0, 0.01, "loss")
    assert not _near(1.02, 1.0, 0.01, "loss")


def test_several_stacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models with one stack of layers; this has 2"):
        prepare(generator(tmp_path, "t5", layers="auto"))
