"""Where adapters can go in any Transformer, read off the module tree: no table of models.

A *site* is a module that writes into the residual stream, with the module that reads for it.
Rules: blocks are the outermost lists of repeated layers; a block's sublayers are its children that hold
linear maps; what a sublayer writes is its last linear map of the model's width.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from interleaf.blocks import Stack, block_width, hidden_size, shared_parts, stacks_of, sublayers
from interleaf.errors import SiteError

POSITIONS = ("attention", "cross_attention", "ffn", "block")


@dataclass(frozen=True)
class Site:
    """One place for an adapter: `write` is the module whose output it sees, `read` the one whose input."""

    write: str
    read: str
    position: str
    stack: str
    layer: int
    width: int
    norm: str = ""
    """The pretrained norm that follows, where a target names one."""
    map_width: int = 0
    """Width of what it reads, where the site is one linear map and `width` only what that writes."""


def find_sites(model: nn.Module, width: int | None = None) -> list[Site]:
    """List every site of a model, stack by stack, layer by layer, in the order in which the base defines them.

    Args:
        width: of the residual stream; by default each stack's own, as its config states it.

    Raises:
        SiteError: no repeated layers with linear maps were found.
    """
    known = _known.setdefault(model, {})
    if width in known and known[width].still(model):
        return list(known[width].sites)
    known[width] = _Found.of(model, _find_sites(model, width))
    return list(known[width].sites)


@dataclass(frozen=True)
class _Found:
    """Sites that were found, and the modules that they were, which may be others later."""

    sites: list[Site]
    modules: dict[str, tuple[weakref.ref[nn.Module], int]]

    @classmethod
    def of(cls, model: nn.Module, sites: list[Site]) -> _Found:
        names = {name for site in sites for name in (site.write, site.read, site.stack)}
        modules = {name: model.get_submodule(name) for name in names}
        return cls(sites, {name: (weakref.ref(module), _count(module)) for name, module in modules.items()})

    def still(self, model: nn.Module) -> bool:
        """Say whether the model has the same modules there, and as many layers."""
        try:
            now = {name: model.get_submodule(name) for name in self.modules}
        except AttributeError:
            return False
        return all(now[name] is ref() and _count(now[name]) == count for name, (ref, count) in self.modules.items())


def _count(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else 0


_known: weakref.WeakKeyDictionary[nn.Module, dict[int | None, _Found]] = weakref.WeakKeyDictionary()


def _find_sites(model: nn.Module, width: int | None) -> list[Site]:
    if width is None and getattr(model, "config", None) is None:
        width = hidden_size(model)
    found: list[Site] = []
    for stack, blocks in stacks_of(model):
        for layer, (name, block) in enumerate(blocks):
            found += _block_sites(name, block, stack, layer, width or block_width(model, name, block))
    if not found:
        raise SiteError(
            f"no repeated layers were found in {type(model).__name__}. Name the modules to adapt with `target_modules`."
        )
    return found


def select_sites(sites: Sequence[Site], positions: Sequence[str], layers: str | Sequence[int] = "all") -> list[Site]:
    """Keep the sites at the given positions and layers (`all`, `first:n`, `last:n` or a list), stack by stack.

    Raises:
        SiteError: a position or a layer that the model does not have, or nothing is left.
    """
    there = sorted({s.position for s in sites})
    if missing := [p for p in positions if p not in there and p != "cross_attention"]:
        raise SiteError(f"this model has no position {missing[0]!r}. It has: {', '.join(there)}.")
    depth = {s.stack: 0 for s in sites}
    for s in sites:
        depth[s.stack] = max(depth[s.stack], s.layer + 1)
    chosen = {stack: layer_numbers(layers, n) for stack, n in depth.items()}
    kept = [s for s in sites if s.position in positions and s.layer in chosen[s.stack]]
    if not kept:
        raise SiteError(f"positions {list(positions)} with layers {layers!r} match no site of this model.")
    return kept


def target_sites(model: nn.Module, targets: str | Sequence[str], width: int | None = None) -> list[Site]:
    """Turn named modules into sites: the escape hatch.

    Args:
        targets: a regular expression for whole names, or name endings. An ending may be `read -> write`, when the
            adapter is to read the input of another module than it changes, or `read -> write -> norm`.

    Raises:
        SiteError: a name that matches no module.
    """
    names = [n for n, _ in model.named_modules() if n and ".adapter_slot" not in n]
    stacks = list(stacks_of(model))
    if isinstance(targets, str):
        hits = [n for n in names if re.fullmatch(targets, n)]
        if not hits:
            raise SiteError(f"target_modules={targets!r} matches no module of {type(model).__name__}.")
        return [_target(model, (n,), stacks, width) for n in hits]
    found: dict[str, tuple[str, ...]] = {}
    for target in targets:
        read, *rest = (part.strip() for part in target.split("->"))
        write = rest[0] if rest else read
        befores = [n[: len(n) - len(write)] for n in names if n == write or n.endswith("." + write)]
        matches = [tuple(before + part for part in (read, *rest)) for before in befores]
        there = [match for match in matches if all(part in names for part in match)]
        if not there:
            raise SiteError(f"target_modules: no module of {type(model).__name__} is named {target!r}.")
        found.update({match[min(1, len(match) - 1)]: match for match in there})
    order = {n: i for i, n in enumerate(names)}
    return [_target(model, found[write], stacks, width) for write in sorted(found, key=lambda n: order[n])]


def named_sites(model: nn.Module, widths: Mapping[str, tuple[int, int]]) -> list[Site]:
    """Make sites of modules by their full names, each with its width and map width; outside all layers: layer -1."""
    stacks = list(stacks_of(model))
    return [replace(_target(model, (name,), stacks, w), map_width=read) for name, (w, read) in widths.items()]


def _target(model: nn.Module, names: tuple[str, ...], stacks: Sequence[Stack], width: int | None) -> Site:
    """Make a site of named modules; outside all layers it has layer -1 of the stack it is nearest to."""
    read, name, norm = (*names, names[0], "")[:3] if len(names) < 2 else (*names, "")[:3]
    for stack, blocks in stacks:
        for layer, (block_name, block) in enumerate(blocks):
            if f"{name}.".startswith(f"{block_name}."):
                own = width or block_width(model, block_name, block)
                return Site(name, read, "target", stack, layer, own, norm)
    near = nearest_stack(name, [stack for stack, _ in stacks])
    return Site(name, read, "target", near, -1, width or hidden_size(model), norm)


def nearest_stack(name: str, stacks: Sequence[str]) -> str:
    """Return the stack of layers whose name begins most like a module's."""
    return max(stacks, key=lambda s: shared_parts(s.split("."), name.split(".")), default="")


