"""Run the frozen layers below the lowest adapter once, keep what they give on disk, and train the layers above.

Between epochs nothing changes below the lowest adapted layer. So its hidden states are stored, one row after the
other, and the layers below pass them on instead of running. No model is known by name: what a layer returns is
recorded, and the cached pass is compared with a whole one before it is used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from interleaf.blocks import stacks_of
from interleaf.files import new_folder
from interleaf.slot import slots
from interleaf.tuner import task_head

if TYPE_CHECKING:
    from datasets import Dataset

    from interleaf.settings import TrainSettings

ROW, STATES = "trunk_row", "trunk_states"  # a column of the rows, and an input of the model
FILE, ABOUT = "states.bin", "cache.json"
BUILD_ROWS = 64


@dataclass(frozen=True)
class Cut:
    """The frozen layers at the bottom of one stack, by name, and how many layers the stack has."""

    layers: list[str]
    depth: int

    def __str__(self) -> str:
        return f"the lowest {len(self.layers)} of {self.depth} layers are run once and stored"


class NoCache(Exception):
    """Why the layers below cannot be run once."""


@dataclass(frozen=True)
class Rows:
    """What a Trainer reads: rows to train on, rows held out, what makes a batch of them, and what was cached."""

    train: Dataset
    dev: Dataset
    collate: Callable[[list[dict[str, Any]]], Any]
    cached: str
    keep_columns: bool = False


def cut_of(model: nn.Module) -> Cut:
    """Find the layers below everything that is trained or adapted.

    Raises:
        NoCache: there are none, or not at the bottom of the only stack or of the encoder.
    """
    heads = tuple(f"{name}." for name in task_head(model))
    live = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(heads)]
    places = {id(slot): name for name, slot in model.named_modules()}
    live += [f"{places[id(slot)]}." for slot in slots(model) if not slot.idle]
    stacks = list(stacks_of(model))
    within = {f"{name}.": (stack, i) for stack, blocks in stacks for i, (name, _) in enumerate(blocks)}
    lowest: dict[str, int] = {}
    for name in live:
        block = next((place for prefix, place in within.items() if name.startswith(prefix)), None)
        if block is None:
            raise NoCache(f"{name.rstrip('.')} is outside the layers, and trained or adapted")
        lowest[block[0]] = min(block[1], lowest.get(block[0], block[1]))
    stack, blocks = _first_stack(model, stacks)
    frozen = lowest.get(stack, len(blocks))
    if frozen == 0:
        raise NoCache("the first layer is trained or adapted: choose the upper ones, such as layers=last:2")
    if len({id(block) for _, block in blocks}) < len(blocks):
        raise NoCache("its layers share weights")
    return Cut([name for name, _ in blocks[:frozen]], len(blocks))


def _first_stack(model: Any, stacks: Sequence[Any]) -> Any:
    """Return the only stack of layers, or the encoder's."""
    if len(stacks) == 1:
        return stacks[0]
    if len(stacks) == 2 and getattr(model.config, "is_encoder_decoder", False):
        inside = {id(module) for module in model.get_encoder().modules()}
        of_encoder = [stack for stack in stacks if id(stack[1][0][1]) in inside]
        if len(of_encoder) == 1:
            return of_encoder[0]
    raise NoCache(f"the model has {len(stacks)} stacks of layers")


@contextmanager
def trunk_cache(model: Any, train: Dataset, dev: Dataset, collate: Any, settings: TrainSettings) -> Iterator[Rows]:
    """Let the frozen layers below run once, for as long as the block lasts; where that cannot be, say why.

    Dropout below the lowest adapter is off when its layers are cached.

    Args:
        train: encoded rows.
        dev: encoded rows.
        collate: makes a batch of encoded rows.
    """
    if settings.cache == "off":
        yield Rows(train, dev, collate, "off")
        return
    skip = None
    try:
        cut = cut_of(model)
        rows = _numbered(model, train, dev)
        states = _states(model, cut, rows, collate, settings)
        skip = _Skip(model, cut)
        _check(model, skip, states, rows, collate)
    except NoCache as reason:
        if skip is not None:
            skip.remove()
        yield Rows(train, dev, collate, f"not used: {reason}")
        return

    def with_states(features: list[dict[str, Any]]) -> Any:
        batch = collate([{k: v for k, v in one.items() if k != ROW} for one in features])
        return {**batch, STATES: states.batch([one[ROW] for one in features], batch["attention_mask"])}

    count = len(train)
    try:
        parts = rows.select(range(count)), rows.select(range(count, len(rows)))
        yield Rows(*parts, with_states, f"{cut} ({states.size_bytes / 1e6:,.0f} MB)", keep_columns=True)
    finally:
        skip.remove()


