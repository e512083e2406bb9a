"""The tasks: one object each, used by train, evaluate and predict alike."""

import inspect
from typing import Any

from interleaf.errors import ConfigError
from interleaf.tasks.base import Task
from interleaf.tasks.classification import TextClassification
from interleaf.tasks.code import Code
from interleaf.tasks.translation import Translation

TASKS: dict[str, Any] = {task.name: task for task in (TextClassification, Translation, Code)}


def check_options(task: str, options: dict[str, Any]) -> None:
    """Check that there is such a task and that it has these settings.

    Raises:
        ConfigError: there is none, or it has not.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}: expected one of {', '.join(TASKS)}.")
    known = inspect.signature(TASKS[task]).parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise ConfigError(f"task_options: {task} has no {unknown[0]!r}. It has: {', '.join(known)}.")


__all__ = ["TASKS", "Code", "Task", "TextClassification", "Translation", "check_options"]
