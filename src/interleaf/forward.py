"""What adapters know of the running forward pass: the composition, and where each token stands in its row.

Kept as the model's state, not in a `with` block: gradient checkpointing runs the layers again in the backward pass.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interleaf.adapter import Around
from interleaf.compose import by_row, head_of, leaves, per_row, width
from interleaf.errors import AdapterError
from interleaf.interpret import row_parts, row_slices

if TYPE_CHECKING:
    from interleaf.slot import Slot

_CACHES = ("past_key_values", "past_key_value", "cache_params")
_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "hidden_states")


class Places:
    """Where the tokens of one stack's current input stand in their rows."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.past = 0
        # real tokens in each row's prompt: [B, 1], or one number for all rows
        self.ends: Tensor | int | None = None
        self._level = 0
        # whether virtual tokens stand before the text's
        self.lengthened = False

    def begin(self, level: int, inputs: dict[str, Any], keep_prompt: bool) -> None:
        """Note mask, cache and prompt of a forward pass; the modules around a stack call it, outermost first."""
        fresh, self._level = level <= self._level, level
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.lengthened &= not fresh
        if not fresh and mask is None:
            return
        tokens = next((inputs[n] for n in _TOKENS if isinstance(inputs.get(n), Tensor)), None)
        count = int(tokens.shape[1]) if tokens is not None and tokens.ndim > 1 else 0
        self.mask, self.past = mask, past_length(inputs, mask, count)
        if self.past == 0 and not (keep_prompt and self.ends is not None):
            self.ends = _prompt(mask, inputs.get("labels"), count)

    def narrow(self, rows: slice | Tensor) -> Places:
        """Return the same for some of the rows."""
        twin = Places()
        twin.past = self.past
        twin.mask = None if self.mask is None else self.mask[rows]
        twin.ends = self.ends[rows] if isinstance(self.ends, Tensor) else self.ends
        return twin

    def places(self, y: Tensor) -> Tensor:
        """Return each token's place among its row's real tokens, shape [B, T]; padding has -1.

        Raises:
            AdapterError: a site that does not see the batch as [B, T, D], or sees virtual tokens too.
        """
        if self.lengthened:
            raise AdapterError("a prompt's virtual tokens run: beside it no adapter can be for chosen tokens only.")
        if y.ndim != 3 or (self.mask is not None and self.mask.shape[0] != y.shape[0]):
            raise AdapterError(f"a site of shape {tuple(y.shape)}, not [B, T, D]: its tokens cannot be told apart.")
        count = y.shape[1]
        if self.mask is None:
            return torch.arange(self.past, self.past + count, device=y.device).expand(y.shape[0], count)
        real = self.mask.to(torch.long)
        return (real.cumsum(1) * real - 1)[:, self.past : self.past + count]

    def chosen(self, tokens: str, y: Tensor) -> Tensor:
        """Tell which tokens a `tokens` setting names, shape [B, T]: the prompt's first:n, last:n, or both."""
        places = self.places(y)
        ends = places.shape[1] if self.ends is None else self.ends
        chosen = torch.zeros_like(places, dtype=torch.bool)
        for part in tokens.split(","):
            kind, _, number = part.partition(":")
            chosen = chosen | (places < int(number) if kind == "first" else places >= ends - int(number))
        return chosen & (places >= 0) & (places < ends)


def past_length(inputs: dict[str, Any], mask: Tensor | None, count: int) -> int:
    """Return how many tokens are in the cache already."""
    for name in _CACHES:
        length = getattr(inputs.get(name), "get_seq_length", None)
        if length is not None:
            return int(length())
    return max(0, mask.shape[1] - count) if mask is not None and count else 0


def _prompt(mask: Tensor | None, labels: Any, count: int) -> Tensor | int:
    """Count the tokens of each row's prompt: in training, those before the first label."""
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == count:
        before = (labels != -100).cumsum(1) == 0
        return (before if mask is None else before & mask.bool()).sum(1, keepdim=True)
    return count if mask is None else mask.sum(1, keepdim=True)