def _numbered(model: Any, train: Dataset, dev: Dataset) -> Dataset:
    """Put all rows together, with the columns that the model takes and a number each."""
    from datasets import concatenate_datasets

    rows = concatenate_datasets([train, dev])
    taken = inspect.signature(model.forward).parameters
    rows = rows.select_columns([c for c in rows.column_names if c in taken or c == "labels"])
    if not {"input_ids", "attention_mask"} <= set(rows.column_names):
        raise NoCache("the model takes no input_ids with an attention_mask")
    return rows.add_column(ROW, list(range(len(rows))))


class States:
    """Hidden states of rows on disk, one row after the other, memory-mapped.

    Args:
        folder: where they are.
        lengths: tokens of each row.
        width: of the model.
        dtype: that they are stored in.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        self.dtype, self.width = dtype, width
        file = str(folder / FILE)
        size = self.starts[-1] * width
        self.tokens = torch.from_file(file, shared=True, size=size, dtype=dtype).view(-1, width)

    @property
    def size_bytes(self) -> int:
        """What they take on disk."""
        return self.tokens.numel() * self.tokens.element_size()

    def hash(self) -> str:
        """Identify their bytes."""
        return xxhash.xxh3_128(self.tokens.view(-1).view(torch.uint8).numpy().data).hexdigest()

    def row(self, number: int) -> Tensor:
        """Return the states of one row, shape [T, D]."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def batch(self, numbers: Sequence[int], mask: Tensor) -> Tensor:
        """Return the states of rows, padded as their mask is, shape [B, T, D]."""
        found = torch.zeros(*mask.shape, self.width, dtype=self.dtype)
        found[mask.bool()] = torch.cat([self.row(number) for number in numbers])
        return found


def _states(model: Any, cut: Cut, rows: Dataset, collate: Any, settings: TrainSettings) -> States:
    """Read what an earlier run stored of the same rows, or store it.

    Raises:
        NoCache: it is too large, or a layer does not give one state for each token.
    """
    weight = next(model.get_submodule(cut.layers[-1]).parameters())
    dtype = getattr(torch, settings.cache_dtype) if settings.cache_dtype else weight.dtype
    lengths = [len(ids) for ids in rows["input_ids"]]
    width = int(_hidden_states(model, cut, collate([_row(rows, 0)])).shape[-1])
    needed = sum(lengths) * width * dtype.itemsize
    allowed = int(settings.cache_gb * 1e9)
    if needed > allowed:
        raise NoCache(f"it takes {needed / 1e9:.2f} GB, and cache_gb={settings.cache_gb:g}")
    root = _root()
    folder = root / _key(model, cut, rows, dtype)
    if (kept := _kept(folder, lengths, width, dtype)) is not None:
        return kept
    _make_room(root, allowed - needed)
    if needed > shutil.disk_usage(root).free:
        raise NoCache(f"it takes {needed / 1e9:.2f} GB, and the disk has less")
    with new_folder(folder, overwrite=True) as draft:
        states = States(draft, lengths, width, dtype)
        _fill(model, cut, rows, collate, states)
        (draft / ABOUT).write_text(json.dumps({"rows": len(rows), "hash": states.hash()}), "utf-8")
    return States(folder, lengths, width, dtype)


