"""AdapterHub's files: a JSON and a flat dict of tensors each, for an adapter, a fusion and a prediction head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from interleaf.errors import StoreError

VERSION = "adapters.1.3.0"
CONFIG, FUSION, HEAD = "adapter_config.json", "adapter_fusion_config.json", "head_config.json"
WEIGHTS = {
    CONFIG: ("adapter.safetensors", "pytorch_adapter.bin"),
    FUSION: ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"),
    HEAD: ("model_head.safetensors", "pytorch_model_head.bin"),
}
_OLD_NAMES = {
    **{f"{where}_text_{what}_adapters": "adapters" for where in ("attention", "layer") for what in ("task", "lang")},
    "invertible_lang_adapters": "invertible_adapters",
}


def is_adapterhub(folder: Path) -> bool:
    """Tell whether a folder holds AdapterHub's files rather than PEFT's."""
    if (folder / FUSION).is_file():
        return True
    try:
        told = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and isinstance(told.get("config"), dict) and "peft_type" not in told


def read_files(folder: Path, config: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one of AdapterHub's JSON files with the tensors beside it, under their present names.

    Raises:
        StoreError: a file is missing or damaged.
    """
    try:
        told = json.loads((folder / config).read_text("utf-8"))
        path = next((folder / f for f in WEIGHTS[config] if (folder / f).is_file()), None)
        if path is None:
            raise StoreError(f"{folder} holds none of {', '.join(WEIGHTS[config])}.")
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except StoreError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "damaged" if isinstance(error, SafetensorError | OSError | ValueError | RuntimeError) else "unreadable"
        raise StoreError(f"{folder} is {kind}: {reason}") from error
    return told, {_modern(key): tensor for key, tensor in tensors.items()}


def _modern(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        key = f".{key}".replace(f".{old}.", f".{new}.").removeprefix(".")
    return key
