"""Loading AdapterHub's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interleaf.adapter import AdapterConfig
from interleaf.adapterhub.disk import CONFIG, FUSION, read_files
from interleaf.adapterhub.heads import Head
from interleaf.adapterhub.options import connection, read_options, undone
from interleaf.adapterhub.places import Place, fusion_query, named_weights, places
from interleaf.adapters import BottleneckConfig, CompacterConfig, FusionConfig, InvertibleConfig, UnionConfig
from interleaf.errors import StoreError

if TYPE_CHECKING:
    from interleaf.model import AdaptedModel


def load(model: AdaptedModel, folder: Path, name: str | None = None, *, with_head: bool = False) -> str:
    """Load an AdapterHub adapter, or a fusion of adapters that are on the model, and make it active.

    Args:
        model: what it is loaded onto.
        folder: where AdapterHub's files are.
        name: how to call it; by default as AdapterHub did.
        with_head: also load the prediction head in the folder, as the adapter's own; by default it is left alone.

    Returns:
        the adapter's name.

    Raises:
        StoreError: another architecture or width, a missing or unknown tensor, an option or a head that has no equal
            here; the model stays as it was.
    """
    base: Any = model._module
    fusion = (folder / FUSION).is_file()
    told, tensors = read_files(folder, FUSION if fusion else CONFIG)
    if told.get("model_type") not in (None, base.config.model_type):
        theirs, ours = told["model_type"], base.config.model_type
        raise StoreError(f"{folder} was made for another architecture: {theirs}, this model is {ours}.")
    own = str(told.get("name") or "default")
    name = name or own.replace(".", "_")
    there = places(base)
    config = _fusion_config(told, model, folder) if fusion else _config(told, there, base, folder, tensors)
    head = Head.read(base, folder) if with_head else None
    before = model.active_setup
    with torch.random.fork_rng(devices=[]):  # loading draws no random numbers a user could notice
        model.add_adapter(name, config, modules_to_save=head.modules if head is not None else [])
    try:
        _fill(base, name, own, there, tensors, folder)
        if head is not None:
            head.fill(base, name)
    except StoreError:
        model.delete_adapter(name)
        model.set_adapter(before or None)
        raise
    return name


def _place_of(key: str, there: dict[str, Place]) -> tuple[Place, str] | None:
    """Split a tensor's name into its place, whatever the prefix, and the rest behind it."""
    parts = key.split(".")
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            if (place := there.get(".".join(parts[start:end]))) is not None:
                return place, ".".join(parts[end:])
    return None


def _found_keys(tensors: dict[str, Tensor], own: str, there: list[Place]) -> set[str]:
    by_key = {place.key: place for place in there}
    hits = (_place_of(key, by_key) for key in tensors)
    return {hit[0].key for hit in hits if hit is not None and hit[1].startswith(f"{own}.")}


def _config(
    told: dict[str, Any], there: list[Place], base: Any, folder: Path, tensors: dict[str, Tensor]
) -> AdapterConfig:
    c = read_options(told, folder)
    left_out = set(c["leave_out"])
    wanted = [p for p in there if c[p.flag] and p.index not in left_out]
    found = _found_keys(tensors, str(told.get("name") or "default"), there)
    if missing := [p.key for p in wanted if p.key not in found]:
        raise StoreError(f"{folder} has no weights for {missing[0]}: it is damaged, or was made for another base.")
    if not wanted:
        raise StoreError(f"{folder}: its options put it nowhere in this model.")
    how = connection(c, any(place.norm for place in there))
    width = _width(tensors, wanted[0].key)
    shared: dict[str, Any] = {
        "target_modules": [place.target(how) for place in wanted],
        "activation": c["non_linearity"],
        "connection": "serial" if how == "after_norm" else how,
        "scaling": c["scaling"] if isinstance(c["scaling"], str) else float(c["scaling"]),
    }
    if c["phm_layer"]:
        config: AdapterConfig = CompacterConfig(
            phm_dim=c["phm_dim"], phm_rank=c["phm_rank"], bottleneck_dim=width, **shared
        )
    else:
        config = BottleneckConfig(
            **_widths(c["reduction_factor"], width, wanted),
            norm_before=c["ln_before"],
            norm_after=c["ln_after"],
            gate="sequence" if c["use_gating"] else False,
            dropout=c["dropout"],
            stochastic_depth=0.0 if c["is_parallel"] else c["stochastic_depth"],
            **shared,
        )
    # task adapters of the first version tell of an inverse they have not
    unused = told.get("type") == "text_task" and not any("invertible_adapters." in key for key in tensors)
    if not c["inv_adapter"] or unused:
        return config
    inverse = InvertibleConfig(
        activation=c["non_linearity"],
        reduction_factor=c["inv_adapter_reduction_factor"],
        undo=undone(str(told.get("model_class")), base),
    )
    return UnionConfig(parts=[config, inverse])


