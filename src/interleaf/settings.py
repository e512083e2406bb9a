"""The settings of a run: one frozen dataclass for YAML, flags and code. It imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from interleaf.errors import ConfigError


@dataclass(frozen=True)
class TrainSettings:
    """All that decides a run."""

    base: str
    """Pretrained model: a hub name, a folder, or bundled:NAME."""
    train: str
    """Training data: a file, a folder, a hub name, or bundled:NAME."""
    out: str
    """Folder that the adapter is written to."""
    dev: str | None = None
    """Held-out data; by default a stratified share of the training data."""
    task: str = "classification"
    """What is learnt: classification, translation or code."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task that differ from its own."""
    name: str = "adapter"
    """Name of the adapter."""
    adapter: str = "pfeiffer"
    """Preset to start from."""
    adapter_options: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the preset's."""
    start: str | None = None
    """Stored adapter to start from: its weights and settings; a head is this run's own."""
    onto: list[str] = field(default_factory=list)
    """Stored adapters that run before the new one and stay as they are; `adapter: fusion` fuses them."""
    unit_budget: int | None = None
    """Bottleneck units in all that a bottleneck adapter keeps: it starts wider, and the places share them by need."""
    layers_tolerance: float = 0.01
    """With `layers: auto` among the adapter's options: dev score that fewer layers may cost (of a loss, its share)."""
    text: str | None = None
    """Column of the text; found if not given."""
    label: str | None = None
    """Column of the label, or of the text to generate; found if not given."""
    max_length: int = 128
    """Longest input in tokens; longer texts are cut."""
    epochs: float = 5
    """Passes over the training data."""
    batch_size: int = 32
    """Rows a step."""
    batch_tokens: int | None = None
    """Tokens a step instead, padding counted: many short rows or few long ones. Batches stay, their order changes."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    patience: int | None = None
    """Passes without a better dev score after which a run stops."""
    warmup: float = 0.06
    """Share of the steps (or, from 1 on, their number) with a rising learning rate."""
    dev_fraction: float = 0.1
    """Share of the training data held out when there is no dev data."""
    limit: int | None = None
    """Use only so many training rows, a stratified sample."""
    seed: int = 0
    """Seed of the split, the initialisation and the order of rows."""
    activation_checkpointing: bool = False
    """Compute activations twice to save memory."""
    precision: str = "auto"
    """Arithmetic of training: float32, bfloat16 (weights stay as they are), or auto: what the device is good at."""
    cache: str = "auto"
    """Run the frozen layers below the lowest adapter once and store what they give: auto (where it can be), or off."""
    cache_dtype: str | None = None
    """Float type they are stored in, such as bfloat16; the base's own if not given."""
    cache_gb: float = 8
    """Disk that stored states of all runs may take."""
    report_to: list[str] = field(default_factory=list)
    """Loggers of the Trainer to follow the run with: tensorboard, trackio. Runs of `compare` do not use them."""
    examples: int = 8
    """Held-out rows stored, with the answers to them, beside the adapter; 0 for none."""
    earlier: str | None = None
    """What may be forgotten, measured before and after: an earlier task's labelled texts, other pairs, general text."""
    forget_budget: float | None = None
    """Share of it that may be lost: training stops there, and keeps the best epoch that lost no more."""
    compare: dict[str, Any] = field(default_factory=dict)
    """What `interleaf compare` does besides; see its help."""
    overwrite: bool = False
    """Replace what is at `out`."""
    resume: bool = False
    """Continue an unfinished run."""

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 0), ("learning_rate", 0), ("max_length", 0)):
            if not getattr(self, name) > low:
                raise ConfigError(f"{name}={getattr(self, name)}: expected more than {low}.")
        if self.examples < 0:
            raise ConfigError(f"examples={self.examples}: expected 0 or more.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision={self.precision!r}: expected auto, float32 or bfloat16.")
        if self.cache not in ("auto", "off"):
            raise ConfigError(f"cache={self.cache!r}: expected auto or off.")
        if self.cache_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"cache_dtype={self.cache_dtype!r}: expected float32, bfloat16 or float16.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens={self.batch_tokens}: expected 1 or more.")
        if self.unit_budget is not None and self.resume:
            raise ConfigError("unit_budget: what units were worth is not in a checkpoint, so such a run cannot resume.")
        if self.start is not None and (self.adapter_options or self.onto):
            raise ConfigError("start: the stored adapter keeps its settings and stands alone. Leave out the others.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience={self.patience}: expected 1 or more.")
        if self.forget_budget is not None and (self.forget_budget < 0 or self.earlier is None):
            raise ConfigError(
                f"forget_budget={self.forget_budget}: expected 0 or more, and `earlier` data to measure on."
            )
        if not 0 < self.dev_fraction < 1:
            raise ConfigError(f"dev_fraction={self.dev_fraction}: expected between 0 and 1.")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that describe the result, without those that only steer this machine."""
        hidden = ("overwrite", "resume", "out", "compare", "report_to")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in hidden}

    def task_arguments(self) -> dict[str, Any]:
        """Return what the task object is made with."""
        return {**{n: getattr(self, n) for n in ("text", "label", "max_length")}, **self.task_options}


def read_settings(path: str | Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Read a YAML config and lay the flags that were given over it.

    Raises:
        ConfigError: an unreadable file, an unknown key, a missing or mistyped value.
    """
    values = {**_read_yaml(path), **{k: v for k, v in flags.items() if v is not None}}
    known = {f.name: f for f in fields(TrainSettings)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ConfigError(f"unknown setting {unknown[0]!r}{_where(path)}. Known: {', '.join(known)}.")
    needed = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    needed = [n for n in needed if known[n].default_factory is dataclasses.MISSING and n not in values]
    if needed:
        raise ConfigError(f"setting {needed[0]!r} is missing{_where(path)}: {_doc(needed[0])}")
    return TrainSettings(**{k: typed(k, v) for k, v in values.items()})


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds no settings (`key: value` lines).")
    return values


def typed(name: str, value: Any) -> Any:
    """Check the value of a setting against its type; YAML reads 1e-3 as a string, so numbers may be text.

    Raises:
        ConfigError: a value of another type.
    """
    expected = next(str(f.type) for f in fields(TrainSettings) if f.name == name)
    if value is None and "None" in expected:
        return None
    kinds: dict[str, type] = {"str": str, "bool": bool, "dict": dict, "int": int, "list": list}
    head = expected.split("[")[0].split(" ")[0]
    try:
        if head == "float" and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    if head in kinds and isinstance(value, kinds[head]) and (head == "bool" or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{name}={value!r}: expected {head}.")


def _where(path: str | Path | None) -> str:
    return f" in {path}" if path else ""


def _doc(name: str) -> str:
    return {"base": "a pretrained model.", "train": "training data.", "out": "a folder for the adapter."}[name]
