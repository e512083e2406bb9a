"""A slot holds the adapters of one site and runs the active ones through hooks on the base's modules.

The slot is a child of the module it watches, so the base's own parameter names never change and taking
the slot away leaves no trace. Hooks run inside the block, hence also in gradient checkpointing's recompute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from interleaf.adapter import Adapter, Around
from interleaf.compose import Stack, backwards, expand, leaves, prune
from interleaf.errors import SiteError
from interleaf.forward import Running
from interleaf.interpret import run
from interleaf.sites import Site

SLOT = "adapter_slot"
MAP = "map"  # holds the slot of what belongs to one linear map (LoRA): it runs before the module's other slot
_NOTHING = object()  # no composition has been planned for


class Slot(nn.Module, BaseTunerLayer):
    """The adapters of one site, by name.

    Args:
        site: where it is.
        base: the model that the site is in.
        running: what all slots of the model share.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, site: Site, base: nn.Module, running: Running) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.site = site
        self.running = running
        self._active_adapter: list[str] = []
        self._read: Tensor | None = None
        self._entered = False
        self._planned: Any = _NOTHING
        self._before_plan: Any = ""
        self._after_plan: Any = ""
        self._around: list[Around] = []
        self._reads = False
        write, read = base.get_submodule(site.write), base.get_submodule(site.read)
        self._hooks = [
            read.register_forward_pre_hook(self.enter, with_kwargs=True),
            write.register_forward_hook(self.leave, prepend=site.map_width > 0),
        ]
        running.slots.append(self)
        running.version += 1
        if site.map_width:
            write.add_module(MAP, nn.Module())
        _holder(base, site).add_module(SLOT, self)

    def join(self, site: Site, base: nn.Module, adapter: Adapter) -> None:
        """Read for an adapter that joins where no other reads, and remember the norm that it names."""
        read = site.read if adapter.watches_input else self.site.read
        if read != self.site.read:
            self._hooks[0].remove()
            self._hooks[0] = base.get_submodule(read).register_forward_pre_hook(self.enter, with_kwargs=True)
        self.site = replace(self.site, read=read, norm=self.site.norm or site.norm)

    def add(self, name: str, adapter: Adapter, like: Tensor | None) -> None:
        """Put an adapter in, on the device and in the float type of a weight of the base."""
        if like is not None and adapter_is_real(adapter):
            dtype = like.dtype if like.dtype.is_floating_point and like.element_size() > 1 else None
            adapter.to(device=like.device, dtype=dtype)
        adapter.requires_grad_(name in self._active_adapter)
        self.adapters[name] = adapter
        self.replan()

    def remove(self, base: nn.Module) -> None:
        """Take the slot and its hooks off the base."""
        for hook in self._hooks:
            hook.remove()
        self.running.slots.remove(self)
        self.running.version += 1
        delattr(base.get_submodule(self.site.write), MAP if self.site.map_width else SLOT)

    @property
    def place(self) -> str:
        """The name of the module the slot is a child of."""
        return f"{self.site.write}.{MAP}" if self.site.map_width else self.site.write

    @property
    def weight(self) -> Tensor:
        """None: PEFT's layers show the weight of a layer they wrap, a slot wraps nothing."""
        raise AttributeError("a slot has no weight")

    bias = weight

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, one after the other; PEFT's verb."""
        names: list[str] = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in {*self._active_adapter, *names} & self.adapters.keys():  # the others are frozen already
            self.adapters[name].requires_grad_(name in names and not inference_mode)
        self._active_adapter = names
        self.running.activate(names[0] if len(names) == 1 else Stack(*names) if names else "")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this site; PEFT's verb."""
        super().delete_adapter(adapter_name)
        self.replan()

    def replan(self) -> None:
        """Work the plan out anew when next it is needed."""
        self._planned = _NOTHING

    def _plan(self) -> None:
        """Work out once for each composition what of it runs at this site, before and after the layer."""
        node = self._planned = self.running.current
        if self.site.layer in self.running.skip_layers:
            node = ""
        node = expand(node, {n: a.composition for n, a in self._named(node).items() if a.composition is not None})
        if self.site.position == "unembedding":
            node = backwards(node)  # what was done last is undone first
        kinds = self._named(node)
        self._around = [kinds[n] for n in leaves(node) if isinstance(kinds.get(n), Around)]
        kinds = {n: a for n, a in kinds.items() if not isinstance(a, Around)}
        self._before_plan = prune(node, lambda n: n in kinds and kinds[n].before)
        self._after_plan = prune(node, lambda n: n in kinds and not kinds[n].before)
        self._reads = any(kinds[n].reads for n in leaves(self._after_plan))

    def _named(self, node: Any) -> dict[str, Any]:
        """Return the adapters of this site that a composition names."""
        return {name: self.adapters[name] for name in leaves(node) if name in self.adapters}

    @property
    def idle(self) -> bool:
        """Whether nothing runs here now."""
        if self._disable_adapters:
            return True
        if self.running.current is not self._planned:
            self._plan()
        return not (self._before_plan or self._after_plan or self._around)

    def around(self) -> list[Around]:
        """Return what changes the call of the slot's module now, in the order it does."""
        return [] if self.idle else self._around

    def forward(self, x: Tensor) -> Tensor:
        """Pass on what is given: where a slot is a child of an `nn.Sequential`, it is called in turn."""
        return x

    def _run(self, plan: Any, x: Tensor | None, y: Tensor) -> Tensor:
        if y.shape[-1] != self.site.width:
            return self._run_streams(plan, x, y)
        if x is not None and x.shape != y.shape and x.numel() == y.numel():
            x = x.reshape(y.shape)  # experts flatten the batch
        if isinstance(plan, str):
            adapter: Adapter = self.adapters[plan]  # type: ignore[assignment]
            if adapter.tokens == "all":
                changed: Tensor = adapter(x, y)
                return changed
        return run(plan, self.adapters, x, y, self.running.places[self.site.stack])  # type: ignore[arg-type]

    def _run_streams(self, plan: Any, x: Tensor | None, y: Tensor) -> Tensor:
        """Hyper-connections carry several residual streams side by side: each passes the adapter.

        Raises:
            SiteError: a width that is no multiple of the model's.
        """
        width = self.site.width
        if y.shape[-1] % width:
            raise SiteError(f"{self.site.write} is {y.shape[-1]} wide, the model {width}: choose other positions.")
        streams = y.unflatten(-1, (-1, width))
        x = x.unflatten(-1, (-1, width)) if x is not None and x.shape == y.shape else x
        return self._run(plan, x, streams).flatten(-2)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the module that the site reads: return its changed arguments, or None."""
        if self.idle:
            return None
        self._entered = bool(self._after_plan)
        if not (self._before_plan or self._reads or self._around):
            return None
        for adapter in self._around:
            args, kwargs = adapter.enter(module, args, kwargs)
            self.running.places[self.site.stack].lengthened |= adapter.lengthens
        if not (self._before_plan or self._reads):
            return args, kwargs
        place = _residual_place(args, kwargs, self.site)
        x: Tensor = kwargs[place] if isinstance(place, str) else args[place]
        changed = self._run(self._before_plan, None, x) if self._before_plan else x
        if self._reads:
            self._read = changed
        if changed is x:
            return (args, kwargs) if self._around else None
        if isinstance(place, str):
            return args, {**kwargs, place: changed}
        return (*args[:place], changed, *args[place + 1 :]), kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook behind the module that the site writes: return its changed output, or None."""
        if self.idle:
            return None
        self._entered = False
        for adapter in reversed(self._around):
            output = adapter.leave(module, output)
        if not self._after_plan:
            return output if self._around else None
        y = state_of(output)
        x = self._read
        if x is not None and x.numel() * self.site.width != y.numel() * (self.site.map_width or self.site.width):
            return None  # this module also writes something else (global tokens); `settle` sees to the rest
        y = self._run(self._after_plan, x, y)
        self._read = None
        if isinstance(output, Tensor):
            return y
        return with_first(output, y)

    def begin(self) -> None:
        """Forget a forward pass that was broken off."""
        self._read, self._entered = None, False

    def settle(self) -> None:
        """Check, at the end of a forward pass, that the adapters ran and that what was read was used.

        Raises:
            SiteError: the site was never called, or wrote nothing of the shape of what it read.
        """
        if self._entered:
            raise SiteError(
                f"{self.site.write} is never called by {self.site.read}, which uses its weight in another way: "
                "an adapter there would do nothing. Use other positions, or name modules with `target_modules`."
            )
        if self._read is None:
            return
        shape, self._read = tuple(self._read.shape), None
        raise SiteError(
            f"{self.site.write} writes nothing of the shape {shape} that {self.site.read} reads: "
            "a parallel adapter cannot sit there. Use connection='serial', or other positions."
        )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """PEFT calls this after it filled adapters made on the meta device; the base gives the device."""
        if device is not None and adapter_name in self.adapters:
            self.adapters[adapter_name].to(device)


