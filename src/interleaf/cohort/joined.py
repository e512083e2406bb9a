"""Calls of one frozen layer by several models, made one call: rows side by side, each through its own adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from interleaf.adapter import Around
from interleaf.blocks import stacks_of
from interleaf.slot import Slot, slots, state_of, with_first

CPU_TOKENS = 2048


@dataclass(frozen=True)
class Call:
    """A model's call of one of its layers.

    `place` is the layer's number; `form` tells which calls can be one.
    """

    place: int
    rows: int
    tokens: int
    training: bool
    grad: bool
    inference: bool
    form: Hashable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: Sequence[Slot]


class Apart(Exception):
    """Calls that cannot be one after all."""


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of all stacks, in the order they run."""
    return [layer for _, blocks in stacks_of(model) for layer in blocks]


def call_of(place: int, layer: nn.Module, own: Sequence[Slot], args: Any, kwargs: Any) -> Call | None:
    """Describe a call that could be made together with others', or None."""
    kwargs = {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}  # the Trainer's, for the loss
    given = [*args, *kwargs.values()]
    shape = next((v.shape for v in given if isinstance(v, Tensor) and v.ndim > 1), (0, 0))
    rows = shape[0]
    modes = layer.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    try:
        form = (place, modes, _form(args, rows), _form(kwargs, rows))
    except Apart:
        return None
    return Call(place, rows, rows * shape[1], *modes, form, args, kwargs, own) if rows else None


def _form(value: Any, rows: int) -> Hashable:
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == rows
        return batched, value.dtype, value.device, tuple(value.shape[batched:])
    if type(value) in (tuple, list):
        return type(value), tuple(_form(v, rows) for v in value)
    if isinstance(value, dict):
        return tuple((k, _form(v, rows)) for k, v in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    raise Apart  # keys and values of earlier tokens, say


def that_fit(calls: Sequence[Call]) -> int:
    """Return how many of the first calls are worth to be one: on a CPU, larger ones leave its caches."""
    if torch.accelerator.is_available():
        return len(calls)
    return max(1, sum(end <= CPU_TOKENS for end in accumulate(call.tokens for call in calls)))


def joined_slots(model: nn.Module) -> dict[int, list[Slot]] | None:
    """Return a model's slots inside each of its layers, or None if its calls are not to be joined.

    That is so where a layer is not the base's own with slots in it: PEFT's own methods wrap maps, virtual tokens
    change whole calls.
    """
    found: dict[int, list[Slot]] = {}
    kinds = [adapter for slot in slots(model) for adapter in slot.adapters.values()]
    if any(isinstance(adapter, Around) for adapter in kinds):
        return None
    for place, (_, layer) in enumerate(layers_of(model)):
        # those on the layer itself are run by the model that the layer is in
        found[place] = [slot for slot in slots(layer) if getattr(layer, "adapter_slot", None) is not slot]
    return found


def run_joined(layer: nn.Module, name: str, calls: Sequence[Call]) -> list[Any]:
    """Run a layer of the untouched base once for several calls, with each one's adapters on its rows.

    Args:
        layer: the base's own.
        name: of the layer in the models.
        calls: of one form.

    Returns:
        what each call would have got.

    Raises:
        Apart: the calls share something that is not the same.
    """
    rows = [call.rows for call in calls]
    args = _join([call.args for call in calls], rows)
    kwargs = _join([call.kwargs for call in calls], rows)
    ends = torch.tensor([0, *rows]).cumsum(0).tolist()
    parts = [slice(*pair) for pair in pairwise(ends)]
    first = calls[0]
    layer.train(first.training)
    modes = torch.set_grad_enabled(first.grad), torch.inference_mode(first.inference)
    with modes[0], modes[1], _adapted(layer, name, calls, parts, ends[-1]):
        output = layer(*args, **kwargs)
    return [_cut(output, part, ends[-1]) for part in parts]


def _join(values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim and first.shape[0] == rows[0]:
            return torch.cat(list(values))
        if all(value is first or torch.equal(value, first) for value in values):
            return first
        if first.ndim and first.shape[0] == 1:
            return torch.cat([v.expand(n, *v.shape[1:]) for v, n in zip(values, rows, strict=True)])
        raise Apart
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], rows) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_join(parts, rows) for parts in zip(*values, strict=True))
    return first


def _cut(value: Any, part: slice, total: int) -> Any:
    """Return some rows of all tensors in a structure; experts flatten rows and tokens."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] and value.shape[0] % total == 0:
        times = value.shape[0] // total
        return value[part.start * times : part.stop * times]
    if type(value) in (tuple, list):
        return type(value)(_cut(v, part, total) for v in value)
    if isinstance(value, dict):
        return {k: _cut(v, part, total) for k, v in value.items()}
    return value


@contextlib.contextmanager
def _adapted(layer: nn.Module, name: str, calls: Sequence[Call], parts: Sequence[slice], total: int) -> Iterator[None]:
    """Let each call's slots act on its rows, for as long as the block lasts."""
    reads: dict[str, dict[int, list[Slot]]] = {}
    writes: dict[str, dict[int, list[Slot]]] = {}
    for number, call in enumerate(calls):
        for slot in sorted(call.slots, key=lambda s: not s.site.map_width):
            for places, module in ((reads, slot.site.read), (writes, slot.site.write)):
                inside = module.removeprefix(name).removeprefix(".")
                places.setdefault(inside, {}).setdefault(number, []).append(slot)
    with contextlib.ExitStack() as stack:
        for inside, by_call in reads.items():
            entering = _entering(by_call, parts, total)
            stack.callback(layer.get_submodule(inside).register_forward_pre_hook(entering, with_kwargs=True).remove)
        for inside, by_call in writes.items():
            stack.callback(layer.get_submodule(inside).register_forward_hook(_leaving(by_call, parts, total)).remove)
        yield


def _entering(by_call: dict[int, list[Slot]], parts: Sequence[slice], total: int) -> Callable[..., Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [_cut((args, kwargs), part, total) for part in parts]
        got = list(given)
        for number, own in by_call.items():
            for slot in own:
                got[number] = slot.enter(module, *got[number]) or got[number]
        if all(one is other for one, other in zip(got, given, strict=True)):
            return None
        return (
            tuple(_changed(a, [g[0][i] for g in given], [g[0][i] for g in got]) for i, a in enumerate(args)),
            {k: _changed(v, [g[1][k] for g in given], [g[1][k] for g in got]) for k, v in kwargs.items()},
        )

    return enter


def _changed(whole: Any, given: Sequence[Any], got: Sequence[Any]) -> Any:
    return whole if all(one is other for one, other in zip(given, got, strict=True)) else torch.cat(list(got))


def _leaving(by_call: dict[int, list[Slot]], parts: Sequence[slice], total: int) -> Callable[..., Any]:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        whole = state_of(output)
        given = [_cut(whole, part, total) for part in parts]
        got = list(given)
        for number, own in by_call.items():
            for slot in own:
                changed = slot.leave(module, (), got[number])
                got[number] = got[number] if changed is None else changed
        y = _changed(whole, given, got)
        return None if y is whole else y if isinstance(output, Tensor) else with_first(output, y)

    return leave
