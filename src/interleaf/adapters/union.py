"""A union: several kinds in one named adapter, trained, saved, loaded and switched as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from interleaf.adapter import Adapter, AdapterConfig, Registry, as_config, register_adapter
from interleaf.errors import ConfigError
from interleaf.sites import Site


@register_adapter("union", {})
@dataclass
class UnionConfig(AdapterConfig):
    """Several configs as one; where two of them meet at a site, they run in their order."""

    parts: list[Any] = field(default_factory=list)
    """The configs, or names of presets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = [_part(part) for part in self.parts]
        if len(self.parts) < 2:
            raise ConfigError("union: name two parts or more.")

    @property
    def needs(self) -> list[str]:
        """What any of the parts needs."""
        return [name for part in self.parts for name in part.needs]

    def sites(self, model: nn.Module) -> list[Site]:
        return list(dict.fromkeys(site for part in self.parts for site in part.sites(model)))

    def build(self, site: Site) -> Adapter:
        raise ConfigError("a union builds its parts, each at its own sites.")

    def make(self, model: nn.Module, there: Callable[[Site], dict[str, Adapter]]) -> list[tuple[Site, Adapter]]:
        """Build every part; those that meet at a site become one."""
        found: dict[str, list[tuple[Site, Adapter]]] = {}
        for part in self.parts:
            for site, adapter in part.make(model, there):
                found.setdefault(site.write, []).append((site, adapter))
        return [(made[0][0], _together(made)) for made in found.values()]


def _together(made: list[tuple[Site, Adapter]]) -> Adapter:
    if len(made) == 1:
        return made[0][1]
    if len({site.read for site, _ in made}) > 1 or len({adapter.before for _, adapter in made}) > 1:
        raise ConfigError(f"union: the parts at {made[0][0].write} read different places. Give them other positions.")
    if len({adapter.tokens for _, adapter in made}) > 1:
        raise ConfigError(f"union: the parts at {made[0][0].write} are for different tokens.")
    return Several([adapter for _, adapter in made])


class Several(Adapter):
    """Adapters of several kinds at one site, one after the other.

    Args:
        adapters: in the order they run.
    """

    def __init__(self, adapters: list[Adapter]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(adapters)
        self.reads = any(adapter.reads for adapter in adapters)
        self.before, self.tokens = adapters[0].before, adapters[0].tokens

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        for part in self.parts:
            y = part(x if part.reads else None, y)
        return y


def _part(part: Any) -> AdapterConfig:
    if isinstance(part, str | AdapterConfig):
        return as_config(part)
    kind = str(part.get("peft_type", "")).rpartition(".")[2].lower()
    if kind not in Registry.kinds:
        raise ConfigError(f"union: {kind or part!r} is no adapter kind. There are: {', '.join(Registry.kinds)}.")
    cls = Registry.kinds[kind].config_cls
    known = {f.name for f in fields(cls) if f.init} - {"peft_type", "auto_mapping", "peft_version"}
    return cls(**{key: value for key, value in part.items() if key in known})