def as_found(model: nn.Module) -> bool:
    """Say whether the modules at a model's sites are still those that were found there last."""
    known = _known.get(model, {}).get(None)
    return known is not None and known.still(model)


def stack_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's weights in its repeated layers and input embeddings, or all if it has no such layers.

    Names start at the stack, and PEFT's wrappers are looked through, so they are the same under every head
    and adapter.
    """
    stacks = [(name, model.get_submodule(name)) for name, _ in stacks_of(model)]
    embeddings = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        embeddings = model.get_input_embeddings() if stacks else None  # type: ignore[operator]
    if isinstance(embeddings, nn.Module):
        stacks.append(("embeddings", embeddings))
    for name, module in stacks or [("", model)]:
        wrapped = [
            f"{n}." if n else ""
            for n, m in module.named_modules()
            if hasattr(m, "base_layer") or hasattr(m, "original_module")
        ]
        for key, tensor in module.state_dict(keep_vars=True).items():
            inside = [w for w in wrapped if key.startswith(w)]
            own = any(not key.startswith((f"{w}base_layer.", f"{w}original_module.")) for w in inside)
            if "adapter_slot" not in key and not own:
                plain = key.replace("base_layer.", "").replace("original_module.", "")
                yield f"{name.rpartition('.')[2]}.{plain}", tensor


def stack_names(model: nn.Module) -> list[str]:
    """Name the lists of repeated layers of a model."""
    return [name for name, _ in stacks_of(model)]


def layer_numbers(layers: str | Sequence[int], depth: int) -> set[int]:
    """Turn `all`, `first:n`, `last:n` or a list into layer numbers.

    Raises:
        SiteError: a layer that is not there.
    """
    if layers == "all":
        return set(range(depth))
    if isinstance(layers, str):
        kind, _, count = layers.partition(":")
        n = int(count) if count.isdigit() else 0
        if kind not in ("first", "last") or not 1 <= n <= depth:
            raise SiteError(f"layers={layers!r}: expected 'all', 'first:n', 'last:n' or a list, n from 1 to {depth}.")
        return set(range(n)) if kind == "first" else set(range(depth - n, depth))
    wrong = [i for i in layers if not -depth <= i < depth]
    if wrong:
        raise SiteError(f"layers={list(layers)}: there is no layer {wrong[0]}; they run from 0 to {depth - 1}.")
    return {i % depth for i in layers}


def _block_sites(name: str, block: nn.Module, stack: str, layer: int, width: int) -> Iterator[Site]:
    for sub in sublayers(name, block, width):
        yield Site(sub.write, sub.read, sub.position, stack, layer, sub.width)
    yield Site(name, name, "block", stack, layer, width)
