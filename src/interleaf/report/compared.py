"""The report of a comparison."""

from __future__ import annotations

import math
from typing import Any

from interleaf.errors import StoreError
from interleaf.metrics import interval
from interleaf.report import figures
from interleaf.report.blocks import RunReport, Section, Table, number
from interleaf.report.shared import again, facts, line, pair, settings
from interleaf.report.words import COSTS, Cost, measure, told

ARMS = {
    "adapter": "the adapter, base frozen",
    "lora": "LoRA, base frozen",
    "full": "every weight of the base",
    "head": "the head alone, base frozen",
}


def compared(path: str, record: dict[str, Any]) -> RunReport:
    """Tell of a comparison what `compare.json` holds.

    Raises:
        StoreError: it is no comparison.
    """
    if missing := [key for key in ("arms", "runs", "settings") if not record.get(key)]:
        raise StoreError(f"{path} is damaged: the comparison has no {missing[0]!r}.")
    arms = record["arms"]
    sections = [
        _about(record),
        _quality(arms),
        _costs(arms, record["runs"]),
        _curves(record["runs"]),
        _forgetting(arms, record["runs"]),
        again(record.get("command"), record.get("environment") or {}),
        *settings({"Settings of the runs": record["settings"]}),
    ]
    run = record["settings"]
    lead = arms.get("adapter") or next(iter(arms.values()))
    overview = {
        "task": str(run.get("task", "–")),
        "base": str(run.get("base", "–")),
        "trained parameters": number(lead["costs"]["trained_parameters"]),
        "stored": COSTS["stored_bytes"].show(lead["costs"]["stored_bytes"]),
        **{measure(k).name: pair(lead["scores"][k]) for k in _shown(arms)},
    }
    title = f"Comparison of {', '.join(arms)}"
    return RunReport(title, path, overview, record, [s for s in sections if s is not None])


def _about(record: dict[str, Any]) -> Section:
    run, arms = record["settings"], record["arms"]
    seeds = next(iter(arms.values()))["seeds"]
    rows = {
        "task": run.get("task"),
        "base": run.get("base"),
        "training data": run.get("train"),
        "held-out data": run.get("dev") or f"{run['dev_fraction']:.0%} of the training data",
        "rows trained on": number(run["limit"]) if run.get("limit") else "all",
        "passes over the data": number(run.get("epochs")),
        "seeds": ", ".join(map(str, seeds)),
        **{name: ARMS.get(name, "") for name in arms},
    }
    text = "The same task, data and number of passes, learnt in several ways. Each way was run with each seed."
    return Section("What was compared", text, [facts(rows)])


def _shown(arms: dict[str, Any]) -> list[str]:
    """Return the scores that are drawn: of a classifier's many averages the two usual ones."""
    names = told(next(iter(arms.values()))["scores"])
    return [n for n in names if n in ("accuracy", "f1_macro")] or names


def _interval_reading(arms: dict[str, Any]) -> str:
    count = len(next(iter(arms.values()))["seeds"])
    if count < 2:
        return "One seed was run, so there is no interval, and chance may decide."
    return f"The thin line is the 95% interval of the mean over {count} seeds: where lines overlap, chance may decide."


def _quality(arms: dict[str, Any]) -> Section:
    names = told(next(iter(arms.values()))["scores"])
    rows = [[measure(n).name, *[pair(arm["scores"][n]) for arm in arms.values()], measure(n).better] for n in names]
    drawn = [_score_bars(arms, name) for name in _shown(arms)]
    text = "Means over the seeds, measured on rows that were not trained on. After ±: half of the 95% interval."
    return Section("Quality", text, [Table(["measure", *arms, "better when"], rows), *drawn])


def _score_bars(arms: dict[str, Any], name: str) -> Any:
    made = [
        figures.Bar(arm, v["mean"], _half(v["half_width"]), pair(v))
        for arm, v in ((arm, of["scores"][name]) for arm, of in arms.items())
    ]
    word = measure(name)
    better = {"higher": "Longer is better. ", "lower": "Shorter is better. "}.get(word.better, "")
    return figures.bars(word.name[:1].upper() + word.name[1:], made, better + _interval_reading(arms))


