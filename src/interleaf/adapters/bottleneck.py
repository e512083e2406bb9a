"""The bottleneck adapter: down-projection, bottleneck, up-projection, in every connection.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2021 (2005.00247), He et al. 2022 (2110.04366),
Steitz and Roth 2024, AdapterPlus (2406.06820).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site

CONNECTIONS = ("serial", "serial_input", "parallel", "skip", "stream")

PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"positions": ["attention", "ffn"], "activation": "silu", "reduction_factor": 16},
    "pfeiffer": {"positions": ["ffn"], "activation": "relu", "reduction_factor": 16},
    "parallel": {
        "positions": ["ffn"],
        "connection": "parallel",
        "activation": "relu",
        "reduction_factor": 2,
        "scaling": 4.0,
    },
    "adapter_plus": {
        "positions": ["ffn"],
        "activation": "gelu",
        "reduction_factor": 96,
        "scaling": "channel",
        "init": "houlsby",
        "stochastic_depth": 0.1,
    },
    "textbook": {"positions": ["ffn"], "activation": "relu", "down_dim": 64, "bottleneck_dim": 16},
}


@register_adapter("bottleneck", PRESETS)
@dataclass
class BottleneckConfig(AdapterConfig):
    """A bottleneck adapter with two linear maps, or three when `down_dim` is given."""

    connection: str = "serial"
    """How it joins the layer: serial (its output), serial_input (its input), parallel, skip; or stream: fed the
    layer's output plus its input, through the pretrained norm if a target names one (AdapterHub's `seq_bn`)."""
    bottleneck_dim: int | dict[str, int] | None = None
    """Width R of the bottleneck, or one for each place, by the module's name; wins over reduction_factor."""
    reduction_factor: float | dict[str, float] = 16
    """Model width over bottleneck width; or one per layer, by number or name: {"0": 8, "default": 16}."""
    down_dim: int | None = None
    """Width of the down-projection in the three-map form: down to down_dim, then to bottleneck_dim."""
    activation: str = "relu"
    """Name of the non-linearity, as in transformers' ACT2FN."""
    residual: bool | None = None
    """Whether the adapter adds its own input; by default only in the serial connections."""
    scaling: float | str = 1.0
    """Factor on what the adapter adds: a number, learned, or channel (one learned per channel)."""
    dropout: float = 0.0
    """Dropout on the adapter's output while training."""
    stochastic_depth: float = 0.0
    """Chance that a row's adapter is left out in a training step; what is left is scaled up."""
    norm_before: bool = False
    """LayerNorm before the down-projection."""
    norm_after: bool = False
    """LayerNorm on what the adapter adds, after the up-projection."""
    gate: bool | str = False
    """Multiply what the adapter adds with a learned sigmoid gate, one number a token (True).

    "sequence" takes the mean over the sequence, for adapters from AdapterHub: it makes a row depend on its padding,
    and cached generation unlike uncached.
    """
    init: str = "zero_up"
    """Initialisation of the down-projection: zero_up (Kaiming) or houlsby (truncated normal, 0.01)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.connection not in CONNECTIONS:
            raise ConfigError(f"connection={self.connection!r}: expected one of {', '.join(CONNECTIONS)}.")
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ConfigError(f"scaling={self.scaling!r}: expected a number, 'learned' or 'channel'.")
        if self.gate not in (True, False, "sequence"):
            raise ConfigError(f"gate={self.gate!r}: expected True, False or 'sequence'.")
        if self.init not in ("zero_up", "houlsby"):
            raise ConfigError(f"init={self.init!r}: expected 'zero_up' or 'houlsby'.")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more and less than 1.")
        for name in ("bottleneck_dim", "down_dim"):
            dims = getattr(self, name)
            if any(dim is not None and dim < 1 for dim in (dims.values() if isinstance(dims, dict) else [dims])):
                raise ConfigError(f"{name}={dims}: expected 1 or more.")
        factors = self.reduction_factor
        if any(f <= 0 for f in (factors.values() if isinstance(factors, dict) else [factors])):
            raise ConfigError(f"reduction_factor={factors}: expected more than 0.")

    def width_at(self, site: Site) -> int:
        """Return the bottleneck's width R at a site, at least 1."""
        if isinstance(self.bottleneck_dim, dict):
            if site.write not in self.bottleneck_dim:
                raise ConfigError(f"bottleneck_dim: no entry for {site.write}.")
            return self.bottleneck_dim[site.write]
        if self.bottleneck_dim is not None:
            return self.bottleneck_dim
        factor = self.reduction_factor
        if isinstance(factor, dict):
            named = next(
                (f for name, f in factor.items() if f"{site.stack}.{site.layer}".endswith(name) and "." in name), None
            )
            found = named or factor.get(str(site.layer), factor.get("default"))
            if found is None:
                raise ConfigError(f"reduction_factor: no entry for layer {site.layer} and no 'default'.")
            factor = found
        return max(1, int(site.width // factor))

    def build(self, site: Site) -> Adapter:
        return Bottleneck(site.width, self.width_at(site), self)

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Let an adapter on the residual stream use the pretrained norm that its target names."""
        for site, adapter in zip(sites, adapters, strict=True):
            if site.norm:
                adapter.__dict__["norm"] = model.get_submodule(site.norm)  # past nn.Module: it stays the base's own


class Bottleneck(Adapter):
    """`y' = y + s * up(act(down(z)))` with `z` the site's output, input, own input or their sum by connection.

    With `down_dim` there is a middle map: `up(act(middle(act(down(z)))))`. All connections start as the
    identity, except serial without and parallel or skip with the inner residual, which cannot.

    Args:
        input_dim: width D of the model.
        bottleneck_dim: width R of the bottleneck.
        config: the adapter's settings.
    """

    def __init__(self, input_dim: int, bottleneck_dim: int, config: BottleneckConfig) -> None:
        super().__init__()
        serial = config.connection.startswith("serial")
        self.reads = config.connection in ("parallel", "stream")
        self.on_stream = config.connection == "stream"
        self.sequence_gate = config.gate == "sequence"
        self.before = config.connection == "serial_input"
        residual = serial if config.residual is None else config.residual
        # what is added without a factor: the residual stream's own y, and the inner residual under s
        self.keeps_y = residual if serial else True
        self.inner_residual = residual and not serial
        self.norm_before = nn.LayerNorm(input_dim) if config.norm_before else None
        self.norm_after = nn.LayerNorm(input_dim) if config.norm_after else None
        self.down = nn.Linear(input_dim, config.down_dim or bottleneck_dim)
        self.middle = nn.Linear(config.down_dim, bottleneck_dim) if config.down_dim else None
        self.up = nn.Linear(bottleneck_dim, input_dim)
        self.gate = nn.Linear(input_dim, 1) if config.gate else None
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.stochastic_depth = config.stochastic_depth
        self.scaling: float | nn.Parameter = _scaling(config.scaling, input_dim)
        self._initialise(config.init, zero_up=self.keeps_y)

    def _initialise(self, init: str, zero_up: bool) -> None:
        if init == "houlsby":
            nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(self.down.bias)
        if zero_up:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def delta(self, z: Tensor) -> Tensor:
        """Return what the adapter adds before scaling: `up(act(...down(z)))`, shape [B, T, D]."""
        h = z if self.norm_before is None else self.norm_before(z)
        h = self.activation(self.down(h))
        if self.middle is not None:
            h = self.activation(self.middle(h))
        h = self.up(h)
        if self.inner_residual:
            h = h + z
        if self.norm_after is not None:
            h = self.norm_after(h)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(z))
            gate = gate.mean(dim=-2, keepdim=True) if self.sequence_gate else gate
            self.observe("gate", gate)
            h = h * gate
        if self.training and self.stochastic_depth:
            kept = torch.rand(h.shape[0], *[1] * (h.ndim - 1), device=h.device) >= self.stochastic_depth
            h = h * kept / (1 - self.stochastic_depth)
        return h if self.dropout is None else self.dropout(h)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        z = y if x is None else x + y if self.on_stream else x
        if (norm := self.__dict__.get("norm")) is not None:
            z = norm(z)
        # weights may be float32 beside a bf16 base: the adapter computes in its own precision
        dtype = self.down.weight.dtype
        change = self.delta(z if z.dtype == dtype else z.to(dtype))
        if not (isinstance(self.scaling, float) and self.scaling == 1.0):
            change = change * self.scaling
        change = change if change.dtype == y.dtype else change.to(y.dtype)
        return y + change if self.keeps_y else change


def _scaling(scaling: float | str, width: int) -> float | nn.Parameter:
    if isinstance(scaling, str):
        return nn.Parameter(torch.ones(width if scaling == "channel" else 1))
    return float(scaling)
