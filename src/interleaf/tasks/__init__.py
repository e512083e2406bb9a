"""The tasks by name: one object serves train, evaluate and predict."""

from interleaf.tasks.base import Task
from interleaf.tasks.classification import TextClassification

TASKS: dict[str, type[TextClassification]] = {TextClassification.name: TextClassification}

__all__ = ["TASKS", "Task", "TextClassification"]
