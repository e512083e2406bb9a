"""The base model as people name it: a hub name, a folder, or bundled:NAME."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from interleaf.bundled import resolve
from interleaf.errors import BaseModelError

T = TypeVar("T")


def load_base(base: str, load: Callable[[str], T]) -> T:
    """Call a `from_pretrained` on a base; what goes wrong becomes one line.

    The architectures that interleaf adds to transformers are known to the Auto classes from here on.

    Raises:
        BaseModelError: there is no such model, or it cannot be read.
    """
    import interleaf.marian_ssru  # noqa: F401

    path = resolve(base)
    try:
        return load(path)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BaseModelError(f"the base {base!r} cannot be loaded: {reason}") from error


def empty_model(base: str) -> Any:
    """Build a model of a base's architecture without its weights (on the meta device).

    Raises:
        BaseModelError: there is no such model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    config = load_base(base, AutoConfig.from_pretrained)
    with init_empty_weights():
        return AutoModel.from_config(config)