def _widths(factor: Any, width: int, there: list[Place]) -> dict[str, Any]:
    if not isinstance(factor, dict):
        return {"bottleneck_dim": width}
    # by the layers' names: AdapterHub counts through encoder and decoder
    return {"reduction_factor": {p.block: factor.get(str(p.index), factor.get("default")) for p in there}}


def _width(tensors: dict[str, Tensor], key: str) -> int:
    ends = (".adapter_up.weight", ".adapter_up.W_left")
    found = next(t for n, t in tensors.items() if f"{key}." in f".{n}" and n.endswith(ends))
    return found.shape[1] if found.ndim == 2 else found.shape[0] * found.shape[1]


def _fusion_config(told: dict[str, Any], model: AdaptedModel, folder: Path) -> FusionConfig:
    c = told["config"]
    names = [n.replace(".", "_") for n in told.get("adapter_names") or str(told["name"]).split(",")]
    plain = c["key"] and c["query"] and c["value_before_softmax"] and not c["residual_before"]
    if not plain or c["query_before_ln"]:
        raise StoreError(f"{folder}: this form of AdapterFusion has no equal here; see docs/adapterhub.md.")
    try:
        query = fusion_query([model.adapters.get(name) for name in names])
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from error
    # AdapterHub's temperature falls to 1 over the first forward passes and is in no file
    return FusionConfig(
        children=names,
        value=c["value"],
        query=query,
        dropout=c["dropout_prob"] or 0.0,
        regularization=FusionConfig.regularization if c["regularization"] else 0.0,
    )


def _fill(base: Any, name: str, own: str, there: list[Place], tensors: dict[str, Tensor], folder: Path) -> None:
    stems = [place.key.removesuffix("adapters") for place in there]
    stems += ["encoder.invertible_adapters.", "invertible_adapters.", "shared_parameters."]
    given = {_without_prefix(key, stems): tensor for key, tensor in tensors.items()}
    # the norm before is stored twice
    given = {k: t for k, t in given.items() if not (".adapter_down.0." in k and f"{_twin(k)}" in given)}
    wanted = dict(named_weights(base, name, own, there))
    if missing := sorted(wanted.keys() - given.keys()):
        raise StoreError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}.")
    if extra := sorted(given.keys() - wanted.keys()):
        raise StoreError(f"{folder}: {len(extra)} weights have no place in this model, the first is {extra[0]}.")
    for key, parameter in wanted.items():
        if parameter.shape != given[key].shape:
            got, want = tuple(given[key].shape), tuple(parameter.shape)
            raise StoreError(f"{folder}: {key} has shape {got}, the model wants {want}: it was made for another base.")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(given[key])


def _without_prefix(key: str, stems: list[str]) -> str:
    """Cut what stands before a place's name: the prefix depends on the class it was saved from."""
    starts = [f".{key}".find(f".{stem}") for stem in stems]
    return key[min((start for start in starts if start >= 0), default=0) :]


def _twin(key: str) -> str:
    return key.replace(".adapter_down.0.", ".adapter_norm_before.")
