"""What training and using adapters costs, beside PEFT, AdapterHub, full fine-tuning and hand-written hooks.

python benchmarks/peers.py                     # everything, some two hours on two cores with nothing else running
python benchmarks/peers.py steps forward       # some of it
python benchmarks/peers.py --small             # a quick look, printed and not stored (`make bench`)
python benchmarks/peers.py --page              # the page again, from the stored figures

PEFT, the hooks and full fine-tuning run in the environment of this script, AdapterHub's library, which pins an older
transformers, in one that is made for it in out/peers. Writes benchmarks/results/peers-*.json and docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interleaf import bundled
from interleaf.record import environment
from interleaf.report.blocks import Figure, number
from interleaf.report.figures import Line, curves

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
STORED, OUT = ROOT / "benchmarks" / "results", ROOT / "out" / "peers"
CACHE = OUT / "cache"
WORKER = Path(__file__).parent / "peer.py"
ADAPTERHUB = (["torch==2.13.0"], ["adapters==1.3.0", "accelerate", "datasets", "huggingface_hub<1"])

TASKS: dict[str, dict[str, Any]] = {
    "movies": {"data": "movie-reviews", "train": 800, "dev": 400, "max_length": 64, "epochs": 3},
    "topics": {"data": "bbc", "train": 250, "dev": 300, "max_length": 64, "epochs": 4},
}
# tried with a seed of its own; the one with the highest accuracy is used
RATES = {"peft": (1e-3, 3e-3), "adapters": (1e-3, 3e-3), "full": (5e-5,)}
OURS: dict[str, list[dict[str, Any]]] = {
    "movies": [
        {"adapter_options": {"reduction_factor": 12, "layers": "all"}, "learning_rate": 3e-3},
        {"adapter_options": {"reduction_factor": 8, "layers": "last:4"}, "learning_rate": 4e-3, "epochs": 4},
    ],
    "topics": [
        {"adapter_options": {"reduction_factor": 8, "layers": "last:2"}, "learning_rate": rate, "epochs": 8}
        for rate in (3e-3, 4e-3)
    ],
}
COHORT = {"adapter": "houlsby", "adapter_options": {"reduction_factor": 12, "layers": "last:2"}, "learning_rate": 3e-3}
SEEDS, TUNING_SEED = (0, 1, 2), 100
LABELS = {"interleaf": "interleaf", "peft": "PEFT, LoRA", "adapters": "AdapterHub", "full": "full fine-tuning"}


def worker(name: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Do a job in a process of its own and return what it says."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"job-{os.getpid()}.json"
    file.write_text(json.dumps(job), "utf-8")
    python = adapterhub() if name == "adapters" else Path(sys.executable)
    shutil.rmtree(CACHE, ignore_errors=True)  # no states stored before
    environ = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "INTERLEAF_CACHE": str(CACHE)}
    done = subprocess.run(
        [str(python), str(WORKER), name, str(file)],
        env={**os.environ, **environ, "STARTED": str(time.time())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} {job['job']}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def one(said: list[dict[str, Any]], key: str) -> Any:
    """Return what a process said of one thing."""
    return next(line[key] for line in said if key in line)


def adapterhub() -> Path:
    """Return the Python that has AdapterHub's library, made when there is none."""
    python = OUT / "adapterhub" / "bin" / "python"
    if not (OUT / "adapterhub" / "made").exists():
        print("making an environment for AdapterHub's library", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(OUT / "adapterhub")], check=True)
        for packages in ADAPTERHUB:  # torch first: a build that is at hand is taken
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (OUT / "adapterhub" / "made").touch()
    return python


def common(**more: Any) -> dict[str, Any]:
    """Return what all jobs are told."""
    return {"base": str(bundled.resolve("bundled:minilm")), "labels": 2, "threads": os.cpu_count(), **more}


# ---- time to an accuracy


