"""Let the frozen layers pass stored states on instead of running, and check that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interleaf.slot import state_of
from interleaf.tasks.rows import by_length
from interleaf.trunk_cache.cut import Cut, NoCache
from interleaf.trunk_cache.states import States, evaluated, hidden_states, plain_row

if TYPE_CHECKING:
    from datasets import Dataset

STATES = "trunk_states"  # an input of the model


class Skip:
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
        self.own = [vars(layer).get("forward") for layer in self.layers]  # of what moves weights about
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
        return state_of(self.like[id(layer)]).dtype

    def forget_outputs(self) -> None:
        """Keep of each layer's last output the form alone."""
        self.like = {key: _in_place_of(like, state_of(like)[:0]) for key, like in self.like.items()}

    def remove(self) -> None:
        """Let the layers run again."""
        for hook in self.hooks:
            hook.remove()
        for layer, own in zip(self.layers, self.own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _in_place_of(like: Any, states: Tensor) -> Any:
    """Return states in the form of a layer's output; what else it gave is left out."""
    if isinstance(like, Tensor):
        return states
    rest = [None if isinstance(part, Tensor) else part for part in list(like)[1:]]
    return type(like)((states, *rest)) if type(like) in (tuple, list) else (states, *rest)


def check(model: Any, cut: Cut, skip: Skip, states: States, rows: Dataset, collate: Any) -> None:
    """Compare stored states with fresh ones, with little padding and with much, and a cached pass with a whole one.

    Raises:
        NoCache: they differ, or the layers above need more than the states.
    """
    order = by_length(rows)
    for numbers in ([order[0]], [order[0], order[len(order) // 2], order[-1]]):
        batch = collate([plain_row(rows, i) for i in numbers])
        real = batch["attention_mask"].bool()
        whole, hidden = evaluated(model, batch), hidden_states(model, cut, batch).cpu()
        skip.forget_outputs()
        stored = states.batch(numbers, batch["attention_mask"])
        rounding = 32 * max(torch.finfo(stored.dtype).eps, torch.finfo(hidden.dtype).eps)
        if not _near(hidden[real], stored[real], max(1e-4, rounding)):
            raise NoCache("a row's states depend on what stands beside it in a batch")
        try:
            cached = evaluated(model, {**batch, STATES: hidden * real.unsqueeze(-1)})
        except Exception as error:
            raise NoCache(f"the layers above need more than hidden states ({type(error).__name__}: {error})") from error
        for name in ("logits", "loss"):
            one, other = getattr(whole, name).cpu(), getattr(cached, name).cpu()
            if one.shape[:2] == real.shape:
                one, other = one[real], other[real]  # what stands at padding is nobody's
            if not _near(one, other, max(1e-4, 4 * torch.finfo(one.dtype).eps)):
                raise NoCache("the layers above need more than the hidden states of those below")


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    finite = torch.isfinite(one)
    largest = float(one[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * largest)
