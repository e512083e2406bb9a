"""What the directions beyond the plain adapter give, beside the plain adapter: the tables of docs/beyond.md.

python -m benchmarks.beyond                # everything, about two hours on two cores
python -m benchmarks.beyond widths meta    # some of it
python -m benchmarks.beyond --page         # the page again, from the stored figures
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmarks import beyond_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from interleaf import adapt
from interleaf.bundled import resolve
from interleaf.cli.app import quiet
from interleaf.record import environment
from interleaf.settings import TrainSettings, read_settings
from interleaf.studies import align as study
from interleaf.train import prepare

ROOT = Path(__file__).parent.parent
PAGE, STORED = ROOT / "docs" / "beyond.md", ROOT / "benchmarks" / "results" / "beyond.json"
SEEDS = (0, 1, 2)
PREFERENCES = study.AlignSettings(prefer="positive", prompt="A film review: ")
PARSES = study.AlignSettings("grpo", reward="parses", steps=40, answer_tokens=24, beta=0.02)


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
    """Train, and return the held-out F1, or chrF, and the adapter's parameters."""
    made = prepare(run)
    done = made.train()
    measure = "f1_macro" if "f1_macro" in done.metrics else "chrf"
    found = {"score": done.metrics[measure], "parameters": made.summary().adapter_parameters}
    print(run.adapter, run.adapter_options, run.seed, found, file=sys.stderr, flush=True)
    return found


def arms(
    made: dict[str, dict[str, Any]], settings: Callable[..., TrainSettings] = settings
) -> dict[str, list[dict[str, float]]]:
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


def depth() -> Any:
    """One adapter in all six layers, run without it in the lowest ones: quality, and time beside that with all."""
    depths = range(6)
    found: dict[str, list[dict[str, float]]] = {f"all but the lowest {n}" if n else "all six": [] for n in depths}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(settings(folder, seed, adapter="houlsby", adapter_options={"reduction_factor": 24}))
            run.train()
            model, dev, name = run.model.eval(), run.splits.dev, run.settings.name
            batch = run.task.collator(run.tokenizer)(list(run.task.encode(dev.select(range(32)), run.tokenizer)))

            def without(lowest: int) -> None:
                model.set_adapter(name, skip_layers=f"first:{lowest}" if lowest else None)  # noqa: B023

            def once(lowest: int) -> float:
                without(lowest)
                began = time.perf_counter()
                with torch.inference_mode():
                    model(**batch)  # noqa: B023
                return time.perf_counter() - began

            rounds = [[once(n) for n in depths] for _ in range(20)]
            for n, runs in zip(depths, found.values(), strict=True):
                without(n)
                metrics = run.task.evaluate(model, run.tokenizer, dev, 64)
                ratio = statistics.median(times[n] / times[0] for times in rounds)
                runs.append({"score": metrics["f1_macro"], "time": ratio})
        print("depth", seed, found, file=sys.stderr, flush=True)
    return found