def learning_job(task: str, seed: int, small: bool) -> dict[str, Any]:
    """Write a task's rows for a seed, and describe the job."""
    told = TASKS[task]
    lines = Path(bundled.resolve(f"bundled:{told['data']}")).read_text("utf-8").splitlines()
    rows = list({(row := json.loads(line))["text"]: row for line in lines}.values())
    names = sorted({row["label"] for row in rows})
    random.Random(seed).shuffle(rows)
    share = told["train"] // len(names) // (8 if small else 1)
    train = [row for name in names for row in [r for r in rows if r["label"] == name][:share]]
    used = {row["text"] for row in train}
    dev = [row for row in rows if row["text"] not in used][: told["dev"] // (8 if small else 1)]
    folder = OUT / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", train), ("dev", dev)):
        text = "".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in chosen)
        (folder / f"{task}-{seed}-{part}.jsonl").write_text(text, "utf-8")
    return common(
        job="learn",
        train=str(folder / f"{task}-{seed}-train.jsonl"),
        dev=str(folder / f"{task}-{seed}-dev.jsonl"),
        labels=len(names),
        names=names,
        max_length=told["max_length"],
        epochs=told["epochs"],
        batch_size=32,
        seed=seed,
    )


def learned(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one training and return its curve and its memory."""
    said = worker(name, job)
    curve = [(one["seconds"], one["accuracy"]) for one in said if "accuracy" in one]
    found: dict[str, Any] = {"curve": curve, "best": max(a for _, a in curve)}
    for one in said:
        found |= {key: one[key] for key in ("peak_mib", "trunk_cache") if key in one}
    return found


def learn(task: str, small: bool) -> dict[str, Any]:
    """Tune each way alike, then run all of them in turn for each seed."""
    job = learning_job(task, TUNING_SEED, small)
    tries = {name: [{"learning_rate": rate} for rate in rates] for name, rates in RATES.items()} | {
        "interleaf": [{"adapter": "houlsby", **one} for one in OURS[task]]
    }
    tuned, tuning = {}, {}
    for name, settings in tries.items():
        scores = [learned(name, {**job, **one})["best"] for one in (settings[:1] if small else settings)]
        tuning[name] = [{**one, "accuracy": score} for one, score in zip(settings, scores, strict=False)]
        tuned[name] = max(tuning[name], key=lambda one: one["accuracy"])
        print(task, name, tuning[name], file=sys.stderr, flush=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in tries}
    for seed in SEEDS[: 1 if small else None]:
        for name in tries:
            settings = {k: v for k, v in tuned[name].items() if k != "accuracy"}
            found = learned(name, {**learning_job(task, seed, small), **settings})
            print(task, name, seed, found, file=sys.stderr, flush=True)
            runs[name].append(found)
    return {"tuning": tuning, "tuned": tuned, "runs": runs}


def reached(curve: Sequence[Sequence[float]], accuracy: float) -> float | None:
    """Return the seconds after which a run was as good as an accuracy, if it was."""
    return next((seconds for seconds, score in curve if score >= accuracy), None)


def races(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each seed: the accuracy of the best of PEFT and AdapterHub, and who had it when."""
    found = []
    for seed in range(len(runs["interleaf"])):
        of = {name: runs[name][seed] for name in runs}
        target = max(of[name]["best"] for name in ("peft", "adapters"))
        times = {name: reached(one["curve"], target) for name, one in of.items()}
        fastest = min(t for name in ("peft", "adapters") if (t := times[name]) is not None)
        ours = times["interleaf"]
        found.append({"target": target, "times": times, "ratio": None if ours is None else fastest / ours})
    return found


# ---- the other parts


def steps(small: bool) -> dict[str, Any]:
    """Time training steps, those of one environment in one process, in turn."""
    rounds = 3 if small else 15
    ours = worker("floor", common(job="steps", libraries=["floor", "interleaf", "peft", "full"], rounds=rounds))
    hub = worker("adapters", common(job="steps", libraries=["floor", "adapters"], rounds=rounds))
    return {"here": one(ours, "step"), "adapterhub": one(hub, "step")}


def compiled(small: bool) -> dict[str, Any]:
    """Time the first step and later ones, with torch.compile and without."""
    said = worker("floor", common(job="steps", libraries=["interleaf", "compiled"], rounds=2 if small else 8))
    return {"steps": one(said, "step"), "first": {k: v for o in said if "first" in o for k, v in o["first"].items()}}


def forward(small: bool) -> dict[str, Any]:
    """Time forward passes likewise."""
    rounds = 5 if small else 40
    ours = worker("floor", common(job="forward", libraries=["floor", "interleaf", "peft"], rounds=rounds))
    hub = worker("adapters", common(job="forward", libraries=["adapters"], rounds=rounds))
    return {"here": one(ours, "forward"), "adapterhub": one(hub, "forward")}


def rows(small: bool) -> dict[str, Any]:
    """Time batches whose rows have several adapters."""
    job = common(job="rows", rounds=3 if small else 15)
    return {name: one(worker(name, job), "rows") for name in ("interleaf", "peft", "adapters")}


def files(small: bool) -> dict[str, Any]:
    """Time attaching, loading, switching."""
    many = {"interleaf": 1000, "peft": 100, "adapters": 100}
    rounds = 3 if small else 20
    return {
        name: worker(name, common(job="files", rounds=rounds, many=20 if small else count))[0]
        for name, count in many.items()
    }


def imports(small: bool) -> dict[str, Any]:
    """Time imports, in turn."""
    names = ("interleaf", "peft", "adapters", "full")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if small else 5):
        for name in names:
            found[name].append(worker(name, common(job="imports"))[0]["seconds"])
    return found


