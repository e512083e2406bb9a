"""Every file in configs/ is a run that can be started as its first line says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import interleaf.adapters  # noqa: F401
from interleaf import bundled
from interleaf.adapter import as_config
from interleaf.bundled import BUNDLED
from interleaf.cli.app import VERBS
from interleaf.compare import compare_settings
from interleaf.settings import TrainSettings, read_settings
from interleaf.train import make_task, prepare

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
FETCHED = {"classification", "topics", "routed", "union"}  # the others' models and data are 400 MB


def named(settings: TrainSettings) -> set[str]:
    refs = [settings.base, settings.train, settings.dev, settings.earlier]
    return {ref.removeprefix(bundled.PREFIX) for ref in refs if ref}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_there_is(path: Path) -> None:
    settings = read_settings(path, {})
    assert named(settings) <= BUNDLED.keys()
    assert settings.out == f"out/{path.stem}"
    make_task(settings)
    as_config(settings.adapter, **settings.adapter_options)
    compare_settings(settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_first_line_is_how_it_is_started(path: Path) -> None:
    first = path.read_text("utf-8").splitlines()[0]
    found = re.fullmatch(r"# (?:interleaf fetch (.+), then: )?interleaf ([a-z]+) configs/([\w-]+)\.yaml.*", first)
    assert found is not None
    assert found[2] in VERBS
    assert found[3] == path.stem
    fetched = set((found[1] or "").split())
    assert named(read_settings(path, {})) - {"minilm", "movie-reviews", "bbc"} == fetched


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[] if p.stem in FETCHED else [pytest.mark.download])
        for p in CONFIGS
        if "interleaf train configs" in p.read_text("utf-8")
    ],
)
def test_a_config_runs(path: Path, tmp_path: Path) -> None:
    settings = read_settings(path, {"limit": 12, "epochs": 1, "out": str(tmp_path / "out")})
    few: dict[str, Any] = {} if settings.task == "classification" else {"dev_rows": 4, "max_new_tokens": 8}
    few_of_all = dataclasses.replace(
        settings,
        task_options={**settings.task_options, **few},
        max_length=24,
        earlier=None,
        dev_fraction=0.01,
        examples=2,
    )
    result = prepare(few_of_all).train()
    assert result.metrics["rows"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
