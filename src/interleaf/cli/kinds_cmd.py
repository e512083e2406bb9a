"""`interleaf kinds`: what the registry knows; it also writes docs/kinds.md."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.errors import ConfigError

if TYPE_CHECKING:
    from interleaf.adapter import Kind


@app.command(epilog="Example: interleaf kinds pfeiffer")
def kinds(
    name: Annotated[str | None, typer.Argument(help="A kind or a preset: list its settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/kinds.md.")] = False,
) -> None:
    """List the kinds of adapters with their presets, or one's settings."""
    import interleaf.adapters  # noqa: F401  (registers them)
    from interleaf.adapter import Registry

    quiet()
    every = [Registry.kinds[kind] for kind in sorted(Registry.kinds)]
    if markdown:
        print("\n".join(page(every)))
    elif name is not None:
        show(one(every, name), name, json)
    elif json:
        print_json([described(kind) for kind in every])
    else:
        rows = [[d["kind"], ", ".join(d["presets"]), d["description"], d["paper"]] for d in map(described, every)]
        table("Kinds of adapters (their settings: interleaf kinds NAME)", ["kind", "presets", "what", "paper"], rows)


def one(every: list[Kind], name: str) -> Kind:
    """Return the kind of a preset's or a kind's name.

    Raises:
        ConfigError: there is neither.
    """
    for kind in every:
        if name == kind.name or name in kind.presets:
            return kind
    names = sorted({n for kind in every for n in (kind.name, *kind.presets)})
    raise ConfigError(f"there is no kind or preset {name!r}. There are: {', '.join(names)}.")


def show(kind: Kind, name: str, json: bool) -> None:
    """Print the settings of a kind with the values that a preset gives them."""
    preset = kind.presets.get(name, {})
    settings = [{**s, "value": preset.get(s["name"], s["default"])} for s in described_settings(kind.config_cls)]
    if json:
        print_json({**described(kind), "settings": settings})
        return
    title = f"{name}: {kind.config_cls.__name__}" + (f", {len(preset)} settings of its own" if preset else "")
    rows = [[s["name"], s["type"], _shown(s["value"]), s["description"]] for s in settings]
    table(title, ["setting", "type", "value", "what it is"], rows)


def described(kind: Kind) -> dict[str, Any]:
    """Describe a kind: its config, presets, first docstring line, and paper (the module's second paragraph)."""
    module = inspect.getdoc(sys.modules[kind.config_cls.__module__]) or ""
    return {
        "kind": kind.name,
        "config": kind.config_cls.__name__,
        "presets": kind.presets,
        "description": (inspect.getdoc(kind.config_cls) or "").partition("\n")[0],
        "paper": " ".join(module.split("\n\n")[1].split()) if "\n\n" in module else "",
    }


def described_settings(config_cls: type) -> list[dict[str, Any]]:
    """Describe a config's settings by their attribute docstrings, its own before those of all kinds."""
    from interleaf.adapter import AdapterConfig

    line = [c for c in config_cls.__mro__ if issubclass(c, AdapterConfig)]
    docs: dict[str, str] = {}
    for cls in line:
        docs = {**docs, **{n: d for n, d in attribute_docs(cls).items() if n not in docs}}
    known = {f.name: f for f in fields(config_cls)}
    return [
        {"name": n, "type": str(known[n].type), "default": _default(known[n]), "description": d}
        for n, d in docs.items()
        if n in known
    ]


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the strings that stand below a class's attributes."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(node.target)] = " ".join(str(below.value.value).split())
    return found


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) and value else str(value)


def page(every: list[Kind]) -> list[str]:
    """Return the lines of docs/kinds.md."""
    lines = ["# Kinds of adapters", "", "Made by `interleaf kinds --markdown > docs/kinds.md`.", ""]
    lines += ["How to add one: [new-kind.md](new-kind.md).", ""]
    lines += ["| kind | presets | what | paper |", "|---|---|---|---|"]
    for kind in every:
        d = described(kind)
        presets = ", ".join(f"`{p}`" for p in d["presets"])
        lines.append(_row(f"[{kind.name}](#{kind.name})", presets, d["description"], _linked(d["paper"])))
    for kind in every:
        lines += _section(kind)
    from interleaf.adapter import AdapterConfig

    lines += ["", "## Settings of all kinds", "", "| setting | type | default | what it is |", "|---|---|---|---|"]
    return lines + [_setting(s) for s in described_settings(AdapterConfig)]


def _section(kind: Kind) -> list[str]:
    from interleaf.adapter import AdapterConfig

    common = attribute_docs(AdapterConfig).keys() - attribute_docs(kind.config_cls).keys()
    settings = [s for s in described_settings(kind.config_cls) if s["name"] not in common]
    lines = ["", f"## {kind.name}", "", f"`interleaf.{kind.config_cls.__name__}`", ""]
    lines += ["| setting | type | default | what it is |", "|---|---|---|---|", *map(_setting, settings)]
    told = {name: given for name, given in kind.presets.items() if given}
    if told:
        lines += ["", "| preset | settings |", "|---|---|"]
        lines += [_row(f"`{n}`", ", ".join(f"{k}={_shown(v)}" for k, v in given.items())) for n, given in told.items()]
    return lines


def _setting(setting: dict[str, Any]) -> str:
    return _row(f"`{setting['name']}`", setting["type"], _shown(setting["default"]), setting["description"])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _linked(paper: str) -> str:
    return re.sub(r"(arXiv )?\b(\d{4}\.\d{5})\b", r"[\g<0>](https://arxiv.org/abs/\2)", paper)
