"""The only contact with PEFT's and transformers' internals: adapters as a genuine PEFT method.

Written for peft 0.21 and transformers 5; `tests/test_tuner.py` fails loudly when they change.
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, register_peft_method
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn

from interleaf.adapter import Adapter, AdapterConfig, Around
from interleaf.compose import Fuse
from interleaf.errors import AdapterError, SiteError
from interleaf.forward import Running, running_in
from interleaf.sites import Site, stack_names
from interleaf.slot import SLOT, Slot, slot_in, slots


def register_kind(name: str, config_cls: type[AdapterConfig]) -> PeftType:
    """Make a PEFT method of an adapter kind; returns its new PeftType.

    PEFT refuses names outside its enum, and enums refuse new members, so one is put in by hand.
    """
    member = name.upper()
    if member not in PeftType.__members__:
        new = str.__new__(PeftType, member)
        new._name_, new._value_ = member, member
        PeftType._member_names_.append(member)
        PeftType._member_map_[member] = new
        PeftType._value2member_map_[member] = new
    tuner = type(f"{name.title()}Tuner", (AdapterTuner,), {})
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner, prefix=AdapterTuner.prefix)
    return PeftType[member]


class AdapterTuner(BaseTuner):
    """Puts adapters of any kind into a model's slots."""

    # transformers' loader puts an adapter's name behind this part of a key
    prefix = f"{SLOT}.adapters"
    tuner_layer_cls = Slot
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter at every site of its config. All that can fail is checked before a change is made.

        Raises:
            SiteError: the config matches no site.
            AdapterError: a name that cannot be part of a parameter's name.
        """
        config = self.peft_config[adapter_name]
        if "." in adapter_name or not adapter_name:
            raise AdapterError(f"the adapter name {adapter_name!r} is empty or has a dot. Choose another.")
        if missing := [name for name in config.needs if not isinstance(self.peft_config.get(name), AdapterConfig)]:
            raise AdapterError(f"{adapter_name!r} needs the adapter {missing[0]!r}: add or load it first.")
        context = init_empty_weights if low_cpu_mem_usage else contextlib.nullcontext
        with context():
            made = config.make(model, lambda site: adapters_at(model, site))
        for _, adapter in made:
            adapter.train(model.training)
            if adapter.composition is not None:
                adapter.composition = Fuse(*adapter.composition.children, name=adapter_name)
        for site, adapter in made:
            check_reader(model, site, adapter)
        running = running_of(model)
        if config.modules_to_save is None:
            config.modules_to_save = task_head(model) or None
        first, kept = not running.slots, _training(running)
        for site, adapter in made:
            slot_at(model, site, running, adapter).add(adapter_name, adapter, nearest_weight(model, site))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if first:
            self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model, config, self.get_model_config(self), adapter_name, adapter_name in self.active_adapters
        )
        for wrapper in model.modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                running.watch_head(wrapper)
        for parameter, trains in kept.items():
            parameter.requires_grad = trains
        if getattr(model, "_hf_peft_config_loaded", False):
            from interleaf.model import adapt

            adapt(model)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters are put into slots by inject_adapter; no module is replaced")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and its slots where it was the last."""
        super().delete_adapter(adapter_name)
        remove_empty_slots(self.model)

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base as it was."""
        strip(self.model)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: a bottleneck has a non-linearity, so it cannot become part of a weight matrix.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            "bottleneck adapters cannot be merged into the base: they are not linear. "
            "Keep them attached, or take them off with `unload()`."
        )

    merge_adapter = merge_and_unload

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # by its place in the slot: PEFT's own rule takes the name for a parameter's when it is followed by two parts
        return key.replace(f"{SLOT}.adapters.{adapter_name}.", f"{SLOT}.adapters.")

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's entry for `adapter_names`, in forward and in generate
        with running_of(self.model).generation(kwargs.get("adapter_names")):
            yield


def _training(running: Running) -> dict[Tensor, bool]:
    """Note what of the active adapters and of the heads trains."""
    parts: list[Any] = [slot.adapters[n] for slot in running.slots for n in slot._active_adapter if n in slot.adapters]
    parts += running.heads
    return {p: p.requires_grad for part in parts for p in part.parameters()} if running.slots else {}


def running_of(model: nn.Module) -> Running:
    """Return what the slots of a model share, made if there is none yet."""
    return running_in(model) or Running(model)


def slot_at(model: nn.Module, site: Site, running: Running, adapter: Adapter) -> Slot:
    """Return the slot at a site that an adapter joins, made if there is none yet."""
    existing = slot_in(model, site)
    if existing is None:
        if site.stack not in running.places:
            running.watch(model, site.stack, stack_names(model))
        return Slot(site, model, running)
    existing.join(site, model, adapter)
    return existing


def check_reader(model: nn.Module, site: Site, adapter: Adapter) -> None:
    """Check that an adapter can join those at a site: all that read there read the same.

    Raises:
        AdapterError: they do not.
    """
    existing = slot_in(model, site)
    if existing is None or existing.site.read == site.read or not adapter.watches_input:
        return
    if any(other.watches_input for other in existing.adapters.values()):
        raise AdapterError(
            f"{site.write} carries an adapter that reads {existing.site.read}, the new one reads {site.read}. "
            "Use the same positions or target_modules for both."
        )


def adapters_at(model: nn.Module, site: Site) -> dict[str, Any]:
    """Return the adapters that are at a site, by name."""
    slot = slot_in(model, site)
    return {} if slot is None else dict(slot.adapters.items())


def nearest_weight(model: nn.Module, site: Site) -> Tensor | None:
    """Return a weight of the base near a site: its device and float type are the adapter's."""
    for name in (site.write, site.read, site.write.rpartition(".")[0], ""):
        for key, parameter in model.get_submodule(name).named_parameters():
            if SLOT not in key and parameter.is_floating_point():
                return parameter
    return None


