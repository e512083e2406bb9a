"""`interleaf show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json
from interleaf.files import documents


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
