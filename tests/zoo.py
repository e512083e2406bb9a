"""Tiny random models of nine families; the property tests run over all of them and over real MiniLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from interleaf import bundled

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
SEQ2SEQ: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}


def _bart() -> PreTrainedModel:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_layers": 2, "decoder_layers": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=99, d_model=32, forced_eos_token_id=None, **heads, **sizes, **SEQ2SEQ)
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, **SEQ2SEQ)
    )


def _distilbert() -> PreTrainedModel:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=99, pad_token_id=0, **sizes))


def _gpt2() -> PreTrainedModel:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, **ends))


def _minilm() -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(bundled.resolve("bundled:minilm"), num_labels=3)


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**COMMON)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**COMMON)),
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=8, **COMMON)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **COMMON)),
    "t5": _t5,
    "bart": _bart,
}
MODELS = {**TINY, "minilm": _minilm}
GENERATORS = ["gpt2", "llama", "qwen3", "mixtral", "t5", "bart"]


def build(name: str) -> PreTrainedModel:
    """Return a model of the zoo in eval mode, the same one every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs(model: PreTrainedModel, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return model inputs; source and target lengths differ."""
    generator = torch.Generator().manual_seed(1)
    found = {"input_ids": torch.randint(5, 99, (rows, 7), generator=generator)}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(5, 99, (rows, 5), generator=generator)
    return found


def logits(model: Any, **changed: Any) -> torch.Tensor:
    """Return the model's logits on the zoo's inputs."""
    with torch.no_grad():
        return model(**{**inputs(model), **changed}).logits


def mixed_and_alone(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a batch whose rows run a, the base, and a then b, and those of the rows one by one."""
    rows, alone = inputs(model, rows=3), []
    for i, setup in enumerate(["a", None, "stack(a, b)"]):
        model.set_adapter(setup)
        alone.append(logits(model, **{k: v[i : i + 1] for k, v in rows.items()}))
    model.set_adapter("b")
    return logits(model, **rows, adapter_names=["a", "", "stack(a, b)"]), torch.cat(alone)


def randomise(model: torch.nn.Module, std: float = 0.3) -> None:
    """Fill what trains with random numbers, as if it had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the base's tensors under their own names."""
    return {
        name.replace(".original_module", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".adapter_slot." not in name and ".modules_to_save." not in name
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tiny_lm(name: str, vocab_size: int) -> Any:
    """Return a tiny random model that generates, with another vocabulary than the zoo's."""
    torch.manual_seed(0)
    if name == "t5":
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **sizes, **SEQ2SEQ))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **{**COMMON, "vocab_size": vocab_size}))
