"""Writing adapters as AdapterHub's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from interleaf.adapterhub.disk import CONFIG, FUSION, VERSION, WEIGHTS
from interleaf.adapterhub.heads import write_head
from interleaf.adapterhub.options import DEFAULTS, their_activation, undone
from interleaf.adapterhub.places import FLAGS, Place, fusion_query, named_weights, places
from interleaf.adapters import BottleneckConfig, CompacterConfig, FusionConfig, InvertibleConfig, UnionConfig
from interleaf.errors import StoreError
from interleaf.files import new_folder
from interleaf.sites import find_sites
from interleaf.slot import slots

if TYPE_CHECKING:
    from interleaf.model import AdaptedModel


def save(model: AdaptedModel, path: str | Path, name: str, *, with_head: bool = False, overwrite: bool = False) -> Path:
    """Write one adapter of a model as AdapterHub's files, for `adapters` to load with `use_safetensors=True`.

    Args:
        model: what it is on.
        path: the folder to make.
        name: the adapter.
        with_head: also write its own task head.
        overwrite: whether it may take the place of another folder.

    Raises:
        StoreError: an adapter that AdapterHub has no equal for, or a folder in the way.
    """
    base: Any = model._module
    there = places(base)
    fusion = isinstance(model.adapters[name], FusionConfig)
    told: dict[str, Any] = {
        "config": _fusion_settings(model, name) if fusion else _settings(model, name, there),
        "hidden_size": find_sites(base)[0].width,
        "model_class": _class_name(model, name),
        "model_name": model.adapters[name].base_model_name_or_path,
        "model_type": base.config.model_type,
        "name": name,
        "version": VERSION,
    }
    if fusion:
        told["adapter_names"] = list(model.adapters[name].children)
    weights = {k: p.detach().cpu().contiguous().clone() for k, p in named_weights(base, name, name, there)}
    weights |= {k.replace(".adapter_norm_before.", ".adapter_down.0."): t for k, t in _doubled(weights)}
    prefix = "" if base.base_model is base or base.config.model_type == "t5" else f"{base.base_model_prefix}."
    config = FUSION if fusion else CONFIG
    with new_folder(path, overwrite) as folder:
        save_file({prefix + key: tensor for key, tensor in weights.items()}, folder / WEIGHTS[config][0])
        (folder / config).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        if with_head:
            write_head(base, name, folder)
    return Path(path)


def _class_name(model: AdaptedModel, name: str) -> str:
    """Name AdapterHub's class that runs the adapter as it runs here: some undo an invertible one, some do not."""
    base: Any = model._module
    own = type(base).__name__
    parts = getattr(model.adapters[name], "parts", [])
    inverse = next((p for p in parts if isinstance(p, InvertibleConfig)), None)
    if inverse is None or not inverse.undo or undone(own, base):
        return own
    return str(type(base.config).__name__.replace("Config", "AdapterModel"))


def _doubled(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(key, tensor.clone()) for key, tensor in weights.items() if ".adapter_norm_before." in key]


def _settings(model: AdaptedModel, name: str, there: list[Place]) -> dict[str, Any]:
    config: Any = model.adapters[name]
    parts = config.parts if isinstance(config, UnionConfig) else [config]
    main = next((p for p in parts if isinstance(p, BottleneckConfig | CompacterConfig)), None)
    inverse = next((p for p in parts if isinstance(p, InvertibleConfig)), None)
    if main is None or len(parts) > 1 + (inverse is not None) or (inverse and inverse.coupling != "additive"):
        raise StoreError(f"{name!r}: AdapterHub has no equal for a {type(config).__name__}.")
    compacter = isinstance(main, CompacterConfig)
    connection = _hub_connection(model._module, main, name, there)
    used = {slot.site.write for slot in slots(model._module) if name in slot.adapters}
    here = [p for p in there if p.write in used or p.norm in used]
    flags = {flag: any(p.flag == flag for p in here) for flag in FLAGS.values()}
    left_out = sorted({p.index for p in there} - {p.index for p in here})
    partly = [p for p in there if flags[p.flag] and p.index not in left_out and p not in here]
    if partly:
        raise StoreError(f"{name!r}: AdapterHub leaves out whole layers only, not {partly[0].write}.")
    sizes = _sizes(model._module, name, here)
    width = next(iter(sizes.values()))
    stream = connection in ("stream", "after_norm")
    settings = {
        **DEFAULTS,
        **flags,
        "dropout": getattr(main, "dropout", 0.0),
        # AdapterHub cannot make a Compacter with the other
        "init_weights": "bert" if compacter else "mam_adapter",
        "inv_adapter": "nice" if inverse else None,
        "inv_adapter_reduction_factor": inverse.reduction_factor if inverse else None,
        "is_parallel": connection == "parallel",
        "leave_out": left_out,
        "ln_after": getattr(main, "norm_after", False),
        "ln_before": getattr(main, "norm_before", False),
        "non_linearity": their_activation(main.activation),
        "original_ln_after": connection != "after_norm",
        "original_ln_before": stream,
        "phm_dim": getattr(main, "phm_dim", 4),
        "phm_layer": compacter,
        "phm_rank": getattr(main, "phm_rank", 1),
        "reduction_factor": width[0] / width[1],
        "residual_before_ln": connection != "after_norm",
        "scaling": getattr(main, "scaling", 1.0),
        "stochastic_depth": getattr(main, "stochastic_depth", 0.0),
        "use_gating": bool(getattr(main, "gate", False)),
    }
    if len(set(sizes.values())) > 1:
        settings["reduction_factor"] = {str(i): d / r for i, (d, r) in sizes.items()}
    return settings


