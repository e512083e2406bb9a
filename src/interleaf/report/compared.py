"""The report of a comparison."""

from __future__ import annotations

import math
from typing import Any

from interleaf.errors import StoreError
from interleaf.report import figures, tables
from interleaf.report.blocks import RunReport, Section, number, pair, short
from interleaf.report.shared import again, facts, held_out, line, settings
from interleaf.report.words import COSTS, FORGETTING_READING, Cost, forgetting_text, measure, told

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
        _costs(arms),
        _curves(record["runs"]),
        _forgetting(arms),
        again(record.get("command"), record.get("environment") or {}),
        *settings({"Settings of the runs": record["settings"]}),
    ]
    run = record["settings"]
    lead = arms.get("adapter") or next(iter(arms.values()))
    overview = {
        "task": str(run.get("task", "–")),
        "base": str(run.get("base", "–")),
        "trained parameters": pair(lead["costs"]["trained_parameters"]),
        "stored": pair(lead["costs"]["stored_bytes"], COSTS["stored_bytes"].show),
        **{measure(k).name: pair(lead["scores"][k]) for k in _shown(arms)},
    }
    title = f"Comparison of {', '.join(arms)} on {short(str(run.get('train')), 40)}"
    return RunReport(title, path, overview, record, [s for s in sections if s is not None])


def _about(record: dict[str, Any]) -> Section:
    run, arms = record["settings"], record["arms"]
    seeds = next(iter(arms.values()))["seeds"]
    rows = {
        "task": run.get("task"),
        "base": run.get("base"),
        "training data": run.get("train"),
        "held-out data": held_out(run),
        "rows trained on": number(run["limit"]) if run.get("limit") else "all",
        "rows measured on": number(record["runs"][0]["metrics"].get("rows")),
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
    text = (
        "Means over the seeds, measured on rows that neither trained nor chose the best pass. "
        "After ±: half of the 95% interval."
    )
    return Section("Quality", text, [tables.quality(arms), *[_score_bars(arms, name) for name in _shown(arms)]])


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


def _costs(arms: dict[str, Any]) -> Section:
    drawn = [
        _cost_bars(of, {arm: given["costs"][key] for arm, given in arms.items()}, _interval_reading(arms))
        for key, of in COSTS.items()
        if all(given["costs"][key]["mean"] is not None for given in arms.values())
    ]
    text = "What each way takes: disk, time, memory, arithmetic. Less is better everywhere."
    return Section("Cost", text, [tables.cost(arms), *drawn])


def _cost_bars(cost: Cost, of: dict[str, dict[str, Any]], reading: str) -> Any:
    varies = any(v["half_width"] for v in of.values())
    made = [figures.Bar(arm, v["mean"], _half(v["half_width"] or None), pair(v, cost.show)) for arm, v in of.items()]
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


def _forgetting(arms: dict[str, Any]) -> Section | None:
    table = tables.forgetting(arms)
    if table is None:
        return None
    known = {name: arm["forgetting"] for name, arm in arms.items() if arm.get("forgetting")}
    what = next(iter(known.values()))["measure"]
    stages = {"before": "before", "on": "after, on", "off": "after, off"}
    groups = {name: {said: of[k]["mean"] for k, said in stages.items() if of[k]} for name, of in known.items()}
    figure = figures.grouped(what.capitalize(), groups, FORGETTING_READING)
    return Section("Forgetting", forgetting_text(what), [table, figure])
