"""One file per adapter kind; importing this package imports, and so registers, every one of them.

A kind from another package is registered when that package is imported. One that names its module as an entry point
of the group `interleaf.kinds` is imported here, so that the command line and stored adapters find it too.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from interleaf.adapter import Adapter, AdapterConfig
from interleaf.errors import ConfigError

if TYPE_CHECKING:  # for type checkers and editors: at run time the loop below finds these, and every new kind
    from interleaf.adapters.bottleneck import Bottleneck as Bottleneck
    from interleaf.adapters.bottleneck import BottleneckConfig as BottleneckConfig
    from interleaf.adapters.compacter import CompacterConfig as CompacterConfig
    from interleaf.adapters.fusion import Fusion as Fusion
    from interleaf.adapters.fusion import FusionConfig as FusionConfig
    from interleaf.adapters.glu import GLUConfig as GLUConfig
    from interleaf.adapters.invertible import InvertibleConfig as InvertibleConfig
    from interleaf.adapters.mtl import MTLConfig as MTLConfig
    from interleaf.adapters.reft import ReftConfig as ReftConfig
    from interleaf.adapters.union import UnionConfig as UnionConfig

CLASSES: dict[str, type] = {}
"""The configs and adapters of this package's kinds, by name: `interleaf.NAME`."""

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _name, _value in vars(_module).items():
        _own = isinstance(_value, type) and _value.__module__ == _module.__name__ and not _name.startswith("_")
        if _own and issubclass(_value, Adapter | AdapterConfig):
            CLASSES[_name] = _value
globals().update(CLASSES)

for _entry in entry_points(group="interleaf.kinds"):
    try:
        _entry.load()
    except Exception as error:  # whatever a stranger's module raises
        raise ConfigError(f"the adapter kind {_entry.name!r} ({_entry.value}) cannot be imported: {error}") from error
