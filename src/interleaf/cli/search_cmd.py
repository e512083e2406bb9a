"""`interleaf search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.errors import ConfigError
from interleaf.files import refuse_existing
from interleaf.settings import read_settings


@app.command(epilog="Example: interleaf search configs/topics.yaml --out out/search --trials 12")
def search(
    config: Annotated[Path, typer.Argument(help="YAML file of a run; settings in its `adapter_options` stay fixed.")],
    out: Annotated[Path, typer.Option(help="Folder for the study, its adapters, a page and best.yaml.")],
    trials: Annotated[int, typer.Option(help="Trials in all.")] = 20,
    together: Annotated[int, typer.Option(help="Train so many at once, as a cohort.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that work on the study.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Work on a Ray cluster that shares OUT: ADDRESS, or local.")] = None,
    tolerance: Annotated[float, typer.Option(help="Quality that a smaller adapter may cost.")] = 0.01,
    limit: Annotated[int | None, typer.Option(help="Use only so many training rows.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the study in OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the trials and the recommended config as JSON.")] = False,
) -> None:
    """Look for an adapter's structure with Optuna: quality against parameters and latency."""
    settings = read_settings(config, {"limit": limit, "epochs": epochs})
    if not resume:
        refuse_existing(out)
    quiet()
    try:
        from interleaf.studies import search as studies
    except ImportError as error:
        raise ConfigError("search needs Optuna. Run: pip install 'interleaf[search]'") from error
    import yaml
    from rich.console import Console

    from interleaf.report import write
    from interleaf.studies.search_page import page
    from interleaf.train import make_task

    metric = make_task(settings).best_metric
    job = studies.Job(settings, str(out), trials, together)
    study = studies.search(job, workers, ray, Console(stderr=True).print)
    chosen = studies.recommended(study, tolerance)
    best = studies.as_config(chosen, settings)
    told = page(study, metric, chosen, f"Search: {settings.train} on {settings.base}")
    write([told], out / "page", overwrite=True)
    text = f"# trial {chosen.number} of {len(study.trials)}; interleaf train {out / studies.BEST}\n"
    (out / studies.BEST).write_text(text + yaml.safe_dump(best, sort_keys=False), "utf-8")
    if json:
        print_json({"trials": told.record["trials"], "recommended": best})
        return
    shown = told.sections[0].blocks[1]
    table("Not beaten by any other", shown.columns, shown.rows)  # type: ignore[union-attr]
    print(studies.told(chosen))
    print(f"recommended: interleaf train {out / studies.BEST}; the page is {out / 'page' / 'report.html'}")
