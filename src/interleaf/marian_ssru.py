"""Marian with SSRU decoder layers: the small, fast translation models of Bergamot, which transformers does not have.

It is transformers' own Marian with three changes: the decoder's self-attention is a simpler simple recurrent
unit (Kim et al. 2019, "From Research to Production and Back: Ludicrously Fast Neural Machine Translation"),
the positions are spaced as Marian itself spaces them, and the norms' epsilon is Marian's.

Importing this module registers it with the Auto classes. `from interleaf import adapt` (or any other name there),
`interleaf.base.load_base` and `bundled.resolve` of such a model import it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    Cache,
    EncoderDecoderCache,
    MarianConfig,
    MarianModel,
    MarianMTModel,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding


class MarianSSRUConfig(MarianConfig):
    """The settings of Marian, and the epsilon of its norms."""

    model_type = "marian-ssru"
    layer_norm_eps: float = 1e-9


class SSRU(nn.Module):
    """`c[t] = f[t] * c[t-1] + (1 - f[t]) * W x[t]`, `f[t] = sigmoid(W_f x[t] + b_f)`; what it writes is `relu(c[t])`.

    It has the interface of the self-attention that it stands for. The states `c` are kept as the keys of the
    layer's cache, one a token, so that every cache of transformers serves: beam search reorders it, `crop` cuts it.

    Args:
        width: D, of the residual stream.
        layer: its number, for the cache.
    """

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Map (B, T, D) to (B, T, D), going on from the last cached state.

        The decoder's mask is not needed: no token sees a later one, so padding on the right changes nothing.
        """
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        state = self._last(past_key_values)
        states = []
        new, forget = self.v_proj(hidden_states), torch.sigmoid(self.gate_proj(hidden_states))
        # one operation a token; T is about 30, and a scan over powers of two took three times as long or more
        for value, keep in zip(new.unbind(1), forget.unbind(1), strict=True):
            state = torch.lerp(value, torch.zeros_like(value) if state is None else state, keep)
            states.append(state)
        found = torch.stack(states, 1)  # B T D
        if past_key_values is not None:
            keys = found[:, None]  # a cache wants B heads T D; there are no values
            past_key_values.update(keys, keys[..., :0], self.layer)
        return torch.relu(found), None

    def _last(self, cache: Cache | None) -> Tensor | None:
        length = 0 if cache is None else cache.get_seq_length(self.layer)
        if cache is None or not length:
            return None
        last: Tensor = cache.layers[self.layer].keys[:, 0, length - 1]
        return last


class _Positions(MarianSinusoidalPositionalEmbedding):
    """Sines, then cosines, with wave lengths from 1 to 10,000 inclusive: transformers' Marian stops short of it."""

    def create_weight(self) -> Tensor:
        count, width = self.weight.shape
        waves = torch.exp(torch.arange(width // 2) * (-math.log(10000) / (width // 2 - 1)))
        angles = torch.arange(count)[:, None] * waves
        return torch.cat([angles.sin(), angles.cos()], 1).to(self.weight.dtype)


class MarianSSRUModel(MarianModel):
    """The encoder and the decoder, without the vocabulary's head."""

    config_class = MarianSSRUConfig

    def __init__(self, config: MarianSSRUConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.decoder.layers):
            layer.self_attn = SSRU(config.d_model, number)
        for side in (self.encoder, self.decoder):
            side.embed_positions = _Positions(config.max_position_embeddings, config.d_model)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        self.post_init()


class MarianSSRUForConditionalGeneration(MarianMTModel):
    """A translation model: `labels` give a loss, `generate` translates.

    There is no token to begin with: decoding starts from the padding token, whose embedding is nought.
    """

    config_class = MarianSSRUConfig
    _can_compile_fullgraph = False  # a loop over tokens

    def __init__(self, config: MarianSSRUConfig) -> None:
        super().__init__(config)
        self.model = MarianSSRUModel(config)
        self.post_init()


AutoConfig.register(MarianSSRUConfig.model_type, MarianSSRUConfig, exist_ok=True)
AutoModel.register(MarianSSRUConfig, MarianSSRUModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(MarianSSRUConfig, MarianSSRUForConditionalGeneration, exist_ok=True)
