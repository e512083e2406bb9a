"""Multi-task adapters with a shared part: common projections, and for each task a small map and a mixture of its own.

After MTL-LoRA, Yang et al. 2024 (arXiv 2410.09437), with the bottleneck's non-linearity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site


@register_adapter("mtl")
@dataclass
class MTLConfig(AdapterConfig):
    """The first task's adapter holds the shared part; the others name it in `shared_with`."""

    positions: list[str] = field(default_factory=lambda: ["ffn"])
    """Sublayers to adapt: attention, cross_attention, ffn, block."""
    shared_with: str | None = None
    """The adapter, on the model already, whose shared part this one uses; none: it has one of its own."""
    bottleneck_dim: int = 24
    """Width R of the bottleneck."""
    experts: int = 2
    """Number of shared up-projections that a task mixes."""
    activation: str = "gelu"
    """Name of the non-linearity, as in transformers' ACT2FN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        for name in ("bottleneck_dim", "experts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more.")

    @property
    def needs(self) -> list[str]:
        """The adapter that holds the shared part."""
        return [self.shared_with] if self.shared_with else []

    def build(self, site: Site) -> Adapter:
        return MTL(site.width, self)

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Let each site's adapter use the shared part of the one it names.

        Raises:
            ConfigError: that one has no such part there, or another shape.
        """
        for adapter, there in zip(adapters, others, strict=True):
            if not (self.shared_with and isinstance(adapter, MTL)):
                continue
            other = there.get(self.shared_with)
            if not isinstance(other, MTL) or other.shared is None:
                raise ConfigError(f"shared_with={self.shared_with!r} has no shared part at every site.")
            if other.shared.up.shape[:2] != (self.experts, self.bottleneck_dim):
                raise ConfigError(f"shared_with={self.shared_with!r} has another bottleneck_dim or number of experts.")
            adapter.borrow(other)


class Shared(nn.Module):
    """The part that all tasks share: one down-projection, several up-projections that start at zero."""

    def __init__(self, width: int, config: MTLConfig) -> None:
        super().__init__()
        self.down = nn.Linear(width, config.bottleneck_dim)
        self.up = nn.Parameter(torch.zeros(config.experts, config.bottleneck_dim, width))


class MTL(Adapter):
    """`y' = y + sum_i softmax(w)_i act(down(y)) M up_i`: `M` and `w` are the task's, `down` and `up_i` shared.

    Args:
        width: width D of the model.
        config: the adapter's settings.
    """

    def __init__(self, width: int, config: MTLConfig) -> None:
        super().__init__()
        self.shared = None if config.shared_with else Shared(width, config)
        self.task = nn.Linear(config.bottleneck_dim, config.bottleneck_dim)
        self.mixture = nn.Parameter(torch.zeros(config.experts))
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]
        if self.task.weight.device.type != "meta":
            nn.init.eye_(self.task.weight)
        nn.init.zeros_(self.task.bias)

    def borrow(self, other: MTL) -> None:
        """Use another adapter's shared part; it stays that one's own."""
        self.__dict__["lender"] = other  # past nn.Module: not a child, so not saved, moved or trained with this one

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        shared = self.shared if self.shared is not None else self.__dict__["lender"].shared
        hidden = self.task(self.activation(shared.down(y.to(shared.up.dtype))))
        weights = torch.softmax(self.mixture, dim=0)
        self.observe("mixture", weights)
        change: Tensor = hidden @ torch.einsum("e,erd->rd", weights, shared.up)
        return y + change.to(y.dtype)