def adapter_is_real(adapter: nn.Module) -> bool:
    """Tell whether an adapter's weights exist (PEFT makes them on the meta device before loading)."""
    return not any(p.device.type == "meta" for p in adapter.parameters())


def state_of(output: Any) -> Tensor:
    """Return a module's hidden state: its output, or the first of its outputs."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


def with_first(output: Any, y: Tensor) -> Any:
    """Return a module's output with another hidden state."""
    if isinstance(output, tuple):
        return type(output)(y, *output[1:]) if hasattr(output, "_fields") else (y, *output[1:])
    if isinstance(output, list):
        return [y, *output[1:]]
    output[next(iter(output))] = y  # a ModelOutput: its first field is the hidden state
    return output


def _residual_place(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> int | str:
    """Find the argument that carries the residual stream: the first as wide as the model, or as several streams."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    expected = site.map_width or site.width
    wide = [(k, v.shape[-1]) for k, v in given if isinstance(v, torch.Tensor) and v.ndim > 1 and v.is_floating_point()]
    for place, size in wide:
        if size == expected:
            return place
    for place, size in wide:
        if size % expected == 0:
            return place
    raise SiteError(
        f"{site.read}: none of its inputs has the model's width {expected}, so there is nothing to read. "
        "Use connection='serial' here, or name other modules with `target_modules`."
    )


def slot_in(model: nn.Module, site: Site) -> Slot | None:
    """Return the slot at a site, if there is one."""
    slot: Slot | None = getattr(_holder(model, site), SLOT, None)
    return slot


def _holder(model: nn.Module, site: Site) -> Any:
    module: Any = model.get_submodule(site.write)
    return getattr(module, MAP, None) if site.map_width else module


def slots(model: nn.Module) -> list[Slot]:
    """Return every slot of a model."""
    return [m for m in model.modules() if isinstance(m, Slot)]