TASKS = {
    "movies": {"train": "bundled:movie-reviews", "limit": 400, "epochs": 6},
    "tweets": {"train": "bundled:tweets", "limit": 400, "epochs": 6},
    "topics": {"train": "bundled:bbc", "limit": 400, "epochs": 6},
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
                found.setdefault("each alone", {}).setdefault(name, []).append(score(one)["score"])
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
                found.setdefault("fusion of the three", {}).setdefault(name, []).append(score(fused)["score"])
    return found


def transfer() -> Any:
    """A new task from 64 tweets: a fresh adapter, and one that begins where movies' or all other tasks' adapter is."""
    from interleaf.studies.multitask import prepare_multitask, train_multitask

    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            old = {
                "movies": settings(folder, seed, name="movies", out=f"{folder}/movies", limit=400),
                "topics": settings(folder, seed, name="topics", out=f"{folder}/topics", train="bundled:bbc", limit=200),
            }
            train_multitask(prepare_multitask(list(old.values()), f"{folder}/shared"), f"{folder}/shared")
            prepare(replace(old["movies"], out=f"{folder}/films", name="films")).train()
            new = settings(folder, seed, train="bundled:tweets", limit=64, epochs=20)
            starts = {"a fresh adapter": None, "the one of movie reviews": "films", "the shared one of both": "shared"}
            for name, start in starts.items():
                how = {} if start is None else {"start": f"{folder}/{start}", "adapter_options": {}}
                out = f"{folder}/new-{start}"
                found.setdefault(name, []).append(score(replace(new, out=out, **how))["score"])
    return found


def meta() -> Any:
    """Pairs of genres: what a learnt start gives after few steps."""
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


def preferences() -> Any:
    """DPO on pairs of film reviews, beside training on the preferred texts alone."""
    return {way: [alone(preferred, way, seed) for seed in SEEDS[:2]] for way in ("plain", "dpo")}


def rewards() -> Any:
    """GRPO towards code that parses, beside training on the answers in the data."""
    return {way: [alone(rewarded, way, seed) for seed in SEEDS[:2]] for way in ("plain", "grpo")}


def preferred(way: str, seed: int) -> dict[str, float]:
    """Train on 270 pairs by DPO, or on the preferred texts of the same pairs; return what 30 others say of it."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        given = read_settings(ROOT / "configs" / "preferences.yaml", {"out": f"{folder}/dpo", "seed": seed})
        trainer = study.make_trainer(given, PREFERENCES, *study.rows_for(given, PREFERENCES))
        trainer.loss_types = ["sigmoid" if way == "dpo" else "sft"]
        trainer.train()
        told = study.last(trainer.state.log_history, PREFERENCES)
    print("preferences", way, seed, told, file=sys.stderr, flush=True)
    return {"pairs": told["rewards/accuracies"], "margin": told["rewards/margins"]}


def rewarded(way: str, seed: int) -> dict[str, Any]:
    """Train by GRPO, or on the answers that stand in the data; return how many held-out answers parse."""
    from interleaf.tasks.rows import read_rows

    quiet()
    rows = read_rows("bundled:stdlib-code")
    train, held = rows.select(range(320)), rows.select(range(len(rows) - 32, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/adapter"
        given = read_settings(ROOT / "configs" / "code-rewards.yaml", {"out": out, "seed": seed})
        if way == "grpo":
            history = study.align(given, PARSES).history
        else:
            train.to_json(f"{folder}/train.jsonl")
            held.to_json(f"{folder}/dev.jsonl")
            few = {"dev_rows": 8, "max_new_tokens": 8}
            files = {"train": f"{folder}/train.jsonl", "dev": f"{folder}/dev.jsonl", "limit": None}
            plain = replace(given, **files, task="code", task_options=few, max_length=128, batch_size=8, epochs=1)
            history = prepare(plain).train().history
        model = adapt(AutoModelForCausalLM.from_pretrained(resolve(given.base)))
        tokenizer = AutoTokenizer.from_pretrained(resolve(given.base), padding_side="left")
        model.load_adapter(out, "trained")
        found: dict[str, Any] = {"parse": parsing(model, tokenizer, held["source"], seed)}
        if way == "grpo":
            found["rewards"] = [one["reward"] for one in history if "reward" in one]
            with model.disable_adapter():
                found["base"] = parsing(model, tokenizer, held["source"], seed)
    print("rewards", way, seed, found, file=sys.stderr, flush=True)
    return found


def parsing(model: Any, tokenizer: Any, prompts: list[str], seed: int) -> float:
    """Return the share of answers, eight drawn for each prompt, that parse with it."""
    torch.manual_seed(seed)
    reward, rewards = study.reward_of(PARSES), []
    for at in range(0, len(prompts), 8):
        asked = [prompt for prompt in prompts[at : at + 8] for _ in range(8)]
        batch = tokenizer(asked, return_tensors="pt", padding=True)
        with torch.inference_mode():
            said = model.generate(
                **batch,
                do_sample=True,
                top_k=0,
                max_new_tokens=PARSES.answer_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += reward(asked, answers)
    return statistics.fmean(rewards)


def memory() -> Any:
    """DPO's peak memory: an adapter whose reference is the base below it, and TRL's own two ways."""
    ways = ("adapter", "adapter and a second model", "full fine-tuning and a second model")
    return {way: alone(peak, way) for way in ways}


def alone(work: Callable[..., Any], *given: Any) -> Any:
    """Run a function in a process of its own, whose peak memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def peak(way: str) -> float:
    """Take five steps of DPO; return MiB at most."""
    from trl import DPOTrainer

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = ROOT / "configs" / "preferences.yaml"
        given = read_settings(config, {"out": f"{folder}/dpo", "limit": 45, "dev_fraction": 0.1})
        how = replace(PREFERENCES, steps=5)
        train, dev = study.rows_for(given, how)
        trainer = study.make_trainer(given, how, train, dev)
        if way != "adapter":
            path, args, tokenizer = resolve(given.base), trainer.args, trainer.processing_class
            model = trainer.model if way.startswith("adapter") else None
            del trainer
            gc.collect()
            model = model or AutoModelForCausalLM.from_pretrained(path)
            second = AutoModelForCausalLM.from_pretrained(path)
            trainer = DPOTrainer(model, second, args, train_dataset=train, eval_dataset=dev, processing_class=tokenizer)
        trainer.train()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def given(page: str) -> list[str]:
    """Return the commands in the blocks of a page."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("interleaf")]


def commands() -> Any:
    """Every command of the page, as a newcomer gives it, one after the other in one folder: how long each takes."""
    found: dict[str, float] = {}
    surroundings = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configs").symlink_to(ROOT / "configs")
        for line in given(PAGE.read_text("utf-8")):
            began = time.monotonic()
            words = shlex.split(line)
            words[0] = str(Path(sys.executable).parent / words[0])
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=surroundings)
            if done.returncode:
                raise RuntimeError(f"{line}: {done.stderr}")
            found[line] = time.monotonic() - began
            print(line, found[line], file=sys.stderr, flush=True)
    return found


def union(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of several methods in one adapter."""
    return {"adapter": "union", "adapter_options": {"parts": list(parts)}}


def bottleneck(dim: int) -> dict[str, Any]:
    """Return a bottleneck behind each feed-forward sublayer."""
    return {"peft_type": "BOTTLENECK", "positions": ["ffn"], "bottleneck_dim": dim}


def prefix(tokens: int) -> dict[str, Any]:
    """Return prefix tuning."""
    return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens}


