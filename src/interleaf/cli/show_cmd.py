"""`interleaf show`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, print_json
from interleaf.errors import StoreError


@app.command(epilog="Example: interleaf show out/movies --json")
def show(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter's card, or all that is stored of it."""
    config, record = documents(adapter)
    if json:
        print_json({"config": config, **record})
        return
    from rich.console import Console
    from rich.markdown import Markdown

    card = (adapter / "README.md").read_text("utf-8") if (adapter / "README.md").exists() else "no card"
    Console().print(Markdown(card.split("---\n", 2)[-1]))


def documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an adapter folder's two JSON files; torch is not needed for that.

    Raises:
        StoreError: a file is missing or damaged.
    """
    found = []
    for name in ("adapter_config.json", "interleaf.json"):
        try:
            found.append(json_module.loads((path / name).read_text("utf-8")))
        except FileNotFoundError as error:
            raise StoreError(f"{path} is no adapter folder: it has no {name}.") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / name} is corrupt: {error}.") from error
    return found[0], found[1]
