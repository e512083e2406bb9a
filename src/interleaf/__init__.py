"""interleaf: small trainable adapters between the layers of a frozen Transformer.

The names below are loaded on first use, so that `import interleaf` and the command line stay quick.
Importing any of them registers the adapter kinds with PEFT, and interleaf.marian_ssru with transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interleaf.adapter import Adapter as Adapter
    from interleaf.adapter import AdapterConfig as AdapterConfig
    from interleaf.adapter import register_adapter as register_adapter
    from interleaf.adapters import *  # noqa: F403
    from interleaf.compose import Average as Average
    from interleaf.compose import BatchSplit as BatchSplit
    from interleaf.compose import Fuse as Fuse
    from interleaf.compose import Parallel as Parallel
    from interleaf.compose import Split as Split
    from interleaf.compose import Stack as Stack
    from interleaf.errors import InterleafError as InterleafError
    from interleaf.model import AdaptedModel as AdaptedModel
    from interleaf.model import adapt as adapt
    from interleaf.sites import Site as Site
    from interleaf.sites import find_sites as find_sites
    from interleaf.store import Adaptation as Adaptation
    from interleaf.summary import AdapterSummary as AdapterSummary

__version__ = "0.1.0"

_HOME = {
    "Adaptation": "store",
    "AdaptedModel": "model",
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "AdapterSummary": "summary",
    "Average": "compose",
    "BatchSplit": "compose",
    "Fuse": "compose",
    "InterleafError": "errors",
    "Parallel": "compose",
    "Site": "sites",
    "Split": "compose",
    "Stack": "compose",
    "adapt": "model",
    "find_sites": "sites",
    "register_adapter": "adapter",
}


def __getattr__(name: str) -> Any:
    # a kind's config or adapter is found, not listed; other names are never looked for, so no submodule loads torch
    if name not in _HOME and name != "__all__" and not name[:1].isupper():
        raise AttributeError(f"module 'interleaf' has no attribute {name!r}")
    importlib.import_module("interleaf.marian_ssru")
    classes = importlib.import_module("interleaf.adapters").CLASSES
    if name == "__all__":
        return sorted([*_HOME, *classes])
    if name in _HOME:
        return getattr(importlib.import_module(f"interleaf.{_HOME[name]}"), name)
    if name not in classes:
        raise AttributeError(f"module 'interleaf' has no attribute {name!r}")
    return classes[name]
