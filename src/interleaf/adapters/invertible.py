"""Invertible adapters: they change the embeddings, and undo it before the words are predicted.

Pfeiffer et al. 2020, MAD-X (arXiv 2005.00052); NICE: Dinh et al. 2015 (1410.8516); GLOW's coupling: Kingma and
Dhariwal 2018 (1807.03039).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapter import Adapter, AdapterConfig, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site, find_sites, nearest_stack, stack_names

PRESETS: dict[str, dict[str, Any]] = {"nice": {}, "glow": {"coupling": "affine"}}


@register_adapter("invertible", PRESETS)
@dataclass
class InvertibleConfig(AdapterConfig):
    """A coupling at the embeddings, and its inverse at the input of the language-model head."""

    coupling: str = "additive"
    """How one half changes the other: additive (NICE) or affine (GLOW)."""
    undo: bool = True
    """Undo it before the words are predicted, where the model has a language-model head of its width."""
    reduction_factor: float = 2
    """Half the embeddings' width over the width of the networks inside."""
    activation: str = "relu"
    """Name of the non-linearity, as in transformers' ACT2FN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in ("additive", "affine"):
            raise ConfigError(f"coupling={self.coupling!r}: expected additive or affine.")
        if self.activation not in ACT2FN:
            raise ConfigError(f"activation={self.activation!r}: expected one of {', '.join(sorted(ACT2FN))}.")
        if self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor={self.reduction_factor}: expected more than 0.")

    def sites(self, model: Any) -> list[Site]:
        """Return where the embeddings enter the first layer, and the language-model head if that is to undo it."""
        first = next(s for s in find_sites(model, self.input_dim) if s.position == "block")
        found = [replace(first, position="embedding")]
        head: Any = model.get_output_embeddings() if self.undo and hasattr(model, "get_output_embeddings") else None
        if head is not None and head.weight.shape[-1] == first.width:
            name = next(n for n, m in model.named_modules() if m is head)
            found.append(Site(name, name, "unembedding", nearest_stack(name, stack_names(model)), -1, first.width))
        return found

    def build(self, site: Site) -> Adapter:
        return Invertible(site.width, self, undo=site.position == "unembedding")

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Let every site use the first one's networks."""
        for adapter in adapters[1:]:
            adapter.__dict__["lender"] = adapters[0]  # past nn.Module: not a child
            adapter.first = adapter.second = None  # type: ignore[assignment]


class Invertible(Adapter):
    """`y1' = y1 + f(y2), y2' = y2 + g(y1')` (additive), or with factors too (affine); or, to undo it, backwards.

    Args:
        width: width of the embeddings.
        config: the adapter's settings.
        undo: whether this site undoes what the first did.
    """

    def __init__(self, width: int, config: InvertibleConfig, undo: bool) -> None:
        super().__init__()
        self.before, self.undo = True, undo
        self.affine = config.coupling == "affine"
        self.halves = (width // 2, width - width // 2)
        self.first = self._network(self.halves[1], self.halves[0], config)
        self.second = self._network(self.halves[0], self.halves[1], config)

    def _network(self, inputs: int, outputs: int, config: InvertibleConfig) -> nn.Sequential:
        hidden = max(1, int(inputs // config.reduction_factor))
        last = nn.Linear(hidden, outputs * (2 if self.affine else 1))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(inputs, hidden), ACT2FN[config.activation], last)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        owner: Invertible = self.__dict__.get("lender", self)
        dtype = next(owner.first.parameters()).dtype
        left, right = y.to(dtype).split(self.halves, dim=-1)
        if self.undo:
            right = self._couple(owner.second, left, right, undo=True)
            left = self._couple(owner.first, right, left, undo=True)
        else:
            left = self._couple(owner.first, right, left, undo=False)
            right = self._couple(owner.second, left, right, undo=False)
        return torch.cat([left, right], dim=-1).to(y.dtype)

    def _couple(self, network: nn.Module, given: Tensor, changed: Tensor, undo: bool) -> Tensor:
        out: Tensor = network(given)
        if not self.affine:
            return changed - out if undo else changed + out
        scale, shift = out.chunk(2, dim=-1)
        # GLOW's soft clamp: no factor leaves [exp(-5), exp(5)]
        log = 5.0 * (2 / math.pi) * torch.atan(scale / 5.0)
        return (changed - shift) * torch.exp(-log) if undo else changed * torch.exp(log) + shift
