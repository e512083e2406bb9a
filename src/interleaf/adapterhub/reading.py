"""Loading AdapterHub's adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from interleaf.adapter import AdapterConfig
from interleaf.adapterhub.places import CONFIG, FUSION, WEIGHTS, Place, named_weights, places
from interleaf.adapters import BottleneckConfig, CompacterConfig, FusionConfig, InvertibleConfig, UnionConfig
from interleaf.errors import StoreError

if TYPE_CHECKING:
    from interleaf.model import AdaptedModel

# AdapterHub's classes for these, unless with its flexible heads, never undo an invertible adapter
_OWN_CLASSES = (
    *("albert", "bart", "bert", "bert-generation", "deberta", "deberta-v2", "distilbert", "electra"),
    *("encoder-decoder", "gpt2", "gptj", "llama", "mbart", "mistral", "mt5", "plbart", "roberta", "t5"),
    *("whisper", "xlm-roberta", "xmod"),
)
_LEGACY = tuple(f"{where}_text_{what}_adapters" for where in ("attention", "layer") for what in ("task", "lang"))


def is_adapterhub(folder: Path) -> bool:
    """Tell whether a folder holds AdapterHub's files rather than PEFT's."""
    if (folder / FUSION).is_file():
        return True
    try:
        told = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and isinstance(told.get("config"), dict) and "peft_type" not in told


def load(model: AdaptedModel, folder: Path, name: str | None = None) -> str:
    """Load an AdapterHub adapter, or a fusion of adapters that are on the model, and make it active.

    A head in the folder is left alone: the model's own stays as it is.

    Returns:
        the adapter's name.

    Raises:
        StoreError: another architecture or width, a missing or unknown tensor, an option that has no equal here.
    """
    base: Any = model._module
    fusion = (folder / FUSION).is_file()
    told, tensors = _read(folder, FUSION if fusion else CONFIG)
    if told.get("model_type") not in (None, base.config.model_type):
        theirs, ours = told["model_type"], base.config.model_type
        raise StoreError(f"{folder} was made for another architecture: {theirs}, this model is {ours}.")
    own = str(told.get("name") or "default")
    name = name or own.replace(".", "_")
    there = places(base)
    if fusion:
        config: AdapterConfig = _fusion_config(told, model, folder)
    else:
        flexible = "AdapterModel" in str(told.get("model_class"))
        undo = flexible or base.config.model_type not in _OWN_CLASSES
        config = _config(told["config"], there, _found_keys(tensors, own, there), folder, tensors, undo)
    before = dict(model.adapters)
    model.add_adapter(name, config, modules_to_save=[])
    try:
        _fill(base, name, own, there, tensors, folder)
    except StoreError:
        if name not in before:
            model.delete_adapter(name)
        raise
    return name


def _read(folder: Path, config: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        told = json.loads((folder / config).read_text("utf-8"))
        path = next((folder / f for f in WEIGHTS[config] if (folder / f).is_file()), None)
        if path is None:
            raise StoreError(f"{folder} holds none of {', '.join(WEIGHTS[config])}.")
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except StoreError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "damaged" if isinstance(error, SafetensorError | OSError | ValueError | RuntimeError) else "unreadable"
        raise StoreError(f"{folder} is {kind}: {reason}") from error
    return told, {_modern(key): tensor for key, tensor in tensors.items()}


def _modern(key: str) -> str:
    for old in _LEGACY:
        key = key.replace(f".{old}.", ".adapters.")
    return key


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
    c: dict[str, Any], there: list[Place], found: set[str], folder: Path, tensors: dict[str, Tensor], undo: bool
) -> AdapterConfig:
    if c.get("architecture") or "mh_adapter" not in c:
        raise StoreError(f"{folder}: {c.get('architecture')} is no bottleneck; see docs/adapterhub.md.")
    left_out = set(c.get("leave_out") or [])
    wanted = [p for p in there if c.get(p.flag) and p.index not in left_out]
    if missing := [p.key for p in wanted if p.key not in found]:
        raise StoreError(f"{folder} has no weights for {missing[0]}: it is damaged, or was made for another base.")
    connection = _connection(c, any(place.norm for place in there), folder)
    targets = [place.target(connection) for place in wanted]
    shared: dict[str, Any] = {"target_modules": targets, "activation": _activation(c["non_linearity"], folder)}
    width = _width(tensors, wanted[0].key)
    if c.get("phm_layer"):
        if (
            connection not in ("serial", "stream")
            or not c["factorized_phm_W"]
            or c["factorized_phm_rule"]
            or not c["shared_phm_rule"]
        ):
            raise StoreError(f"{folder}: this form of Compacter has no equal here; see docs/adapterhub.md.")
        shared |= {"phm_dim": c["phm_dim"], "phm_rank": c["phm_rank"], "bottleneck_dim": width}
        config: AdapterConfig = CompacterConfig(connection=connection, **shared)
    else:
        config = BottleneckConfig(
            connection="serial" if connection == "after_norm" else connection,
            **_widths(c["reduction_factor"], width, wanted),
            scaling=c["scaling"] if isinstance(c["scaling"], str) else float(c["scaling"]),
            norm_before=c["ln_before"],
            norm_after=c["ln_after"],
            gate="sequence" if c["use_gating"] else False,
            dropout=c.get("dropout", 0.0),
            stochastic_depth=c.get("stochastic_depth", 0.0),
            **shared,
        )
    if not c.get("inv_adapter"):
        return config
    if c["inv_adapter"] != "nice":
        raise StoreError(f"{folder}: inv_adapter={c['inv_adapter']!r} does not run in AdapterHub either.")
    inverse = InvertibleConfig(
        activation=shared["activation"], reduction_factor=c["inv_adapter_reduction_factor"], undo=undo
    )
    return UnionConfig(parts=[config, inverse])


def _widths(factor: Any, width: int, there: list[Place]) -> dict[str, Any]:
    if not isinstance(factor, dict):
        return {"bottleneck_dim": width}
    # by the layers' names: AdapterHub counts through encoder and decoder
    return {"reduction_factor": {p.block: factor.get(str(p.index), factor.get("default")) for p in there}}


def _connection(c: dict[str, Any], post_norm: bool, folder: Path) -> str:
    scaled = c["scaling"] != 1.0 or c["use_gating"]
    if c["ln_after"] and (c["adapter_residual_before_ln"] or scaled):
        raise StoreError(f"{folder}: ln_after with a residual, a gate or a factor before it has no equal here.")
    if c["is_parallel"]:
        return "parallel"
    if not c["original_ln_before"] and c["residual_before_ln"] is True and c["original_ln_after"]:
        return "serial"
    if c["original_ln_before"] and c["residual_before_ln"] is True and c["original_ln_after"]:
        return "stream"
    if c["original_ln_before"] and c["residual_before_ln"] is False and not c["original_ln_after"]:
        return "after_norm" if post_norm else "stream"
    raise StoreError(f"{folder}: this combination of original_ln_* and residual_before_ln has no equal here.")


def _activation(name: str, folder: Path) -> str:
    found = {"leakyrelu": "leaky_relu", "swish": "silu"}.get(name.lower(), name.lower())
    if found not in ACT2FN:
        raise StoreError(f"{folder}: the activation {name!r} is not known here.")
    return found


def _width(tensors: dict[str, Tensor], key: str) -> int:
    ends = (".adapter_up.weight", ".adapter_up.W_left")
    found = next(t for n, t in tensors.items() if f"{key}." in f".{n}" and n.endswith(ends))
    return found.shape[1] if found.ndim == 2 else found.shape[0] * found.shape[1]


def _fusion_config(told: dict[str, Any], model: AdaptedModel, folder: Path) -> FusionConfig:
    c = told["config"]
    names = told.get("adapter_names") or str(told["name"]).split(",")
    plain = c["key"] and c["query"] and c["value_before_softmax"] and not c["residual_before"]
    if not plain or c["query_before_ln"]:
        raise StoreError(f"{folder}: this form of AdapterFusion has no equal here; see docs/adapterhub.md.")
    last: Any = model.adapters.get(names[-1])
    query = "stream" if getattr(last, "connection", "") == "stream" else "output"
    return FusionConfig(children=list(names), value=c["value"], query=query, dropout=c["dropout_prob"] or 0.0)


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
