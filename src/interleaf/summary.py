"""What the adapters of a model consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interleaf.adapter import Adapter


@dataclass(frozen=True)
class AdapterSummary:
    """What one adapter consists of; sizes count its head too."""

    name: str
    kind: str
    active: bool
    trains: bool
    sites: int
    adapter_parameters: int
    head_parameters: int
    base_parameters: int
    size_bytes: int


def summarise(model: Any) -> list[AdapterSummary]:
    """Describe every adapter of a model."""
    parts = {name: list(model.parts(name).values()) for name in model.adapters}
    own = {id(p) for modules in parts.values() for module in modules for p in module.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    return [_summary(model, name, modules, base) for name, modules in parts.items()]


def _summary(model: Any, name: str, parts: list[Any], base: int) -> AdapterSummary:
    places = [part for part in parts if isinstance(part, Adapter)]
    weights = [p for place in places for p in place.parameters()]
    head = [p for part in parts if not isinstance(part, Adapter) for p in part.parameters()]
    return AdapterSummary(
        name=name,
        kind=str(model.adapters[name].peft_type.value).lower(),
        active=name in model.active_adapters(),
        trains=any(p.requires_grad for p in weights),
        sites=len(places),
        adapter_parameters=sum(p.numel() for p in weights),
        head_parameters=sum(p.numel() for p in head),
        base_parameters=base,
        size_bytes=sum(p.numel() * p.element_size() for p in weights + head),
    )
