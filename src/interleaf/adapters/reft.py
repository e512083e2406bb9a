"""Representation fine-tuning: a low-rank edit of hidden states at chosen tokens.

Wu et al. 2024 (arXiv 2404.03592).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site

# W is kept as its difference from R (see `Reft`), so NoReFT and DiReFT are one function
PRESETS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "noreft": {"orthogonal": False},
    "direft": {"orthogonal": False},
}


@register_adapter("reft", PRESETS)
@dataclass
class ReftConfig(AdapterConfig):
    """LoReFT by default; NoReFT and DiReFT without orthogonality."""

    positions: list[str] = field(default_factory=lambda: ["block"])
    """Sublayers to adapt: attention, cross_attention, ffn, block."""
    tokens: str = "first:3,last:3"
    """Tokens to edit: all, or of the prompt first:n, last:n, or both as first:n,last:n."""
    rank: int = 4
    """Rank r of the edited subspace."""
    orthogonal: bool = True
    """Keep the rows of the projection orthonormal."""
    dropout: float = 0.0
    """Dropout on the edit while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}: expected 1 or more.")

    def build(self, site: Site) -> Adapter:
        if self.rank > site.width:
            raise ConfigError(f"rank={self.rank}: expected at most the model's width {site.width}.")
        return Reft(site.width, self)


class Reft(Adapter):
    """`y' = y + R^T (W y + b - R y)`: what the subspace of `R` holds becomes what `W y + b` says.

    `source` holds `W - R` and `b`, both zero at first: so it starts as the identity, exactly. DiReFT's
    `y + R^T (W y + b)` is the same function of `source`.

    Args:
        width: width D of the model.
        config: the adapter's settings.
    """

    def __init__(self, width: int, config: ReftConfig) -> None:
        super().__init__()
        self.source = nn.Linear(width, config.rank)
        self.projection = nn.Parameter(torch.empty(config.rank, width))
        self.orthogonal = config.orthogonal
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.source.weight)
        nn.init.zeros_(self.source.bias)
        if self.projection.device.type != "meta":
            nn.init.orthogonal_(self.projection)

    def rows(self) -> Tensor:
        """Return the projection R, its rows orthonormal if they are to be, shape [r, D]."""
        if not self.orthogonal:
            return self.projection
        # QR has no half precision; the signs make it the identity on what is orthonormal already
        q, r = torch.linalg.qr(self.projection.float().T)
        return (q * r.diagonal().sign()).T.to(self.projection.dtype)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        z, rows = y.to(self.projection.dtype), self.rows()
        edit: Tensor = self.source(z)
        return y + self.dropout(edit @ rows).to(y.dtype)
