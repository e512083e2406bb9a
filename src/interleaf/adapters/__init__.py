"""One file per adapter kind; importing this package registers them all."""

from interleaf.adapters.bottleneck import Bottleneck, BottleneckConfig
from interleaf.adapters.fusion import Fusion, FusionConfig

__all__ = ["Bottleneck", "BottleneckConfig", "Fusion", "FusionConfig"]