def task_head(model: Any) -> list[str]:
    """Name the modules of a model's task head: what stands outside the pretrained trunk.

    A language-model head is pretrained, so it is no task head.
    """
    trunk = getattr(model, "base_model", None)
    if trunk is None or trunk is model or not hasattr(model, "get_output_embeddings"):
        return []
    lm_head = model.get_output_embeddings()
    return [
        name
        for name, child in model.named_children()
        if child is not trunk
        and any(True for _ in child.parameters())
        and not (lm_head is not None and any(m is lm_head for m in child.modules()))
    ]


def remove_empty_slots(model: nn.Module) -> None:
    """Take off the slots and head wrappers that hold no adapter any more."""
    held = slots(model)
    for slot in held:
        if len(slot.adapters) == 0:
            slot.remove(model)
    if held and not held[0].running.slots:
        held[0].running.remove()
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and not getattr(module, "modules_to_save", None):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)


def strip(model: nn.Module) -> None:
    """Take every slot and every head wrapper off, whatever they hold."""
    for slot in slots(model):
        slot.adapters.clear()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "modules_to_save"):
            module.modules_to_save.clear()
    remove_empty_slots(model)
    model.__dict__.pop("peft_config", None)


def plain_method(config: PeftConfig) -> Any:
    """Return PEFT's tuner class of a config, or None if it does more in a forward pass than its layers do."""
    method = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return method if method is not None and method.forward is BaseTuner.forward else None


class Attends(Around):
    """What takes part in an attention module's computation, such as a prefix of keys and values."""

    @abstractmethod
    def attend(self, attention: Callable[..., Any], module: nn.Module, *qkvm: Tensor, **options: Any) -> Any:
        """Return the attention's output and weights.

        Args:
            attention: the function that transformers would call: `attention(module, *qkvm, **options)`.
            module: the attention module.
            qkvm: query, keys and values, shape [B, heads, T, width of a head], and the mask or None.
            options: what else the module tells the function.
        """


_seen: dict[int, tuple[int, int, int]] | None = None
_ATTENTIONS = ("sdpa", "eager")  # the others take masks of other forms


def teach_attention() -> None:
    """Let what is in an attention module's slot take part, in every model that uses transformers' attention interface.

    A module without such a slot computes as before.
    """
    from transformers.modeling_utils import AttentionInterface

    if hasattr(AttentionInterface, "_asks_slots"):
        return
    get = AttentionInterface.get_interface

    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_attend, get(self, attn_implementation, default), attn_implementation)

    AttentionInterface.get_interface = get_interface
    AttentionInterface._asks_slots = True


