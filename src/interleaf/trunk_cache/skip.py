"""Let the frozen layers pass stored states on instead of running, and check that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interleaf.trunk_cache.cut import Cut, NoCache
from interleaf.trunk_cache.states import States, evaluated, plain_row

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


def check(model: Any, skip: Skip, states: States, rows: Dataset, collate: Any) -> None:
    """Compare a pass with stored states and a whole one.

    Raises:
        NoCache: they differ, or the layers above need more than the states.
    """
    numbers = [i * len(rows) // 4 for i in range(4)] if len(rows) >= 4 else [0]
    batch = collate([plain_row(rows, i) for i in numbers])
    whole = evaluated(model, batch)
    skip.forget_outputs()
    given = {**batch, STATES: states.batch(numbers, batch["attention_mask"])}
    try:
        cached = evaluated(model, given)
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
