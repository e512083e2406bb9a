"""Marian's own files, as Bergamot's models come, turned into a folder that `from_pretrained` reads."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

_FLOAT32, _INT8 = 0x404, 0x4101  # Marian's numbers of its types; int8 as intgemm packs it
EOS, UNK = 0, 1
NEVER = -1e4  # a logit whose probability is nought in every float type

# Marian's name of a map, and transformers'
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_FFN = {"1": "fc1", "2": "fc2"}


def marian(direction: str) -> Callable[[Sequence[Path], Path], None]:
    """Unpack one direction (`enpt`, `pten`): int8 weights dequantised to float32, and a fast tokenizer."""

    def unpack(archives: Sequence[Path], target: Path) -> None:
        with zipfile.ZipFile(archives[0]) as archive:
            names = [n for n in archive.namelist() if PurePosixPath(n).parent.name.startswith(f"{direction}-")]
            files = {PurePosixPath(n).name: archive.read(n) for n in names}
        _save_model(files[f"model.{direction}.intgemm.alphas.bin"], target)
        _save_tokenizer(json.loads(files["tokenizer.json"]), target)

    return unpack


def read_weights(data: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Read a binary model of Marian: its tensors in float32, maps as (out, in), and its settings."""
    count = struct.unpack_from("<QQ", data)[1]
    heads = [struct.unpack_from("<4Q", data, 16 + 32 * i) for i in range(count)]  # name, type, axes, bytes
    place = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in heads:
        names.append(data[place : place + length - 1].decode())
        place += length
    for _, _, axes, _ in heads:
        shapes.append(struct.unpack_from(f"<{axes}i", data, place))
        place += 4 * axes
    place += 8 + struct.unpack_from("<Q", data, place)[0]  # padding
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    settings: dict[str, Any] = {}
    for name, (_, kind, _, size), shape in zip(names, heads, shapes, strict=True):
        if name == "special:model.yml":
            settings = yaml.safe_load(data[place : place + size].decode().rstrip("\0"))
        elif kind == _FLOAT32:
            tensors[name] = np.frombuffer(data, "<f4", math.prod(shape), place).reshape(shape)
        elif kind == _INT8:
            tensors[name] = _dequantise(data, place, shape, transposed=name != "Wemb")
        place += size
    return tensors, settings


def _dequantise(data: bytes, place: int, shape: tuple[int, ...], transposed: bool) -> np.ndarray[Any, Any]:
    """Divide by the scale that stands behind the numbers; maps, unlike embeddings, are stored transposed."""
    size = math.prod(shape)
    scale = np.frombuffer(data, "<f4", 1, place + size)[0]
    numbers = np.frombuffer(data, "i1", size, place).astype(np.float32) / scale
    return numbers.reshape(shape[::-1] if transposed else shape)


def _save_model(data: bytes, target: Path) -> None:
    import torch
    from transformers import GenerationConfig

    from interleaf.marian_ssru import MarianSSRUConfig, MarianSSRUForConditionalGeneration

    tensors, settings = read_weights(data)
    pad = len(tensors["Wemb"])  # one token more: padding, also where decoding starts
    sizes = {"attention_heads": settings["transformer-heads"], "ffn_dim": settings["transformer-dim-ffn"]}
    config = MarianSSRUConfig(
        vocab_size=pad + 1,
        d_model=settings["dim-emb"],
        encoder_layers=settings["enc-depth"],
        decoder_layers=settings["dec-depth"],
        **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sizes.items()},
        activation_function=settings["transformer-ffn-activation"],
        scale_embedding=True,
        dropout=0.0,
        eos_token_id=EOS,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
    )
    model = MarianSSRUForConditionalGeneration(config)
    state = {key: torch.from_numpy(tensor.copy()) for key, tensor in _renamed(tensors, settings)}
    positions = {k: v for k, v in model.state_dict().items() if "embed_positions" in k}
    tied = dict.fromkeys(
        ["lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
        state["model.shared.weight"],
    )
    model.load_state_dict({**state, **positions, **tied})
    model.generation_config = GenerationConfig(
        decoder_start_token_id=pad, pad_token_id=pad, eos_token_id=EOS, suppress_tokens=[UNK], max_length=512
    )
    model.save_pretrained(target)


def _renamed(
    tensors: dict[str, np.ndarray[Any, Any]], settings: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield every tensor under its name in transformers; nothing may be left over."""
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("QuantMultA") and name != "none"}

    def take(theirs: str, ours: str) -> tuple[str, np.ndarray[Any, Any]]:
        tensor = left.pop(theirs)
        return ours, tensor[0] if tensor.shape[0] == 1 and ours != "final_logits_bias" else tensor

    def maps(theirs: str, ours: str, names: dict[str, str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for letter, name in names.items():
            yield take(f"{theirs}_W{letter}", f"{ours}{name}.weight")
            yield take(f"{theirs}_b{letter}", f"{ours}{name}.bias")

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        yield take(f"{theirs}_ln_scale", f"{ours}.weight")
        yield take(f"{theirs}_ln_bias", f"{ours}.bias")

    yield "model.shared.weight", np.pad(left.pop("Wemb"), ((0, 1), (0, 0)))
    yield "final_logits_bias", np.pad(left.pop("decoder_ff_logit_out_b"), ((0, 0), (0, 1)), constant_values=NEVER)
    for side, depth in (("encoder", settings["enc-depth"]), ("decoder", settings["dec-depth"])):
        for i in range(depth):
            theirs, ours = f"{side}_l{i + 1}", f"model.{side}.layers.{i}."
            yield from maps(f"{theirs}_ffn", ours, _FFN)
            yield from norm(f"{theirs}_ffn_ffn", f"{ours}final_layer_norm")
            if side == "encoder":
                yield from maps(f"{theirs}_self", f"{ours}self_attn.", _ATTENTION)
                yield from norm(f"{theirs}_self_Wo", f"{ours}self_attn_layer_norm")
                continue
            yield take(f"{theirs}_rnn_W", f"{ours}self_attn.v_proj.weight")
            yield from maps(f"{theirs}_rnn", f"{ours}self_attn.", {"f": "gate_proj"})
            yield from norm(f"{theirs}_rnn_ffn", f"{ours}self_attn_layer_norm")
            yield from maps(f"{theirs}_context", f"{ours}encoder_attn.", _ATTENTION)
            yield from norm(f"{theirs}_context_Wo", f"{ours}encoder_attn_layer_norm")
    if left:
        raise ValueError(f"tensors of an unknown use: {', '.join(left)}")


def _save_tokenizer(fast: dict[str, Any], target: Path) -> None:
    """Save the package's tokenizer with an end, padding, and two corrections towards sentencepiece."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # these two are no text: part their first sign from the rest, lest a text that has them be taken for them
    part = {"type": "Split", "pattern": {"Regex": "<(?=/s>|unk>)"}, "behavior": "Isolated", "invert": False}
    fast["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [fast["pre_tokenizer"], part]}
    # sentencepiece strips blanks only, not all that counts as white space
    strip = next(n for n in fast["normalizer"]["normalizers"] if n["type"] == "Strip")
    strip.clear()
    strip.update(type="Replace", pattern={"Regex": "^ | $"}, content="")
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, eos],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, eos],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}},
    }
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fast)),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    ).save_pretrained(target)
