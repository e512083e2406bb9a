"""The tasks: one object each, used by train, evaluate and predict alike."""

from typing import Any

from interleaf.tasks.base import Task
from interleaf.tasks.classification import TextClassification
from interleaf.tasks.code import Code
from interleaf.tasks.translation import Translation

TASKS: dict[str, Any] = {task.name: task for task in (TextClassification, Translation, Code)}

__all__ = ["TASKS", "Code", "Task", "TextClassification", "Translation"]
