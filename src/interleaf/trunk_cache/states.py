"""Hidden states of rows on disk: made once, kept for later runs, verified when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from interleaf.errors import StoreError
from interleaf.files import cache_folder, new_folder
from interleaf.slot import state_of
from interleaf.tasks.rows import by_length
from interleaf.trunk_cache.cut import Cut, NoCache
from interleaf.tuner import task_head

if TYPE_CHECKING:
    from datasets import Dataset

    from interleaf.settings import TrainSettings

ROW = "trunk_row"  # a column of the rows: their number
FILE, ABOUT = "states.bin", "cache.json"
BUILD_ROWS = 64


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
        self.seconds = 0.0
        """What it took to make them."""
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


def stored_states(model: Any, cut: Cut, rows: Dataset, collate: Any, settings: TrainSettings) -> States:
    """Read what an earlier run stored of the same rows, or store it.

    Raises:
        NoCache: it is too large, or a layer does not give one state for each token.
    """
    first = hidden_states(model, cut, collate([plain_row(rows, 0)]))
    dtype = getattr(torch, settings.cache_dtype) if settings.cache_dtype else first.dtype
    lengths = [len(ids) for ids in rows["input_ids"]]
    width = int(first.shape[-1])
    needed = sum(lengths) * width * dtype.itemsize
    allowed = int(settings.cache_gb * 1e9)
    if needed > allowed:
        raise NoCache(f"it takes {needed / 1e9:.2f} GB, and cache_gb={settings.cache_gb:g}")
    root = _root()
    ends = by_length(rows)
    padded = collate([plain_row(rows, i) for i in (ends[0], ends[-1])])["attention_mask"]
    if not bool(padded[:, 0].all()):
        raise NoCache("rows are padded on the left, where positions may count the padding")
    folder = root / _key(model, cut, rows, dtype)
    if (kept := _kept(folder, lengths, width, dtype)) is not None:
        return kept
    _make_room(root, allowed - needed)
    if needed > shutil.disk_usage(root).free:
        raise NoCache(f"it takes {needed / 1e9:.2f} GB, and the disk has less")
    try:
        with new_folder(folder, overwrite=True) as draft:
            states = States(draft, lengths, width, dtype)
            start = time.monotonic()
            _fill(model, cut, rows, collate, states)
            states.seconds = time.monotonic() - start
            about = {"rows": len(rows), "hash": states.hash(), "seconds": states.seconds}
            (draft / ABOUT).write_text(json.dumps(about), "utf-8")
    except StoreError:
        if (kept := _kept(folder, lengths, width, dtype)) is not None:
            return kept  # another process was first
        raise
    return states  # the mapping outlives the folder's new name


def _kept(folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> States | None:
    """Read what was stored, if all of it is there, as it was written."""
    size = sum(lengths) * width * dtype.itemsize
    try:
        if (folder / FILE).stat().st_size != size:
            return None
        states = States(folder, lengths, width, dtype)
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        whole, states.seconds = about["hash"] == states.hash(), float(about["seconds"])
        os.utime(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged, or another run is deleting it
    return states if whole else None


def _root() -> Path:
    root = cache_folder() / "trunk"
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

    order = by_length(rows)
    starts = range(0, len(order), BUILD_ROWS)
    for start in track(starts, "running the frozen layers once", disable=not sys.stderr.isatty(), transient=True):
        numbers = order[start : start + BUILD_ROWS]
        batch = collate([plain_row(rows, i) for i in numbers])
        hidden = hidden_states(model, cut, batch)
        mask = batch["attention_mask"].bool()
        if hidden.shape[:2] != mask.shape:
            raise NoCache(f"{cut.layers[-1]} gives {tuple(hidden.shape)}, not one state for each token")
        for number, row, real in zip(numbers, hidden.cpu(), mask, strict=True):
            states.row(number).copy_(row[real])


def plain_row(rows: Dataset, number: int) -> dict[str, Any]:
    """Return a row as the model takes it, without its number."""
    return {k: v for k, v in rows[number].items() if k != ROW}


class _Enough(Exception):
    """The last frozen layer has run."""


def hidden_states(model: Any, cut: Cut, batch: Any) -> Tensor:
    """Return what the last frozen layer gives, and run no layer above it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(state_of(output))
        raise _Enough

    hook = model.get_submodule(cut.layers[-1]).register_forward_hook(keep)
    try:
        evaluated(model, batch)
    except _Enough:
        pass
    finally:
        hook.remove()
    if not found:
        raise NoCache(f"{cut.layers[-1]} does not run")
    return found[0]


def evaluated(model: Any, batch: Any) -> Any:
    """Return what a model gives for a batch, with dropout off."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return model(**{k: v.to(model.device) for k, v in batch.items()})
    finally:
        model.train(training)
