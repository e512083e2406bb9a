"""Compacter: a bottleneck of parameterised hypercomplex maps, sums of Kronecker products with a shared rule.

Karimi Mahabadi et al. 2021 (arXiv 2106.04647), Zhang et al. 2021 (2102.08597).
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

PRESETS: dict[str, dict[str, Any]] = {
    "compacter": {"positions": ["attention", "ffn"]},
    "compacter++": {"positions": ["ffn"]},
}


@register_adapter("compacter", PRESETS)
@dataclass
class CompacterConfig(AdapterConfig):
    """A bottleneck whose two maps are `sum_i A_i (x) (L_i R_i)`, the rule `A` shared by all sites."""

    connection: str = "serial"
    """How it joins the layer: serial (fed its output), parallel (its input), or stream (both, as in `bottleneck`)."""
    bottleneck_dim: int | None = None
    """Width R of the bottleneck; wins over reduction_factor. phm_dim divides it."""
    reduction_factor: float = 32
    """Model width over bottleneck width."""
    phm_dim: int = 4
    """Number n of Kronecker products; divides the model's and the bottleneck's width."""
    phm_rank: int = 1
    """Rank of each product's second factor."""
    scaling: float = 1.0
    """Factor on what the adapter adds."""
    activation: str = "gelu"
    """Name of the non-linearity, as in transformers' ACT2FN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        if self.connection not in ("serial", "parallel", "stream"):
            raise ConfigError(f"connection={self.connection!r}: expected serial, parallel or stream.")
        for name in ("phm_dim", "phm_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor={self.reduction_factor}: expected more than 0.")

    def width_at(self, site: Site) -> int:
        """Return the bottleneck's width R: the nearest multiple of phm_dim, at least that.

        Raises:
            ConfigError: phm_dim does not divide the model's width.
        """
        if site.width % self.phm_dim:
            raise ConfigError(f"phm_dim={self.phm_dim} does not divide the model's width {site.width}.")
        if self.bottleneck_dim is not None:
            if self.bottleneck_dim < 1 or self.bottleneck_dim % self.phm_dim:
                raise ConfigError(f"phm_dim={self.phm_dim} does not divide bottleneck_dim={self.bottleneck_dim}.")
            return self.bottleneck_dim
        wanted = site.width / self.reduction_factor
        return max(1, round(wanted / self.phm_dim)) * self.phm_dim

    def build(self, site: Site) -> Adapter:
        return Compacter(site.width, self.width_at(site), self)

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Let all sites use the first one's rule, and on the residual stream the pretrained norm."""
        for site, adapter in zip(sites, adapters, strict=True):
            if site.norm:
                adapter.__dict__["norm"] = model.get_submodule(site.norm)
        for adapter in adapters[1:]:
            adapter.__dict__["lender"] = adapters[0]  # past nn.Module: not a child
            adapter.rule = None  # type: ignore[assignment]


class PHMLinear(nn.Module):
    """`z @ sum_i A_i (x) (L_i R_i) + b`, computed without ever building the matrix.

    Args:
        inputs: width of z.
        outputs: width of the result.
        config: rank and number of products.
    """

    def __init__(self, inputs: int, outputs: int, config: CompacterConfig) -> None:
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factors in (self.left, self.right):
            for factor in factors:
                nn.init.xavier_normal_(factor)

    def forward(self, z: Tensor, rule: Tensor) -> Tensor:
        """Map z of shape [..., inputs]; the rule has shape [n, n, n]."""
        n = rule.shape[0]
        parts = z.unflatten(-1, (n, -1))
        mapped = torch.einsum("...ai,nir,nro,nab->...bo", parts, self.left, self.right, rule)
        return mapped.flatten(-2) + self.bias


class Compacter(Adapter):
    """`y' = y + s * up(act(down(z)))` with hypercomplex maps; `up` starts at zero, so it is the identity.

    Args:
        width: width D of the model.
        bottleneck_dim: width R of the bottleneck.
        config: the adapter's settings.
    """

    def __init__(self, width: int, bottleneck_dim: int, config: CompacterConfig) -> None:
        super().__init__()
        self.reads = config.connection != "serial"
        self.on_stream = config.connection == "stream"
        self.scaling = float(config.scaling)
        self.rule = nn.Parameter(torch.empty(config.phm_dim, config.phm_dim, config.phm_dim))
        nn.init.normal_(self.rule, std=config.phm_dim**-0.5)
        self.down = PHMLinear(width, bottleneck_dim, config)
        self.up = PHMLinear(bottleneck_dim, width, config)
        nn.init.zeros_(self.up.right)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation]

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        rule = self.__dict__.get("lender", self).rule
        z = y if x is None else x + y if self.on_stream else x
        if (norm := self.__dict__.get("norm")) is not None:
            z = norm(z)
        change = self.up(self.activation(self.down(z.to(rule.dtype), rule)), rule)
        return y + (change if self.scaling == 1.0 else change * self.scaling).to(y.dtype)
