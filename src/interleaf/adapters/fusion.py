"""AdapterFusion: attention over what several adapters change, learned in a second stage.

Pfeiffer et al. 2021 (arXiv 2005.00247).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.compose import Fuse, leaves, parse
from interleaf.errors import ConfigError, SiteError
from interleaf.sites import Site
from interleaf.slot import slots


@register_adapter("fusion", {})
@dataclass
class FusionConfig(AdapterConfig):
    """A fusion of adapters that are on the model already; it sits wherever one of them does."""

    children: list[str] = field(default_factory=list)
    """The adapters to fuse: names, or compositions in their text form."""
    value: bool = True
    """Map what the adapters change with a value matrix, the identity at first (dynamic); without it: static."""
    regularization: float = 0.01
    """Weight of the squared distance of the value matrix from the identity in the training loss."""
    dropout: float = 0.0
    """Dropout on the attention's scores while training."""
    query: str = "output"
    """What asks: the layer's output, or the residual stream, as its children with connection stream see it."""
    temperature: float = 1.0
    """Divisor of the attention's scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query not in ("output", "stream"):
            raise ConfigError(f"query={self.query!r}: expected output or stream.")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature}: expected more than 0.")

    @property
    def needs(self) -> list[str]:
        """The fused adapters."""
        return list(dict.fromkeys(name for child in self.children for name in leaves(parse(child))))

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Let a query from the residual stream use the pretrained norm that the children use."""
        for site, adapter in zip(sites, adapters, strict=True):
            if self.query == "stream" and site.norm:
                adapter.__dict__["norm"] = model.get_submodule(site.norm)  # past nn.Module: it stays the base's own

    def sites(self, model: nn.Module) -> list[Site]:
        """Return every site where one of the children has an adapter.

        Raises:
            SiteError: fewer than two children are named.
        """
        if len(self.children) < 2:
            raise SiteError(f"fusion of {self.children}: name two children or more.")
        return [slot.site for slot in slots(model) if any(name in slot.adapters for name in self.needs)]

    def build(self, site: Site) -> Adapter:
        return Fusion(site.width, self)


class Fusion(Adapter):
    """`y' = y + sum_n softmax_n(query(y) . key(c_n) / t) value(c_n)` over the changes `c_n` of the children.

    Args:
        width: width D of the model.
        config: the fusion's settings.
    """

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.reads = config.query == "stream"
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False) if config.value else None
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.value is not None:
            nn.init.eye_(self.value.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.temperature = config.temperature
        self.regularization = config.regularization
        self.composition = Fuse(*(parse(child) for child in config.children), name="?")

    def fuse(self, changes: Tensor, x: Tensor | None, y: Tensor) -> Tensor:
        """Return the new `y`.

        Args:
            changes: what the children change, shape [B, T, N, D].
            x: what the site reads, shape [B, T, D]; None unless the stream asks.
            y: what the site writes, shape [B, T, D].
        """
        dtype = self.query.weight.dtype
        changes, asking = changes.to(dtype), y if x is None else x + y
        if (norm := self.__dict__.get("norm")) is not None:
            asking = norm(asking)
        scores = (self.key(changes) @ self.query(asking.to(dtype)).unsqueeze(-1)).squeeze(-1)
        attention = torch.softmax(self.dropout(scores) / self.temperature, dim=-1)
        self.observe("attention", attention)
        values = changes if self.value is None else self.value(changes)
        return y + (attention.unsqueeze(-2) @ values).squeeze(-2).to(y.dtype)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Refuse: a fusion runs over what its children change; `interpret.run` calls `fuse`."""
        raise ConfigError("a fusion has no input of its own: run it by its name or in fuse(...).")

    def penalty(self) -> Tensor | None:
        """Return the regularisation term: the value matrix's squared distance from the identity, weighted."""
        if self.value is None or not self.regularization:
            return None
        weight = self.value.weight
        identity = torch.eye(weight.shape[0], device=weight.device, dtype=weight.dtype)
        return self.regularization * (weight - identity).pow(2).sum()
