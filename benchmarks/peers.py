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
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interleaf import bundled
from interleaf.files import size
from interleaf.record import environment
from interleaf.report.blocks import Figure, number
from interleaf.report.figures import Line, curves

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
STORED, OUT = ROOT / "benchmarks" / "results", ROOT / "out" / "peers"
WORKER = Path(__file__).parent / "peer.py"
ADAPTERHUB = (["torch==2.13.0"], ["adapters==1.3.0", "accelerate", "datasets", "huggingface_hub<1"])

TASKS: dict[str, dict[str, Any]] = {
    "movies": {"data": "movie-reviews", "train": 2000, "dev": 1000, "max_length": 64, "epochs": 3},
    "topics": {"data": "bbc", "train": 250, "dev": 600, "max_length": 64, "epochs": 6},
}
# three each, tried with a seed of its own; the one with the highest accuracy is used
RATES = {"peft": (5e-4, 1e-3, 3e-3), "adapters": (5e-4, 1e-3, 3e-3), "full": (2e-5, 5e-5, 1e-4)}
OURS: dict[str, Sequence[dict[str, Any]]] = {
    "movies": [
        {"adapter": "houlsby", "adapter_options": {"reduction_factor": 24}, "learning_rate": rate}
        for rate in (5e-4, 1e-3, 3e-3)
    ],
    "topics": [
        {"adapter": "houlsby", "adapter_options": {"reduction_factor": 8, "layers": "last:2"}, "learning_rate": rate}
        for rate in (1e-3, 3e-3, 1e-2)
    ],
}
SEEDS, TUNING_SEED = (0, 1, 2), 100
LABELS = {"interleaf": "interleaf", "peft": "PEFT, LoRA", "adapters": "AdapterHub", "full": "full fine-tuning"}


def worker(name: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Do a job in a process of its own and return what it says."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"job-{os.getpid()}.json"
    file.write_text(json.dumps(job), "utf-8")
    python = adapterhub() if name == "adapters" else Path(sys.executable)
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "STARTED": str(time.time())}
    done = subprocess.run(
        [str(python), str(WORKER), name, str(file)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} {job['job']}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
    found = {"curve": curve, "best": max(a for _, a in curve)}
    for one in said:
        found |= {key: one[key] for key in ("peak_mib", "trunk_cache") if key in one}
    return found


def learn(task: str, small: bool) -> dict[str, Any]:
    """Tune each way alike, then run all of them in turn for each seed, our own without stored states of earlier runs."""
    job = learning_job(task, TUNING_SEED, small)
    tries = {name: [{"learning_rate": rate} for rate in rates] for name, rates in RATES.items()} | {
        "interleaf": list(OURS[task])
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
    return {"here": ours[0]["step"], "adapterhub": hub[0]["step"]}


def forward(small: bool) -> dict[str, Any]:
    """Time forward passes likewise."""
    rounds = 5 if small else 40
    ours = worker("floor", common(job="forward", libraries=["floor", "interleaf", "peft"], rounds=rounds))
    hub = worker("adapters", common(job="forward", libraries=["adapters"], rounds=rounds))
    return {"here": ours[0]["forward"], "adapterhub": hub[0]["forward"]}


def rows(small: bool) -> dict[str, Any]:
    """Time batches whose rows have several adapters."""
    job = common(job="rows", rounds=3 if small else 15)
    return {name: worker(name, job)[0]["rows"] for name in ("interleaf", "peft", "adapters")}


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
    wanted = {**OURS["topics"][1], "base": job["base"], "out": str(OUT / "cohort"), "examples": 0, "overwrite": True}
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
    "forward": forward,
    "rows": rows,
    "files": files,
    "imports": imports,
    "cohort": cohort,
}