class Running:
    """The state all slots of a model share: what runs, on which rows, at which places.

    Args:
        model: the model the slots are in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.node: Any = ""
        self.rows: Any = None
        self.skip_layers: frozenset[int] = frozenset()
        self.generating = False
        self.slots: list[Slot] = []
        self.heads: list[Any] = []
        self.version = 0
        """Grows when a slot or a head comes or goes."""
        self.places: dict[str, Places] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    @property
    def current(self) -> Any:
        """The composition of this forward pass."""
        return self.node if self.rows is None else self.rows

    def activate(self, node: Any, skip_layers: frozenset[int] = frozenset()) -> None:
        """Run a composition from now on, but in the layers to skip."""
        if (node, skip_layers) == (self.node, self.skip_layers):
            return
        self.node, self.skip_layers = node, skip_layers
        for slot in self.slots:
            slot.replan()

    def watch(self, model: nn.Module, stack: str, stacks: Sequence[str]) -> None:
        """Follow the inputs of the modules that hold one stack of layers and no other."""
        self.places[stack] = Places()
        parts = stack.split(".")
        around = [".".join(parts[:i]) for i in range(len(parts))]
        shared = [n for n in around if any(s != stack and f"{s}.".startswith(f"{n}." if n else "") for s in stacks)]
        for level, name in enumerate(n for n in around if n not in shared):
            watcher = _Watcher(self, stack, level, model.get_submodule(name))
            self._hooks.append(model.get_submodule(name).register_forward_pre_hook(watcher, with_kwargs=True))

    def watch_head(self, wrapper: nn.Module) -> None:
        """Give each row the task head of its own adapter."""
        if not any(head is wrapper for head in self.heads):
            wrapper.register_forward_hook(self._heads, with_kwargs=True)
            self.heads.append(wrapper)
            self.version += 1

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def use_rows(self, names: Sequence[Any]) -> None:
        """Give each row of the coming forward passes its own adapter.

        Raises:
            AdapterError: an unknown name.
        """
        node = per_row(names)
        known = {name for slot in self.slots for name in slot.adapters}
        if unknown := [name for name in leaves(node) if name not in known]:
            there = ", ".join(sorted(known)) or "none"
            raise AdapterError(f"adapter_names: there is no adapter {unknown[0]!r} here. There are: {there}.")
        whole = {n for slot in self.slots for n, a in slot.adapters.items() if isinstance(a, Around)}
        if found := [name for name in leaves(node) if name in whole]:
            raise AdapterError(f"adapter_names: {found[0]!r} has virtual tokens, which take a whole batch.")
        self.rows = node

    @contextlib.contextmanager
    def generation(self, adapter_names: Sequence[Any] | None = None) -> Iterator[None]:
        """Hold rows and prompt over the forward passes of one `generate`."""
        self.rows = None
        if adapter_names is not None:
            self.use_rows(adapter_names)
        for places in self.places.values():
            places.ends = None
        self.generating = True
        try:
            yield
        finally:
            self.generating = False

    def copies(self) -> int:
        """Return how many copies of the batch the composition wants."""
        return 1 if self.rows is not None or isinstance(self.node, str) else width(self.node)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(module, "_is_replica", False):
            # a replica's hooks are those of the model it was copied from, and so are the adapters they hold
            raise AdapterError(
                "torch.nn.DataParallel would run every copy with the first one's adapters. Start with "
                "`torchrun --nproc-per-node N` instead, or show one device only (CUDA_VISIBLE_DEVICES=0)."
            )
        for slot in self.slots:
            slot.begin()
        names = kwargs.get("adapter_names")
        if not self.generating:
            self.rows = None
        if names is not None:
            self.use_rows(names)
        if "adapter_names" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "adapter_names"}
        copies = 1 if self.generating else self.copies()
        if copies > 1:
            return tuple(repeat(a, copies) for a in args), {k: repeat(v, copies) for k, v in kwargs.items()}
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for slot in self.slots:
            slot.settle()
        loss = output.get("loss") if module.training and isinstance(output, dict) else None
        if loss is None or (penalty := self.penalty()) is None:
            return None
        output["loss"] = loss + penalty.to(loss.dtype)
        return output

    def penalty(self) -> Tensor | None:
        """Return what the running adapters add to the training loss; the model's own `loss` holds it already."""
        names = leaves(self.current)
        terms = [slot.adapters[n].penalty() for slot in self.slots for n in names if n in slot.adapters]  # type: ignore[operator]
        found = [t for t in terms if t is not None]
        return torch.stack(found).sum() if found else None

    def _heads(self, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if wrapper.disable_adapters or not by_row(self.current):
            return None
        return _heads(self.current, wrapper, args, kwargs)


def running_in(model: nn.Module) -> Running | None:
    """Return what the slots of a model share, if there are any; found by its hook, not by looking through the model."""
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((one for one in hooks if isinstance(one, Running)), None)


class _Watcher:
    """A hook that notes a module's inputs by name."""

    def __init__(self, running: Running, stack: str, level: int, module: nn.Module) -> None:
        self.running, self.stack, self.level = running, stack, level
        self.names = [p for p in inspect.signature(module.forward).parameters if p != "self"]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.running.places[self.stack].begin(self.level, inputs, self.running.generating)


def repeat(value: Any, copies: int) -> Any:
    """Repeat a tensor's rows, copy after copy; leave everything else."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.repeat(copies, *[1] * (value.ndim - 1))


def _heads(node: Any, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if not by_row(node):
        name = head_of(node, wrapper.modules_to_save)
        result: Tensor = (wrapper.modules_to_save[name] if name else wrapper.original_module)(*args, **kwargs)
        return result
    if not hasattr(node, "order") and node.word not in ("parallel", "batch_split"):
        last = next(child for child in reversed(node.children) if by_row(child))
        return _heads(last, wrapper, args, kwargs)
    features: Tensor = args[0]
    order, node = row_parts(node, features.shape[0], features.device)
    features = features if order is None else features[order]
    parts = [
        _heads(child, wrapper, (features[part], *args[1:]), kwargs)
        for child, part in row_slices(node, features.shape[0])
    ]
    joined = torch.cat(parts)
    return joined if order is None else joined[torch.argsort(order)]
