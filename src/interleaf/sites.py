"""Where adapters can go in any Transformer, read off the module tree: no table of models.

A *site* is a module that writes into the residual stream, with the module that reads for it.
Rules: blocks are the outermost lists of repeated layers; a block's sublayers are its children that hold
linear maps; what a sublayer writes is its last linear map of the model's width.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from interleaf.errors import SiteError

# maps that feed attention rather than write its result
_READS = re.compile(r"(w?[qkv]|query|key|value|qkv|gate|g|index\w*)(_?[abcu])?(_(proj|lin|layer|net|[abu]))*")

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


@dataclass(frozen=True)
class _Sublayer:
    name: str
    write: str
    position: str


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream as the model's config states it.

    Raises:
        SiteError: the model has no Hugging Face config that states one.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    if not isinstance(width, int) and config is not None:
        # some state another name only: then it is what most maps of the layers end in
        ends = Counter(_out_dim(m) for _, blocks in _stacks(model) for _, block in blocks for _, m in _linears(block))
        width = ends.most_common(1)[0][0] if ends else None
    if not isinstance(width, int):
        raise SiteError(
            f"{type(model).__name__} does not state its width: its config has no `hidden_size`. "
            "Set `input_dim` in the adapter's config."
        )
    return width


def find_sites(model: nn.Module, width: int | None = None) -> list[Site]:
    """List every site of a model, stack by stack, layer by layer, in the order of computation.

    Raises:
        SiteError: no repeated layers with linear maps were found.
    """
    width = width or hidden_size(model)
    found = [
        site
        for stack, blocks in _stacks(model)
        for layer, (name, block) in enumerate(blocks)
        for site in _block_sites(name, block, stack, layer, width)
    ]
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


def target_sites(model: nn.Module, targets: str | Sequence[str], width: int) -> list[Site]:
    """Turn named modules into sites: the escape hatch.

    Args:
        targets: a regular expression for whole names, or name endings. An ending may be `read -> write`, when the
            adapter is to read the input of another module than it changes, or `read -> write -> norm`.

    Raises:
        SiteError: a name that matches no module.
    """
    names = [n for n, _ in model.named_modules() if n and ".adapter_slot" not in n]
    stacks = list(_stacks(model))
    if isinstance(targets, str):
        hits = [n for n in names if re.fullmatch(targets, n)]
        if not hits:
            raise SiteError(f"target_modules={targets!r} matches no module of {type(model).__name__}.")
        return [_target((n,), stacks, width) for n in hits]
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
    return [_target(found[write], stacks, width) for write in sorted(found, key=lambda n: order[n])]


def _target(names: tuple[str, ...], stacks: list[tuple[str, list[tuple[str, nn.Module]]]], width: int) -> Site:
    """Make a site of named modules; outside all layers it has layer -1 of the stack it is nearest to."""
    read, name, norm = (*names, names[0], "")[:3] if len(names) < 2 else (*names, "")[:3]
    for stack, blocks in stacks:
        for layer, (block, _) in enumerate(blocks):
            if f"{name}.".startswith(f"{block}."):
                return Site(name, read, "target", stack, layer, width, norm)
    return Site(name, read, "target", nearest_stack(name, [stack for stack, _ in stacks]), -1, width, norm)


def nearest_stack(name: str, stacks: Sequence[str]) -> str:
    """Return the stack of layers whose name begins most like a module's."""
    return max(stacks, key=lambda s: _shared(s.split("."), name.split(".")), default="")


def stack_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's weights in its repeated layers and input embeddings, or all if it has no such layers.

    Names start at the stack, and PEFT's wrappers are looked through, so they are the same under every head
    and adapter.
    """
    stacks = [(name, model.get_submodule(name)) for name, _ in _stacks(model)]
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


def _shared(left: list[str], right: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def stack_names(model: nn.Module) -> list[str]:
    """Name the lists of repeated layers of a model."""
    return [name for name, _ in _stacks(model)]


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


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map: nn.Linear, a quantised one, or GPT-2's Conv1D."""
    weight = getattr(module, "weight", None)
    return weight is not None and (hasattr(module, "out_features") or hasattr(module, "nf"))


def _out_dim(module: nn.Module) -> int:
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    # an adapter's own maps are never part of the base: slots are skipped
    return [(n, m) for n, m in module.named_modules() if "adapter_slot" not in n and is_linear(m)]


def _weighty(module: nn.Module) -> bool:
    """A child worth adapting holds linear maps, or is a mixer of raw parameters (fused experts)."""
    return bool(_linears(module)) or _has_experts(module)


def _has_experts(module: nn.Module) -> bool:
    return any(p.ndim == 3 and p.shape[0] > 1 for n, p in module.named_parameters() if "adapter_slot" not in n)


