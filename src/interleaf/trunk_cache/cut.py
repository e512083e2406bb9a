"""Where a model is cut: below it all is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interleaf.blocks import stacks_of
from interleaf.slot import slots
from interleaf.tuner import task_head


@dataclass(frozen=True)
class Cut:
    """The frozen layers at the bottom of one stack, by name, and how many layers the stack has."""

    layers: list[str]
    depth: int

    def __str__(self) -> str:
        return f"the lowest {len(self.layers)} of {self.depth} layers are run once and stored"


class NoCache(Exception):
    """Why the layers below cannot be run once."""


def cut_of(model: Any) -> Cut:
    """Find the layers below everything that is trained or adapted.

    Raises:
        NoCache: there are none, or not at the bottom of the only stack or of the encoder.
    """
    heads = tuple(f"{name}." for name in task_head(model))
    live = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(heads)]
    places = {id(slot): name for name, slot in model.named_modules()}
    live += [f"{places[id(slot)]}." for slot in slots(model) if not slot.idle]
    stacks = list(stacks_of(model))
    within = {f"{name}.": (stack, i) for stack, blocks in stacks for i, (name, _) in enumerate(blocks)}
    lowest: dict[str, int] = {}
    for name in live:
        block = next((place for prefix, place in within.items() if name.startswith(prefix)), None)
        if block is None:
            raise NoCache(f"{name.rstrip('.')} is outside the layers, and trained or adapted")
        lowest[block[0]] = min(block[1], lowest.get(block[0], block[1]))
    stack, blocks = _first_stack(model, stacks)
    frozen = lowest.get(stack, len(blocks))
    if frozen == 0:
        raise NoCache("the first layer is trained or adapted: choose the upper ones, such as layers=last:2")
    if len({id(block) for _, block in blocks}) < len(blocks):
        raise NoCache("its layers share weights")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise NoCache("the routers of all layers are part of the loss")
    return Cut([name for name, _ in blocks[:frozen]], len(blocks))


def _first_stack(model: Any, stacks: Sequence[Any]) -> Any:
    """Return the only stack of layers, or the encoder's."""
    if len(stacks) == 1:
        return stacks[0]
    if len(stacks) == 2 and getattr(model.config, "is_encoder_decoder", False):
        inside = {id(module) for module in model.get_encoder().modules()}
        of_encoder = [stack for stack in stacks if id(stack[1][0][1]) in inside]
        if len(of_encoder) == 1:
            return of_encoder[0]
    raise NoCache(f"the model has {len(stacks)} stacks of layers")
