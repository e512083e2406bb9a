"""The report of one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interleaf.files import size
from interleaf.report import figures
from interleaf.report.blocks import Example, Figure, RunReport, Section, Table, duration, number, short
from interleaf.report.shared import again, facts, held_out, line, settings
from interleaf.report.words import FORGETTING_COLUMNS, FORGETTING_READING, forgetting_text, measure, told

HEADLINES = (
    "accuracy",
    "f1_macro",
    "loss",
    "perplexity",
    "bleu",
    "chrf",
    "ter",
    "exact_match",
    "valid_syntax",
    "pass@1",
)


def trained(path: str, config: dict[str, Any], record: dict[str, Any], size_bytes: int | None) -> RunReport:
    """Tell of an adapter folder what its two JSON files hold; what an older version did not store is left out."""
    metrics = record.get("metrics") or {}
    sections = [
        _about(config, record, size_bytes),
        _results(metrics),
        _curves(record.get("history") or []),
        _confusion(metrics),
        _per_class(metrics),
        _forgetting(metrics.get("forgetting")),
        _examples(record.get("examples") or []),
        again(record.get("command"), record.get("environment") or {}),
        *settings({"Settings of the run": record.get("run"), "Settings of the adapter": config}),
    ]
    plan, task = record.get("plan") or {}, (record.get("task") or {}).get("name")
    overview = {
        "task": task or "–",
        "base": str(config.get("base_model_name_or_path") or "–"),
        "trained parameters": number(_trained(plan)),
        "stored": size(size_bytes) if size_bytes is not None else "–",
        **{measure(k).name: number(metrics[k]) for k in HEADLINES if k in metrics},
    }
    kept = {**record, "adapter": config, "size_bytes": size_bytes}
    title = f"Adapter {short(Path(path).resolve().name, 60)}"
    return RunReport(title, path, overview, kept, [s for s in sections if s is not None])


def _trained(plan: dict[str, Any]) -> int | None:
    return plan["adapter_parameters"] + plan["head_parameters"] if plan else None


def _about(config: dict[str, Any], record: dict[str, Any], size_bytes: int | None) -> Section:
    run, plan, base = record.get("run") or {}, record.get("plan") or {}, record.get("base") or {}
    share = f", {100 * _share(plan):.2f}% of the base" if plan else ""
    rows = {
        "name": record.get("name"),
        "task": (record.get("task") or {}).get("name"),
        "base (frozen)": config.get("base_model_name_or_path"),
        "architecture": base.get("architecture"),
        "size of the base": f"{plan['base_parameters']:,} parameters" if plan else None,
        "training data": run.get("train"),
        "held-out data": held_out(run),
        "rows": f"{plan['train_rows']:,} to train on, {plan['dev_rows']:,} held out" if plan else None,
        "left out": ", ".join(f"{n:,} rows {why}" for why, n in (plan.get("dropped") or {}).items()),
        "labels": ", ".join(plan.get("labels") or ((record.get("task") or {}).get("state") or {}).get("labels") or []),
        "adapter": " ".join(filter(None, [run.get("adapter"), f"({str(config['peft_type']).lower()})"])),
        "size of the adapter": f"{plan['adapter_parameters']:,} parameters{share}" if plan else None,
        "head": f"{plan['head_parameters']:,} parameters" if plan.get("head_parameters") else None,
        "places": f"{len(plan['sites'])} in the base, the first {plan['sites'][0]}" if plan.get("sites") else None,
        "file": size(size_bytes) if size_bytes is not None else None,
        "training": f"{plan['steps']:,} steps in {_time(record)}" if plan else None,
        "fingerprint of the base": base.get("weights"),
    }
    text = "A small adapter was trained inside a large model; the model itself, the base, was not changed."
    return Section("What was trained", text, [facts(rows)])


def _share(plan: dict[str, Any]) -> float:
    return float(plan["adapter_parameters"] / plan["base_parameters"])


def _time(record: dict[str, Any]) -> str:
    return duration(record["seconds"]) if record.get("seconds") is not None else "a time not stored"


def _results(metrics: dict[str, Any]) -> Section | None:
    """Put each figure beside that of the untouched base or, of a classifier, of the most frequent label."""
    mine = {k: metrics[k] for k in told(metrics) if isinstance(metrics[k], int | float)}
    if not mine:
        return None
    other, name = metrics.get("base"), "base alone"
    if other is None and "confusion_matrix" in metrics:
        other, name = always_the_most_frequent(metrics["confusion_matrix"]), "most frequent label"
    columns = ["measure", *([name] if other else []), "with adapter", "better when", "what it means"]
    rows = [
        [word.name, *([number(other.get(key))] if other else []), number(value), word.better, word.meaning]
        for key, value in mine.items()
        for word in (measure(key),)
    ]
    text = f"Measured on {metrics['rows']:,} rows that were not trained on." if "rows" in metrics else ""
    if name == "most frequent label" and other:
        text += " Beside it, what always guessing the most frequent label would reach."
    elif other:
        text += " Beside it, the same base without the adapter."
    return Section("Results on held-out data", text, [Table(columns, rows)])


def always_the_most_frequent(matrix: list[list[int]]) -> dict[str, float]:
    """Return what a classifier reaches that always says the most frequent label of the rows measured."""
    share = max(sum(row) for row in matrix) / (sum(map(sum, matrix)) or 1)
    count = len(matrix)
    macro = {"precision_macro": share / count, "recall_macro": 1 / count, "f1_macro": 2 * share / (1 + share) / count}
    return {"accuracy": share, **macro}


def _curves(history: list[dict[str, Any]]) -> Section | None:
    loss = [line("training", history, "loss"), line("held-out", history, "eval_loss")]
    drawn = [one for one in loss if one.x]
    made: list[Any] = []
    if drawn:
        reading = "Lower is better. If held-out rises while training still falls, the adapter learns rows by heart."
        made.append(figures.curves("Loss", drawn, reading))
    keys = [k for k in ("eval_accuracy", "eval_f1_macro") if any(k in entry for entry in history)]
    if keys:
        lines = [line(measure(k.removeprefix("eval_")).name, history, k) for k in keys]
        reading = "Higher is better; the best pass over the data was kept."
        made.append(figures.curves("Quality on held-out data", lines, reading))
    return Section("Learning curves", "How the adapter got better while it was trained.", made) if made else None


def _confusion(metrics: dict[str, Any]) -> Section | None:
    matrix = metrics.get("confusion_matrix")
    if not matrix:
        return None
    labels = list(metrics["per_class"])
    reading = "Each row is a true label. What lies on the diagonal is right; darker means a larger share of the row."
    figure: Figure = figures.confusion("Confusion matrix", labels, matrix, reading)
    pairs = [
        (matrix[i][j], labels[i], labels[j], matrix[i][j] / sum(matrix[i]))
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and matrix[i][j]
    ]
    worst = [[a, b, f"{n:,}", f"{share:.1%}"] for n, a, b, share in sorted(pairs, key=lambda p: -p[0])[:10]]
    blocks: list[Any] = [figure]
    if worst:
        blocks.append(Table(["true label", "was called", "rows", "share of the label"], worst))
    return Section("Confusion matrix", "Which labels are taken for which.", blocks)


def _per_class(metrics: dict[str, Any]) -> Section | None:
    classes = metrics.get("per_class")
    if not classes:
        return None
    names = ("precision", "recall", "f1", "support")
    rows = [[label, *[number(of[name]) for name in names]] for label, of in classes.items()]
    text = (
        "Precision: of what was called the label, the share that was it. Recall: of what was the label, the share "
        "that was found. F1: both in one."
    )
    return Section("Label by label", text, [Table(["label", "precision", "recall", "F1", "rows"], rows)])


def _forgetting(of: dict[str, Any] | None) -> Section | None:
    if of is None:
        return None
    stages = {"before": of["before"], "after, on": of["on"], "after, off": of["off"]}
    table = Table(["", *FORGETTING_COLUMNS], [["adapter", *map(number, stages.values()), f"{of['lost']:.1%}"]])
    figure = figures.grouped(of["measure"].capitalize(), {"adapter": stages}, FORGETTING_READING)
    return Section("Forgetting", forgetting_text(of["measure"]), [table, figure])


def _examples(examples: list[dict[str, Any]]) -> Section | None:
    if not examples:
        return None
    if any("score" in row for row in examples):
        text = "Held-out rows: the surest mistakes first, at most half of all shown, then rows it got right."
        return Section("Examples", text, [_classified(row) for row in examples])
    text = "Held-out rows, evenly spread: what was given, what was expected, and both answers."
    return Section("Examples", text, [_answered(row) for row in examples])


def _classified(row: dict[str, Any]) -> Example:
    verdict = "right" if row["answer"] == row["expected"] else "wrong"
    said = f"{row['answer']} ({row['score']:.0%} sure)"
    return Example({"text": row["input"], "true label": row["expected"], "predicted": said}, verdict)


def _answered(row: dict[str, Any]) -> Example:
    base = {"base alone": row["base"]} if "base" in row else {}
    return Example({"given": row["input"], "expected": row["expected"], **base, "with adapter": row["answer"]})
