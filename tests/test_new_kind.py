"""docs/new-kind.md: its one file makes a kind, in the package and out of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import interleaf
from interleaf.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "new-kind.md").read_text("utf-8")
FILE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def python(paths: list[Path], *words: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def commands(*lines: list[str]) -> list[str]:
    """Return Python's arguments to run several commands in one process: importing torch takes seconds."""
    code = (
        "import json, sys\n"
        "from interleaf.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['interleaf', *words]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert not stop.code, words\n"
        "    print('=====')\n"
    )
    return ["-c", code, json.dumps(lines)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with the page's one file in it."""
    shutil.copytree(ROOT / "src" / "interleaf", tmp_path / "interleaf", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(FILE) == 1, "the page holds the complete file in one block"
    (tmp_path / "interleaf" / "adapters" / "ssf.py").write_text(FILE[0], "utf-8")
    return tmp_path


def test_one_file_is_a_kind_on_the_command_line_and_in_the_docs(tree: Path, reviews: Path) -> None:
    train = ["train", "--base", "bundled:minilm", "--train", str(reviews), "--adapter", "ssf", "--max-length", "8"]
    train += ["--epochs", "1", "--out", "out", "--json"]
    asked = [["kinds", "--json"], ["kinds", "--markdown"], ["sites", "bundled:minilm", "--adapter", "ssf_scale"], train]
    told, page, sites, trained, _ = python([tree], *commands(*asked), cwd=tree).split("=====\n")
    kind = next(k for k in json.loads(told) if k["kind"] == "ssf")
    assert kind["config"] == "SSFConfig"
    assert kind["presets"] == {"ssf": {}, "ssf_scale": {"shift": False}}
    assert kind["description"] == "A learned factor and offset per channel."
    assert "2210.08823" in kind["paper"]
    assert re.search(r"^\| \[ssf\]\(#ssf\) \| `ssf`, `ssf_scale` \|", page, flags=re.MULTILINE)
    assert "| `shift` | bool | True | Learn an offset too, not only a factor. |" in page
    assert "12 sites" in sites
    assert json.loads(trained)["plan"]["adapter_parameters"] == 12 * 2 * 384
    assert json.loads((tree / "out" / "adapter_config.json").read_text("utf-8"))["peft_type"] == "SSF"


def test_one_file_is_held_to_the_contract(tree: Path) -> None:
    words = ["-m", "pytest", "-p", "no:cacheprovider", "tests/test_kinds.py", "-k", "ssf and (bert or t5)"]
    said = python([tree, ROOT], *words, cwd=ROOT)
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 14
    assert "failed" not in said


def test_a_kind_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "my_kind.py").write_text(FILE[0], "utf-8")
    info = tmp_path / "my_kind-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-kind\nVersion: 1.0\n", "utf-8")
    toml = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    (info / "entry_points.txt").write_text(f"[{toml[0]}]\n{toml[1].replace(chr(34), '')}", "utf-8")
    said = python([tmp_path, ROOT / "src"], *commands(["kinds", "--json"]), cwd=tmp_path)
    assert "A learned factor and offset per channel." in said


def test_a_package_whose_kind_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint("ssf", "no_such_module", group)]

    assert interleaf.Stack  # the kinds are registered
    monkeypatch.setattr(importlib.metadata, "entry_points", entries)
    with pytest.raises(ConfigError, match=r"the adapter kind 'ssf' \(no_such_module\) cannot be imported: No module"):
        importlib.reload(sys.modules["interleaf.adapters"])
