"""A model's blocks and their sublayers, read off the module tree: what repeats, what reads, what writes.

Blocks are the outermost lists of repeated layers. A block's sublayers are its children that hold linear maps.
A sublayer writes with its last linear map of the stack's width that is not named as one that feeds it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from interleaf.errors import SiteError

# maps that feed a sublayer's result rather than write it: queries, keys, values, gates, positions
_READS = re.compile(
    r"(\w+_)?gate(_\w+)?|receptance|in_proj\w*|(linear_|lin_|\w*pos_)?(w?[qkv]{1,3}|query|key|value|[abfgr]|index\w*)(_\w+)?"
    r"|(\w+_)?pos(ition)?(_proj)?|intermediate"
)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
# of a class's name: MLP, Attention, 2
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|_")
_FFN = re.compile(r"mlp|ffn|feed_?forward|moe|expert|intermediate|(^|_|layer)ffs?(_|\d|$)")
_MIXER = re.compile(r"att|conv|recurrent|rnn|lstm|mamba|ssm|delta")
_CROSS = re.compile(r"cross|enc(oder)?_?(dec_?)?att")

Stack = tuple[str, list[tuple[str, nn.Module]]]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a block: the module that reads, the one that writes, and the width of what it writes."""

    read: str
    write: str
    position: str
    width: int


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream as the model's config states it.

    Raises:
        SiteError: the model has no Hugging Face config that states one.
    """
    config: Any = getattr(model, "config", None)
    width = getattr(_text_config(config), "hidden_size", None)
    if not isinstance(width, int) and config is not None:
        # some state another name only
        width = _common_width([block for _, blocks in stacks_of(model) for block in blocks])
    if not isinstance(width, int):
        raise SiteError(
            f"{type(model).__name__} does not state its width: its config has no `hidden_size`. "
            "Set `input_dim` in the adapter's config."
        )
    return width


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map: nn.Linear, a quantised one, or GPT-2's Conv1D."""
    weight = getattr(module, "weight", None)
    return weight is not None and (hasattr(module, "out_features") or hasattr(module, "nf"))


def _out_dim(module: nn.Module) -> int:
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]


