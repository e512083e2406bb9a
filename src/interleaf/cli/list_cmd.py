"""`interleaf list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, print_json, table
from interleaf.files import size


@app.command(name="list", epilog="Example: interleaf list out")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="Folder to look in, with the folders below it.")] = Path("."),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapters stored in a folder."""
    from interleaf.errors import StoreError

    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder.")
    found = [describe(path.parent) for path in sorted(folder.rglob("interleaf.json"))]
    if json:
        print_json(found)
        return
    rows = [[a["path"], a["kind"], a["base"], a["task"], a["f1_macro"], size(a["size_bytes"])] for a in found]
    table(f"{len(found)} adapters in {folder}", ["path", "kind", "base", "task", "F1 (macro)", "size"], rows)


def describe(path: Path) -> dict[str, Any]:
    """Summarise an adapter folder from its JSON files."""
    from interleaf.files import documents

    config, record = documents(path)
    weights = path / "adapter_model.safetensors"
    return {
        "path": str(path),
        "name": record.get("name"),
        "kind": str(config.get("peft_type", "")).lower(),
        "base": config.get("base_model_name_or_path"),
        "task": (record.get("task") or {}).get("name"),
        "f1_macro": (record.get("metrics") or {}).get("f1_macro"),
        "size_bytes": weights.stat().st_size if weights.exists() else 0,
    }