def _half(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _costs(arms: dict[str, Any], runs: list[dict[str, Any]]) -> Section:
    measured = {key: {arm: _cost(runs, arm, key) for arm in arms} for key in COSTS}
    rows = [[COSTS[key].name, *[pair(v, COSTS[key].show) for v in of.values()]] for key, of in measured.items()]
    drawn = [
        _cost_bars(COSTS[key], of, _interval_reading(arms))
        for key, of in measured.items()
        if all(v["mean"] == v["mean"] for v in of.values())
    ]
    text = "What each way takes: disk, time, memory, arithmetic. Less is better everywhere."
    return Section("Cost", text, [Table(["", *arms], rows), *drawn])


def _cost(runs: list[dict[str, Any]], arm: str, key: str) -> dict[str, float]:
    """Return the mean of a cost with its interval; what never varies has none."""
    values = [math.nan if run[key] is None else float(run[key]) for run in runs if run["arm"] == arm]
    found = interval(values)
    return {**found, "half_width": math.nan} if len(set(values)) == 1 else found


def _cost_bars(cost: Cost, of: dict[str, dict[str, float]], reading: str) -> Any:
    made = [figures.Bar(arm, v["mean"], v["half_width"], pair(v, cost.show)) for arm, v in of.items()]
    varies = any(v["half_width"] == v["half_width"] for v in of.values())
    reading = f"Shorter is better. {reading}" if varies else "Shorter is better. It is the same with every seed."
    return figures.bars(cost.name[:1].upper() + cost.name[1:], made, reading, cost.show)


def _curves(runs: list[dict[str, Any]]) -> Section | None:
    keys = [k for k in ("eval_f1_macro", "eval_loss") if any(k in e for run in runs for e in run["history"])]
    reading = {
        "eval_f1_macro": "Higher is better; a line for each seed, the ways of training in different colours.",
        "eval_loss": "Lower is better; a line that rises again has begun to learn rows by heart.",
    }
    drawn = [
        figures.curves(
            f"{measure(key.removeprefix('eval_')).name} on held-out data".capitalize(),
            [made for made in (line(run["arm"], run["history"], key) for run in runs) if made.x],
            reading[key],
        )
        for key in keys
    ]
    return Section("Learning curves", "How each way got better, pass by pass.", list(drawn)) if drawn else None


def _forgetting(arms: dict[str, Any], runs: list[dict[str, Any]]) -> Section | None:
    known = {name: arm["forgetting"] for name, arm in arms.items() if arm.get("forgetting")}
    if not known:
        return None
    what = next(iter(known.values()))["measure"]
    groups = {name: _stages(name, of, runs) for name, of in known.items()}
    rows = [[name, *_cells(of, groups[name])] for name, of in known.items()]
    table = Table(["", "before", "after, switched on", "after, switched off", "share lost"], rows)
    reading = "Grey is what the base could before. What stays as far as grey was not forgotten."
    text = (
        f"Learning something new can cost what was known before. Measured by: {what}. An adapter can be switched "
        "off, and the base is as it was; every weight trained at once cannot. A negative share lost is a gain."
    )
    return Section("Forgetting", text, [table, figures.grouped(what[:1].upper() + what[1:], groups, reading)])


def _stages(arm: str, of: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, float]:
    off = [run["forgetting"]["off"] for run in runs if run["arm"] == arm and run.get("forgetting")]
    off = [value for value in off if value is not None]
    stages = {"before": of["before"]["mean"], "after, on": of["on"]["mean"]}
    return {**stages, "after, off": sum(off) / len(off)} if off else stages


def _cells(of: dict[str, Any], stages: dict[str, float]) -> list[str]:
    lost = {k: v if k != "half_width" or v is None else 100 * v for k, v in of["lost"].items()}
    share = pair({**lost, "mean": 100 * of["lost"]["mean"]}, lambda v: f"{v:.1f}%")
    return [
        pair(of["before"]),
        pair(of["on"]),
        number(stages["after, off"]) if "after, off" in stages else "cannot be",
        share,
    ]
