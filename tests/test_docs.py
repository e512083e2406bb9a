"""The Python in the documents runs, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import build, inputs

DOCS = Path(__file__).parent.parent / "docs"
ELSEWHERE = ("adapterhub.md",)  # needs another library's folders: tests/test_adapterhub.py
WITH_PYTHON = [p.name for p in sorted(DOCS.glob("*.md")) if "```python" in p.read_text("utf-8")]
WITH_PYTHON = [name for name in WITH_PYTHON if name not in ELSEWHERE]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = build("bert")
    names: dict[str, Any] = {"base": base, "batch": inputs(base)}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), flags=re.DOTALL):
        exec(block, names)
    if name == "unions.md":
        assert (tmp_path / "out/both/adapter_model.safetensors").exists()
        assert len(names["gates"]) == 8
        assert {"mam", "dared"} <= set(names["model"].adapters)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
        assert (path.parent / link).exists(), link
