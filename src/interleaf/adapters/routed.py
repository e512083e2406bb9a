"""Several small bottlenecks at each place, and a router that sends each token to some of them, or past them all.

After Shazeer et al. 2017 (arXiv 1701.06538); balanced as in Fedus et al. 2022 (2101.03961).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site


@register_adapter("routed")
@dataclass
class RoutedConfig(AdapterConfig):
    """Experts, and a router over them that reads the token itself."""

    positions: list[str] = field(default_factory=lambda: ["ffn"])
    """Sublayers to adapt: attention, cross_attention, ffn, block."""
    experts: int = 4
    """Number of bottlenecks."""
    bottleneck_dim: int = 8
    """Width R of each."""
    active: int = 1
    """Choices that a token takes, weighed by how sure the router is of each, whatever the number of experts."""
    skip: bool = True
    """Give the router one more choice: no expert, so that the token passes unchanged."""
    balance: float = 0.01
    """Weight, in the training loss, of how unevenly the experts are used."""
    activation: str = "relu"
    """Name of the non-linearity, as in transformers' ACT2FN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        if self.experts < 2 or self.bottleneck_dim < 1:
            raise ConfigError(
                f"experts={self.experts}, bottleneck_dim={self.bottleneck_dim}: expected 2 and 1 or more."
            )
        if not 1 <= self.active <= self.experts:
            raise ConfigError(f"active={self.active}: expected 1 to {self.experts}, the number of experts.")

    def build(self, site: Site) -> Adapter:
        return Routed(site.width, self)


class Routed(Adapter):
    """`y' = y + E / k sum_e p_e up_e(act(down_e(y)))` over the k choices a token takes, `p = softmax(router(y))`.

    An undecided router thus adds as much as a plain bottleneck. At the start few tokens skip: the loss does not say
    what a token that skips would gain by an expert. All experts are computed, whichever a token takes: they are too
    small for gathering tokens to pay.

    Args:
        width: width D of the model.
        config: the adapter's settings.
    """

    def __init__(self, width: int, config: RoutedConfig) -> None:
        super().__init__()
        count, inner = config.experts, config.bottleneck_dim
        self.router = nn.Linear(width, count + config.skip)
        self.down = nn.Linear(width, count * inner)
        self.up = nn.Parameter(torch.zeros(count, inner, width))
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]
        self.experts, self.active, self.balance = count, config.active, config.balance
        self._uneven: Tensor | None = None
        if self.down.weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            if config.skip:
                nn.init.zeros_(self.router.weight[-1])
                nn.init.zeros_(self.router.bias[-1:])

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        z = y.to(self.up.dtype)
        scores = self.router(z)
        chances = torch.softmax(scores, dim=-1)
        taken = torch.zeros_like(chances).scatter(-1, chances.topk(self.active, dim=-1).indices, 1.0)
        weights = chances * taken
        self.observe("router", weights)
        if self.training and self.balance:
            self._uneven = unevenness(scores[..., : self.experts])
        hidden = self.activation(self.down(z)).unflatten(-1, (self.experts, -1))
        hidden = hidden * weights[..., : self.experts, None] * (self.experts / self.active)
        change: Tensor = hidden.flatten(-2) @ self.up.flatten(0, 1)
        return y + change.to(y.dtype)

    def penalty(self) -> Tensor | None:
        """Return the balancing term of the last forward pass: 0 when all experts are used alike."""
        uneven, self._uneven = self._uneven, None
        return None if uneven is None else self.balance * uneven


def unevenness(scores: Tensor) -> Tensor:
    """Return `E sum_e f_e P_e - 1`: `f` the share of tokens whose first choice an expert is, `P` its mean chance.

    0 when all are used alike, `E - 1` when one has all.

    Args:
        scores: of the experts, shape [..., E].
    """
    count = scores.shape[-1]
    chances = torch.softmax(scores, dim=-1).flatten(0, -2)
    first = torch.zeros_like(chances).scatter(-1, chances.argmax(-1, keepdim=True), 1.0)
    return count * (first.mean(0) * chances.mean(0)).sum() - 1
