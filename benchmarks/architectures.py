"""Adapters on every text architecture of transformers: what works is written to docs/architectures.md.

python benchmarks/architectures.py                       # all types, shapes and heads, an hour
python benchmarks/architectures.py bert t5               # these only, printed
python benchmarks/architectures.py --shape odd           # all types of one shape
python benchmarks/architectures.py --head token bert     # with another head than the first
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import transformers

import interleaf
from interleaf import BottleneckConfig
from interleaf.sites import find_sites

if __package__:
    from benchmarks import tiny_models
else:
    import tiny_models

SHAPES = tiny_models.SHAPES
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
LIMIT_S = 240
SMOOTH: dict[str, Any] = {"bottleneck_dim": 4, "activation": "gelu"}


@dataclass(frozen=True)
class Job:
    """A model to check: its type, its shape, and its head (None: the first it has)."""

    kind: str
    shape: str = "base"
    head: str | None = None

    def build(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return tiny_models.build(self.kind, tiny_models.SHAPES[self.shape], self.head)


def ways(positions: list[str]) -> dict[str, BottleneckConfig]:
    """The four ways in: serial and parallel at every sublayer, skip and parallel around the block."""
    inner = [p for p in positions if p != "block"]
    found = {
        "skip": BottleneckConfig(connection="skip", positions=["block"], **SMOOTH),
        "block": BottleneckConfig(connection="parallel", positions=["block"], **SMOOTH),
    }
    if inner:
        found["serial"] = BottleneckConfig(positions=inner, **SMOOTH)
        found["parallel"] = BottleneckConfig(connection="parallel", positions=inner, **SMOOTH)
    return found


def logits_of(model: Any, given: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # hashing attention draws its buckets
    out = model(**given)
    found = out.logits if getattr(out, "logits", None) is not None else out[0]
    return found[0] if isinstance(found, tuple) else found


def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, given)


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter_slot." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def check_identity(model: Any, given: dict[str, Any], before: torch.Tensor) -> None:
    if not torch.equal(logits(model, given), before):
        raise AssertionError("a fresh adapter is not the identity")


def unused_layers(job: Job, layers: dict[str, str]) -> dict[str, str]:
    """Find the sites in layers whose own weights get no gradient in full training: the head does not use them."""
    model, given = job.build()
    out = logits_of(model, given).float()
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {site: layer for site, layer in layers.items() if not any(n.startswith(f"{layer}.") for n in used)}


def layers_of(model: Any) -> dict[str, str]:
    """Return the layer of each site, both by name."""
    sites = find_sites(model)
    blocks = {(s.stack, s.layer): s.write for s in sites if s.position == "block"}
    return {s.write: blocks[s.stack, s.layer] for s in sites}


def check_gradients(model: Any, given: dict[str, Any], before: torch.Tensor, job: Job) -> set[str]:
    model.train_adapter("a")
    model.eval()
    randomise(model)
    out = logits_of(model, given).float()
    if torch.equal(out, before):
        raise AssertionError("the adapter changes nothing")
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    named = [(n, p) for n, p in model.named_parameters() if ".adapter_slot." in n]
    dead = sorted({n.split(".adapter_slot.")[0] for n, p in named if p.grad is None or not p.grad.abs().sum() > 0})
    unused = unused_layers(job, layers_of(model)) if dead else {}
    if wrong := [d for d in dead if d not in unused]:
        raise AssertionError(f"no gradient at {len(wrong)} sites, the first is {wrong[0]}")
    leaked = [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    if leaked:
        raise AssertionError(f"a gradient in the base: {leaked[0]}")
    return {unused[d] for d in dead}


def check_off(model: Any, given: dict[str, Any], before: torch.Tensor) -> None:
    with model.disable_adapter():
        if not torch.equal(logits(model, given), before):
            raise AssertionError("switched off it is not the base")


def check_store(model: Any, given: dict[str, Any], job: Job, weights: dict[str, Any]) -> None:
    model.requires_grad_(False)
    after = logits(model, given)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(f"{folder}/a", "a")
        fresh = job.build()[0]
        fresh.load_state_dict(weights)  # some leave weights as they find them in memory
        interleaf.adapt(fresh)
        fresh.load_adapter(f"{folder}/a")
    if not torch.equal(logits(fresh, given), after):
        raise AssertionError("loaded it gives other logits")


def check_cache(model: Any, given: dict[str, Any]) -> None:
    """Cached generation gives the logits of uncached generation as closely as the base's own does."""
    if not model.can_generate():
        return
    gap, base_gap = generation_gap(model, given), 0.0
    if gap > 1e-4:
        with model.disable_adapter():
            base_gap = generation_gap(model, given)
    if gap > max(1e-4, 3 * base_gap) and base_gap < 1e-2:  # beyond that, the base's own cache is broken
        raise AssertionError(f"cached generation differs from uncached by {gap:.1e}, the base's own by {base_gap:.1e}")


