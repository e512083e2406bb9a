"""One file per adapter kind; importing this package registers them all."""

from interleaf.adapters.bottleneck import Bottleneck, BottleneckConfig

__all__ = ["Bottleneck", "BottleneckConfig"]