def _stacks(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """Yield the outermost lists of repeated layers, each as its name and its named layers."""
    towers = [f"{tower}." for tower in _other_towers(model)]
    found = list(_stacks_outside(model, towers))
    yield from found or _stacks_outside(model, [])


def _stacks_outside(model: nn.Module, towers: list[str]) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    inside = list(towers)
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside) or not isinstance(module, nn.ModuleList):
            continue
        if not _is_stack(module):
            continue
        inside.append(name + ".")
        layers = [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
        yield name, [b for n, layer in layers for b in _descend(n, layer)]


def _other_towers(model: nn.Module) -> Iterator[str]:
    """Name the parts of a multimodal model that have a config of their own beside the text's: vision, audio."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kept = [type(part) for part in (config, text, getattr(config, "encoder", None))]
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if name and hasattr(own, "to_dict") and type(own) not in kept:
            yield name


def _is_stack(layers: nn.ModuleList) -> bool:
    """Tell whether a list holds layers: of one class, or each made to be checkpointed, as in hybrid models."""
    alike = len({type(layer) for layer in layers}) == 1 and not isinstance(layers[0], nn.ModuleList)
    alike = alike or (len(layers) > 1 and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers))
    return alike and all(len(_linears(layer)) >= 2 for layer in layers)


def _descend(name: str, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """ALBERT keeps its layers in groups: a layer that is only a list of layers gives way to them."""
    children = [(n, c) for n, c in layer.named_children() if _weighty(c)]
    list_name, items = children[0] if len(children) == 1 else ("", layer)
    if isinstance(items, nn.ModuleList) and _is_stack(items):
        return [(f"{name}.{list_name}.{i}", item) for i, item in enumerate(items)]
    return [(name, layer)]


def _block_sites(name: str, block: nn.Module, stack: str, layer: int, width: int) -> Iterator[Site]:
    for sub in _sublayers(name, block, width):
        yield Site(sub.write, sub.name, sub.position, stack, layer, width)
    yield Site(name, name, "block", stack, layer, width)


def _sublayers(name: str, block: nn.Module, width: int) -> Iterator[_Sublayer]:
    """Yield a block's sublayers; neighbours of one linear map each (fc1, fc2) are one feed-forward."""
    children = list(_block_children(name, block))
    if children and all(is_linear(c) for _, c in children) and any(_reads(n) for n, _ in children):
        # the block is itself an attention
        if (write := _write(name, block, width)) is not None:
            yield _Sublayer(name, write, _position(name, block))
        return
    pending: tuple[str, nn.Module] | None = None
    for child_name, child in children:
        if len(_linears(child)) == 1 and not _has_experts(child):
            if pending is None:
                pending = (child_name, child)
                continue
            first, pending = pending[0], None
            if (write := _write(child_name, child, width)) is not None:
                yield _Sublayer(first, write, _position(first, block.get_submodule(first[len(name) + 1 :])))
            continue
        pending = None
        if (write := _write(child_name, child, width)) is not None:
            yield _Sublayer(child_name, write, _position(child_name, child))


def _block_children(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in block.named_children():
        if child_name == "adapter_slot" or not _weighty(child):
            continue
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{child_name}.{i}", c) for i, c in enumerate(child) if _weighty(c))
        else:
            yield f"{name}.{child_name}", child


def _write(name: str, child: nn.Module, width: int) -> str | None:
    """Name the module whose output the child adds to the residual stream; None if it writes none."""
    linears = _linears(child)
    routed = any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in child.modules())
    if _has_experts(child) or routed:
        return name
    wide = [n for n, m in linears if _out_dim(m) == width]
    if not wide:
        return None
    writers = [n for n in wide if not _reads(n)]
    if not writers:
        return name  # its maps only feed it, as in a recurrence: what it writes is its own output
    # the shallowest: what lies deeper (an indexer, a norm's map) serves the sublayer, not the residual stream
    depth = min(n.count(".") for n in writers)
    last = [n for n in writers if n.count(".") == depth][-1]
    return f"{name}.{last}" if last else name


def _reads(name: str) -> bool:
    return _READS.fullmatch(name.rpartition(".")[2]) is not None


def _position(name: str, child: nn.Module) -> str:
    """Tell attention, cross-attention and feed-forward apart by the words their authors use."""
    words = f"{name.rpartition('.')[2]} {type(child).__name__}".lower()
    if "cross" in words or "encoder_attn" in words or "encdec" in words:
        return "cross_attention"
    mixers = ("att", "mixer", "conv", "recurrent", "rnn", "mamba", "ssm")
    return "attention" if any(word in words for word in mixers) else "ffn"
