"""Merging adapters' weights by task arithmetic into a new adapter of the same kind.

Task arithmetic: Ilharco et al. 2023 (arXiv 2212.04089); TIES: Yadav et al. 2023 (2306.01708); DARE: Yu et al. 2024
(2311.03099). The arithmetic is PEFT's.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from interleaf.adapter import AdapterConfig
from interleaf.errors import AdapterError, ConfigError
from interleaf.slot import SLOT

if TYPE_CHECKING:
    from interleaf.model import AdaptedModel

METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
# settings that say how an adapter came to be, not what it is
_HISTORY = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "task_type",
    "modules_to_save",
)


def merge(
    model: AdaptedModel,
    name: str,
    weights: Mapping[str, float],
    method: str = "linear",
    density: float | None = None,
    seed: int = 0,
) -> None:
    """Make a new adapter of the weighted sum of others, tensor by tensor, and make it the active one.

    What an adapter does is not linear in its tensors (two maps with an activation between them, or LoRA's product of
    two), so the result only approximates the sum of what the adapters do, as in AdapterHub and in PEFT. Only matrices
    lose numbers; biases, norms, scales and task heads are always summed. The new adapter has a head if all have one.

    Args:
        model: the model with the adapters.
        name: how to call the new adapter.
        weights: a weight for each adapter; a negative one takes away what that adapter learnt.
        method: linear, magnitude_prune, ties, dare_linear or dare_ties.
        density: the share of each matrix's numbers that is kept, more than 0 and at most 1; all but linear need it.
        seed: of the numbers that the dare methods drop; the global generators stay as they are.

    Raises:
        AdapterError: an unknown or taken name, or adapters of another kind, other settings or other shapes.
        ConfigError: an unknown method, or a density or weights out of range.
    """
    from interleaf.model import adapter_tensors

    _check(weights, method, density)
    if name in model.adapters:
        raise AdapterError(f"there is an adapter {name!r} already. Delete it first, or choose another name.")
    configs = {one: model._known(one) for one in weights}
    if foreign := [one for one, config in configs.items() if not isinstance(config, AdapterConfig)]:
        raise AdapterError(f"{foreign[0]!r} is a method of PEFT's own; as a part of a union it can be merged.")
    tensors = {one: adapter_tensors(model._module, one) for one in weights}
    first = next(iter(weights))
    for other in weights:
        _alike(first, other, configs)
        _same_shapes(first, other, tensors)
    headed = all(any(_of_head(key) for key in tensors[one]) for one in weights)
    merged = _merged(list(tensors.values()), list(weights.values()), method, density, seed)
    config = copy.deepcopy(configs[first])
    config.modules_to_save = config.modules_to_save if headed else []
    with torch.random.fork_rng(devices=[]):  # its first weights are overwritten
        model.add_adapter(name, config)
    for key, tensor in adapter_tensors(model._module, name).items():
        tensor.copy_(merged[key])  # state dicts alias the live weights


def _merged(
    tensors: list[dict[str, Tensor]], weights: list[float], method: str, density: float | None, seed: int
) -> dict[str, Tensor]:
    factors = torch.tensor(weights)
    found = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density")  # of 1: PEFT says that nothing is pruned
        torch.default_generator.manual_seed(seed)
        for key in tensors[0]:
            if not all(key in one for one in tensors):
                continue  # a head that not all have
            same = [one[key].detach().cpu() for one in tensors]
            prunes = density is not None and same[0].ndim > 1 and not _of_head(key)
            found[key] = METHODS[method](same, factors, density) if prunes else task_arithmetic(same, factors)
    return found


def _check(weights: Mapping[str, float], method: str, density: float | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if not weights:
        raise ConfigError("merge: name the adapters, each with its weight: {'a': 0.7, 'b': 0.3}.")
    for one, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise ConfigError(f"merge: the weight of {one!r} is {weight!r}; expected a number.")
    if method == "linear":
        if density is not None:
            raise ConfigError("merge: linear keeps everything and has no density.")
    elif density is None or not 0 < density <= 1:
        raise ConfigError(f"density={density}: {method} needs more than 0 and at most 1.")


def _alike(first: str, other: str, configs: Mapping[str, Any]) -> None:
    left, right = (_settings(configs[one].to_dict()) for one in (first, other))
    for key in sorted(left.keys() | right.keys()):
        if (a := left.get(key)) != (b := right.get(key)):
            raise AdapterError(f"{first!r} and {other!r} cannot be merged: {key} is {a!r} and {b!r}.")


def _settings(values: Any) -> Any:
    """Return settings without what only says how an adapter came to be."""
    if isinstance(values, dict):
        return {k: _settings(v) for k, v in values.items() if k not in _HISTORY}
    return [_settings(v) for v in values] if isinstance(values, list) else values


def _same_shapes(first: str, other: str, tensors: Mapping[str, dict[str, Tensor]]) -> None:
    left, right = ({k: tuple(t.shape) for k, t in tensors[one].items()} for one in (first, other))
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key), right.get(key)
        if a != b and not (_of_head(key) and None in (a, b)):
            raise AdapterError(f"{first!r} and {other!r} cannot be merged: {key} has the shapes {a} and {b}.")


def _of_head(key: str) -> bool:
    return SLOT not in key
