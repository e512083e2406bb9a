"""Virtual tokens as parts of a union: PEFT's prefix tuning, prompt tuning and P-tuning, held by slots.

Li and Liang 2021 (arXiv 2101.00190), Lester et al. 2021 (2104.08691), Liu et al. 2021 (2103.10385).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftType, PrefixEncoder, PromptEmbedding, PromptEncoder
from torch import Tensor, nn
from torch.nn.functional import pad

from interleaf.adapter import Adapter, Around
from interleaf.blocks import hidden_size
from interleaf.errors import AdapterError, ConfigError, SiteError
from interleaf.forward import past_length
from interleaf.sites import Site, named_sites, stack_names
from interleaf.slot import with_first
from interleaf.tuner import Attends, attention_shapes

Made = list[tuple[Site, Adapter]]


def make_prefix(config: PeftConfig, model: nn.Module, gated: bool) -> Made:
    """Make the prefixes of every attention module in the layers: self-attention, and attention over a source text.

    Raises:
        SiteError: no attention goes through transformers' attention interface, or keys and values differ in width.
    """
    width = hidden_size(model)
    found = attention_shapes(model)
    sites = named_sites(model, dict.fromkeys(found, (width, 0)))
    shapes = {site: found[site.write] for site in sites if site.layer >= 0}
    if not shapes:
        raise SiteError(f"a prefix has no place: no attention of {type(model).__name__} can be told of it.")
    if unequal := [site for site, (_, keys, values) in shapes.items() if keys != values]:
        raise SiteError(f"a prefix has no place at {unequal[0].write}: its keys and values differ in width.")
    return [(site, Prefix(config, heads, wide, width, gated)) for site, (heads, wide, _) in shapes.items()]


def make_prompt(config: PeftConfig, model: Any, gated: bool) -> Made:
    """Make the prompt in front of a model's first stack, and what shows it to a decoder that reads that stack.

    Raises:
        SiteError: nothing around the layers takes embeddings in the place of tokens.
        ConfigError: a gated prompt.
    """
    if gated:
        raise ConfigError("union: a prompt adds nothing at a site that a gate could weigh. Leave out gated=True.")
    first, *others = stack_names(model)
    place = _around(model, first, {"input_ids", "inputs_embeds"})
    if place is None:
        raise SiteError(f"a prompt has no place: {type(model).__name__} takes no embeddings instead of tokens.")
    prompt = Prompt(config, model.get_submodule(place), keeps=bool(model.config.is_encoder_decoder))
    readers = {_around(model, stack, {"encoder_hidden_states", "encoder_attention_mask"}) for stack in others}
    seen = {name: PromptSeen(model.get_submodule(name)) for name in readers if name is not None}
    sites = named_sites(model, dict.fromkeys([place, *seen], (hidden_size(model), 0)))
    return list(zip(sites, [prompt, *seen.values()], strict=True))


def _around(model: nn.Module, stack: str, wanted: set[str]) -> str | None:
    """Name the innermost module around a stack that takes all of these arguments."""
    parts = stack.split(".")
    names = [".".join(parts[:i]) for i in reversed(range(len(parts)))]
    return next((n for n in names if wanted <= set(_arguments(model.get_submodule(n)))), None)


def _arguments(module: nn.Module) -> list[str]:
    return [p for p in inspect.signature(module.forward).parameters if p != "self"]


def _encoder_config(config: Any, token_dim: int, heads: int | None = None) -> Any:
    """Return a PEFT config with what PEFT itself would read off a model."""
    config = copy.deepcopy(config)
    if not config.num_virtual_tokens:
        raise ConfigError(f"union: {config.peft_type.value} needs num_virtual_tokens.")
    for name, read in (("token_dim", token_dim), ("num_attention_heads", heads)):
        if getattr(config, name) not in (None, read) and read is not None:
            raise ConfigError(f"union: {name}={getattr(config, name)}, but here it is {read}. Leave it out.")
    config.token_dim, config.num_attention_heads = token_dim, heads
    config.num_layers, config.num_transformer_submodules = 1, 1
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = token_dim
    config.inference_mode = False  # PEFT would build an encoder without its projection
    return config


class Prefix(Attends):
    """Keys and values before an attention's own: `softmax(q [P_k; K]) [P_v; V]`, from a PrefixEncoder of PEFT's.

    Gated, a token's output is `without + g (with - without)`, `g` a learned sigmoid gate of what the attention reads.

    Args:
        config: PEFT's PrefixTuningConfig.
        heads: number of heads of the keys.
        head_width: width of a head.
        width: width D of the model.
        gated: whether there is a gate.
    """

    label = "gate"

    def __init__(self, config: PeftConfig, heads: int, head_width: int, width: int, gated: bool) -> None:
        super().__init__()
        own = _encoder_config(config, heads * head_width, heads)
        self.heads, self.count = heads, own.num_virtual_tokens
        self.encoder = PrefixEncoder(own)
        self.gate = nn.Linear(width, 1) if gated else None
        self.__dict__["read"] = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what the attention reads, for the gate."""
        if self.gate is not None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
            self.__dict__["read"] = next(v for v in given if v.shape[-1] == self.gate.in_features)
        return args, kwargs

    def leave(self, module: nn.Module, output: Any) -> Any:
        """Forget it."""
        self.__dict__["read"] = None
        return output

    def attend(self, attention: Callable[..., Any], module: nn.Module, *qkvm: Any, **options: Any) -> Any:
        """Return the attention's output with the prefix, and its weights."""
        query, key, value, mask = qkvm
        pairs = self.encoder(torch.arange(self.count, device=key.device)).view(self.count, 2, self.heads, -1)
        prefix = pairs.permute(1, 2, 0, 3).to(key.dtype).unsqueeze(1).expand(-1, key.shape[0], -1, -1, -1)
        wide = (torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2))
        more = dict(options)
        if (bias := options.get("position_bias")) is not None:
            more["position_bias"] = pad(bias, (self.count, 0))
        output, weights = attention(module, query, *wide, self._mask(module, query, key, mask, options), **more)
        if self.gate is None:
            return output, weights
        gate = torch.sigmoid(self.gate(self.read.to(self.gate.weight.dtype)))
        self.observe(self.label, gate)
        without = attention(module, query, key, value, mask, **options)[0]
        return without + gate.unsqueeze(-1).to(output.dtype) * (output - without), weights

    def _mask(self, module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Any:
        """Let every token see the prefix; a mask that was left to `is_causal` is written out."""
        if mask is not None:
            return pad(mask, (self.count, 0), value=True if mask.dtype == torch.bool else 0)
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or query.shape[2] == 1:
            return None
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
        return pad(seen, (self.count, 0), value=True)[None, None]


class Prompt(Around):
    """Learned embeddings before the text's, from a PromptEmbedding or PromptEncoder of PEFT's.

    What the layers make of them is cut off again, so that the task's head sees the text's tokens only; but a decoder
    that reads the whole stack sees them too.

    Args:
        config: PEFT's PromptTuningConfig or PromptEncoderConfig.
        module: what takes the tokens.
        keeps: whether they stay in the module's output.
    """

    lengthens = True

    def __init__(self, config: PeftConfig, module: Any, keeps: bool) -> None:
        super().__init__()
        embeddings = module.get_input_embeddings()
        own = _encoder_config(config, embeddings.weight.shape[-1])
        self.encoder: nn.Module
        if own.peft_type == PeftType.P_TUNING:
            self.encoder = PromptEncoder(own)
        else:
            self.encoder = PromptEmbedding(own, embeddings)
        self.count, self.keeps = own.num_virtual_tokens, keeps
        self.arguments = _arguments(module)
        self.inserted = False

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the prompt before the embeddings, unless it is in the cache, and widen masks and positions."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise AdapterError("a prompt needs an attention mask of shape [B, T]; static caches give another.")
            given["attention_mask"] = pad(mask, (self.count, 0), value=1)
        if positions is not None:
            given["position_ids"] = positions = positions + self.count
        self.inserted = past_length(given, None, 0) == 0
        if not self.inserted:
            return (), given
        text = given.get("inputs_embeds")
        text = module.get_input_embeddings()(given["input_ids"]) if text is None else text
        prompt = self.encoder(torch.arange(self.count, device=text.device).unsqueeze(0)).to(text.dtype)
        given["inputs_embeds"] = torch.cat([prompt.expand(text.shape[0], -1, -1), text], dim=1)
        given["input_ids"] = None
        if positions is not None:
            places = torch.arange(self.count, device=positions.device).expand(*positions.shape[:-1], -1)
            given["position_ids"] = torch.cat([places, positions], dim=-1)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = pad(given["token_type_ids"], (self.count, 0))
        return (), given

    def leave(self, module: nn.Module, output: Any) -> Any:
        """Cut the prompt off the hidden states."""
        if self.keeps or not self.inserted:
            return output
        if isinstance(output, dict) and output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(state[:, self.count :] for state in output["hidden_states"])
        return with_first(output, output[0][:, self.count :])


class PromptSeen(Around):
    """Lets a decoder see the prompt in what it reads: the encoder's states are longer than their mask.

    Args:
        module: the decoder.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.arguments = _arguments(module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Widen the mask over the encoder's states."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None:
            given["encoder_attention_mask"] = pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
        return (), given


MAKERS: dict[PeftType, Callable[[PeftConfig, Any, bool], Made]] = {
    PeftType.PREFIX_TUNING: make_prefix,
    PeftType.PROMPT_TUNING: make_prompt,
    PeftType.P_TUNING: make_prompt,
}

__all__ = ["MAKERS", "Prefix", "Prompt", "PromptSeen"]
