"""A search as a page: what was found, what it costs, and which settings went with quality."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import TrialState

from interleaf.report import figures
from interleaf.report.blocks import RunReport, Section, Table, number


def page(study: optuna.Study, metric: str, chosen: optuna.trial.FrozenTrial, title: str) -> RunReport:
    """Tell of a study: the trials that no other beats in everything, all trials, what mattered."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    front = sorted(study.best_trials, key=lambda trial: trial.values[1])
    points = {
        "beaten": [(t.values[1], t.values[0]) for t in done if t not in front],
        "not beaten": [(t.values[1], t.values[0]) for t in front],
        "recommended": [(chosen.values[1], chosen.values[0])],
    }
    drawn = figures.points(
        "Quality against size",
        points,
        ("parameters of the adapter", f"dev {metric}"),
        "Each point is a trial. None is better than one that is not beaten in quality, size and latency at once.",
    )
    sections = [
        Section("Which to take", _which(metric), [drawn, Table(*_rows(front, metric))]),
        Section(
            "All trials", "Those stopped early fell behind the others.", [Table(*_rows(study.trials, metric))], True
        ),
    ]
    if mattered := _importance(study):
        text = "The share of the differences in quality that goes with a setting (fANOVA). Few trials tell little."
        sections.insert(1, Section("What mattered", text, [Table(["setting", "share"], mattered)]))
    overview = {"trials": str(len(study.trials)), f"dev {metric}": number(chosen.values[0])}
    record = {"trials": [{"params": t.params, "state": t.state.name, **t.user_attrs} for t in study.trials]}
    return RunReport(title, title, overview, record, sections)


def _which(metric: str) -> str:
    return (
        f"Quality is the best dev {metric} of a run; it chose among the trials, so on new data expect a little less. "
        "Latency is a forward pass with the adapter over one without."
    )


def _rows(trials: list[Any], metric: str) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    rows = []
    for trial in trials:
        values = trial.user_attrs.get("values", [None, None, None])
        given = [number(v) if isinstance(v, float) else str(v) for v in (trial.params.get(n, "–") for n in names)]
        state = {"COMPLETE": "", "PRUNED": "stopped early", "RUNNING": "running"}.get(trial.state.name, "failed")
        rows.append([str(trial.number), *map(number, values), *given, state])
    return ["trial", metric, "parameters", "latency", *names, ""], rows


def _importance(study: optuna.Study) -> list[list[str]]:
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0), target=lambda trial: trial.values[0]
        )
    except (ValueError, RuntimeError, ImportError):  # too few trials, or all alike
        return []
    return [[name, f"{share:.2f}"] for name, share in found.items()]