def generation_gap(model: Any, given: dict[str, Any]) -> float:
    # one row: some bases mix the rows of a batch when they generate with a cache
    asked = {k: v[:1] for k, v in given.items() if isinstance(v, torch.Tensor) and not k.startswith("decoder")}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    try:
        cached, uncached = (model.generate(**asked, **options, use_cache=use) for use in (True, False))
    except Exception:
        with model.disable_adapter():
            try:
                for use in (True, False):
                    model.generate(**asked, **options, use_cache=use)
            except Exception:
                return 0.0  # the base cannot generate from text with its default settings either
        raise
    pairs = zip(cached.logits, uncached.logits, strict=True)
    return max(float((left - right).abs().max()) for left, right in pairs)


def check_type(job: Job) -> dict[str, Any]:
    """Run every check on a type; returns its row: class, sites, and yes or the reason for each way."""
    row: dict[str, Any] = {**asdict(job), "model": "", "plain": "yes", "ways": {}}
    try:
        model, given = job.build()
        row["model"] = type(model).__name__
        logits(model, given)
    except Exception as error:
        row["plain"] = reason(error)
        return row
    try:
        positions = sorted({site.position for site in find_sites(model)})
        row["positions"] = positions
        todo = ways(positions)
    except Exception as error:
        row["ways"]["sites"] = reason(error)
        return row
    if job.shape != "base" or job.head not in (None, "beyond"):
        todo = {way: config for way, config in todo.items() if way in ("parallel", "skip")}
    for way, config in todo.items():
        try:
            row["unused"] = sorted(check_way(job, config))
            row["ways"][way] = "yes"
        except Exception as error:
            row["ways"][way] = reason(error)
            row["trace"] = traceback.format_exc()
    return row


