"""The verbs of the field on a model: add, train, set, disable, delete, save, load, summarise adapters."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from interleaf.adapter import Adapter, AdapterConfig, as_config
from interleaf.compose import Stack, head_of, leaves, parse, trained_names, width
from interleaf.errors import AdapterError, BaseModelError
from interleaf.forward import Running, repeat, running_in
from interleaf.sites import layer_numbers
from interleaf.slot import Slot
from interleaf.tuner import AdapterTuner, remove_empty_slots, teach_trainer, training_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from interleaf.store import Adaptation
    from interleaf.summary import AdapterSummary

M = TypeVar("M", bound=nn.Module)


def adapt(model: M) -> M:
    """Give a Hugging Face model the adapter verbs; the model, its weights and its names stay the same.

    Returns:
        the same object, whose class is now a subclass of its own.

    Raises:
        BaseModelError: the model is no Hugging Face model, or is wrapped already.
    """
    from transformers import PreTrainedModel

    if isinstance(model, AdaptedModel):
        return model
    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(
            f"adapt() takes a Hugging Face model (a PreTrainedModel), not a {type(model).__name__}. "
            "For a PeftModel use its own verbs; for any nn.Module use peft's inject_adapter_in_model."
        )
    teach_trainer(AdaptedModel)
    cls: Any = type(model)
    model.__class__ = _adapted_class(cls)
    return model


@functools.cache
def _adapted_class(cls: Any) -> Any:
    # the same name and module: configs, checkpoints and error messages go on naming the real class
    body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_base_cls": cls}
    return type(cls.__name__, (AdaptedModel, cls), body)


def _rebuild(cls: Any) -> Any:
    adapted = _adapted_class(cls)
    return adapted.__new__(adapted)


class AdaptedModel:
    """The verbs, mixed into a model's class by `adapt`."""

    _base_cls: Any
    peft_config: dict[str, PeftConfig]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the subclass is made at run time: copies and pickles make it again from the real class
        return _rebuild, (self._base_cls,), self.__dict__

    @property
    def adapters(self) -> Mapping[str, PeftConfig]:
        """The configs of the model's adapters, by name."""
        return self.__dict__.get("peft_config", {})

    def add_adapter(self, name: Any, config: Any = "pfeiffer", **overrides: Any) -> None:
        """Add a fresh adapter, the identity so far, and make it the active one.

        Args:
            name: how to call it. (transformers' order, `add_adapter(config, name)`, works too.)
            config: a preset's name, an AdapterConfig, or any PEFT config.
            overrides: settings that differ from the preset's.

        Raises:
            AdapterError: the name is taken.
            ConfigError: an unknown preset or setting.
            SiteError: the config matches no layer.
        """
        if isinstance(name, PeftConfig):
            name, config = (config if config != "pfeiffer" else "default"), name
        if name in self.adapters:
            raise AdapterError(f"there is an adapter {name!r} already. Delete it first, or choose another name.")
        config = config if _foreign(config) else as_config(config, **overrides)
        config.base_model_name_or_path = self.__dict__.get("name_or_path") or None
        self._inject(config, name)
        self.set_adapter(name)

    def _inject(self, config: PeftConfig, name: str) -> None:
        before = dict(self.adapters)
        ran = leaves(self._running.node) if self._running is not None else []
        if not before:
            self.__dict__["_trained_before"] = [n for n, p in self._module.named_parameters() if p.requires_grad]
        self._hf_peft_config_loaded = True
        try:
            with warnings.catch_warnings():
                # PEFT warns of a second adapter; here that is what was asked for
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(config, self, name)
        except Exception:
            # the tuner writes its config down before it looks for sites
            self.__dict__["peft_config"] = before
            self._forget_if_empty()
            raise
        for one in ran:  # PEFT leaves those trainable that were active before
            for part in self.parts(one).values():
                part.requires_grad_(False)

    def train_adapter(self, setup: Any, within: Any = None) -> None:
        """Freeze everything but the named adapters and their task heads, and make them active.

        Args:
            setup: a name, or a composition: all its adapters train, but of a fusion only the fusion itself.
            within: the composition that runs, if it is more than `setup`: `train_adapter("task", "stack(lang, task)")`.

        Raises:
            AdapterError: an unknown name, or one that does not run.
        """
        node = self._setup(setup)
        self.set_adapter(node if within is None else within)
        trained = trained_names(node)
        if idle := [name for name in trained if name not in self.active_adapters()]:
            raise AdapterError(f"adapter {idle[0]!r} is to be trained but does not run in {within}.")
        for parameter in self._module.parameters():
            parameter.requires_grad = False
        for layer in self._adapter_layers():
            names = ("modules_to_save",) if isinstance(layer, AuxiliaryTrainingWrapper) else layer.adapter_layer_names
            for part in names:
                for name, weights in getattr(layer, part, {}).items():
                    weights.requires_grad_(name in trained)
        self._module.train()

    def set_adapter(self, setup: Any, skip_layers: str | list[int] | None = None) -> None:
        """Make adapters the active ones; None switches all off, as disable_adapters.

        Args:
            setup: a name, a list of names (one after the other), or a composition, also in its text form:
                `stack(a, b)`, `fuse`, `parallel`, `split`, `batch_split`, `average`.
            skip_layers: layers that run without adapters (AdapterDrop): first:n, last:n, or a list.

        Raises:
            AdapterError: an unknown name.
            ConfigError: no composition, or one that cannot run.
        """
        if setup is None:
            return self.disable_adapters()
        node = self._setup(setup)
        names = leaves(node)
        for layer in self._adapter_layers():
            layer._disable_adapters = False
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter(names)
                continue
            # one head for the whole batch; rows of several adapters get theirs in `forward.Running`
            head = head_of(node, layer.modules_to_save)
            layer.set_adapter([head] if head else [])
        if (running := self._running) is not None:
            running.activate(node, self._layers(skip_layers))
        return None

    def _setup(self, setup: Any) -> Any:
        """Read a setup and check every name and rule of it."""
        node = parse(setup) if isinstance(setup, str) else Stack(*setup) if isinstance(setup, list | tuple) else setup
        if isinstance(node, Stack) and len(node.children) == 1:
            node = node.children[0]
        names = leaves(node)
        for name in names:
            self._known(name)
        width(node)
        plain = isinstance(node, str) or (type(node) is Stack and names == list(node.children))
        if not plain and (foreign := [name for name in names if _foreign(self.adapters[name])]):
            raise AdapterError(
                f"{foreign[0]!r} is a method of PEFT's own: only as a part of a union can it run in {node}."
            )
        if not plain and (whole := [name for name in names if self.adapters[name].virtual_tokens]):
            raise AdapterError(f"{whole[0]!r} has virtual tokens, which take a whole batch: it stacks, but not {node}.")
        return node

    def _layers(self, layers: str | list[int] | None) -> frozenset[int]:
        running = self._running
        if layers is None or running is None:
            return frozenset()
        return frozenset(layer_numbers(layers, 1 + max(slot.site.layer for slot in running.slots)))

    @property
    def _running(self) -> Running | None:
        return running_in(self._module)

    def generate(self, *args: Any, adapter_names: list[Any] | None = None, **kwargs: Any) -> Any:
        """Generate as the model does; `adapter_names` gives each row its own adapter, `""` the base."""
        base: Any = super()
        running = self._running
        if running is None:
            if adapter_names is not None:
                raise AdapterError("adapter_names: the model has no adapters of this package.")
            return base.generate(*args, **kwargs)
        with running.generation(adapter_names):
            if (copies := running.copies()) > 1:
                args = tuple(repeat(a, copies) for a in args)
                kwargs = {k: repeat(v, copies) for k, v in kwargs.items()}
            return base.generate(*args, **kwargs)

    @contextlib.contextmanager
    def observe(self) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
        """Collect what adapters show of themselves inside a `with` block: gates, routers, fusion attentions.

        Yields:
            by (adapter, site): the quantities by name, of the last forward pass.
        """
        found: dict[tuple[str, str], dict[str, Any]] = {}
        watched: list[Adapter] = []
        for slot in [layer for layer in self._adapter_layers() if isinstance(layer, Slot)]:
            for name, adapter in cast("dict[str, Adapter]", slot.adapters).items():
                for part in (m for m in adapter.modules() if isinstance(m, Adapter)):
                    part.observed = found.setdefault((name, slot.place), {})
                    watched.append(part)
        try:
            yield found
        finally:
            for adapter in watched:
                adapter.observed = None
            for key in [key for key, seen in found.items() if not seen]:
                del found[key]

    def disable_adapters(self) -> None:
        """Switch all adapters off: the model is its base, bit for bit, until `enable_adapters`."""
        for layer in self._adapter_layers():
            layer.enable_adapters(False)

    def enable_adapters(self) -> None:
        """Switch the active adapters on again."""
        for layer in self._adapter_layers():
            layer.enable_adapters(True)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all adapters off inside a `with` block; what trained before trains again after it."""
        trained = {p: p.requires_grad for p in self._module.parameters()}
        states = [(layer, layer._disable_adapters) for layer in self._adapter_layers()]
        self.disable_adapters()
        try:
            yield
        finally:
            for layer, disabled in states:
                layer._disable_adapters = disabled
            for parameter, trains in trained.items():
                parameter.requires_grad = trains

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters, in the order they run."""
        layers = self._adapter_layers()
        if not layers or layers[0]._disable_adapters:
            return []
        running = self._running
        return leaves(running.node) if running is not None else list(layers[0].active_adapters)

    @property
    def active_setup(self) -> Any:
        """The composition that runs: a name, a `Composition`, or `""` for the base."""
        running = self._running
        return running.node if running is not None and self.active_adapters() else ""

    def delete_adapter(self, name: str | list[str]) -> None:
        """Delete adapters with their heads; with the last one the model is its base again.

        When none of the others was active, none is afterwards: `set_adapter` chooses one.

        Raises:
            AdapterError: an unknown name.
        """
        from peft.functional import delete_adapter

        for one in [name] if isinstance(name, str) else name:
            self._known(one)
            if users := [n for n, c in self.adapters.items() if one in getattr(c, "needs", [])]:
                raise AdapterError(f"adapter {users[0]!r} needs {one!r}. Delete {users[0]!r} first.")
            active = [a for a in self.active_adapters() if a != one]
            with warnings.catch_warnings():
                # PEFT makes some other adapter the active one, with a warning; below is which
                warnings.filterwarnings("ignore", ".* was active which is now deleted")
                delete_adapter(self, adapter_name=one, prefix=AdapterTuner.prefix)
            del self.peft_config[one]
            remove_empty_slots(self._module)
            self.set_adapter(active or None)
        self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        if not self.adapters:
            self.__dict__.pop("peft_config", None)
            self._hf_peft_config_loaded = False
            for name in self.__dict__.pop("_trained_before", []):
                self._module.get_parameter(name).requires_grad = True

    def save_adapter(self, path: str | Path, name: str, run: Adaptation | None = None, **options: Any) -> Path:
        """Write one adapter and its head to a folder of its own; see `store.save`."""
        from interleaf import store

        self._known(name)
        return store.save(self, path, name, run, **options)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write what transformers writes; where several adapters run, the one that trains.

        Raises:
            AdapterError: several run, and not just one of them trains.
        """
        if len(self.active_adapters()) < 2:
            cast("PreTrainedModel", super()).save_pretrained(save_directory, **options)
        else:  # transformers refuses
            self.save_adapter(save_directory, training_adapter(self), overwrite=True)

    def load_adapter(self, path: str | Path, name: str | None = None, **options: Any) -> str:
        """Read an adapter from a folder or the hub; an adapter of that name gets its weights; see `store.load`."""
        from interleaf import store

        return store.load(self, path, name or options.pop("adapter_name", None), **options)

    def merge_adapters(self, name: str, weights: Mapping[str, float], method: str = "linear", **options: Any) -> None:
        """Make a new adapter of the weighted sum of others, by task arithmetic; see `merge.merge`."""
        from interleaf.merge import merge

        merge(self, name, weights, method, **options)

    def adapter_summary(self) -> list[AdapterSummary]:
        """Describe every adapter of the model: kind, sites, parameters, bytes."""
        from interleaf.summary import summarise

        return summarise(self)

    @property
    def _module(self) -> PreTrainedModel:
        return self

    def _adapter_layers(self) -> list[Any]:
        return list(self._named_layers().values())

    def _named_layers(self) -> dict[str, Any]:
        """Return slots and head wrappers, and PEFT's own layers; looked for again only when some came or went."""
        running = self._running
        if running is None or any(_foreign(config) for config in self.adapters.values()):
            return self._found_layers()
        key = (running, running.version)
        kept = self.__dict__.get("_layers_of")
        if kept is None or kept[0] != key:
            kept = self.__dict__["_layers_of"] = (key, self._found_layers())
        layers: dict[str, Any] = kept[1]
        return layers

    def _found_layers(self) -> dict[str, Any]:
        kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
        return {name: module for name, module in self._module.named_modules() if isinstance(module, kinds)}

    def parts(self, name: str) -> dict[str, nn.Module]:
        """Return the modules that are one adapter's: what is in the slots and its head, by their names in files."""
        found: dict[str, nn.Module] = {}
        for place, layer in self._named_layers().items():
            if isinstance(layer, Slot) and name in layer.adapters:
                found[f"{place}.adapters"] = layer.adapters[name]
            elif isinstance(layer, AuxiliaryTrainingWrapper) and name in layer.modules_to_save:
                found[place] = layer.modules_to_save[name]
        return found

    def _known(self, name: str) -> PeftConfig:
        if name not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise AdapterError(f"there is no adapter {name!r} on this model. There are: {there}.")
        return self.adapters[name]


def _foreign(config: Any) -> bool:
    return isinstance(config, PeftConfig) and not isinstance(config, AdapterConfig)


def adapter_tensors(model: Any, name: str) -> dict[str, Any]:
    """Return one adapter's tensors, head included, under PEFT's names for files."""
    if _foreign(model.adapters[name]):
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    else:  # the same without a look at the whole model
        tensors = {f"{at}.{k}": v for at, part in model.parts(name).items() for k, v in part.state_dict().items()}
    return {k if k.startswith("base_model.model.") else f"base_model.model.{k}": v for k, v in tensors.items()}
