"""Share a budget of bottleneck units out over the places of an adapter while it trains, and keep only what is left.

The adapter starts wide. A unit's importance is how much the loss would change, to first order, without it: its weights
times their gradients, smoothed over the steps, as AdaLoRA scores singular values (Zhang et al. 2023, arXiv 2303.10512).
The least important units of all places are set to nought, more and more of them; they go on being trained, and can
come back, until the budget is reached.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from interleaf.adapters import Bottleneck, BottleneckConfig
from interleaf.errors import ConfigError
from interleaf.slot import slots

BEGIN, END = 0.1, 0.5
"""Shares of the steps between which units are taken away; then the rest trains on."""
SMOOTHING = 0.85


class Pruning(TrainerCallback):
    """Takes units away after each step; epochs with more units than the budget are never the best.

    Args:
        model: with the adapter.
        name: the adapter's name.
        budget: bottleneck units in all that are left at the end.
        metric: what the Trainer chooses the best epoch by; `loss` is better when lower.

    Raises:
        ConfigError: not a bottleneck adapter, or a budget that it cannot meet.
    """

    def __init__(self, model: Any, name: str, budget: int, metric: str) -> None:
        self.adapters = bottlenecks(model, name)
        self.budget, self.metric = budget, metric
        widths = [adapter.up.in_features for adapter in self.adapters.values()]
        self.total = sum(widths)
        if not len(widths) <= budget < self.total:
            raise ConfigError(
                f"unit_budget={budget}: expected {len(widths)} (one unit a place) to {self.total - 1}, fewer than the "
                "adapter has at first. Start with a wider one (a smaller reduction_factor)."
            )
        self.scores = [torch.zeros(width) for width in widths]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, adapter in enumerate(self.adapters.values()):
            weight = adapter.up.weight
            if weight.grad is not None:
                importance = (weight.detach() * weight.grad).sum(0).abs().float().cpu()
                self.scores[number] = SMOOTHING * self.scores[number] + (1 - SMOOTHING) * importance
        wanted = allowed(state.global_step + 1, state.max_steps, self.total, self.budget)
        if wanted < self.total:
            self._keep(wanted)

    def _keep(self, count: int) -> None:
        for kept, adapter in zip(most_important(self.scores, count), self.adapters.values(), strict=True):
            with torch.no_grad():
                adapter.up.weight[:, ~kept.to(adapter.up.weight.device)] = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if allowed(state.global_step, state.max_steps, self.total, self.budget) > self.budget:
            # what the Trainer compares next, with the best so far
            kwargs["metrics"][f"eval_{self.metric}"] = math.inf if self.metric == "loss" else -math.inf


def allowed(step: int, steps: int, total: int, budget: int) -> int:
    """Return how many units there may be after a step: all at first, then fewer by a cubic, then the budget."""
    begin, end = BEGIN * steps, END * steps
    left = min(1.0, max(0.0, (end - step) / (end - begin)))
    return budget + round((total - budget) * left**3)


def most_important(scores: list[Tensor], count: int) -> list[Tensor]:
    """Choose the best units of each place, and of all others the best: `count` in all.

    Args:
        scores: of the units, a place each, shape [R].

    Returns:
        which are chosen, a place each, shape [R].
    """
    first = [torch.zeros(len(own), dtype=torch.bool).index_fill(0, own.argmax(), True) for own in scores]
    every, chosen = torch.cat(scores), torch.cat(first)
    rest = every.masked_fill(chosen, -math.inf).argsort(descending=True, stable=True)[: count - len(scores)]
    return list(chosen.index_fill(0, rest, True).split([len(own) for own in scores]))


def bottlenecks(model: Any, name: str) -> dict[str, Bottleneck]:
    """Return an adapter's modules by place.

    Raises:
        ConfigError: they are of another kind.
    """
    if not isinstance(model.adapters[name], BottleneckConfig):
        raise ConfigError(
            f"unit_budget is for bottleneck adapters; {name!r} is a {type(model.adapters[name]).__name__}."
        )
    found: dict[str, Any] = {slot.site.write: slot.adapters[name] for slot in slots(model) if name in slot.adapters}
    return found


def narrow(model: Any, name: str) -> dict[str, int]:
    """Cut an adapter down to the units that write something, one a place at least; its config says the widths.

    Returns:
        the widths, by place.
    """
    widths = {}
    for place, adapter in bottlenecks(model, name).items():
        writes = adapter.up.weight.detach().abs().sum(0) > 0
        if not writes.any():
            writes[0] = True
        adapter.up = _part(adapter.up, adapter.up.weight[:, writes], adapter.up.bias)
        inner = "down" if adapter.middle is None else "middle"
        read = getattr(adapter, inner)
        setattr(adapter, inner, _part(read, read.weight[writes], read.bias[writes]))
        widths[place] = int(writes.sum())
    model.adapters[name].bottleneck_dim = widths
    return widths


def _part(whole: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), whole.weight.requires_grad)
    made.bias = nn.Parameter(bias.detach().clone(), whole.weight.requires_grad)
    return made
