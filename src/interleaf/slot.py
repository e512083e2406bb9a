"""A slot holds the adapters of one site and runs the active ones through hooks on the base's modules.

The slot is a child of the module it watches, so the base's own parameter names never change and taking
the slot away leaves no trace. Hooks run inside the block, hence also in gradient checkpointing's recompute.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from interleaf.adapter import Adapter
from interleaf.errors import SiteError
from interleaf.sites import Site

SLOT = "adapter_slot"


class Slot(nn.Module, BaseTunerLayer):
    """The adapters of one site, by name.

    Args:
        site: where it is.
        base: the model that the site is in.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, site: Site, base: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.site = site
        self._active_adapter: list[str] = []
        self._read: Tensor | None = None
        write, read = base.get_submodule(site.write), base.get_submodule(site.read)
        self._hooks = [
            read.register_forward_pre_hook(self._before, with_kwargs=True),
            write.register_forward_hook(self._after),
        ]
        write.add_module(SLOT, self)

    def add(self, name: str, adapter: Adapter, like: Tensor | None) -> None:
        """Put an adapter in, on the device and in the float type of a weight of the base."""
        if like is not None and adapter_is_real(adapter):
            dtype = like.dtype if like.dtype.is_floating_point and like.element_size() > 1 else None
            adapter.to(device=like.device, dtype=dtype)
        self.adapters[name] = adapter

    def remove(self, base: nn.Module) -> None:
        """Take the slot and its hooks off the base."""
        for hook in self._hooks:
            hook.remove()
        delattr(base.get_submodule(self.site.write), SLOT)

    @property
    def weight(self) -> Tensor:
        """None: PEFT's layers show the weight of a layer they wrap, a slot wraps nothing."""
        raise AttributeError("a slot has no weight")

    bias = weight

    def _running(self) -> list[Adapter]:
        if self._disable_adapters:
            return []
        return [self.adapters[n] for n in self.active_adapters if n in self.adapters]  # type: ignore[misc, union-attr]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self._running()
        if not running:
            return None
        place = _residual_place(args, kwargs, self.site)
        x: Tensor = kwargs[place] if isinstance(place, str) else args[place]
        changed = x
        for adapter in running:
            if adapter.before:
                changed = adapter(None, changed)
        if any(adapter.reads for adapter in running):
            self._read = changed
        if changed is x:
            return None
        if isinstance(place, str):
            return args, {**kwargs, place: changed}
        return (*args[:place], changed, *args[place + 1 :]), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = self._running()
        if not running:
            return None
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        for adapter in running:
            if not adapter.before:
                y = adapter(self._read if adapter.reads else None, y)
        self._read = None
        if isinstance(output, Tensor):
            return y
        return _with_first(output, y)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """PEFT calls this after it filled adapters made on the meta device; the base gives the device."""
        if device is not None and adapter_name in self.adapters:
            self.adapters[adapter_name].to(device)


def adapter_is_real(adapter: nn.Module) -> bool:
    """Tell whether an adapter's weights exist (PEFT makes them on the meta device before loading)."""
    return not any(p.device.type == "meta" for p in adapter.parameters())


def _with_first(output: Any, y: Tensor) -> Any:
    if isinstance(output, tuple):
        return (y, *output[1:])
    if isinstance(output, list):
        return [y, *output[1:]]
    first = next(iter(output))  # a ModelOutput: its first field is the hidden state
    output[first] = y
    return output


def _residual_place(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> int | str:
    """Find the argument that carries the residual stream: the first tensor of the model's width."""
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.shape[-1] == site.width:
            return i
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == site.width:
            return name
    raise SiteError(
        f"{site.read}: none of its inputs has the model's width {site.width}, so there is nothing to read. "
        "Use connection='serial' here, or name other modules with `target_modules`."
    )


def slots(model: nn.Module) -> list[Slot]:
    """Return every slot of a model."""
    return [m for m in model.modules() if isinstance(m, Slot)]
