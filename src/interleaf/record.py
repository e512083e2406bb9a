"""What a run leaves for those who read about it later: its curves, example answers, command, versions."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CURVE_POINTS = 300
EXAMPLE_LENGTH = 1000


def curves(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of the Trainer's log what a learning curve needs; of a long training loss every n-th point only."""
    kept = [{k: v for k, v in entry.items() if _drawn(k)} for entry in history]
    losses = [entry for entry in kept if "loss" in entry]
    measured = [entry for entry in kept if any(k.startswith("eval_") for k in entry)]
    stride = -(-len(losses) // CURVE_POINTS) or 1
    return sorted([*losses[::stride], *measured], key=lambda entry: entry["step"])


def _drawn(key: str) -> bool:
    timing = key.endswith(("_runtime", "_per_second"))
    return key in ("step", "epoch", "loss") or (key.startswith("eval_") and not timing)


def side_by_side(rows: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return example answers with those of the untouched base beside them, and long texts cut.

    Args:
        rows: what `Task.examples` gave with the adapter.
        base: the same rows without it, if the base can answer at all.
    """
    if base is not None:
        rows = [{**row, "base": other["answer"]} for row, other in zip(rows, base, strict=True)]
    return [{k: _cut(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]


def _cut(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + " …"


def command() -> str:
    """Return the command line of this process as it can be typed again."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that figures depend on."""
    import peft
    import torch
    import transformers

    from interleaf import __version__

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "interleaf": __version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