def _kept(folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> States | None:
    """Read what was stored, if all of it is there, as it was written."""
    size = sum(lengths) * width * dtype.itemsize
    if not (folder / ABOUT).exists() or (folder / FILE).stat().st_size != size:
        return None
    states = States(folder, lengths, width, dtype)
    if json.loads((folder / ABOUT).read_text("utf-8"))["hash"] != states.hash():
        return None
    os.utime(folder)
    return states


def _root() -> Path:
    root = Path(os.environ.get("INTERLEAF_CACHE") or Path.home() / ".cache" / "interleaf") / "trunk"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _make_room(root: Path, allowed: int) -> None:
    """Delete what was not used for longest until the rest is no larger than allowed."""
    kept = sorted((p for p in root.iterdir() if (p / ABOUT).exists()), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in kept}
    while kept and sum(sizes[p] for p in kept) > allowed:
        shutil.rmtree(kept.pop(0), ignore_errors=True)


def _key(model: Any, cut: Cut, rows: Dataset, dtype: torch.dtype) -> str:
    """Name what the states depend on: frozen weights, the cut, the rows' tokens, and what rounds."""
    heads = tuple(f"{name}." for name in task_head(model))
    found = xxhash.xxh3_128()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "adapter_slot" not in name and not name.startswith(heads) and not getattr(tensor, "requires_grad", False):
            found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for column in rows.column_names:
        if column not in ("labels", ROW):
            found.update(json.dumps([column, rows[column][:]]).encode())
    rounds = (torch.__version__, transformers.__version__, torch.get_num_threads(), str(model.device.type))
    found.update(json.dumps([cut.layers, str(dtype), model.config.to_json_string(), *rounds]).encode())
    return hashlib.sha256(found.digest()).hexdigest()[:32]


def _fill(model: Any, cut: Cut, rows: Dataset, collate: Any, states: States) -> None:
    """Run the layers below on all rows, like lengths together."""
    from rich.progress import track

    order = sorted(range(len(rows)), key=lambda i: states.starts[i + 1] - states.starts[i])
    starts = range(0, len(order), BUILD_ROWS)
    for start in track(starts, "running the frozen layers once", disable=not sys.stderr.isatty(), transient=True):
        numbers = order[start : start + BUILD_ROWS]
        batch = collate([_row(rows, i) for i in numbers])
        hidden = _hidden_states(model, cut, batch)
        mask = batch["attention_mask"].bool()
        if hidden.shape[:2] != mask.shape:
            raise NoCache(f"{cut.layers[-1]} gives {tuple(hidden.shape)}, not one state for each token")
        for number, row, real in zip(numbers, hidden.cpu(), mask, strict=True):
            states.row(number).copy_(row[real])


def _row(rows: Dataset, number: int) -> dict[str, Any]:
    return {k: v for k, v in rows[number].items() if k != ROW}


class _Enough(Exception):
    """The last frozen layer has run."""


def _hidden_states(model: Any, cut: Cut, batch: Any) -> Tensor:
    """Return what the last frozen layer gives, and run no layer above it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        raise _Enough

    hook = model.get_submodule(cut.layers[-1]).register_forward_hook(keep)
    try:
        _evaluated(model, batch)
    except _Enough:
        pass
    finally:
        hook.remove()
    if not found:
        raise NoCache(f"{cut.layers[-1]} does not run")
    return found[0]


def _evaluated(model: Any, batch: Any) -> Any:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return model(**{k: v.to(model.device) for k, v in batch.items()})
    finally:
        model.train(training)


class _Skip:
    """Puts stored states in the place of what the frozen layers give, while a model is given them.

    Args:
        model: whose layers they are.
        cut: the frozen layers.
    """

    def __init__(self, model: Any, cut: Cut) -> None:
        self.states: Tensor | None = None
        self.layers = [model.get_submodule(name) for name in cut.layers]
        self.like: dict[int, Any] = {}
        self.hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._drop, always_call=True),
        ]
        for layer in self.layers:
            layer.forward = self._forward(layer, layer.forward)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.states = kwargs.get(STATES)
        return args, {k: v for k, v in kwargs.items() if k != STATES}

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.states = None

    def _forward(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.states is None:
                output = self.like[id(layer)] = forward(*args, **kwargs)
                return output
            return _in_place_of(self.like[id(layer)], self.states.to(self.dtype(layer)))

        return run

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """The float type that a layer gives."""
        like = self.like[id(layer)]
        found: torch.dtype = (like if isinstance(like, Tensor) else like[0]).dtype
        return found

    def forget_outputs(self) -> None:
        """Keep of each layer's last output the form alone."""
        self.like = {key: _in_place_of(like, _first(like)[:0]) for key, like in self.like.items()}

    def remove(self) -> None:
        """Let the layers run again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            del layer.forward


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _in_place_of(like: Any, states: Tensor) -> Any:
    """Return states in the form of a layer's output; what else it gave is left out."""
    if isinstance(like, Tensor):
        return states
    rest = [None if isinstance(part, Tensor) else part for part in list(like)[1:]]
    return type(like)((states, *rest)) if type(like) in (tuple, list) else (states, *rest)


def _check(model: Any, skip: _Skip, states: States, rows: Dataset, collate: Any) -> None:
    """Compare a pass with stored states and a whole one.

    Raises:
        NoCache: they differ, or the layers above need more than the states.
    """
    numbers = [i * len(rows) // 4 for i in range(4)] if len(rows) >= 4 else [0]
    batch = collate([_row(rows, i) for i in numbers])
    whole = _evaluated(model, batch)
    skip.forget_outputs()
    given = {**batch, STATES: states.batch(numbers, batch["attention_mask"])}
    try:
        cached = _evaluated(model, given)
    except Exception as error:
        raise NoCache(f"the layers above need more than hidden states ({type(error).__name__}: {error})") from error
    lossy = states.tokens.element_size() < skip.dtype(skip.layers[-1]).itemsize
    tolerance = 0.05 if lossy else 1e-4
    real = batch["attention_mask"].bool()
    for name in ("logits", "loss"):
        one, other = getattr(whole, name).float().cpu(), getattr(cached, name).float().cpu()
        if one.shape[:2] == real.shape:
            one, other = one[real], other[real]  # what stands at padding is nobody's
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max())):
            raise NoCache("the layers above need more than the hidden states of those below")
