"""What every adapter kind is: a config, a module `y' = f(x, y)`, and an entry in the registry.

Axes: `B` batch, `T` tokens, `D` width of the model, `R` bottleneck.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig
from torch import Tensor, nn

from interleaf.errors import ConfigError
from interleaf.sites import Site, find_sites, select_sites, target_sites


@dataclass
class AdapterConfig(PeftConfig):
    """Where an adapter goes; each kind's config adds what it is."""

    positions: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    """Sublayers to adapt: attention, cross_attention, ffn, block."""
    layers: str | list[int] = "all"
    """Layers of each stack to adapt: all, first:n, last:n, or a list of numbers."""
    target_modules: str | list[str] | None = None
    """Modules to adapt by name instead: name endings, or one regular expression."""
    tokens: str = "all"
    """Tokens to adapt: all, or of the prompt first:n, last:n, or both as first:n,last:n."""
    input_dim: int | None = None
    """Width of the model; read from its config when not given."""

    modules_to_save: list[str] | None = None
    """Modules trained whole and saved along; by default the task's head."""
    registered_as: ClassVar[Any] = None
    """The kind's PeftType, set when it is registered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.registered_as
        if not re.fullmatch(r"all|(first|last):[1-9]\d*(,(first|last):[1-9]\d*)*", self.tokens):
            raise ConfigError(f"tokens={self.tokens!r}: expected 'all', 'first:n', 'last:n' or 'first:n,last:n'.")

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites of `model` this config adapts.

        Raises:
            SiteError: nothing matches, or the model has no such layer or position.
        """
        if self.target_modules is not None:
            return target_sites(model, self.target_modules, self.input_dim)
        return select_sites(find_sites(model, self.input_dim), self.positions, self.layers)

    @abstractmethod
    def build(self, site: Site) -> Adapter:
        """Make the adapter for one site."""

    @property
    def needs(self) -> list[str]:
        """Adapters that must be on the model before this one, and stay as long as it does."""
        return []

    @property
    def virtual_tokens(self) -> bool:
        """Whether it adds tokens that are not in the text: then it is not the identity, and takes a whole batch."""
        return False

    def make(self, model: nn.Module, there: Callable[[Site], dict[str, Adapter]]) -> list[tuple[Site, Adapter]]:
        """Build the adapters of all sites.

        Args:
            model: the model they are for.
            there: tells the adapters that are at a site already, by name.

        Raises:
            SiteError: the config matches no site.
        """
        sites = self.sites(model)
        adapters = [self.build(site) for site in sites]
        for adapter in adapters:
            adapter.tokens = self.tokens
        self.link(model, sites, adapters, [there(site) for site in sites])
        return list(zip(sites, adapters, strict=True))

    def link(
        self, model: nn.Module, sites: list[Site], adapters: list[Adapter], others: list[dict[str, Adapter]]
    ) -> None:
        """Connect what was built with what it shares: one another, other adapters at the site, a norm of the base."""


class Adapter(nn.Module):
    """A function of what a site reads and what it writes.

    `reads` says whether the adapter needs `x`; `before` whether it changes the layer's input
    instead of its output; `tokens` which tokens it changes; `composition` what a fusion fuses.
    """

    reads: bool = False
    before: bool = False
    tokens: str = "all"
    composition: Any = None
    observed: dict[str, Tensor] | None = None

    @property
    def watches_input(self) -> bool:
        """Whether it needs or changes what its site reads."""
        return self.reads or self.before

    def observe(self, name: str, value: Tensor) -> None:
        """Show an inner quantity, such as a gate, to whoever looks (`AdaptedModel.observe`)."""
        if self.observed is not None:
            self.observed[name] = value.detach()

    def penalty(self) -> Tensor | None:
        """Return a term of the training loss, or None."""
        return None

    @abstractmethod
    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Return the new `y`.

        Args:
            x: what the site reads, shape [B, T, D]; None unless `reads`.
            y: what the site writes (its input, if `before`), shape [B, T, D].
        """


class Around(Adapter):
    """What changes a whole module's call instead of the residual stream: virtual tokens of a prefix or a prompt.

    `lengthens` says whether the module sees more tokens than it was given.
    """

    lengthens: bool = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's arguments, changed; the slot calls it before the module."""
        return args, kwargs

    def leave(self, module: nn.Module, output: Any) -> Any:
        """Return the module's output, changed; the slot calls it after the module."""
        return output

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Return `y`: nothing is changed in the residual stream."""
        return y


@dataclass(frozen=True)
class Kind:
    """One registered adapter kind: its PEFT name, its config class and its presets."""

    name: str
    config_cls: type[AdapterConfig]
    presets: dict[str, dict[str, Any]]


C = TypeVar("C", bound=type[AdapterConfig])


class Registry:
    """All adapter kinds, by name; the CLI, the docs and the contract tests read it."""

    kinds: ClassVar[dict[str, Kind]] = {}

    @classmethod
    def presets(cls) -> dict[str, AdapterConfig]:
        """Return every preset by name, each as a fresh config."""
        return {p: k.config_cls(**o) for k in cls.kinds.values() for p, o in k.presets.items()}

    @classmethod
    def preset(cls, name: str) -> AdapterConfig:
        """Return one preset as a fresh config.

        Raises:
            ConfigError: there is no such preset.
        """
        for kind in cls.kinds.values():
            if name in kind.presets:
                return kind.config_cls(**kind.presets[name])
        there = ", ".join(sorted({*cls.kinds, *(p for kind in cls.kinds.values() for p in kind.presets)}))
        raise ConfigError(f"there is no preset {name!r}. There are: {there}.")


def register_adapter(name: str, presets: dict[str, dict[str, Any]] | None = None) -> Callable[[C], C]:
    """Register a config class as an adapter kind (a class decorator).

    Args:
        name: the kind's name in lower case; also its PEFT type.
        presets: named settings of this kind; by default one, of the kind's name.

    Raises:
        ConfigError: the name, or a preset's, is taken.
    """

    def register(config_cls: C) -> C:
        from interleaf.tuner import register_kind

        if name in Registry.kinds:
            raise ConfigError(f"the adapter kind {name!r} is registered already. Choose another name.")
        named = {name: {}} if presets is None else presets
        if taken := [p for kind in Registry.kinds.values() for p in kind.presets if p in named]:
            raise ConfigError(f"{name!r}: there is a preset {taken[0]!r} of another kind already. Choose another name.")
        config_cls.registered_as = register_kind(name, config_cls)
        Registry.kinds[name] = Kind(name, config_cls, named)
        return config_cls

    return register


def as_config(config: str | AdapterConfig, **overrides: Any) -> AdapterConfig:
    """Turn the name of a preset or of a kind, or a config, into a config of its own.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    import copy

    kind = Registry.kinds.get(config) if isinstance(config, str) else None
    if kind is not None and kind.name not in kind.presets:
        made, own, settings = None, kind.config_cls, {}
    else:
        made = copy.deepcopy(config) if isinstance(config, AdapterConfig) else Registry.preset(config)
        own, settings = type(made), _fields(made)
    if unknown := set(overrides) - {f.name for f in fields(own)}:
        raise ConfigError(f"unknown adapter setting {sorted(unknown)[0]!r} for {own.__name__}.")
    return own(**{**settings, **overrides}) if made is None or overrides else made


def _fields(config: AdapterConfig) -> dict[str, Any]:
    own = ("peft_type", "auto_mapping", "peft_version")
    return {f.name: getattr(config, f.name) for f in fields(config) if f.init and f.name not in own}
