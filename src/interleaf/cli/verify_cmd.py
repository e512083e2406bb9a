"""`interleaf verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet


@app.command(epilog="Example: interleaf verify out/movies")
def verify(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub name.")],
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that an adapter is whole and fits its base: checksum, shapes, fingerprint."""
    from interleaf.evaluate import open_adapter

    quiet()
    opened = open_adapter(adapter, base)
    summary = opened.model.adapter_summary()[0]
    if json:
        print_json({"adapter": adapter, "ok": True, "parameters": summary.adapter_parameters})
        return
    print(
        f"ok: {adapter} is whole and fits its base ({summary.sites} sites, {summary.adapter_parameters:,} parameters)"
    )
