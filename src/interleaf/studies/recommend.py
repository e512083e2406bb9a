"""A sound setup from the size of the data, the model and what there is to spend, without trying anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from interleaf.blocks import stacks_of
from interleaf.settings import TrainSettings
from interleaf.train import make_task

FEW, MANY = 500, 10_000
ENOUGH = 128  # tokens of a text to classify
LONGEST = 1024  # no text is looked at further


@dataclass(frozen=True)
class Rule:
    """A setting, its value, and why."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    task: str
    rows: int
    longest: int
    layers: int
    width: int
    minutes: float | None
    megabytes: float | None


def facts(settings: TrainSettings, minutes: float | None, megabytes: float | None) -> Facts:
    """Look at data and base.

    Raises:
        InterleafError: data or base that cannot be used.
    """
    task = make_task(dataclasses.replace(settings, max_length=LONGEST))
    splits = task.load(settings.train, settings.dev, dev_fraction=settings.dev_fraction, seed=settings.seed)
    tokenizer = task.tokenizer(settings.base)
    sample = splits.train.select(range(min(1000, len(splits.train))))
    lengths = sorted(len(ids) for ids in task.encode(sample, tokenizer)["input_ids"])
    model = task.model(settings.base)
    layers = max(len(found) for _, found in stacks_of(model))
    width = model.config.get_text_config().hidden_size
    long = lengths[int(0.98 * (len(lengths) - 1))]
    return Facts(settings.task, len(splits.train), long, layers, width, minutes, megabytes)


def rules(of: Facts) -> list[Rule]:
    """Return what is recommended, each setting with its reason; the pages named have the figures."""
    few, many = of.rows < FEW, of.rows > MANY
    classify = of.task == "classification"
    positions = ["attention", "ffn"] if not few else ["ffn"]
    upper = _upper(of, classify, many)
    factor = _factor(of, positions, upper)
    found = [
        Rule("adapter", "houlsby" if not few else "pfeiffer", _places(few, of.rows)),
        Rule("adapter_options.reduction_factor", factor, _width(of, factor)),
    ]
    if upper < of.layers:
        found.append(
            Rule(
                "adapter_options.layers",
                f"last:{upper}",
                f"the {of.layers - upper} layers below are run once and stored, and the backward pass ends above them "
                "(docs/trunk-cache.md); a classifier seldom needs more (docs/adapterdrop.md)",
            )
        )
    rate = 3e-3 if few else 1e-3 if classify else 5e-4
    found += [
        Rule("learning_rate", rate, _rate(few, classify)),
        Rule("epochs", 8 if few else 2 if many else 4, "about as many steps whatever the number of rows"),
        Rule("patience", 2, "stops when the dev score does not rise any more"),
        Rule("max_length", *_length(of.longest, classify)),
    ]
    return found


def _places(few: bool, rows: int) -> str:
    if few:
        return f"{rows:,} rows: one place a layer has enough to learn them (fewer than {FEW})"
    return f"{rows:,} rows are enough for both places of a layer, as in Houlsby et al. 2019"


def _upper(of: Facts, classify: bool, many: bool) -> int:
    """Choose how many layers: half for a classifier, all for what generates, fewer when there is little time."""
    share = 0.5 if classify and not many else 1.0
    if of.minutes is not None and of.minutes < 3:
        share = min(share, 0.34)
    return max(1, round(share * of.layers))


def _factor(of: Facts, positions: list[str], upper: int) -> int:
    """Choose the narrowest usual width for few rows, and what fits into the file that is allowed."""
    wanted = 32 if of.rows < FEW else 8 if of.rows > MANY else 16
    while of.megabytes is not None and wanted < of.width and _bytes(of, positions, upper, wanted) > of.megabytes * 1e6:
        wanted *= 2
    return wanted


def _bytes(of: Facts, positions: list[str], upper: int, factor: int) -> float:
    return 4 * len(positions) * upper * (2 * of.width * max(1, of.width // factor) + of.width)


def _width(of: Facts, factor: int) -> str:
    room = "" if of.megabytes is None else f", and the file is to be at most {of.megabytes:g} MB"
    return f"bottlenecks of {max(1, of.width // factor)} for {of.rows:,} rows: more rows can fill wider ones{room}"


def _rate(few: bool, classify: bool) -> str:
    if few:
        return "few steps want a higher rate (docs/results.md)"
    return (
        "the usual rate of adapters"
        if classify
        else "half of the usual for what generates, as in configs/: higher rates forget more"
    )


def _length(longest: int, classify: bool) -> tuple[int, str]:
    fits = next(size for size in (32, 64, 128, 256, 512, LONGEST) if size >= longest)
    why = f"98 of 100 rows have at most {longest} tokens"
    if classify and fits > ENOUGH:
        return ENOUGH, f"{why}; the first {ENOUGH} mostly settle the class, and more take longer"
    return fits, why


def as_config(settings: TrainSettings, found: list[Rule]) -> dict[str, Any]:
    """Return the recommended settings as a config."""
    config: dict[str, Any] = {"base": settings.base, "train": settings.train, "out": settings.out}
    usual = TrainSettings(**config)
    for name in ("dev", "task", "task_options", "text", "label"):
        if (value := getattr(settings, name)) != getattr(usual, name):
            config[name] = value
    for rule in found:
        head, _, inner = rule.setting.partition(".")
        if inner:
            config.setdefault(head, {})[inner] = rule.value
        else:
            config[head] = rule.value
    return config