def _attend(attention: Callable[..., Any], kind: str, module: nn.Module, *qkv: Tensor, **options: Any) -> Any:
    if _seen is not None:
        _seen[id(module)] = (qkv[1].shape[1], qkv[1].shape[3], qkv[2].shape[3])
    slot = module._modules.get(SLOT)
    parts = [a for a in slot.around() if isinstance(a, Attends)] if isinstance(slot, Slot) else []
    if parts and kind not in _ATTENTIONS:
        raise SiteError(f"a prefix cannot run with the attention {kind!r}: load the model with {_CHOICE}.")
    mask = options.pop("attention_mask") if len(qkv) == 3 else None
    qkvm = (*qkv, mask) if len(qkv) == 3 else qkv
    for part in parts:
        attention = functools.partial(part.attend, attention)
    return attention(module, *qkvm, **options)


_CHOICE = " or ".join(f"attn_implementation={kind!r}" for kind in _ATTENTIONS)


def attention_shapes(model: Any) -> dict[str, tuple[int, int, int]]:
    """Find the modules that attend through transformers' attention interface, by running the model on two tokens.

    Returns:
        by name: the number of heads of the keys, their width, and the values' width.

    Raises:
        SiteError: an attention that cannot take a prefix, or a model that does not run on tokens alone.
    """
    global _seen
    if (kind := getattr(model.config, "_attn_implementation", None)) not in _ATTENTIONS:
        raise SiteError(f"a prefix cannot run with the attention {kind!r}: load the model with {_CHOICE}.")
    teach_attention()
    trunk = getattr(model, "base_model", model)
    names = ["input_ids", *(["decoder_input_ids"] if model.config.is_encoder_decoder else [])]
    ids = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    _seen = {}
    try:
        with _quiet(model), torch.no_grad():
            trunk.forward(**dict.fromkeys(names, ids))
        return {n: _seen[id(m)] for n, m in model.named_modules() if id(m) in _seen}
    except (TypeError, ValueError, RuntimeError) as error:
        raise SiteError(
            f"a prefix has no place: {type(model).__name__} does not run on tokens alone. {error}"
        ) from error
    finally:
        _seen = None


@contextlib.contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Run as the base, without dropout, inside a `with` block."""
    trains = [(m, m.training) for m in model.modules()]
    every: list[Any] = list(slots(model))
    off = [(s, s._disable_adapters) for s in every]
    model.eval()
    for slot, _ in off:
        slot._disable_adapters = True
    try:
        yield
    finally:
        for module, training in trains:
            module.training = training  # one by one: `train()` would set the children too
        for slot, disabled in off:
            slot._disable_adapters = disabled


def training_adapter(model: Any) -> str:
    """Return the one active adapter that trains.

    Raises:
        AdapterError: none does, or several do, so that a checkpoint of one adapter cannot hold them.
    """
    active = model.active_adapters()
    trained = [n for n in active if any(p.requires_grad for part in model.parts(n).values() for p in part.parameters())]
    if len(active) == 1 or len(trained) == 1:
        return str((trained or active)[0])
    raise AdapterError(
        f"a checkpoint holds one adapter, and of {', '.join(active)} {len(trained)} train. Train one at a time, "
        "or turn checkpoints off (save_strategy='no') and save each with save_adapter."
    )


def teach_trainer(adapted_cls: Any) -> None:
    """Let the stock Trainer resume, and load the best of, models adapted without a PeftModel.

    Its checkpoints of such models can be written but not read upstream, for LoRA too: it looks for a
    whole model's weights. Ours are read by their own `load_adapter`.
    """
    from transformers import Trainer

    if hasattr(Trainer, "_reads_adapters"):
        return
    load_checkpoint, load_best = Trainer._load_from_checkpoint, Trainer._load_best_model

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, adapted_cls) and model.adapters:
            model.load_adapter(resume_from_checkpoint, training_adapter(model), is_trainable=True)
        else:
            load_checkpoint(self, resume_from_checkpoint, model)

    def _load_best_model(self: Any) -> None:
        if isinstance(self.model, adapted_cls) and self.model.adapters:
            best = self.state.best_model_checkpoint
            self.model.load_adapter(best, training_adapter(self.model), is_trainable=True)
        else:
            load_best(self)

    Trainer._load_from_checkpoint, Trainer._load_best_model = _load_from_checkpoint, _load_best_model
    Trainer._reads_adapters = True