def _sizes(base: nn.Module, name: str, here: list[Place]) -> dict[int, tuple[int, int]]:
    """Return the widths of model and bottleneck of each layer."""
    layers = {p.write: p.index for p in here} | {p.norm: p.index for p in here if p.norm}
    found: dict[int, tuple[int, int]] = {}
    for slot in slots(base):
        if name in slot.adapters and slot.site.write in layers:
            adapter: Any = slot.adapters[name]
            compacter = type(adapter).__name__ == "Compacter"
            size = (adapter.up.bias.shape[0], adapter.down.bias.shape[0]) if compacter else adapter.up.weight.shape
            layer = layers[slot.site.write]
            if found.setdefault(layer, size) != size:
                raise StoreError(f"{name!r}: AdapterHub has one width a layer; layer {layer} has several here.")
    return found


def _hub_connection(base: nn.Module, config: Any, name: str, there: list[Place]) -> str:
    """Tell AdapterHub's placement of a bottleneck.

    Raises:
        StoreError: it has none.
    """
    odd = {"tokens": config.tokens != "all"}
    if isinstance(config, BottleneckConfig):
        odd |= {"down_dim": bool(config.down_dim)}
        odd |= {f"residual={config.residual}": config.residual not in (None, config.connection == "serial")}
        odd |= {"gate for each token": config.gate is True}
        odd |= {"norm_after with a factor or a gate": config.norm_after and (config.scaling != 1.0 or config.gate)}
    if wrong := [what for what, is_set in odd.items() if is_set]:
        raise StoreError(f"{name!r}: AdapterHub has no {wrong[0]}.")
    there_by_write = {p.write: p for p in there}
    sites = [slot.site for slot in slots(base) if name in slot.adapters and slot.site.position != "unembedding"]
    sites = [site for site in sites if site.position != "embedding"]
    if config.connection == "serial" and all(site.write in {p.norm for p in there if p.norm} for site in sites):
        return "after_norm"
    if config.connection == "serial" and all(site.write in there_by_write for site in sites):
        return "serial"
    beside = config.connection in ("parallel", "stream")
    if beside and all(site.write in there_by_write and site.read == there_by_write[site.write].read for site in sites):
        return str(config.connection)
    raise StoreError(f"{name!r}: AdapterHub has no place for connection={config.connection!r} at {sites[0].write}.")


def _fusion_settings(model: AdaptedModel, name: str) -> dict[str, Any]:
    config: Any = model.adapters[name]
    if config.query != fusion_query([model.adapters.get(child) for child in config.children]):
        raise StoreError(f"{name!r}: AdapterHub has no fusion of these adapters with query={config.query!r}.")
    if config.temperature != 1.0:
        raise StoreError(f"{name!r}: AdapterHub does not keep a fusion's temperature.")
    return {
        "dropout_prob": config.dropout or None,
        "key": True,
        "query": True,
        "query_before_ln": False,
        "regularization": bool(config.regularization),
        "residual_before": False,
        "temperature": False,
        "value": config.value,
        "value_before_softmax": True,
        "value_initialized": config.value,
    }
