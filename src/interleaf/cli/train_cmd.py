"""`interleaf train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interleaf.cli.app import app, options, print_json, quiet, table
from interleaf.files import size
from interleaf.settings import read_settings

if TYPE_CHECKING:
    from interleaf.train import Plan, Result


@app.command(epilog="Example: interleaf train configs/classification.yaml --out out/movies --epochs 3")
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings; flags win over it.")] = None,
    base: Annotated[str | None, typer.Option(help="Pretrained model: hub name, folder, bundled:NAME.")] = None,
    train: Annotated[str | None, typer.Option(help="Training data: file, folder, hub name, bundled:NAME.")] = None,
    dev: Annotated[str | None, typer.Option(help="Held-out data; by default a share of the training data.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the adapter.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Preset to start from: see `interleaf kinds`.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Adapter setting as key=value, for example layers=last:3.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Stored adapter to start from, with a head of its own.")] = None,
    onto: Annotated[
        list[str] | None, typer.Option(help="Stored adapter that runs below, as it is; or one to fuse.")
    ] = None,
    unit_budget: Annotated[int | None, typer.Option(help="Bottleneck units to keep in all: places share them.")] = None,
    task: Annotated[str | None, typer.Option(help="classification, translation or code.")] = None,
    task_set: Annotated[
        list[str] | None, typer.Option(help="Task setting as key=value, for example num_beams=4.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text; found if not given.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label; found if not given.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many training rows.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, initialisation and order.")] = None,
    earlier: Annotated[
        str | None, typer.Option(help="What may be forgotten: labelled texts, other pairs, or general text.")
    ] = None,
    forget_budget: Annotated[float | None, typer.Option(help="Share of it that may be lost: 0.05 for 5%.")] = None,
    activation_checkpointing: Annotated[bool | None, typer.Option(help="Save memory, take longer.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Run the frozen layers below the lowest adapter once: auto or off.")
    ] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="Log to tensorboard or trackio too.")] = None,
    examples: Annotated[int | None, typer.Option(help="Held-out rows stored with their answers; 0 for none.")] = None,
    overwrite: Annotated[bool | None, typer.Option(help="Replace what is at OUT.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Continue an unfinished run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train an adapter on a task; the base stays frozen."""
    flags = {k: v for k, v in locals().items() if k not in ("config", "set", "task_set", "json")}
    settings = read_settings(config, {**flags, "report_to": report_to or None, "onto": onto or None})
    settings = dataclasses.replace(
        settings,
        adapter_options={**settings.adapter_options, **options(set)},
        task_options={**settings.task_options, **options(task_set)},
    )
    from interleaf.train import prepare

    quiet()
    run = prepare(settings)
    if json:
        result = run.train()
        print_json({"plan": dataclasses.asdict(run.plan()), "result": dataclasses.asdict(result)})
        return
    show_plan(run.plan())
    from interleaf.cli.progress import RichProgress

    show_result(run.train(RichProgress()))


def show_plan(plan: Plan) -> None:
    """Print what will be trained before it starts."""
    trained = plan.adapter_parameters + plan.head_parameters
    share = 100 * trained / plan.base_parameters
    rows = [
        ["base", f"{plan.base}, {plan.base_parameters:,} parameters, frozen"],
        ["data", f"{plan.train_rows:,} rows to train on, {plan.dev_rows:,} held out"],
        *([["labels", ", ".join(plan.labels)]] if plan.labels else []),
        *([["left out", ", ".join(f"{n:,} rows {why}" for why, n in plan.dropped.items())]] if plan.dropped else []),
        ["adapter", f"{plan.adapter_parameters:,} parameters at {len(plan.sites)} sites: {_short(plan.sites)}"],
        ["head", f"{plan.head_parameters:,} parameters"],
        ["trained", f"{trained:,} parameters, {share:.2f}% of the base"],
        ["steps", f"{plan.steps:,}"],
        *([["layers tried", _tried(plan)]] if plan.tried_layers else []),
        ["precision", plan.precision],
        ["trunk cache", plan.trunk_cache],
        ["memory", f"about {size(plan.memory_bytes)} at the peak (an estimate)"],
    ]
    table("What will be trained", ["", ""], rows)


def _tried(plan: Plan) -> str:
    return ", ".join(f"last {t.layers}: {t.score:.4f} ({t.seconds:.0f} s)" for t in plan.tried_layers)


def _short(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def show_result(result: Result) -> None:
    """Print what a run gave, beside the untouched base where that can do the task."""
    from interleaf.metrics import headline

    base = result.metrics.get("base")
    rows = [[k, f"{v:.4f}", *([f"{base[k]:.4f}"] if base else [])] for k, v in headline(result.metrics).items()]
    table(f"Held-out data, after {result.seconds:.0f} s", ["metric", "adapter", *(["base"] if base else [])], rows)
    if (of := result.metrics.get("forgetting")) is not None:
        said = [of["measure"], *(f"{of[k]:.4f}" for k in ("before", "on", "off")), f"{of['lost']:.2%}"]
        table("Forgetting", ["", "before", "adapter on", "adapter off", "lost"], [said])
    saved = f"; about {result.saved_s:.0f} s saved" if result.saved_s else ""
    print(f"trunk cache: {result.trunk_cache}{saved}")
    print(f"saved {result.path}")
