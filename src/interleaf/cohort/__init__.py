"""Train several adapters at once over one frozen base: each has a run of its own, the layers see all their rows.

Every run is the stock Trainer's, in a thread of its own, with its optimizer, schedule, stop and checkpoints. Where its
model calls a layer it waits until all others do too; calls of one layer are then made one, of the base's layer, each
run's adapters on its own rows. The backward pass is one for all. So each run gives what it gives alone, but for
rounding, and for where dropout falls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from interleaf.cohort.joined import Apart, Call, call_of, joined_slots, layers_of, run_joined, that_fit
from interleaf.cohort.turns import Member
from interleaf.errors import ConfigError, InterleafError, TrainingError
from interleaf.settings import TrainSettings
from interleaf.train import Result, Run, prepare


@dataclass(frozen=True)
class _Backward:
    """A model's loss, whose backward pass is asked for."""

    loss: Tensor


class _Begun(TrainerCallback):
    """Notes that a run has prepared all it needs: its frozen layers are stored."""

    begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True


def prepare_cohort(settings: Sequence[TrainSettings]) -> list[Run]:
    """Load and check everything that some runs need; their models share the base's weights.

    Raises:
        ConfigError: runs that cannot be trained together: another base, one place for two, activation checkpointing.
        InterleafError: what is wrong with one of them.
    """
    if not settings:
        raise ConfigError("a cohort has no runs in it.")
    for one in settings:
        if one.base != settings[0].base:
            raise ConfigError(f"{one.out} adapts {one.base}, {settings[0].out} {settings[0].base}: expected one base.")
        if one.activation_checkpointing:
            raise ConfigError(f"{one.out}: activation_checkpointing computes layers twice, which a cohort cannot.")
    if len({Path(one.out).resolve() for one in settings}) < len(settings):
        raise ConfigError("two runs of a cohort have one `out`: each adapter needs a folder of its own.")
    return [prepare(one) for one in settings]


def train_cohort(
    runs: Sequence[Run], callbacks: Callable[[int], tuple[TrainerCallback, ...]] = lambda number: ()
) -> list[Result]:
    """Train runs at once; each adapter is written when its own run ends.

    Args:
        runs: from `prepare_cohort`.
        callbacks: makes the callbacks of a run, by its number.

    Raises:
        TrainingError: some runs failed; the others' adapters were saved.
    """
    base = runs[0].task.model(runs[0].settings.base)
    shared = layers_of(base)
    begun = [_Begun() for _ in runs]
    members = [Member(_work(run, (begun[i], *callbacks(i)))) for i, run in enumerate(runs)]
    with contextlib.ExitStack() as stack:
        for run, member in zip(runs, members, strict=True):
            _share_weights(base, run)
            stack.enter_context(_watched(member, run.model))
            stack.callback(member.stop)
        for member, note in zip(members, begun, strict=True):
            member.advance()
            while member.wants is not None and not note.begun:
                member.advance()  # alone: what one run stores of the frozen layers, the next ones find
        while waiting := [member for member in members if member.wants is not None]:
            for member, answer in _answers(waiting, shared):
                member.advance(answer)
    return _results(runs, members)


def _work(run: Run, callbacks: tuple[TrainerCallback, ...]) -> Callable[[], Result]:
    return lambda: run.train(*callbacks)


def _results(runs: Sequence[Run], members: Sequence[Member]) -> list[Result]:
    failed = [(run.settings.out, m.error) for run, m in zip(runs, members, strict=True) if m.error is not None]
    for _, error in failed:
        if not isinstance(error, InterleafError) or len(runs) == 1:
            raise error
    if failed:
        told = "; ".join(f"{out}: {error}" for out, error in failed)
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, the others were saved. {told}")
    return [member.result for member in members]


def _share_weights(base: nn.Module, run: Run) -> None:
    """Let a run's model hold the very weights of `base`, where they are the same.

    Raises:
        ConfigError: its layers are others.
    """
    own = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if name in own and own[name].shape == tensor.shape and torch.equal(own[name], tensor):
            own[name].data = tensor.data
    for name, layer in layers_of(base):
        for inside, tensor in layer.named_parameters():
            if (found := own.get(f"{name}.{inside}")) is None or found.data_ptr() != tensor.data_ptr():
                raise ConfigError(f"{run.settings.out}: its layer {name} is not that of the other runs' base.")


@contextlib.contextmanager
def _watched(member: Member, model: Any) -> Iterator[None]:
    """Let a model ask for its layers' outputs and for its backward pass, for as long as the block lasts."""
    inside = joined_slots(model)
    if inside is None:
        yield
        return
    layers = [layer for _, layer in layers_of(model)]
    for place, layer in enumerate(layers):
        layer.forward = _asking(member, place, layer, inside[place], layer.forward)
    hook = model.register_forward_hook(_asking_backward(member))
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            del layer.forward


def _asking(
    member: Member, place: int, layer: nn.Module, own: Sequence[Any], forward: Callable[..., Any]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = call_of(place, layer, own, args, kwargs)
        answer = None if call is None else member.ask(call)
        return forward(*args, **kwargs) if answer is None else answer

    return run


def _asking_backward(member: Member) -> Callable[..., Any]:
    class Loss(Tensor):
        """A loss whose backward pass is made together with the others'."""

        def backward(self, *args: Any, **kwargs: Any) -> None:
            member.ask(_Backward(self.as_subclass(Tensor)))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None and loss.requires_grad:
            output["loss"] = loss.as_subclass(Loss)
        return output

    return hook


def _answers(waiting: Sequence[Member], shared: Sequence[tuple[str, nn.Module]]) -> list[tuple[Member, Any]]:
    """Give those what they want that stand lowest in the model; the backward pass when all wait for theirs."""
    calling = [member for member in waiting if isinstance(member.wants, Call)]
    if not calling:
        try:
            torch.autograd.backward([member.wants.loss for member in waiting])
        except Exception as error:
            return [(member, error) for member in waiting]
        return [(member, None) for member in waiting]
    first = min(calling, key=lambda member: member.wants.place)
    group = [member for member in calling if member.wants.form == first.wants.form]
    group = group[: that_fit([member.wants for member in group])]
    return list(zip(group, _joined([member.wants for member in group], shared), strict=True))


def _joined(calls: Sequence[Call], shared: Sequence[tuple[str, nn.Module]]) -> Sequence[Any]:
    if len(calls) == 1:
        return [None]  # by its own model's layer
    name, layer = shared[calls[0].place]
    try:
        return run_joined(layer, name, calls)
    except Apart:
        return [None] * len(calls)
    except Exception as error:
        return [error] * len(calls)
