"""interleaf: small trainable adapters between the layers of a frozen Transformer.

The names below are loaded on first use, so that `import interleaf` and the command line stay quick.
Importing any of them registers the adapter kinds with PEFT, and interleaf.marian_ssru with transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interleaf.adapter import Adapter, AdapterConfig, register_adapter
    from interleaf.adapters import (
        Bottleneck,
        BottleneckConfig,
        CompacterConfig,
        Fusion,
        FusionConfig,
        GLUConfig,
        InvertibleConfig,
        MTLConfig,
        ReftConfig,
        UnionConfig,
    )
    from interleaf.compose import Average, BatchSplit, Fuse, Parallel, Split, Stack
    from interleaf.errors import InterleafError
    from interleaf.model import AdaptedModel, AdapterSummary, adapt
    from interleaf.sites import Site, find_sites
    from interleaf.store import Adaptation

__version__ = "0.1.0"

_HOME = {
    "Adaptation": "store",
    "AdaptedModel": "model",
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "AdapterSummary": "model",
    "Average": "compose",
    "BatchSplit": "compose",
    "Bottleneck": "adapters",
    "BottleneckConfig": "adapters",
    "CompacterConfig": "adapters",
    "GLUConfig": "adapters",
    "InvertibleConfig": "adapters",
    "MTLConfig": "adapters",
    "ReftConfig": "adapters",
    "Fuse": "compose",
    "Fusion": "adapters",
    "FusionConfig": "adapters",
    "InterleafError": "errors",
    "Parallel": "compose",
    "Site": "sites",
    "Split": "compose",
    "Stack": "compose",
    "UnionConfig": "adapters",
    "adapt": "model",
    "find_sites": "sites",
    "register_adapter": "adapter",
}

__all__ = [
    "Adaptation",
    "AdaptedModel",
    "Adapter",
    "AdapterConfig",
    "AdapterSummary",
    "Average",
    "BatchSplit",
    "Bottleneck",
    "BottleneckConfig",
    "CompacterConfig",
    "Fuse",
    "Fusion",
    "FusionConfig",
    "GLUConfig",
    "InterleafError",
    "InvertibleConfig",
    "MTLConfig",
    "Parallel",
    "ReftConfig",
    "Site",
    "Split",
    "Stack",
    "UnionConfig",
    "adapt",
    "find_sites",
    "register_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'interleaf' has no attribute {name!r}")
    importlib.import_module("interleaf.adapters")
    importlib.import_module("interleaf.marian_ssru")
    return getattr(importlib.import_module(f"interleaf.{_HOME[name]}"), name)
