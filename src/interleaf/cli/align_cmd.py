"""`interleaf align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interleaf.cli.app import app, print_json, quiet, table
from interleaf.settings import read_settings


@app.command(epilog="Example: interleaf align configs/preferences.yaml --prefer positive")
def align(
    config: Annotated[Path, typer.Argument(help="YAML file of a run: base, data, adapter, `out`.")],
    method: Annotated[str, typer.Option(help="dpo, grpo, or reward: a reward model.")] = "dpo",
    prefer: Annotated[str | None, typer.Option(help="Of labelled texts, the label whose texts are preferred.")] = None,
    prompt: Annotated[str, typer.Option(help="What stands before such texts.")] = "",
    reward: Annotated[str, typer.Option(help="What grpo rewards: parses, tests or matches.")] = "parses",
    pattern: Annotated[str | None, typer.Option(help="Regular expression that an answer has to match.")] = None,
    beta: Annotated[float | None, typer.Option(help="How strongly to stay near the base.")] = None,
    answers: Annotated[int, typer.Option(help="Answers to each prompt (grpo).")] = 8,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer (grpo).")] = 32,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of `epochs`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many pairs or prompts.")] = None,
    overwrite: Annotated[bool | None, typer.Option(help="Replace what is at the config's `out`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Learn from preferences or rewards, with TRL; the reference is the model with the adapter switched off."""
    settings = read_settings(config, {"limit": limit, "overwrite": overwrite})
    quiet()
    from interleaf.cli.progress import RichProgress
    from interleaf.studies import align as study

    how = study.AlignSettings(
        method=method,
        beta=beta,
        prefer=prefer,
        prompt=prompt,
        reward=reward,
        pattern=pattern,
        answers=answers,
        answer_tokens=answer_tokens,
        steps=steps,
    )
    done = study.align(settings, how, *([] if json else [RichProgress(name=method)]))
    metrics = study.last(done.history, how)
    if json:
        print_json({"path": str(done.path), "metrics": metrics, "seconds": done.seconds, "history": done.history})
        return
    table(f"{method}, {done.seconds:.0f} s", list(metrics), [[f"{value:.4f}" for value in metrics.values()]])
    print(f"saved {done.path}")
