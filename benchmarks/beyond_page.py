"""The tables of docs/beyond.md, of the figures that `python -m benchmarks.beyond` stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interleaf.metrics import interval
from interleaf.report.blocks import Figure
from interleaf.report.figures import Line, curves

MARK = "<!-- figures of {}: python -m benchmarks.beyond {} -->"
END = "<!-- end -->"
FIGURE = "beyond/grpo.svg"

Runs = list[dict[str, Any]]


def shown(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Return a mean with the half-width of its 95% interval."""
    one = interval(values)
    half = one["half_width"]
    return form.format(one["mean"]) + ("" if half is None else " ± " + form.format(half))


def beside(values: Sequence[float], plain: Sequence[float], form: str = "{:+.3f}") -> str:
    """Say what values are more than the plain ones of the same seeds or tasks, and whether that is sure."""
    more = interval([value - base for value, base in zip(values, plain, strict=True)])
    mean, half = more["mean"] or 0.0, more["half_width"] or 0.0
    verdict = "better" if mean - half > 0 else "worse" if mean + half < 0 else "no difference shown"
    return f"{form.format(mean)} ± {form.format(half).lstrip('+')}: {verdict}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def told(values: Sequence[float], plain: Sequence[float], form: str = "{:.3f}") -> list[str]:
    """Return what each seed gave, the mean, and what it is more than the plain one's, unless it is that."""
    more = "" if values is plain else beside(values, plain, form.replace(":", ":+"))
    return [", ".join(map(form.format, values)), shown(values, form), more]


