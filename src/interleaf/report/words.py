"""What the figures of a report mean, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from interleaf.files import size
from interleaf.report.blocks import number


@dataclass(frozen=True)
class Word:
    """A measure: its name for people, which way is better, what it means."""

    name: str
    better: str
    meaning: str


MEASURES = {
    "accuracy": Word("accuracy", "higher", "share of rows that got the right label"),
    "f1_macro": Word("F1 (macro)", "higher", "precision and recall in one, every label counting the same"),
    "precision_macro": Word("precision (macro)", "higher", "of what was called a label, the share that was it"),
    "recall_macro": Word("recall (macro)", "higher", "of what was a label, the share that was found"),
    "loss": Word("loss", "lower", "how surprised the model is by the right answers"),
    "perplexity": Word("perplexity", "lower", "between how many tokens the model wavers, on average"),
    "bleu": Word("BLEU", "higher", "0 to 100: how many word sequences agree with the reference"),
    "chrf": Word("chrF", "higher", "0 to 100: how many letter sequences agree with the reference"),
    "ter": Word("TER", "lower", "edits that make the answer the reference, per 100 words"),
    "valid_syntax": Word("valid syntax", "higher", "share of answers that are a program Python can read"),
    "pass@1": Word("pass@1", "higher", "share of problems that an answer solves: it passes their tests"),
    "exact_match": Word("exact match", "higher", "share of answers that are the reference, letter by letter"),
}


def told(scores: Iterable[str]) -> list[str]:
    """Return the measures that a table names: micro averages of single labels are the accuracy again."""
    return [key for key in scores if key != "rows" and not key.endswith("_micro")]


def measure(key: str) -> Word:
    """Return what is known of a measure; a strange one keeps its key."""
    return MEASURES.get(key, Word(key.replace("_", " "), "", ""))


@dataclass(frozen=True)
class Cost:
    """A cost of training: its name, and how it is written with its unit."""

    name: str
    show: Callable[[float], str]


COSTS = {
    "trained_parameters": Cost("trained parameters", "{:,.0f}".format),
    "stored_bytes": Cost("stored", size),
    "seconds": Cost("training time", "{:,.1f} s".format),
    "seconds_to_best": Cost("time to the best score", "{:,.1f} s".format),
    "peak_memory_bytes": Cost("peak memory", size),
    "flops_per_step": Cost("GFLOP a step", lambda v: number(v / 1e9)),
}


FORGETTING_COLUMNS = ["before", "after, switched on", "after, switched off", "share lost"]
FORGETTING_READING = "Grey is what the base could before. What stays as far as grey was not forgotten."


def forgetting_text(measure: str) -> str:
    """Say what forgetting is, and what it was measured by."""
    return (
        f"Learning something new can cost what was known before. Measured by: {measure}. An adapter can be switched "
        "off, and the base is as it was; every weight trained at once cannot. A negative share lost is a gain."
    )