def check_way(job: Job, config: BottleneckConfig) -> set[str]:
    """Run every check; returns the layers that the model's head does not use."""
    model, given = job.build()
    model.requires_grad_(False)  # torch folds some products another way, and rounds so, when a weight trains
    before, names = logits(model, given), [n for n, _ in model.named_modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    interleaf.adapt(model).add_adapter("a", config)
    check_identity(model, given, before)
    unused = check_gradients(model, given, before, job)
    check_off(model, given, before)
    check_store(model, given, job, weights)
    check_cache(model, given)
    model.delete_adapter("a")
    left = model.state_dict()
    if [n for n, _ in model.named_modules()] != names or not all(torch.equal(left[k], v) for k, v in weights.items()):
        raise AssertionError("deleted, it leaves something behind")
    if not torch.equal(logits(model, given), before):
        raise AssertionError("deleted, the model is not its base")
    return unused


def reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def prepare() -> None:
    torch.set_num_threads(1)  # sums over several threads may round one way now and another way then
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def check_each(jobs: list[Job]) -> list[dict[str, Any]]:
    return [check_type(job) for job in jobs]


def run_all(jobs: Iterable[Job], report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Check the models of each type in a process of their own, two at a time."""
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    rows = []
    with multiprocessing.get_context("fork").Pool(2, initializer=prepare, maxtasksperchild=1) as pool:
        waiting = [(these, pool.apply_async(check_each, (these,))) for these in kinds.values()]
        for these, result in waiting:
            try:
                found = result.get(timeout=LIMIT_S * len(these))
            except multiprocessing.TimeoutError:
                slow = f"took over {LIMIT_S} s"
                found = [{**asdict(job), "model": "", "plain": slow, "ways": {}} for job in these]
            for row in found:
                report(row)
            rows += found
    return rows


def passed(row: dict[str, Any]) -> bool:
    return bool(row["ways"]) and all(said == "yes" for said in row["ways"].values())


WAYS = ("serial", "parallel", "skip", "block")

INTRODUCTION = """\
# Architectures

Made by `python benchmarks/architectures.py` ({versions}, CPU).

Of the {total} text model types, {plain} were built tiny with random weights and ran plain; {good} of these passed \
every check in every way in. Of {beyond} models that see or hear, built likewise, {beyond_good} passed.

Ways in: serial and parallel at every attention, cross-attention and feed-forward sublayer; skip and parallel around \
every block.

Checks: a fresh adapter is the identity bit for bit; every parameter of every adapter gets a gradient and no parameter \
of the base does; switched off it is the base bit for bit; saved and loaded it gives the same logits bit for bit; \
cached generation gives the logits of uncached generation as closely as the base's own does; deleted it leaves nothing \
behind. They do not show that a place is a good one: the places of every type were read through by hand.
"""


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| type | class | positions | serial | parallel | skip | block |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["ways"].get(way, "") for way in WAYS]
        marks = ["yes" if c == "yes" else "no" if c else "-" for c in cells]
        lines.append(
            f"| {row['kind']} | {row['model']} | {', '.join(row.get('positions', []))} | {' | '.join(marks)} |"
        )
    return lines


def counts_of(rows: list[dict[str, Any]]) -> list[str]:
    """Write a row for each shape and head: how many were built, how many passed."""
    lines = ["| shape | head | types | built and ran plain | passed every check |", "|---|---|---|---|---|"]
    for shape, head in sorted({(r["shape"], r["head"]) for r in rows}, key=RUNS.index):
        these = [r for r in rows if (r["shape"], r["head"]) == (shape, head)]
        counts = len(these), sum(r["plain"] == "yes" for r in these), sum(map(passed, these))
        name = "beyond text" if head == "beyond" else f"`{head}`" if head else "the first it has"
        lines.append(f"| {shape} | {name} | {' | '.join(map(str, counts))} |")
    return lines


OTHERS = (
    "The tables above are of the shape `base`, with the first head a type has. "
    "`--shape` and `--head` run others, in two ways in, parallel and skip."
)


def page(rows: list[dict[str, Any]]) -> str:
    """Write the page: the counts, a row for each type, the exceptions with their reasons."""
    text = [r for r in rows if r["shape"] == "base" and r["head"] is None]
    beyond = [r for r in rows if r["shape"] == "base" and r["head"] == "beyond"]
    plain = [r for r in text if r["plain"] == "yes"]
    seen = [r for r in beyond if r["plain"] == "yes"]
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    counts = {"total": len(text), "plain": len(plain), "good": sum(map(passed, plain))}
    counts |= {"beyond": len(seen), "beyond_good": sum(map(passed, seen))}
    lines = [INTRODUCTION.format(versions=versions, **counts), *table(plain)]
    lines += ["", "## Beyond text", "", *table(seen)]
    lines += ["", "## Other shapes and heads", ""]
    lines += [OTHERS, ""]
    lines += [f"- `{name}`: {', '.join(f'{k} {v}' for k, v in asdict(s).items())}" for name, s in SHAPES.items()]
    lines += ["", *counts_of(rows), "", "## Not every check passed", ""]
    failed = [
        (label(r), w, said) for r in rows if r["plain"] == "yes" for w, said in r["ways"].items() if said != "yes"
    ]
    lines += [f"- {name}, {way}: {said}" for name, way, said in failed] or ["None."]
    lines += ["", "## Layers that a head does not use", ""]
    lines += ["No weight of theirs, the base's own or an adapter's, gets a gradient with this head.", ""]
    lines += [f"- {label(r)} ({r['model']}): {', '.join(r['unused'])}" for r in rows if r.get("unused")] or ["None."]
    lines += ["", "## Not built or not run without adapters", ""]
    missing = [r for r in text if r["plain"] != "yes"]
    lines += [f"- **{r['kind']}**: {r['plain']}" for r in missing] or ["None."]
    lines += ["", "In other shapes or with other heads, besides these:", ""]
    others = {r["kind"] for r in missing}
    lines += [f"* {label(r)}: {r['plain']}" for r in rows if r["plain"] != "yes" and r["kind"] not in others] or [
        "None."
    ]
    return "\n".join(lines) + "\n"


def label(row: dict[str, Any]) -> str:
    return f"**{row['kind']}** ({', '.join(filter(None, (row['shape'], row['head'])))})"


RUNS: list[tuple[str, str | None]] = [("base", None), ("base", "beyond")]
"""What the page tells; `--shape` and `--head` run others."""


def types_of(head: str | None) -> list[str]:
    return list(tiny_models.BEYOND_TEXT) if head == "beyond" else tiny_models.model_types(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all, and the page is written, when nothing is given")
    parser.add_argument("--shape", choices=SHAPES, help="sizes of model and input")
    parser.add_argument("--head", choices=[*tiny_models.HEADS, "beyond"], help="head of the models, or beyond text")
    parser.add_argument("--trace", action="store_true", help="print the traceback of what failed")
    arguments = parser.parse_args()

    def report(row: dict[str, Any]) -> None:
        failed = {way: said for way, said in row["ways"].items() if said != "yes"}
        state = "yes" if passed(row) else f"no: {failed or row['plain']}"
        print(f"{label(row):40} {state}", flush=True)
        if arguments.trace and "trace" in row:
            print(row["trace"])

    whole = not (arguments.kinds or arguments.shape or arguments.head)
    runs = RUNS if whole else [(arguments.shape or "base", arguments.head)]
    rows = run_all([Job(k, shape, head) for shape, head in runs for k in arguments.kinds or types_of(head)], report)
    plain = [r for r in rows if r["plain"] == "yes"]
    print(f"{len(rows)} models, {len(plain)} ran plain, {sum(map(passed, plain))} of them passed every check")
    if whole:
        PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main()
