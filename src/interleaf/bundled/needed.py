"""Libraries that only some bundles need to be unpacked."""

from __future__ import annotations

import importlib
from typing import Any

from interleaf.errors import StoreError


def needed(library: str) -> Any:
    """Import a library of the `demo` extra.

    Raises:
        StoreError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise StoreError(f"{library} is needed to unpack this: pip install 'interleaf[demo]'") from error
