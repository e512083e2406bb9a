"""Measures of quality, as plain numbers that go into JSON: of labels, translations and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from interleaf.errors import DataError, TrainingError


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of values and the half-width of its 95% confidence interval (Student's t); None for one value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None}
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


def translation_metrics(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    bootstrap: int = 0,
) -> dict[str, Any]:
    """Return corpus BLEU, chrF and TER by sacrebleu, with the signatures that make them comparable.

    Papineni et al. 2002; Popović 2015; Snover et al. 2006; Post 2018 (arXiv 1804.08771).

    Args:
        hypotheses: N translations, as a reader would see them (not tokenized).
        references: for each, what it should have been: one text, or several.
        tokenize: sacrebleu's tokenizer for BLEU, for example `zh` for Chinese.
        bootstrap: from 2 on, so many resamples of the corpus are scored for 95% confidence intervals.

    Raises:
        DataError: no rows, as many references as not hypotheses, a row without a reference, an unknown tokenizer.
    """
    from sacrebleu.metrics import BLEU, CHRF, TER

    rows = [[each] if isinstance(each, str) else list(each) for each in references]
    if not rows or len(rows) != len(hypotheses) or not all(rows):
        raise DataError(f"{len(hypotheses)} translations, {len(rows)} rows of references: each needs at least one.")
    if tokenize not in BLEU.TOKENIZERS:
        raise DataError(f"no tokenizer {tokenize!r}; sacrebleu has {', '.join(BLEU.TOKENIZERS)}.")
    most = max(map(len, rows))
    # sacrebleu takes the first reference of each row, then the second of each, with None where there is none
    columns = [[row[i] if i < len(row) else None for row in rows] for i in range(most)]
    found: dict[str, Any] = {"rows": len(rows), "signatures": {}}
    for name, metric in {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF(), "ter": TER()}.items():
        score = metric.corpus_score(list(hypotheses), columns, n_bootstrap=max(bootstrap, 1))
        found[name] = float(score.score)
        found["signatures"][name] = signature = str(metric.get_signature())
        if bootstrap > 1:
            told = json.loads(score.format(width=6, is_json=True, signature=signature))
            interval = {"mean": told.get("confidence_mean", 0.0), "half_width": told.get("confidence_var", 0.0)}
            found.setdefault("intervals", {})[name] = interval
    return found


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate, without bias, how probable it is that one of k samples passes, when c of n did.

    It is `1 - C(n - c, k) / C(n, k)`, as a product that does not overflow (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        DataError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise DataError(
            f"pass@{k} needs at least {max(k, 1)} samples of each problem, and k at least 1; there are {n}."
        )
    if not 0 <= c <= n:
        raise DataError(f"{c} of {n} samples cannot have passed.")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def code_metrics(passed: Sequence[Sequence[bool]], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """Return the mean pass@k over problems.

    Args:
        passed: for each problem, which of its samples passed; their number may differ.
        ks: the values of k.

    Raises:
        DataError: no problems, or one with fewer samples than k.
    """
    if not passed:
        raise DataError("there are no problems, so nothing can be said of how many are solved.")
    found: dict[str, Any] = {"problems": len(passed), "samples": sum(map(len, passed))}
    for k in ks:
        found[f"pass@{k}"] = float(np.mean([pass_at_k(len(each), sum(map(bool, each)), k) for each in passed]))
    return found


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that are the reference, but for white space at either end.

    Raises:
        DataError: no rows, or as many references as not predictions.
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions, {len(references)} references: they go in pairs.")
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([predicted.strip() == reference.strip() for predicted, reference in pairs]))


_PARSE = """
import ast, warnings
warnings.simplefilter("ignore")
for source in {!r}:
    try:
        ast.parse(source)
        print(1, flush=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        print(0, flush=True)
"""
_BATCH = 500


def valid_syntax(sources: Sequence[str], timeout_s: float = 10.0) -> list[bool]:
    """Tell which texts are Python that can be parsed.

    The parser runs in the sandbox: there are texts that it crashes on, or needs hours for; they count as not valid.

    Args:
        sources: the texts.
        timeout_s: time for one text, and for up to 500 that are parsed together.

    Raises:
        SandboxError: this machine has no sandbox.
    """
    from interleaf.sandbox import run_program

    verdicts: list[bool] = []
    size = _BATCH
    while len(verdicts) < len(sources):
        batch = list(sources[len(verdicts) : len(verdicts) + size])
        output = run_program(_PARSE.format(batch), timeout_s=timeout_s).output
        # as far as it came; the text that it did not survive comes first in the next batch, then alone
        told = [line == "1" for line in output.split() if line in ("0", "1")]
        verdicts += told or [False] * (size == 1)
        size = 1 if not told and size > 1 else _BATCH
    return verdicts


_HEADLINES = (
    "accuracy",
    "f1_macro",
    "f1_micro",
    "precision_macro",
    "recall_macro",
    "bleu",
    "chrf",
    "ter",
    "exact_match",
    "valid_syntax",
    "loss",
    "perplexity",
)


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Keep the single numbers that a log line or a short table shows."""
    names = [name for name in _HEADLINES if name in metrics] + [name for name in metrics if name.startswith("pass@")]
    return {name: metrics[name] for name in names}