def cohort(small: bool) -> dict[str, Any]:
    """Time eight runs at once, eight one after the other with the same stored states, and runs of PEFT."""
    job = learning_job("topics", 0, small)
    count = 2 if small else 8
    rates = [round(1e-3 * 1.3**i, 6) for i in range(count)]
    config = OUT / "cohort.yaml"
    wanted = {**COHORT, "base": job["base"], "out": str(OUT / "cohort"), "examples": 0, "overwrite": True}
    for key in ("train", "dev", "max_length", "epochs", "batch_size"):
        wanted[key] = job[key]
    config.write_text(json.dumps(wanted), "utf-8")  # JSON is YAML
    interleaf = str(Path(sys.executable).parent / "interleaf")
    train = [interleaf, "train", str(config), "--json"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)  # stores the states
    found: dict[str, Any] = {"members": count}
    start = time.time()
    subprocess.run(
        [interleaf, "cohort", str(config), "--vary", f"learning_rate={rates}", "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found["cohort"] = time.time() - start
    start = time.time()
    for rate in rates:
        subprocess.run([*train, "--learning-rate", str(rate)], check=True, stdout=subprocess.DEVNULL)
    found["alone"] = time.time() - start
    start = time.time()
    for _ in range(2):
        worker("peft", {**job, "learning_rate": 1e-3})
    found["peft"] = (time.time() - start) / 2 * count
    return found


PARTS = {
    "movies": lambda small: learn("movies", small),
    "topics": lambda small: learn("topics", small),
    "steps": steps,
    "compiled": compiled,
    "forward": forward,
    "rows": rows,
    "files": files,
    "imports": imports,
    "cohort": cohort,
}


# ---- the page


def page(stored: dict[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """Return the page, and its figures by file name."""
    figures: dict[str, str] = {}
    lines = ["# Performance", "", "Made by `python benchmarks/peers.py`; `make bench` is a quick look.", ""]
    made = next(iter(stored.values()))["environment"]
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "peft"))
    lines += [
        f"{made['cores']} cores, {made['device']}, {made['threads']} threads, nothing else running; {versions}; "
        "AdapterHub's library 1.3.0 with the transformers 4.57 that it pins, in an environment of its own. MiniLM "
        "(6 layers, 384 wide), float32. What is compared was run in one go, in turn.",
    ]
    for name, tell in SECTIONS.items():
        if name in stored:
            lines += ["", *tell({k: v for k, v in stored[name].items() if k != "environment"}, figures)]
    return "\n".join(lines).rstrip() + "\n", figures


def of_task(title: str, task: str) -> Any:
    """Return what tells of a training task."""
    told = TASKS[task]

    def tell(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
        runs, raced = found["runs"], races(found["runs"])
        rows = []
        for name, label in LABELS.items():
            own = runs[name]
            times = [race["times"][name] for race in raced]
            rows.append(
                [
                    label,
                    number(found["tuned"][name]["learning_rate"]),
                    mean([one["best"] for one in own], "{:.4f}"),
                    mean([one["curve"][0][0] for one in own], "{:.1f} s"),
                    mean([one["curve"][-1][0] for one in own], "{:.1f} s"),
                    ", ".join("never" if t is None else f"{t:.1f} s" for t in times),
                    f"{max(one['peak_mib'] for one in own):,.0f} MiB",
                ]
            )
        lines = [
            Line(LABELS[name], [x for x, _ in one["curve"]], [y for _, y in one["curve"]])
            for name in LABELS
            for one in runs[name]
        ]
        drawn = curves(
            f"Accuracy over time: {title}", lines, "Each line is a seed; its points are the passes.", "seconds"
        )
        targets = ["{:.4f}".format(race["target"]) for race in raced]
        ratios = ["– (never reached here)" if (r := race["ratio"]) is None else f"{r:.2f}" for race in raced]
        ours = found["tuned"]["interleaf"]
        asked = f"{told['train']:,} rows to train on, {told['dev']:,} held out, {told['epochs']} passes at most"
        tried = " or ".join(
            f"{one.get('epochs', told['epochs'])} passes with `{one['adapter_options']['layers']}` at "
            f"{one['learning_rate']:g}"
            for one in OURS[task]
        )
        return [
            f"## Time to an accuracy: {title}",
            "",
            f"{asked}, three seeds, each run a process: the seconds count from its start and hold imports, loading, "
            f"tokenizing, running the frozen layers once and measuring after each pass. interleaf: `houlsby` in "
            f"`{ours['adapter_options']['layers']}`, {ours.get('epochs', told['epochs'])} passes, chosen by that seed "
            f"too ({tried}); states not stored before. PEFT: LoRA of rank 12 at query and value. AdapterHub: "
            "`seq_bn`. All get batches of 32 rows of like length. Learning rates: the better of 1e-3 and 3e-3, by a "
            "seed of its own; 5e-5 for full fine-tuning. The accuracy to reach is, for each seed, the best that PEFT "
            "or AdapterHub had.",
            "",
            *table(
                [
                    "",
                    "rate",
                    "best accuracy",
                    "first pass",
                    "last pass",
                    "seconds to the accuracy, by seed",
                    "peak memory",
                ],
                rows,
            ),
            "",
            f"To reach: {', '.join(targets)}. The fastest of PEFT and AdapterHub takes {', '.join(ratios)} times as "
            "long as interleaf (expected 5).",
            "",
            *shown(drawn, f"{task}.svg", figures),
        ]

    return tell


def told_steps(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of training steps."""
    here, hub = found["here"], found["adapterhub"]
    rows = [[name, *against(here, key, "floor")] for name, key in STEPS if key in here]
    rows.append(["AdapterHub, `seq_bn`", *against(hub, "adapters", "floor")])
    return [
        "## A training step",
        "",
        "32 rows of 64 tokens, adapters in all layers, no cache: forward, backward, AdamW. The floor is the same "
        "adapters written by hand, a hook behind each feed-forward sublayer; each is compared with the floor in its "
        "own environment.",
        "",
        *table(["", "seconds", "times the floor"], rows),
    ]


def told_compiled(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of torch.compile."""
    first, ratio = found["first"], against(found["steps"], "compiled", "interleaf")[1]
    return [
        "## torch.compile",
        "",
        f"The same step compiled: {ratio} times the time of the uncompiled one, after a first step of "
        f"{first['compiled']:.0f} s (uncompiled {first['interleaf']:.1f} s). So it is not used by default; "
        "`model.compile()` works as for any model.",
    ]


STEPS = (
    ("hand-written hooks", "floor"),
    ("interleaf, `pfeiffer`", "interleaf"),
    ("PEFT, LoRA", "peft"),
    ("full fine-tuning", "full"),
)


def told_forward(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of forward passes."""
    here, hub = found["here"], found["adapterhub"]
    rows = [[key, *against(here, key, "base")] for key in here]
    rows.append(["AdapterHub", *against(hub, "adapters", "base")])
    return [
        "## A forward pass",
        "",
        "32 rows of 64 tokens, against the base in the same process. `floor` are hand-written hooks.",
        "",
        *table(["", "seconds", "times the base"], rows),
    ]


def told_rows(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of batches with several adapters."""
    rows = [[LABELS[name], *(against(found[name], str(count), "base")[1] for count in (1, 8, 32))] for name in found]
    return [
        "## Several adapters in one batch",
        "",
        "32 rows of 64 tokens, 1, 8 or 32 different adapters: times the base, which has none. By `adapter_names` here "
        "and in PEFT, by `BatchSplit` in AdapterHub's library.",
        "",
        *table(["", "1 adapter", "8", "32"], rows),
        "",
        "To be three times as fast as the others is not to be had here: the base is most of what each of them takes.",
    ]


def told_files(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of attaching, loading and switching."""
    rows = [
        [LABELS[name], *(milliseconds(one[key]) for key in ("attach", "load", "switch")), f"{one['many']:,}"]
        for name, one in found.items()
    ]
    ours = found["interleaf"]
    later = statistics.median(ours["first_pass"]) - statistics.median(ours["later_pass"])
    return [
        "## Attaching, loading, switching",
        "",
        "Medians. Loading reads from disk and checks what was read; switching is among as many adapters in memory as "
        "the last column has.",
        "",
        *table(["", "attach", "load", "switch", "in memory"], rows),
        "",
        f"The first pass after switching takes {1000 * later:+.2f} ms, one of one token.",
    ]


def told_imports(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of imports."""
    names = {"full": "transformers with its Trainer", **{k: v for k, v in LABELS.items() if k != "full"}}
    rows = [[names[name], f"{statistics.median(seconds):.2f} s"] for name, seconds in found.items()]
    return [
        "## Import",
        "",
        "From the start of the process. `import interleaf` loads the rest when it is used.",
        "",
        *table(["", "median of five"], rows),
    ]


def told_cohort(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Tell of several runs at once."""
    count = found["members"]
    named = {
        f"{count} in one cohort": "cohort",
        f"{count} runs of interleaf, one after the other": "alone",
        f"{count} runs of PEFT's LoRA (two were run)": "peft",
    }
    rows = [[label, f"{found[key]:.1f} s", f"{found[key] / found['cohort']:.2f}"] for label, key in named.items()]
    return [
        "## Several runs at once",
        "",
        f"{count} learning rates on the topics' rows, start to end, processes and saving included; the frozen layers' "
        "states were stored before, as they are after any run.",
        "",
        *table(["", "seconds", "times the cohort"], rows),
        "",
        "Expected were 4 and 8. What the layers above the cache compute is the same for a run alone and in a cohort, "
        "and on two cores it is most of the time: a cohort saves the start-up, not the arithmetic.",
    ]


SECTIONS: dict[str, Any] = {
    "movies": of_task("movie reviews", "movies"),
    "topics": of_task("news topics from few examples", "topics"),
    "steps": told_steps,
    "compiled": told_compiled,
    "forward": told_forward,
    "rows": told_rows,
    "files": told_files,
    "cohort": told_cohort,
    "imports": told_imports,
}


def against(found: dict[str, list[float]], name: str, other: str) -> tuple[str, str]:
    """Return a way's median seconds, and its median ratio to another, round by round."""
    ratios = [one / base for one, base in zip(found[name], found[other], strict=True)]
    return f"{statistics.median(found[name]):.3f}", f"{statistics.median(ratios):.3f}"


def mean(values: Sequence[float], form: str) -> str:
    """Return a mean and the standard deviation of the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.fmean(values))} ± {form.format(spread)}"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return a median in milliseconds."""
    return f"{1000 * statistics.median(seconds):.2f} ms"


def shown(drawn: Figure, file: str, figures: dict[str, str]) -> list[str]:
    """Note a figure, and return the lines that show it."""
    figures[file] = drawn.svg
    return [f"![{drawn.alt}](performance/{file})", "", f"**{drawn.title}.** {drawn.reading}"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def load() -> dict[str, dict[str, Any]]:
    """Read the figures of all parts that were run."""
    found = {name: STORED / f"peers-{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text("utf-8")) for name, file in found.items() if file.exists()}


def write(stored: dict[str, dict[str, Any]]) -> None:
    """Write the page and its figures."""
    text, figures = page(stored)
    PAGE.write_text(text, "utf-8")
    FIGURES.mkdir(exist_ok=True)
    for name, svg in figures.items():
        (FIGURES / name).write_text(svg + "\n", "utf-8")


def main() -> None:
    """Run what is asked for, store it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PARTS], help="parts to run; all if none")
    parser.add_argument("--small", action="store_true", help="few rounds and rows, printed and not stored")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from the stored figures")
    asked = parser.parse_args()
    found = {}
    for name in [] if asked.page else asked.names or list(PARTS):
        found[name] = {**PARTS[name](asked.small), "environment": environment()}
        if not asked.small:
            (STORED / f"peers-{name}.json").write_text(json.dumps(found[name], indent=1) + "\n", "utf-8")
    if asked.small:
        print(page(found)[0])
    else:
        write(load())


if __name__ == "__main__":
    main()