def grid(found: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Return rows of means, each with what it is more than the first row's."""
    plain = next(iter(found.values()))
    return [
        [
            name,
            *(
                shown(values) + ("" if row is plain else f" ({beside(values, plain[column])})")
                for column, values in row.items()
            ),
        ]
        for name, row in found.items()
    ]


def of_arms(found: dict[str, Runs], measure: str = "F1", form: str = "{:.3f}") -> list[str]:
    """Tell of arms: what each seed gave, the mean, what it is more than the first arm's, the parameters."""
    by_arm = {name: [run["score"] for run in runs] for name, runs in found.items()}
    plain = next(iter(by_arm.values()))
    rows = [[name, *told(scores, plain, form), f"{found[name][0]['parameters']:,}"] for name, scores in by_arm.items()]
    return table(["", f"held-out {measure}, seeds 0, 1, 2", "mean", "more than the first row's", "parameters"], rows)


def of_translation(found: dict[str, Runs]) -> list[str]:
    """Tell of arms that translate."""
    return of_arms(found, "chrF", "{:.2f}")


def of_depth(found: dict[str, Runs]) -> list[str]:
    """Tell of the curve: quality and time at each depth."""
    by_depth = {name: [run["score"] for run in runs] for name, runs in found.items()}
    plain = next(iter(by_depth.values()))
    rows = [
        [name, *told(scores, plain), shown([run["time"] for run in found[name]])] for name, scores in by_depth.items()
    ]
    columns = ["adapter in", "held-out F1, seeds 0, 1, 2", "mean", "more than the first row's", "forward pass, ratio"]
    return table(columns, rows)


def of_multitask(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Tell of each task's F1."""
    lines = table(["held-out F1", *next(iter(found.values()))], grid(found))
    return [*lines, "", "Three seeds; in brackets, what it is more than each task's adapter trained alone."]


def of_transfer(found: dict[str, list[float]]) -> list[str]:
    """Tell of the new task's F1."""
    plain = next(iter(found.values()))
    rows = [[name, *told(values, plain)] for name, values in found.items()]
    columns = [
        "64 tweets to learn from, beginning at",
        "held-out F1, seeds 0, 1, 2",
        "mean",
        "more than the first row's",
    ]
    return table(columns, rows)


def of_meta(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Tell of the accuracy after some steps."""
    plain = next(iter(found.values()))
    tasks = len(next(iter(plain.values())))
    lines = table(["start", *(f"after {count} step{'s' * (count != '1')}" for count in plain)], grid(found))
    return [
        *lines,
        "",
        f"Mean accuracy over {tasks} tasks of held-out genres (two seeds), with the 95% interval over these; in "
        "brackets, what it is more than the random start's, task by task.",
    ]


def of_preferences(found: dict[str, Runs]) -> list[str]:
    """Tell of the pairs that were told rightly."""
    by_way = {way: [run["pairs"] for run in runs] for way, runs in found.items()}
    called = {"plain": "the preferred texts alone", "dpo": "DPO"}
    rows = [[called[way], *told(values, by_way["plain"])] for way, values in by_way.items()]
    columns = ["trained by", "held-out pairs told rightly, seeds 0, 1", "mean", "more than the first row's"]
    return [*table(columns, rows), "", "Both have the same 270 pairs, steps and adapter, and 30 others to tell apart."]


def of_rewards(found: dict[str, Runs]) -> list[str]:
    """Tell of the answers that parse, and draw the reward."""
    by_way = {way: [run["parse"] for run in runs] for way, runs in found.items()}
    called = {"plain": "the answers in the data", "grpo": "GRPO", "base": "nothing: the base"}
    every = {"plain": by_way["plain"], "base": [run["base"] for run in found["grpo"]], "grpo": by_way["grpo"]}
    rows = [[called[way], *told(values, every["plain"])] for way, values in every.items()]
    drawn = curve(found)
    columns = ["trained by", "held-out answers that parse, seeds 0, 1", "mean", "more than the first row's"]
    return [
        *table(columns, rows),
        "",
        "GRPO saw no answer; plain training had 320.",
        "",
        f"![{drawn.alt}]({FIGURE})",
        "",
        f"**{drawn.title}.** {drawn.reading}",
    ]


def curve(found: dict[str, Runs]) -> Figure:
    """Draw GRPO's reward, step by step, each the mean of five."""
    lines = []
    for seed, run in enumerate(found["grpo"]):
        rewards = run["rewards"]
        means = [sum(rewards[at : at + 5]) / len(rewards[at : at + 5]) for at in range(0, len(rewards), 5)]
        lines.append(Line(f"seed {seed}", [float(5 * i + 5) for i in range(len(means))], means))
    reading = "The share of answers that parse as Python with their prompt, mean of five steps."
    return curves("Reward while GRPO trains", lines, reading, "steps")


def of_memory(found: dict[str, float]) -> list[str]:
    """Tell of the peak memory."""
    plain = next(iter(found.values()))
    rows = [[name, f"{mib:,.0f} MiB", f"{mib / plain:.2f}"] for name, mib in found.items()]
    lines = table(["DPO with", "peak memory of the process", "ratio"], rows)
    return [*lines, "", "Five steps on the same pairs, batches of 8, float32."]


def of_search(found: dict[str, Any]) -> list[str]:
    """Tell of what the search recommends."""
    wanted = ("adapter", "adapter_options", "learning_rate")
    kept = {key: found["recommended"][key] for key in wanted if key in found["recommended"]}
    return [*of_arms(found["arms"]), "", f"It recommended `{kept}`."]


def of_commands(found: dict[str, float]) -> list[str]:
    """Tell how long each command of the page took."""
    return table(["command", "time"], [[f"`{line}`", f"{seconds:.0f} s"] for line, seconds in found.items()])


TOLD: dict[str, Callable[[Any], list[str]]] = {
    "widths": of_arms,
    "routed": of_arms,
    "depth": of_depth,
    "multitask": of_multitask,
    "transfer": of_transfer,
    "meta": of_meta,
    "preferences": of_preferences,
    "rewards": of_rewards,
    "memory": of_memory,
    "unions": of_arms,
    "unions_translation": of_translation,
    "search": of_search,
    "commands": of_commands,
}


def page(stored: dict[str, Any], text: str) -> str:
    """Return the page's text with its tables anew."""
    for part, found in stored.items():
        before, mark, rest = text.partition(MARK.format(part, part))
        made = found["environment"]
        versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "peft"))
        with_what = f"{made['cores']} cores, {made['device']}; {versions}."
        lines = [mark, "", *TOLD[part](found["figures"]), "", with_what, "", END]
        text = before + "\n".join(lines) + rest.partition(END)[2]
    return text


def write(stored: dict[str, Any], file: Path) -> None:
    """Write the page and its figure."""
    file.write_text(page(stored, file.read_text("utf-8")), "utf-8")
    if "rewards" in stored:
        (file.parent / FIGURE).parent.mkdir(exist_ok=True)
        (file.parent / FIGURE).write_text(curve(stored["rewards"]["figures"]).svg + "\n", "utf-8")
