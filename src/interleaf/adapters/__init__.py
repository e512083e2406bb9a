"""One file per adapter kind; importing this package registers them all."""

from interleaf.adapters.bottleneck import Bottleneck, BottleneckConfig
from interleaf.adapters.compacter import CompacterConfig
from interleaf.adapters.fusion import Fusion, FusionConfig
from interleaf.adapters.glu import GLUConfig
from interleaf.adapters.invertible import InvertibleConfig
from interleaf.adapters.mtl import MTLConfig
from interleaf.adapters.reft import ReftConfig
from interleaf.adapters.union import UnionConfig

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "CompacterConfig",
    "Fusion",
    "FusionConfig",
    "GLUConfig",
    "InvertibleConfig",
    "MTLConfig",
    "ReftConfig",
    "UnionConfig",
]
