"""Where AdapterHub's adapters sit in a model and what their weights are called: from the order in which modules run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interleaf.adapters import BottleneckConfig, CompacterConfig
from interleaf.blocks import is_linear
from interleaf.errors import StoreError
from interleaf.sites import find_sites
from interleaf.slot import slots

FLAGS = {"attention": "mh_adapter", "ffn": "output_adapter", "cross_attention": "cross_adapter"}
_BESIDE = {"attention": "attention_adapters", "ffn": "output_adapters", "cross_attention": "cross_attention_adapters"}


@dataclass(frozen=True)
class Place:
    """One place of AdapterHub's in a model."""

    write: str
    """The module whose output is adapted."""
    read: str
    """The module whose input is the residual stream before the sublayer."""
    norm: str
    """The pretrained norm after the addition; none where norms come first."""
    key: str
    """How AdapterHub names the place, without the base model's prefix."""
    flag: str
    """The setting that switches it on."""
    index: int
    """The layer's number, counted through encoder and decoder."""
    block: str
    """The layer's name."""

    def target(self, connection: str) -> str:
        """Return the entry of `target_modules` for a connection."""
        if connection == "after_norm":
            return self.norm
        parts = {"serial": [self.write], "parallel": [self.read, self.write]}.get(connection)
        parts = parts or [self.read, self.write, *([self.norm] if self.norm else [])]
        return " -> ".join(parts)


def places(model: Any) -> list[Place]:
    """Find AdapterHub's places in a model, by running it once on a few tokens."""
    order = _order(model)
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    sites = find_sites(model)
    stacks = list(dict.fromkeys(site.stack for site in sites))
    depth = {stack: 1 + max(s.layer for s in sites if s.stack == stack) for stack in stacks}
    found = []
    for site in sites:
        if site.position not in FLAGS:
            continue
        block = f"{site.stack}.{site.layer}"
        read, norm, owner = _around(site.read, site.write, block, order, modules)
        key = f"{owner}.adapters" if owner else f"{block}.{_BESIDE[site.position]}.adapters"
        index = site.layer + sum(depth[s] for s in stacks[: stacks.index(site.stack)])
        found.append(Place(site.write, read, norm, key.removeprefix(prefix), FLAGS[site.position], index, block))
    return found


def _order(model: Any) -> list[str]:
    started: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: started.append(name))
        for name, module in model.named_modules()
        if ".adapter_slot" not in name
    ]
    was_training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            model(**{name: tensor.to(device) for name, tensor in model.dummy_inputs.items()})
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return started


def _around(read: str, write: str, block: str, order: list[str], modules: dict[str, nn.Module]) -> tuple[str, str, str]:
    """Return where the residual stream enters a sublayer, the norm behind it, and the module that owns the place."""

    def is_norm(name: str) -> bool:
        return "norm" in type(modules[name]).__name__.lower()

    inside = [n for n in order if n.startswith(f"{block}.") and (is_norm(n) or is_linear(modules[n]))]
    at_read = order.index(read)
    if is_norm(inside[0]):
        own = next((n for n in inside if n.startswith(f"{read}.")), "")
        if own and is_norm(own):
            return read, "", read
        return next(n for n in reversed(order[:at_read]) if is_norm(n)), "", ""
    norm = next((n for n in order[order.index(write) :] if is_norm(n)), "")
    parent = write.rpartition(".")[0]
    return read, norm, parent if norm.rpartition(".")[0] == parent != block else ""


def fusion_query(children: list[Any]) -> str:
    """Tell what asks in AdapterHub's fusion of adapters: the residual stream, or the layer's output.

    Args:
        children: their configs, None for one that is not on the model.

    Raises:
        StoreError: a fusion of them is not the same function in both libraries.
    """
    if None in children:
        return "output"  # which one is missing is said when the fusion is added
    if any(not isinstance(c, BottleneckConfig | CompacterConfig) for c in children):
        raise StoreError("AdapterHub fuses bottleneck adapters by name only, here without invertible ones.")
    if any(getattr(c, "gate", False) or getattr(c, "norm_after", False) for c in children):
        raise StoreError("AdapterHub fuses what adapters give before gate and ln_after; that has no equal here.")
    found = {c.connection for c in children}
    if len(found) > 1 or not found <= {"serial", "stream"}:
        raise StoreError(f"AdapterHub's fusion of adapters with connection {sorted(found)} has no equal here.")
    return "stream" if found == {"stream"} else "output"


def _leaves(module: nn.Module) -> dict[str, str]:
    """Tell AdapterHub's names of an adapter's weights, by ours."""
    kind = type(module).__name__
    if kind == "Fusion":
        return {n: n for n, _ in module.named_parameters()}
    if kind == "Compacter":
        names = {"left": "W_left", "right": "W_right", "bias": "b"}
        maps = {"down": "adapter_down.0", "up": "adapter_up"}
        return {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in maps.items() for a, b in names.items()}
    first = 1 if getattr(module, "norm_before", None) is not None else 0
    heads = {"down": f"adapter_down.{first}", "up": "adapter_up", "norm_before": "adapter_norm_before"}
    heads |= {"norm_after": "adapter_norm_after", "gate": "gate", "scaling": "scaling"}
    mine = [n for n, _ in module.named_parameters()]
    if unknown := [n for n in mine if n.split(".")[0] not in heads]:
        raise StoreError(f"AdapterHub has no equal for the weight {unknown[0]} of a {kind}.")
    return {n: ".".join([heads[n.split(".")[0]], *n.split(".")[1:]]) for n in mine}


def named_weights(base: Any, name: str, own: str, there: list[Place]) -> Iterator[tuple[str, Tensor]]:
    """Yield AdapterHub's name, without prefix, of every weight of an adapter, with the weight.

    Raises:
        StoreError: an adapter where AdapterHub has no place.
    """
    by_write = {place.write: place for place in there} | {p.norm: p for p in there if p.norm}
    holder = "encoder." if base.config.is_encoder_decoder else ""
    for slot in slots(base):
        if name not in slot.adapters:
            continue
        adapter: Any = slot.adapters[name]
        if type(adapter).__name__ == "Invertible":
            for ours, parameter in adapter.named_parameters():
                letter, _, rest = ours.partition(".")
                yield f"{holder}invertible_adapters.{own}.{'F' if letter == 'first' else 'G'}.{rest}", parameter
            continue
        if (place := by_write.get(slot.site.write)) is None:
            raise StoreError(f"AdapterHub has no place for the adapter at {slot.site.write}.")
        stem = (
            place.key if type(adapter).__name__ != "Fusion" else place.key.replace(".adapters", ".adapter_fusion_layer")
        )
        if type(adapter).__name__ == "Compacter" and adapter.rule is not None:
            yield f"shared_parameters.{own}.phm_rule", adapter.rule
        for ours, theirs in _leaves(adapter).items():
            yield f"{stem}.{own}.{theirs}", adapter.get_parameter(ours)
