"""Tiny random models of every text model type in transformers: its default config, shrunk by its settings' names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

HEADS = {
    "seq2seq": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence": ("AutoModelForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "token": ("AutoModelForTokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "question": ("AutoModelForQuestionAnswering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "none": ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
}
"""Auto classes and the model types they know; the first four make a text model type."""


SOUND = ("wav2vec2", "hubert", "wavlm")
BEYOND_TEXT = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "beit": "BeitForImageClassification",
    "swin": "SwinForImageClassification",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "whisper": "WhisperForConditionalGeneration",
    "speech_to_text": "Speech2TextForConditionalGeneration",
    "wav2vec2": "Wav2Vec2ForCTC",
    "wav2vec2-conformer": "Wav2Vec2ConformerForCTC",
    "hubert": "HubertForCTC",
    "wavlm": "WavLMForCTC",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
}
"""Models that see or hear, by type."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model, and of the text it is given."""

    width: int = 32
    heads: int = 4
    groups: int = 2
    head: int = 8
    layers: int = 2
    inner: int = 40
    vocabulary: int = 120
    rows: int = 2
    length: int = 12
    target: int = 7


SHAPES = {
    "base": Shape(),
    "square": Shape(width=64, heads=8, groups=8, layers=1, inner=64, vocabulary=99, rows=3, length=9, target=11),
    "deep": Shape(width=48, heads=3, groups=1, head=16, layers=4, inner=192, vocabulary=211, rows=1, length=16),
    "odd": Shape(width=80, heads=5, groups=5, head=16, layers=3, inner=56, vocabulary=150, rows=4, length=10, target=3),
}

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# what settings of these names become, wherever they stand: a size of the shape, or a number
_SIZES: dict[str | int, str] = {
    1: """
        n_group topk_group num_expert_group first_k_dense_replace n_shared_experts
        num_shared_experts
    """,
    2: "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads",
    8: """
        qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim rotary_dim kv_lora_rank
        q_lora_rank o_lora_rank laurel_rank embedding_rank mamba_dt_rank time_step_rank mamba_d_state state_size
        ssm_state_size mamba_d_head mamba_head_dim
    """,
    16: "patch_size",
    32: "image_size",
    "layers": """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers depth num_blocks speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers num_layers_per_stack
    """,
    "groups": """
        num_key_value_heads swa_num_key_value_heads kv_n_heads num_kv_heads num_global_key_value_heads
    """,
    "heads": """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads swa_num_attention_heads linear_num_heads
        conf_num_attention_heads num_self_attention_heads num_cross_attention_heads
        linear_num_key_heads linear_num_value_heads
    """,
    "head": """
        head_dim d_kv kv_channels attention_head_dim swa_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim dim_head global_head_dim
    """,
    "width": """
        hidden_size d_model n_embd emb_dim embedding_size dim embed_dim word_embed_proj_dim
        encoder_hidden_size decoder_hidden_size out_hidden_size backbone_hidden_size lru_width
        attention_hidden_size projector_hidden_size embedding_dim vision_output_dim conv_output_size
        projection_dim unit_embed_dim lang_embed_dim spkr_embed_dim pooler_hidden_size
        hidden_size_global d_latents hidden_dim_vision
    """,
    "inner": """
        intermediate_size n_inner ffn_dim d_ff dim_ff dff encoder_ffn_dim decoder_ffn_dim
        ffn_hidden_size hidden_dim shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_intermediate_size d_inner intermediate_size_mlp
        dense_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size mlp_dim
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        moe_intermediate_size
    """,
    "vocabulary": """
        vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size t2u_vocab_size entity_vocab_size
        vocab_size_per_layer_input unpadded_vocab_size unit_hifi_gan_vocab_size audio_vocab_size
    """,
    128: """
        max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len
        n_ctx max_encoder_position_embeddings max_decoder_position_embeddings
        original_max_position_embeddings
    """,
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def odd(shape: Shape) -> dict[str, dict[str, Any]]:
    """Return what single types need besides: sizes that depend on each other, layers of every sort."""
    layers, head = shape.layers, shape.head
    hybrid: dict[str, Any] = {"num_hidden_layers": max(4, layers)}
    mamba = {"mamba_n_heads": shape.width // 4, "mamba_d_head": 8}  # twice the width
    indexer = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": head, "indexer_budget": 8}
    indexer |= {"indexer_compress_ratio": 2}
    mixed = {"num_hidden_layers": max(2, layers)}
    mixed["layer_types"] = ["linear_attention"] * (mixed["num_hidden_layers"] - 1) + ["full_attention"]
    return {
        "bailing_hybrid": {**hybrid, "layer_group_size": 2},
        "bamba": {**mamba, "attn_layer_indices": [layers - 1]},
        "blt": {"encoder_hash_byte_group_vocab": 100},
        "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
        "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
        "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
        "dots3_note": {"text_config": {"per_layer_config": {0: {"num_attention_heads": shape.heads}}}},
        "dots3_note_text": {"per_layer_config": {0: {"num_attention_heads": shape.heads}}},
        "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
        "esm": {"vocab_size": shape.vocabulary, "pad_token_id": 0, "mask_token_id": 4},
        "esmc": {"num_key_value_heads": shape.heads},
        "gemma3n_text": {
            "num_kv_shared_layers": 0,
            "intermediate_size": shape.inner,
            "activation_sparsity_pattern": None,
        },
        "gpt_neo": {
            "num_layers": max(2, layers // 2 * 2),
            "attention_types": [[["global", "local"], max(1, layers // 2)]],
        },
        "granitemoehybrid": {**mamba, **mixed},
        "hunyuan_v1_dense": {"head_dim": head},
        "hunyuan_v1_moe": {"head_dim": head},
        "jamba": {
            "num_hidden_layers": max(2, layers),
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        "kimi_linear": mixed,
        "layoutlmv3": {"coordinate_size": shape.width // 6, "shape_size": (shape.width - 4 * (shape.width // 6)) // 2},
        "led": {"attention_window": 4},
        "lfm2_moe": {**mixed, "layer_types": ["conv"] * (mixed["num_hidden_layers"] - 1) + ["full_attention"]},
        "lfm3": hybrid,
        "lilt": {"hidden_size": 48, "num_attention_heads": 4},
        "longcat_flash": {"head_dim": 8},
        "mamba2": {"num_heads": shape.width // 4, "head_dim": 8, "n_groups": 2},
        "ministral": {"head_dim": head},
        "mobilebert": {"intra_bottleneck_size": 4 * shape.heads, "embedding_size": shape.width // 2},
        "musicgen": {"decoder": {"num_codebooks": 1}},
        "musicgen_melody": {"decoder": {"num_codebooks": 1}},
        "nemotron": {"num_key_value_heads": shape.groups},
        "nemotron3_diarization": {"head_config": {"audio_hidden_size": shape.width}},
        "neomme": {"head_dim": 16},
        "perceiver": {"num_self_attends_per_block": layers},
        "qwen3_5": {"text_config": hybrid},
        "qwen3_5_moe": {"text_config": hybrid},
        "qwen3_5_moe_text": hybrid,
        "qwen3_5_text": hybrid,
        "qwen3_next": hybrid,
        "qwen4_exp": {"text_config": {**hybrid, **indexer}},
        "qwen4_exp_text": {**hybrid, **indexer},
        "olmo_hybrid": {"num_hidden_layers": max(2, layers)},
        "recurrent_gemma": {"num_hidden_layers": max(3, layers)},
        "reformer": {
            "is_decoder": True,
            "axial_pos_embds": False,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
        },
        "rwkv": {"num_hidden_layers": max(2, layers)},
        "swin": {"depths": [layers, 1], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
        **{kind: {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8} for kind in SOUND},
        "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
        "wav2vec2-conformer": {"vocab_size": shape.vocabulary, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8},
        "whisper": {"num_mel_bins": 16},
        "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
        "audio-spectrogram-transformer": {"num_mel_bins": 32, "max_length": 64},
        "xlstm": {"num_heads": 2},
        "xmod": {"default_language": "en_XX"},
        "zamba": {
            **hybrid,
            "attention_hidden_size": 2 * shape.width,
            "attention_head_dim": 2 * shape.width // shape.heads,
            "layers_block_type": (["linear_attention", "hybrid"] * 4)[: hybrid["num_hidden_layers"]],
        },
        "zamba2": {
            "num_hidden_layers": max(2, layers),
            "layers_block_type": ["linear_attention"] * (max(2, layers) - 1) + ["hybrid"],
            "hybrid_layer_ids": [max(2, layers) - 1],
        },
        "zaya": {"num_experts_per_tok": 1},
    }


def model_types(head: str | None = None) -> list[str]:
    """Return the text model types of this transformers: causal, seq2seq, masked, classification; or of one head."""
    text = sorted(set().union(*[names for _, names in list(HEADS.values())[:4]]))
    return [kind for kind in text if head is None or kind in HEADS[head][1]]


def tiny_config(kind: str, shape: Shape, **changed: Any) -> Any:
    """Return a tiny config of a model type."""
    table = odd(shape)
    return _shrink(CONFIG_MAPPING[kind], shape, table, {**table.get(kind, {}), **changed})


def _shrink(cls: Any, shape: Shape, table: dict[str, dict[str, Any]], changed: dict[str, Any]) -> Any:
    default = cls()
    told: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters:
        value = default.__dict__.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in _SIZE:
            size = _SIZE[name]
            told[name] = size if isinstance(size, int) else getattr(shape, size)
        elif name.endswith(("_token_id", "_token_index", "_index")) and value >= shape.vocabulary:
            told[name] = TOKENS.get(name, 3 + sum(map(ord, name)) % 16)
    if "kv_lora_rank" in told and "num_key_value_heads" in told:  # latent attention has a key for each head
        told["num_key_value_heads"] = told["num_attention_heads"]
    subs = getattr(cls, "sub_configs", {})
    for name in subs:
        value = getattr(default, name, None)
        if value is not None:
            inner = {**table.get(value.model_type, {}), **changed.get(name, {})}
            told[name] = _shrink(type(value), shape, table, inner)
    told.update({k: v for k, v in changed.items() if k not in subs})
    return cls(**told)


def build(kind: str, shape: Shape = SHAPES["base"], head: str | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a tiny random model of a type, and inputs it takes.

    Args:
        head: one of `HEADS`, by default the first that the type has, or `beyond` for a model of `BEYOND_TEXT`.
    """
    torch.manual_seed(0)
    config = tiny_config(kind, shape)
    for part in (config, *vars(config).values()):
        if head == "sequence" and getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0  # it takes the last token that is no padding
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if head == "beyond":
        model = getattr(transformers, BEYOND_TEXT[kind])(config).eval()
    else:
        head = head or next(h for h, (_, names) in HEADS.items() if kind in names)
        model = _with_head(kind, config, *HEADS[head])
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    _wake(model)
    return model, signals(model, shape) if head == "beyond" else inputs(model, shape, head)


def _with_head(kind: str, config: Any, auto: str, names: dict[str, Any]) -> Any:
    cls = getattr(transformers, str(names[kind]), None)
    wanted = getattr(cls, "config_class", ())
    part = next((p for p in vars(config).values() if wanted and isinstance(p, wanted)), None)
    if part is not None and not isinstance(config, wanted):  # the decoder of Musicgen
        return cls(part).eval()
    return getattr(transformers, auto).from_config(config).eval()


def _wake(model: torch.nn.Module) -> None:
    """Give weights that start at zero something to do: behind them no gradient would be seen."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def inputs(model: Any, shape: Shape, head: str = "") -> dict[str, torch.Tensor]:
    """Return text for a model; source and target differ in length."""
    generator = torch.Generator().manual_seed(1)
    rows, words = shape.rows, (20, shape.vocabulary - 20)
    found = {"input_ids": torch.randint(*words, (rows, shape.length), generator=generator)}
    if head == "sequence" and model.config.is_encoder_decoder:
        found["input_ids"][:, -1] = model.config.eos_token_id  # BART's head looks for it
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    takes = inspect.signature(model.forward).parameters
    if "encoder_hidden_states" in takes and any("encoder_attn" in n for n, _ in model.named_modules()):
        found["encoder_hidden_states"] = torch.randn(rows, 9, shape.width, generator=generator)
    if "encoder_outputs" in takes and not model.config.is_encoder_decoder:
        found["encoder_outputs"] = (torch.randn(rows, 9, shape.width, generator=generator),)
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes and head not in ("sequence", "question"):
        found["decoder_input_ids"] = torch.randint(*words, (rows, shape.target), generator=generator)
    return found


def signals(model: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """Return pictures or sound for a model, and text where it takes that too."""
    generator = torch.Generator().manual_seed(1)
    rows, takes, config = shape.rows, inspect.signature(model.forward).parameters, model.config
    sizes = {
        "pixel_values": (rows, 3, 32, 32),
        "input_features": (rows, 16, 256) if "num_mel_bins" in vars(config) else (rows, 40, 16),
    }
    if config.model_type == "audio-spectrogram-transformer":
        sizes = {"input_values": (rows, config.max_length, config.num_mel_bins)}
    elif "input_values" in takes:
        sizes = {"input_values": (rows, 6000)}
    found = {name: torch.randn(size, generator=generator) for name, size in sizes.items() if name in takes}
    words = (20, shape.vocabulary - 20)
    for name in ("input_ids", "decoder_input_ids"):
        if name in takes:
            found[name] = torch.randint(*words, (rows, shape.target), generator=generator)
    return found