def prompt(tokens: int) -> dict[str, Any]:
    """Return prompt tuning."""
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens}


def lora(rank: int, *modules: str) -> dict[str, Any]:
    """Return LoRA of some of an attention's maps."""
    return {"peft_type": "LORA", "target_modules": list(modules), "r": rank, "lora_alpha": 2 * rank}


def ia3(inner: str, *modules: str) -> dict[str, Any]:
    """Return (IA)3: a factor for each output of some of an attention's maps, and for each input of another."""
    return {"peft_type": "IA3", "target_modules": [*modules, inner], "feedforward_modules": [inner]}


def mixtures(
    attention: tuple[str, ...], factors: dict[str, Any], ranks: tuple[int, int, int], tokens: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """Return each method alone, each beside a bottleneck, and all, at about as many weights where they can have them.

    Args:
        attention: the maps that LoRA is for.
        factors: (IA)3.
        ranks: LoRA's alone, beside a bottleneck and among all.
        tokens: a prompt's beside a bottleneck and a prefix's among all.
    """
    single, beside, among = (lora(rank, *attention) for rank in ranks)
    return {
        "plain bottleneck": union(bottleneck(24)),
        "LoRA": union(single),
        "prefix": union(prefix(24)),
        "prompt": union(prompt(96)),
        "(IA)3": union(factors),
        "bottleneck and LoRA": union(bottleneck(12), beside),
        "bottleneck and prefix": union(bottleneck(12), prefix(12)),
        "bottleneck and prompt": union(bottleneck(20), prompt(tokens[0])),
        "bottleneck and (IA)3": union(bottleneck(20), factors),
        "bottleneck, LoRA, prefix and (IA)3": union(bottleneck(8), among, prefix(tokens[1]), factors),
    }


def unions() -> Any:
    """Film reviews: methods alone and together, at 113,040 weights where they can."""
    made = mixtures(("query", "value"), ia3("output.dense", "key", "value"), (12, 6, 4), (48, 4))
    return arms({name: {**how, "limit": 600} for name, how in made.items()})


def unions_translation() -> Any:
    """Labels and messages of programs into Portuguese: the same methods, at 100,544 weights where they can."""

    def interface(folder: str, seed: int, **changed: Any) -> TrainSettings:
        given = {"out": f"{folder}/{time.monotonic_ns()}", "limit": 1000, "seed": seed, "examples": 0}
        told = read_settings(ROOT / "configs" / "translation-ui.yaml", given)
        return replace(told, **changed, earlier=None, task_options={**told.task_options, "dev_rows": 100})

    return arms(mixtures(("q_proj", "v_proj"), ia3("fc2", "k_proj", "v_proj"), (11, 5, 3), (64, 5)), interface)


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


PARTS: dict[str, Callable[[], Any]] = {
    "widths": widths,
    "routed": routed,
    "depth": depth,
    "multitask": multitask,
    "transfer": transfer,
    "meta": meta,
    "preferences": preferences,
    "rewards": rewards,
    "memory": memory,
    "unions": unions,
    "unions_translation": unions_translation,
    "search": search,
    "commands": commands,
}


def main() -> None:
    """Measure, store, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--page", action="store_true", help="run nothing, write the tables from the stored figures")
    asked = parser.parse_args()
    if not asked.page:
        quiet()
        for part in asked.parts or PARTS:
            made = {"figures": PARTS[part](), "environment": environment()}
            STORED.write_text(json.dumps({**load(), part: made}, indent=1) + "\n", "utf-8")
    beyond_page.write(load(), PAGE)


def load() -> dict[str, Any]:
    """Return the figures of what was run."""
    found = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    return {part: found[part] for part in PARTS if part in found}


if __name__ == "__main__":
    main()
