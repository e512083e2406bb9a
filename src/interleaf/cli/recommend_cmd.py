"""`interleaf recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, options, print_json, quiet, table
from interleaf.settings import read_settings


@app.command(epilog="Example: interleaf recommend --base bundled:minilm --train bundled:bbc --out out/bbc --minutes 2")
def recommend(
    base: Annotated[str, typer.Option(help="Pretrained model: hub name, folder, bundled:NAME.")],
    train: Annotated[str, typer.Option(help="Training data: file, folder, hub name, bundled:NAME.")],
    out: Annotated[str, typer.Option(help="Folder that the run is to write to.")] = "out/recommended",
    task: Annotated[str | None, typer.Option(help="classification, translation or code.")] = None,
    task_set: Annotated[list[str] | None, typer.Option(help="Task setting as key=value.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes that training may take.")] = None,
    megabytes: Annotated[float | None, typer.Option(help="Megabytes that the adapter may have.")] = None,
    config: Annotated[Path | None, typer.Option(help="Write the config here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name a sound setup from the data's size, the model and a budget, with the reasons; nothing is trained."""
    flags = {"base": base, "train": train, "out": out, "task": task, "task_options": options(task_set) or None}
    settings = read_settings(None, flags)
    import dataclasses

    import yaml

    from interleaf.files import refuse_existing
    from interleaf.studies.recommend import as_config, facts, rules

    quiet()
    if config is not None:
        refuse_existing(config)
    of = facts(settings, minutes, megabytes)
    found = rules(of)
    made = as_config(settings, found)
    if config is not None:
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    if json:
        print_json({"facts": dataclasses.asdict(of), "rules": [dataclasses.asdict(r) for r in found], "config": made})
        return
    table("Recommended", ["setting", "value", "because"], [[r.setting, str(r.value), r.reason] for r in found])
    print(yaml.safe_dump(made, sort_keys=False).rstrip())
    if config is not None:
        print(f"run it: interleaf train {config}")
