"""Both READMEs hold the same commands, and the commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from interleaf import bundled
from interleaf.tasks import TextClassification

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]


def blocks(name: str, language: str = "[a-z]*") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)


def test_both_languages_hold_the_same_commands_figures_and_links() -> None:
    english, chinese = ((ROOT / name).read_text("utf-8") for name in READMES)
    assert blocks("README.md") == blocks("README.zh-CN.md")
    assert len(blocks("README.md")) == 5
    assert re.findall(r"\d[\d.,]*\d", english) == re.findall(r"\d[\d.,]*\d", chinese)
    assert english.count("\n|") == chinese.count("\n|")
    assert english.count("\n## ") == chinese.count("\n## ")


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\S+)$", blocks("README.md", "")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for name in READMES:
        for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text("utf-8")):
            assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for line in "".join(blocks("README.md", "bash")).strip().splitlines():
        done = subprocess.run(
            ["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line
    assert (tmp_path / "out/movies/adapter_model.safetensors").stat().st_size < 1_000_000


def test_the_python_example_runs(tmp_path: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = bundled.resolve("bundled:minilm")
    task = TextClassification(max_length=8)
    splits = task.load(str(reviews))
    tokenizer = task.tokenizer(base)
    args = TrainingArguments(
        "out/run", max_steps=2, eval_strategy="epoch", report_to=[], use_cpu=True, dataloader_pin_memory=False
    )
    names: dict[str, Any] = {"base": base, "args": args, "metrics": task.compute_metrics}
    for name, rows in (("train", splits.train), ("dev", splits.dev)):
        encoded = task.encode(rows, tokenizer).to_list()
        names[name] = [tokenizer.pad(row, padding="max_length", max_length=8) for row in encoded]
    for block in blocks("README.md", "python"):
        exec(block, names)
    assert names["model"].active_adapters() == ["my_adapter"]
    assert (tmp_path / "out/my_adapter/adapter_model.safetensors").exists()
    assert not list((tmp_path / "out/run").rglob("model.safetensors"))
