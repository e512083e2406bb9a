"""Tiny random models of every text model type in transformers: its default config, shrunk by its settings' names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

HEADS = {
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
AUTO = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}
WIDTH, VOCABULARY = 32, 120

# what settings of these names become, wherever they stand
_SIZES = {
    1: """
        n_group topk_group num_expert_group first_k_dense_replace n_shared_experts
        num_shared_experts
    """,
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers depth num_blocks speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers num_layers_per_stack
        num_key_value_heads swa_num_key_value_heads kv_n_heads num_kv_heads
        num_global_key_value_heads num_experts_per_tok moe_topk moe_top_k moe_k
        num_experts_per_token
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads swa_num_attention_heads linear_num_heads
        conf_num_attention_heads num_self_attention_heads num_cross_attention_heads
        linear_num_key_heads linear_num_value_heads index_n_heads num_experts n_routed_experts
        num_local_experts moe_num_experts
    """,
    8: """
        head_dim d_kv kv_channels attention_head_dim swa_head_dim linear_head_dim
        linear_key_head_dim qk_nope_head_dim linear_value_head_dim qk_rope_head_dim v_head_dim
        dim_head index_head_dim global_head_dim rotary_dim kv_lora_rank q_lora_rank o_lora_rank
        laurel_rank embedding_rank mamba_dt_rank time_step_rank mamba_d_state state_size
        ssm_state_size mamba_d_head mamba_head_dim
    """,
    16: """
        patch_size
    """,
    WIDTH: """
        hidden_size d_model n_embd emb_dim embedding_size dim embed_dim word_embed_proj_dim
        encoder_hidden_size decoder_hidden_size out_hidden_size backbone_hidden_size lru_width
        attention_hidden_size projector_hidden_size embedding_dim vision_output_dim conv_output_size
        projection_dim unit_embed_dim lang_embed_dim spkr_embed_dim pooler_hidden_size
        hidden_size_global d_latents hidden_dim_vision image_size
    """,
    40: """
        intermediate_size n_inner ffn_dim d_ff dim_ff dff encoder_ffn_dim decoder_ffn_dim
        ffn_hidden_size hidden_dim shared_expert_intermediate_size
        moe_shared_expert_intermediate_size shared_intermediate_size d_inner intermediate_size_mlp
        dense_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size mlp_dim
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        moe_intermediate_size
    """,
    VOCABULARY: """
        vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size t2u_vocab_size entity_vocab_size
        vocab_size_per_layer_input unpadded_vocab_size unit_hifi_gan_vocab_size audio_vocab_size
    """,
    128: """
        max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len
        n_ctx max_encoder_position_embeddings max_decoder_position_embeddings
        original_max_position_embeddings
    """,
}
SMALL = {name: value for value, names in _SIZES.items() for name in names.split()}

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_HYBRID: dict[str, Any] = {"num_hidden_layers": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_INDEXER |= {"indexer_compress_ratio": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

ODD: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_HYBRID, "layer_group_size": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"text_config": {"per_layer_config": {0: {"num_attention_heads": 4}}}},
    "dots3_note_text": {"per_layer_config": {0: {"num_attention_heads": 4}}},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 40, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": _HYBRID,
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16},
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": {**_HYBRID, **_INDEXER}},
    "qwen4_exp_text": {**_HYBRID, **_INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "xlstm": {"num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **_HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need besides: sizes that depend on each other, layers of every sort."""


def model_types() -> list[str]:
    """Return the text model types of this transformers: causal, seq2seq, masked, classification."""
    return sorted(set().union(*HEADS.values()))


def tiny_config(kind: str, **changed: Any) -> Any:
    """Return a tiny config of a model type, or of a config class's defaults."""
    return _shrink(CONFIG_MAPPING[kind], {**ODD.get(kind, {}), **changed})


def _shrink(cls: Any, changed: dict[str, Any]) -> Any:
    default = cls()
    told: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters:
        value = default.__dict__.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in SMALL:
            told[name] = SMALL[name]
        elif name.endswith(("_token_id", "_token_index", "_index")) and value >= VOCABULARY:
            told[name] = TOKENS.get(name, 3 + sum(map(ord, name)) % 16)
    if "kv_lora_rank" in told and "num_key_value_heads" in told:  # latent attention has a key for each head
        told["num_key_value_heads"] = told["num_attention_heads"]
    for name in getattr(cls, "sub_configs", {}):
        value = getattr(default, name, None)
        if value is not None:
            told[name] = _shrink(type(value), {**ODD.get(value.model_type, {}), **changed.get(name, {})})
    told.update({k: v for k, v in changed.items() if k not in getattr(cls, "sub_configs", {})})
    return cls(**told)


def build(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a tiny random model of a type, and inputs it takes."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(kind)
    head = next(h for h, names in HEADS.items() if kind in names)
    model = getattr(transformers, AUTO[head]).from_config(config).eval()
    model.config.use_cache = False
    _wake(model)
    return model, inputs(model)


def _wake(model: torch.nn.Module) -> None:
    """Give weights that start at zero something to do: behind them no gradient would be seen."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def inputs(model: Any, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Return text for a model; source and target differ in length."""
    generator = torch.Generator().manual_seed(1)
    found = {"input_ids": torch.randint(20, VOCABULARY - 20, (rows, length), generator=generator)}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    takes = inspect.signature(model.forward).parameters
    if "encoder_hidden_states" in takes and any("encoder_attn" in n for n, _ in model.named_modules()):
        found["encoder_hidden_states"] = torch.randn(rows, 9, WIDTH, generator=generator)
    if "encoder_outputs" in takes and not model.config.is_encoder_decoder:
        found["encoder_outputs"] = (torch.randn(rows, 9, WIDTH, generator=generator),)
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(20, VOCABULARY - 20, (rows, 7), generator=generator)
    return found
