"""Measures of quality, by scikit-learn, as plain numbers that go into JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from interleaf.errors import TrainingError


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of values and the half-width of its 95% confidence interval; NaN for one value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": math.nan}
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return {"mean": mean, "half_width": half}


def classification_metrics(true: Sequence[int], scores: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, macro, micro and per-class precision, recall and F1, and the confusion matrix.

    Args:
        true: class numbers, shape [N].
        scores: logits or probabilities, shape [N, C].
        labels: the C class names.

    Raises:
        TrainingError: a score is NaN or infinite.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    if not np.isfinite(scores).all():
        raise TrainingError("the model's scores hold NaN or infinity. Try a lower learning_rate.")
    predicted = scores.argmax(axis=-1)
    every = list(range(len(labels)))
    found: dict[str, Any] = {"accuracy": float(accuracy_score(true, predicted)), "rows": len(predicted)}
    for average in ("macro", "micro"):
        values = precision_recall_fscore_support(true, predicted, labels=every, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values[:3], strict=True):
            found[f"{name}_{average}"] = float(value)
    columns = precision_recall_fscore_support(true, predicted, labels=every, zero_division=0)
    found["per_class"] = {
        label: {
            "precision": float(columns[0][i]),
            "recall": float(columns[1][i]),
            "f1": float(columns[2][i]),
            "support": int(columns[3][i]),
        }
        for i, label in enumerate(labels)
    }
    found["confusion_matrix"] = confusion_matrix(true, predicted, labels=every).tolist()
    return found


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Keep the single numbers that a log line or a short table shows."""
    names = ("accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro")
    return {name: metrics[name] for name in names}
