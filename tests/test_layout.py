"""The shape of the source: imports point left only, files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).parent.parent / "src" / "interleaf"

# a module may import from its own rank and from those to the left
RANKS = [
    ["errors"],
    ["settings", "files", "blocks", "sites", "sandbox", "metrics", "card", "record"],
    ["marian_ssru"],
    ["bundled"],
    ["adapter", "base"],
    ["compose"],
    ["interpret"],
    ["forward"],
    ["slot"],
    ["tuner"],
    ["adapters", "model", "summary"],
    ["merge"],
    ["adapterhub"],
    ["store"],
    ["tasks"],
    ["forgetting", "trunk_cache", "fit", "depth", "widths", "train", "evaluate"],
    ["cohort"],
    ["compare", "demo", "report"],
    ["studies"],
    ["cli"],
]
RANK = {name: i for i, names in enumerate(RANKS) for name in names}


def modules() -> list[tuple[str, Path]]:
    files = [p for p in SRC.rglob("*.py") if p != SRC / "__init__.py"]
    return [(p.relative_to(SRC).parts[0].removesuffix(".py"), p) for p in files]


def test_every_module_has_a_rank() -> None:
    assert {name for name, _ in modules()} == set(RANK)


def test_imports_point_left_only() -> None:
    for name, path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        for node in tree.body:  # an import inside a function is a deliberate exception
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("interleaf."):
                other = (node.module or "").split(".")[1]
                assert RANK[other] <= RANK[name], f"{path.name} imports {other}"


def test_files_and_functions_are_small() -> None:
    for _, path in modules():
        text = path.read_text("utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{path.name} {node.name}: {length} lines"


def test_only_the_tuner_touches_internals() -> None:
    private = ("peft.tuners.tuners_utils import BaseTuner\n", "transformers.trainer import", "register_peft_method")
    for name, path in modules():
        if name != "tuner":
            assert not any(word in path.read_text("utf-8") for word in private), path


def test_public_things_have_docstrings() -> None:
    missing = []
    for _, path in modules():
        for node in ast.parse(path.read_text("utf-8")).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.name}: {node.name}")
    assert missing == []
