"""`interleaf push`."""

from __future__ import annotations

from typing import Annotated

import typer

from interleaf.cli.app import app


@app.command(epilog="Example: interleaf push out/movies me/movies-adapter")
def push(
    adapter: Annotated[str, typer.Argument(help="Adapter folder.")],
    repo: Annotated[str, typer.Argument(help="Hub name, owner/name.")],
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
) -> None:
    """Check an adapter and upload it to the hub."""
    from interleaf.store import push_to_hub

    print(push_to_hub(adapter, repo, private=private))
