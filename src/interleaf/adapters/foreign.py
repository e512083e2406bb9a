"""PEFT's own methods on linear maps as parts of a union: LoRA, (IA)3, LoHa, LoKr and their kin, held by slots.

PEFT injects them into a skeleton of the model whose linear maps are stand-ins: its own matching of names and its own
layers are used, and the model itself stays as it is.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interleaf.adapter import Adapter
from interleaf.errors import ConfigError, SiteError
from interleaf.sites import Site, named_sites
from interleaf.slot import SLOT
from interleaf.tuner import plain_method

PART = "part"  # PEFT's layers name their adapters too; in a slot there is one

# settings with which a method changes more than what the maps give
_BEYOND: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


def make_maps(config: PeftConfig, model: Any) -> list[tuple[Site, Adapter]]:
    """Make a PEFT method's adapters for every linear map it targets.

    Raises:
        ConfigError: a setting that changes the base or more than linear maps, or a method PEFT cannot inject.
        SiteError: no linear map matches.
    """
    kind, method = config.peft_type.value, plain_method(config)
    if method is None:
        raise ConfigError(f"union: {kind} cannot be a part: it does more than its layers do.")
    choices = getattr(method, "target_module_mapping", None)
    if choices is not None and getattr(config, "target_modules", "") is None:
        # PEFT's choice for this model, written down as PEFT does
        config.target_modules = choices.get(model.config.model_type, "all-linear")
    config = copy.deepcopy(config)
    for name, fine in _BEYOND.items():
        value = getattr(config, name, fine[0])
        if value not in fine and value != []:
            raise ConfigError(
                f"union: {kind} with {name}={value!r} cannot be a part, as it changes more than the maps."
            )
    bare = skeleton(model)
    if getattr(config, "target_modules", None) == "all-linear":
        config.target_modules = _inside(bare, model)
        if hasattr(config, "feedforward_modules"):
            config.feedforward_modules = config.feedforward_modules or []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT puts it right for GPT-2's maps
            inject_adapter_in_model(config, bare, PART)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise SiteError(f"union: {kind} finds no place in {type(model).__name__}: {error}") from error
    layers = [(n, m) for n, m in bare.named_modules() if isinstance(getattr(m, "base_layer", None), StandIn)]
    if not layers:
        raise SiteError(f"union: {kind} matches no linear map of {type(model).__name__}.")
    sites = named_sites(model, {name: layer.base_layer.shape() for name, layer in layers})
    return [(site, PeftLayer(layer)) for site, (_, layer) in zip(sites, layers, strict=True)]


def _inside(bare: nn.Module, model: nn.Module) -> list[str]:
    """Name the linear maps inside the layers: what PEFT calls all-linear, without any head."""
    shapes = {name: m.shape() for name, m in bare.named_modules() if isinstance(m, StandIn)}
    return [site.write for site in named_sites(model, shapes) if site.layer >= 0]


def skeleton(model: Any) -> Any:
    """Return a bare tree with a stand-in for every linear map of a model, under the same names."""
    root: Any = nn.Module()
    root.config = model.config
    root.hf_device_map = {}  # PEFT would look at a parameter, and here is none
    for name, module in model.named_modules():
        cls = next((cls for real, cls in _STAND_INS.items() if isinstance(module, real)), None)
        if cls is None or SLOT in name:
            continue
        *path, last = name.removesuffix(".base_layer").split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if not isinstance(parent, StandIn):  # a part of a PEFT layer that is on the model
            parent.add_module(last, cls(module))
    return root


class StandIn(nn.Module):
    """Stands where a linear map is: of the same class and with its weights, but they stay that one's own.

    Args:
        real: the linear map.
    """

    def __init__(self, real: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__["real"] = real  # past nn.Module: not a child
        for name in ("in_features", "out_features", "nf", "nx"):
            if hasattr(real, name):
                setattr(self, name, getattr(real, name))

    @property
    def weight(self) -> Any:
        """The map's weight."""
        return self.__dict__["real"].weight

    @property
    def bias(self) -> Any:
        """The map's bias."""
        return self.__dict__["real"].bias

    def shape(self) -> tuple[int, int]:
        """Return the widths of what the map writes and reads."""
        known = self.__dict__
        return (known["nf"], known["nx"]) if "nf" in known else (known["out_features"], known["in_features"])

    def forward(self, z: Tensor, given: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return what the map gives for `z`.

        Args:
            z: what PEFT's layer gives the map, shape [B, T, in].
            given: what the map was given already, shape [B, T, in].
            y: what came of it, other adapters' changes included, shape [B, T, out]; for another `z` the map's own
                difference is added.
        """
        run = self.__dict__["real"].forward  # past the hooks of the site
        if given is None or y is None:
            result: Tensor = run(z)
            return result
        # a copy: some of PEFT's layers add in place
        return y.clone() if z is given else y + (run(z) - run(given))


class _Linear(StandIn, nn.Linear):  # type: ignore[override]
    pass


class _Conv1D(StandIn, Conv1D):
    pass


_STAND_INS: dict[type[nn.Module], type[StandIn]] = {nn.Linear: _Linear, Conv1D: _Conv1D}


class PeftLayer(Adapter):
    """A PEFT layer as an adapter: `y' = layer(x)`, with `y` in the place of what its linear map gives.

    Args:
        layer: PEFT's layer around a stand-in.
    """

    reads = True

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # past nn.Module: PEFT's verbs would switch it by a name that is not its own; its parts are children here
        self.__dict__["layer"] = layer
        for name, child in layer.named_children():
            if name != "base_layer":
                self.add_module(name, child)

    def train(self, mode: bool = True) -> PeftLayer:
        """Set the mode of PEFT's layer too."""
        self.__dict__["layer"].training = mode
        super().train(mode)
        return self

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        result: Tensor = self.__dict__["layer"](x, given=x, y=y)
        return result.to(y.dtype)


__all__ = ["PeftLayer", "StandIn", "make_maps", "skeleton"]