def _in_dim(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(getattr(module, "in_features", None) or weight.shape[0])


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    # an adapter's own maps are never part of the base: slots are skipped
    return [(n, m) for n, m in module.named_modules() if "adapter_slot" not in n and is_linear(m)]


def _common_width(blocks: Sequence[tuple[str, nn.Module]]) -> int | None:
    """Return what most linear maps of some blocks end in."""
    ends = Counter(_out_dim(m) for _, block in blocks for _, m in _linears(block))
    return ends.most_common(1)[0][0] if ends else None


def _weighty(name: str, module: nn.Module) -> bool:
    """A child worth adapting holds linear maps, or raw ones (fused experts); a norm is none, whatever it holds."""
    norm = _NORM.search(name) and not _MIXER.search(type(module).__name__.lower())
    return not norm and (bool(_linears(module)) or _has_raw_maps(module))


def _has_raw_maps(module: nn.Module) -> bool:
    """Tell whether linear maps are kept as bare parameters somewhere inside: fused experts, XLNet's attention."""
    return any(
        (p.ndim == 3 and p.shape[1] > 1) or (p.ndim == 2 and "expert" in type(m).__name__.lower())
        for n, m in module.named_modules()
        if "adapter_slot" not in n and not _is_conv(m) and not any(is_linear(c) for c in m.children())
        for p in m.parameters(recurse=False)
    )


def _has_experts(module: nn.Module) -> bool:
    """Tell whether a module holds experts: a list of several parts with linear maps, or what is called so."""
    return any(
        isinstance(m, nn.ModuleList | nn.ModuleDict) and (isinstance(m, nn.ModuleList) or "expert" in n)
        for n, m in module.named_modules()
        if len(list(m.children())) > 1 and "adapter_slot" not in n and _linears(m)
    )


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def stacks_of(model: nn.Module) -> Iterator[Stack]:
    """Yield the outermost lists of repeated layers, each as its name and its named layers."""
    towers = [f"{tower}." for tower in _other_towers(model)]
    found = list(_stacks_outside(model, towers))
    yield from found or _stacks_outside(model, [])


def _stacks_outside(model: nn.Module, towers: list[str]) -> Iterator[Stack]:
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
    """Name the parts of a multimodal model that have a config of their own beside the text's: vision, audio.

    Text alone does not pass them. In a dual encoder, which gives features of each modality, all parts count.
    """
    config: Any = getattr(model, "config", None)
    if config is None or hasattr(model, "get_text_features"):
        return
    told = [config, getattr(config, "encoder", None)]
    kept = {type(part) for whole in told for part in (whole, _text_config(whole))}
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if name and hasattr(own, "to_dict") and type(own) not in kept:
            yield name


def _text_config(config: Any) -> Any:
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # text goes in and comes out
        return config.get_text_config(decoder=True)


def block_width(model: nn.Module, name: str, block: nn.Module) -> int:
    """Return a block's width: what the nearest config states, if the block's own norms, or else its maps, have it."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1))
    stated = (getattr(_text_config(getattr(m, "config", None)), "hidden_size", None) for m in around)
    width = next((w for w in stated if isinstance(w, int)), 0)
    norms = Counter(
        p.numel() for n, c in block.named_children() if _NORM.search(n) for p in c.parameters(recurse=False)
    )
    ends = norms or Counter(_out_dim(m) for _, m in _linears(block))
    return width if width in ends or not ends else ends.most_common(1)[0][0]


def _is_stack(layers: nn.ModuleList) -> bool:
    """Tell whether a list holds layers: of one class, or each made to be checkpointed, as in hybrid models."""
    alike = len({type(layer) for layer in layers}) == 1 and not isinstance(layers[0], nn.ModuleList)
    alike = alike or (len(layers) > 1 and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers))
    return alike and all(len(_linears(layer)) >= 2 for layer in layers)


def _descend(name: str, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """ALBERT keeps its layers in groups, Swin in stages: a layer that holds a list of layers gives way to them."""
    children = [(n, c) for n, c in layer.named_children() if _weighty(n, c)]
    for list_name, items in children:
        if isinstance(items, nn.ModuleList) and _is_stack(items) and (len(children) == 1 or all(map(_is_block, items))):
            return [(f"{name}.{list_name}.{i}", item) for i, item in enumerate(items)]
    return [(name, layer)]


def sublayers(name: str, block: nn.Module, width: int) -> list[Sublayer]:
    """List a block's sublayers; what is named neither mixer nor feed-forward is one where nothing else is."""
    parts = list(_parts(block))
    if parts and all(is_linear(c) for _, c in parts) and any(_reads(n) for n, _ in parts):
        # the block is itself an attention
        cross = _CROSS.search(type(block).__name__.lower())
        found = [_sublayer(name, name, block, "cross_attention" if cross else "attention", width)]
    else:
        found = []
        for leaf, read, child in _pairs(parts):
            if _is_block(child):
                found += sublayers(f"{name}.{leaf}", child, width)
                continue
            reader = block.get_submodule(read)
            sub = _sublayer(f"{name}.{read}", f"{name}.{leaf}", child, _position(read, reader, block), width)
            takes = {_in_dim(m) for _, m in _linears(reader)}
            # Zamba's attention takes two streams side by side, MobileBERT's output a narrower one
            found.append(replace(sub, read=name) if sub and takes and sub.width not in takes else sub)
    there = [sub for sub in found if sub is not None]
    named = any(sub.position == "ffn" for sub in there)
    return [replace(s, position=s.position or "ffn") for s in there if s.position or not named]


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if name == "adapter_slot" or not _weighty(name, child):
            continue
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", c) for i, c in enumerate(child) if _weighty("", c))
        else:
            yield name, child


def _pairs(parts: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield what writes, what reads for it, and the writer: neighbours of one map each (fc1, fc2) are one sublayer."""
    pending = ""
    for leaf, child in parts:
        single = len(_linears(child)) == 1 and not _has_raw_maps(child)
        if single and not pending:
            pending = leaf
            continue
        yield leaf, pending if pending and (single or leaf == "output") else leaf, child
        pending = ""


def _is_block(module: nn.Module) -> bool:
    """Tell whether a block's child is a block of its own: it was made to be checkpointed, or holds both sublayers."""
    inside = {_position(leaf, child, module) for leaf, child in _parts(module)}
    return isinstance(module, GradientCheckpointingLayer) or inside >= {"attention", "ffn"}


def _sublayer(read: str, name: str, child: nn.Module, position: str, width: int) -> Sublayer | None:
    """Say where a sublayer writes; None if it writes nothing into the residual stream."""
    if (whole := _whole(child)) is not None:
        return Sublayer(read, f"{name}.{whole}" if whole else name, position, width)
    linears = _linears(child)
    ends = [(n, _out_dim(m)) for n, m in linears if not _reads(n)]
    wide = [n for n, out in ends if out == width]
    if not ends and any(_out_dim(m) == width for _, m in linears):
        return Sublayer(read, name, position, width)  # a product of maps that all read, as RWKV's
    if not wide and position == "attention" and ends and len(ends) < len(linears):
        width = ends[-1][1]  # MobileBERT's attention works on a stream of its own width
        wide = [n for n, out in ends if out == width]
    if not wide:
        return None
    # the shallowest: what lies deeper (an indexer, a norm's map) serves the sublayer, not the residual stream
    depth = min(n.count(".") for n in wide)
    last = [n for n in wide if n.count(".") == depth][-1]
    return Sublayer(read, f"{name}.{last}" if last else name, position, width)


def _whole(module: nn.Module) -> str | None:
    """Name the part of a sublayer that writes as a whole: routed experts, raw maps, and mixers with a convolution.

    The last have fused kernels that take the weight of the output map and never call it.
    """
    if not _has_experts(module) and not _has_raw_maps(module):
        convolves = any(_is_conv(c) for c in module.children()) and not is_linear(module)
        return "" if convolves else None
    inner = [
        (n, c) for n, c in module.named_children() if n != "adapter_slot" and any(p.ndim > 1 for p in c.parameters())
    ]
    if len(inner) != 1 or any(p.ndim > 1 for p in module.parameters(recurse=False)):
        return ""
    name, child = inner[0]
    deeper = None if isinstance(child, nn.ModuleList) else _whole(child)
    return "" if deeper is None else f"{name}.{deeper}".rstrip(".")


def _reads(name: str) -> bool:
    return any(_READS.fullmatch(part) for part in name.split("."))


def _position(name: str, child: nn.Module, block: nn.Module) -> str:
    """Tell attention, cross-attention and feed-forward apart by the words their authors use; "" if they say neither.

    The name comes before the class, and from the class goes what it shares with the block's: the model's own name.
    """
    own, whose = (_WORDS.findall(type(m).__name__) for m in (child, block))
    kind = "".join(own[shared_parts(own, whose) :]).lower()
    for words in (name.lower(), kind):
        if _FFN.search(words):
            return "ffn"
        if _CROSS.search(words):
            return "cross_attention"
        if _MIXER.search(words):
            return "cross_attention" if "cross" in kind and "self" not in words else "attention"
    return "attention" if "mixer" in name or "mixer" in kind else ""


def shared_parts(left: Sequence[str], right: Sequence[str]) -> int:
    """Count the parts that two names begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
