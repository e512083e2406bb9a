"""The gated bottleneck: a small GLU feed-forward beside the layer's own, or in line with it.

Shazeer 2020 (arXiv 2002.05202); in parallel as in He et al. 2022 (2110.04366).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site


@register_adapter("glu")
@dataclass
class GLUConfig(AdapterConfig):
    """A gated linear unit as the bottleneck, parallel to the feed-forward."""

    positions: list[str] = field(default_factory=lambda: ["ffn"])
    """Sublayers to adapt: attention, cross_attention, ffn, block."""
    connection: str = "parallel"
    """How it joins the layer: parallel (fed its input) or serial (fed its output)."""
    bottleneck_dim: int = 24
    """Width R of the bottleneck."""
    activation: str = "silu"
    """Name of the non-linearity of the gate, as in transformers' ACT2FN."""
    scaling: float = 1.0
    """Factor on what the adapter adds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.connection not in ("parallel", "serial"):
            raise ConfigError(f"connection={self.connection!r}: expected parallel or serial.")
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        if self.bottleneck_dim < 1:
            raise ConfigError(f"bottleneck_dim={self.bottleneck_dim}: expected 1 or more.")

    def build(self, site: Site) -> Adapter:
        return GLU(site.width, self)


class GLU(Adapter):
    """`y' = y + s * up(act(gate(z)) * value(z))` with `z` the site's input (parallel) or output (serial).

    Args:
        width: width D of the model.
        config: the adapter's settings.
    """

    def __init__(self, width: int, config: GLUConfig) -> None:
        super().__init__()
        self.reads = config.connection == "parallel"
        self.gate = nn.Linear(width, config.bottleneck_dim)
        self.value = nn.Linear(width, config.bottleneck_dim)
        self.up = nn.Linear(config.bottleneck_dim, width)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]
        self.scaling = config.scaling
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        z = (y if x is None else x).to(self.up.weight.dtype)
        change: Tensor = self.up(self.activation(self.gate(z)) * self.value(z)) * self.scaling
        return y + change.to(y.dtype)
