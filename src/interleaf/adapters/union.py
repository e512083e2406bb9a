"""A union: several methods in one named adapter, trained, saved, loaded and switched as one, PEFT's own included.

Mix-and-Match: He et al. 2022 (arXiv 2110.04366); UniPELT: Mao et al. 2022 (2110.07577).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from interleaf.adapter import Adapter, AdapterConfig, Around, Registry, as_config, register_adapter
from interleaf.adapters.foreign import make_maps
from interleaf.adapters.virtual import MAKERS
from interleaf.errors import ConfigError
from interleaf.sites import Site

PRESETS: dict[str, dict[str, Any]] = {
    "mam": {"parts": [{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 30}, "parallel"]},
    "unipelt": {
        "parts": [
            {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10},
            "pfeiffer",
        ],
        "gated": True,
    },
}


@register_adapter("union", PRESETS)
@dataclass
class UnionConfig(AdapterConfig):
    """Several configs as one; where two of them meet at a site, they run in their order.

    A part for linear maps (LoRA) always runs on its map, before what adapts the sublayer.
    """

    parts: list[Any] = field(default_factory=list)
    """The configs, this package's or PEFT's, or names of presets."""
    gated: bool = False
    """Multiply what each part adds at a site with a learned sigmoid gate of what it reads there, one number a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = [_part(part) for part in self.parts]
        if not self.parts:
            raise ConfigError("union: name the parts.")
        for part in self.parts:
            if not isinstance(part, AdapterConfig) and getattr(part, "modules_to_save", None):
                self.modules_to_save = sorted({*(self.modules_to_save or []), *part.modules_to_save})
                part.modules_to_save = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values: JSON knows no sets."""
        return {**super().to_dict(), "parts": [_plain(part.to_dict()) for part in self.parts]}

    @property
    def needs(self) -> list[str]:
        """What any of the parts needs."""
        return [name for part in self.parts for name in getattr(part, "needs", [])]

    @property
    def virtual_tokens(self) -> bool:
        """Whether one of the parts has virtual tokens."""
        return any(part.virtual_tokens if isinstance(part, AdapterConfig) else _virtual(part) for part in self.parts)

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites of all parts, each once."""
        with init_empty_weights():
            found = [self._sites(part, model) for part in self.parts]
        return list(dict.fromkeys(site for sites in found for site in sites))

    def _sites(self, part: Any, model: nn.Module) -> list[Site]:
        if isinstance(part, AdapterConfig):
            return part.sites(model)
        return [site for site, _ in self._make(part, model, lambda site: {})]

    def build(self, site: Site) -> Adapter:
        raise ConfigError("a union builds its parts, each at its own sites.")

    def make(self, model: nn.Module, there: Callable[[Site], dict[str, Adapter]]) -> list[tuple[Site, Adapter]]:
        """Build every part; those that meet at a site become one."""
        found: dict[tuple[str, bool], list[tuple[Site, Adapter]]] = {}
        for part in self.parts:
            for site, adapter in self._make(part, model, there):
                found.setdefault((site.write, site.map_width > 0), []).append((site, adapter))
        return [(made[0][0], _together(made)) for made in found.values()]

    def _make(
        self, part: Any, model: nn.Module, there: Callable[[Site], dict[str, Adapter]]
    ) -> list[tuple[Site, Adapter]]:
        if _virtual(part):
            return MAKERS[part.peft_type](part, model, self.gated)
        made = part.make(model, there) if isinstance(part, AdapterConfig) else make_maps(part, model)
        return [(site, Gated(adapter, site)) for site, adapter in made] if self.gated else made


def _together(made: list[tuple[Site, Adapter]]) -> Adapter:
    if len(made) == 1:
        return made[0][1]
    where = f"union: the parts at {made[0][0].write}"
    if len({site.read for site, _ in made}) > 1 or len({adapter.before for _, adapter in made}) > 1:
        raise ConfigError(f"{where} read different places. Give them other positions.")
    if len({adapter.tokens for _, adapter in made}) > 1:
        raise ConfigError(f"{where} are for different tokens.")
    if any(isinstance(adapter, Around) for _, adapter in made):
        raise ConfigError(f"{where} cannot share a site: virtual tokens change its whole call. Leave one out.")
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
        for number, adapter in enumerate(a for a in adapters if isinstance(a, Gated)):
            adapter.label = f"gate_{number + 1}"

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        for part in self.parts:
            y = part(x if part.reads else None, y)
        return y


class Gated(Adapter):
    """`y' = y + sigmoid(w z + b) (part(x, y) - y)`, with `z` what the part reads: one number a token.

    Args:
        part: the adapter that is weighed.
        site: where it is.

    Raises:
        ConfigError: the part has to be undone exactly, so it cannot be weighed.
    """

    label = "gate"

    def __init__(self, part: Adapter, site: Site) -> None:
        super().__init__()
        if site.position in ("embedding", "unembedding"):
            raise ConfigError("union: an invertible part cannot be gated. Leave it out, or gated=True.")
        self.part = part
        self.reads, self.before, self.tokens = part.reads, part.before, part.tokens
        self.gate = nn.Linear((site.map_width or site.width) if part.reads else site.width, 1)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        z = y if x is None else x
        gate = torch.sigmoid(self.gate(z.to(self.gate.weight.dtype)))
        self.observe(self.label, gate)
        return y + gate.to(y.dtype) * (self.part(x, y) - y)


def _virtual(part: Any) -> bool:
    return not isinstance(part, AdapterConfig) and part.peft_type in MAKERS


def _part(part: Any) -> PeftConfig:
    if isinstance(part, str | AdapterConfig):
        part = as_config(part)
    elif not isinstance(part, PeftConfig):
        part = _read(part)
    if not isinstance(part, AdapterConfig):
        part = _sorted(part)
        if part.is_prompt_learning and not _virtual(part):
            there = ", ".join(kind.value for kind in MAKERS)
            raise ConfigError(f"union: {part.peft_type.value} cannot be a part. Of its like there are: {there}.")
    return part


def _read(values: Any) -> Any:
    """Make a part of what was stored of it."""
    kind = str(values.get("peft_type", "") if isinstance(values, dict) else values).rpartition(".")[2]
    own = Registry.kinds.get(kind.lower())
    cls = own.config_cls if own else PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if cls is None:
        there = f"{', '.join(Registry.kinds)}, and PEFT's {', '.join(PEFT_TYPE_TO_CONFIG_MAPPING)}"
        raise ConfigError(f"union: {kind or values!r} is no adapter kind. There are: {there}.")
    known = {f.name for f in fields(cls) if f.init}
    left_out = {"peft_type", "auto_mapping", "peft_version"}
    if unknown := sorted(values.keys() - known - left_out):
        raise ConfigError(
            f"union: unknown setting {unknown[0]!r} of a {kind} part; a newer version may have written it."
        )
    return cls(**{key: value for key, value in values.items() if key in known - left_out})


def _sorted(part: Any) -> PeftConfig:
    """Return a PEFT config with lists in the place of sets, so that it is written the same every time."""
    import copy

    part = copy.deepcopy(part)
    for key, value in vars(part).items():
        if isinstance(value, set):
            setattr(part, key, sorted(value))
    return part


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
