"""Compositions of adapters as data: stack, fuse, parallel, split, batch_split, average, freely nested.

A composition is a tree whose leaves are adapters' names, `""` being the base. One interpreter, `interpret.run`, serves
every adapter kind. Pfeiffer et al. 2021 (arXiv 2005.00247) and 2020 (2005.00052), Rücklé et al. 2021 (2010.11918).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from interleaf.errors import ConfigError


@dataclass(frozen=True)
class Composition:
    """Adapters that run together; the children are names or compositions."""

    children: tuple[Any, ...]

    def __init__(self, *children: Any) -> None:
        if not children:
            raise ConfigError(f"{self.word}() has no adapters in it.")
        object.__setattr__(self, "children", tuple(_child(c) for c in children))

    word = "composition"

    def settings(self) -> dict[str, Any]:
        """Return what the composition is told besides its children."""
        return {}

    def __str__(self) -> str:
        told = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in self.settings().items()]
        return f"{self.word}({', '.join([*(_quoted(c) for c in self.children), *told])})"

    __repr__ = __str__


class Stack(Composition):
    """One adapter after the other."""

    word = "stack"


class Parallel(Composition):
    """Every child on a copy of the batch of its own: rows of the first, then rows of the second, and so on."""

    word = "parallel"


@dataclass(frozen=True, init=False, repr=False)
class Fuse(Composition):
    """AdapterFusion: attention over what the children change; `name` is the adapter that holds its weights."""

    name: str = ""
    word = "fuse"

    def __init__(self, *children: Any, name: str = "") -> None:
        super().__init__(*children)
        object.__setattr__(self, "name", name or ",".join(str(c) for c in self.children))

    def settings(self) -> dict[str, Any]:
        return {} if self.name == ",".join(str(c) for c in self.children) else {"name": _quoted(self.name)}


@dataclass(frozen=True, init=False, repr=False)
class Average(Composition):
    """The weighted mean of what the children change; weights are made to add up to one."""

    weights: tuple[float, ...] = ()
    word = "average"

    def __init__(self, *children: Any, weights: Sequence[float] | None = None) -> None:
        super().__init__(*children)
        given = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(children)
        if len(given) != len(children) or sum(given) <= 0:
            raise ConfigError(
                f"average: {len(children)} adapters need as many weights, of a positive sum; got {given}."
            )
        object.__setattr__(self, "weights", given)

    def settings(self) -> dict[str, Any]:
        return {} if set(self.weights) == {1.0} else {"weights": self.weights}


@dataclass(frozen=True, init=False, repr=False)
class Split(Composition):
    """By token: the first child on a row's first `splits[0]` real tokens, the second on the next, and so on.

    Tokens after the last range stay as the base has them.
    """

    splits: tuple[int, ...] = ()
    word = "split"

    def __init__(self, *children: Any, splits: int | Sequence[int]) -> None:
        super().__init__(*children)
        object.__setattr__(self, "splits", _counts("split", "splits", splits, len(children)))

    def settings(self) -> dict[str, Any]:
        return {"splits": self.splits}


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Composition):
    """By row: the first child on the first `batch_sizes[0]` rows, the second on the next, and so on."""

    batch_sizes: tuple[int, ...] = ()
    word = "batch_split"

    def __init__(self, *children: Any, batch_sizes: int | Sequence[int]) -> None:
        super().__init__(*children)
        object.__setattr__(self, "batch_sizes", _counts("batch_split", "batch_sizes", batch_sizes, len(children)))

    def settings(self) -> dict[str, Any]:
        return {"batch_sizes": self.batch_sizes}


class PerRow(Composition):
    """One composition for each row, as `adapter_names` gives them; made by `per_row`."""

    word = "per_row"
    order: tuple[int, ...]

    def grouped(self) -> BatchSplit:
        """Return the split of the rows once they are in `order`."""
        runs = [(kind, len(list(run))) for kind, run in groupby(self.children[i] for i in self.order)]
        return BatchSplit(*(kind for kind, _ in runs), batch_sizes=[count for _, count in runs])


def per_row(names: Sequence[Any]) -> PerRow:
    """Make the composition of `adapter_names`: names or compositions, one per row; `""` and `__base__` are the base."""
    node = PerRow(*("" if n in (None, "__base__") else parse(n) if isinstance(n, str) else n for n in names))
    kinds = list(dict.fromkeys(node.children))
    if any(width(kind) > 1 for kind in kinds):
        raise ConfigError("adapter_names: parallel() makes copies of a whole batch and cannot be one row's adapter.")
    order = sorted(range(len(names)), key=lambda i: kinds.index(node.children[i]))
    object.__setattr__(node, "order", tuple(order))
    return node


WORDS: dict[str, type[Composition]] = {c.word: c for c in (Stack, Fuse, Parallel, Split, BatchSplit, Average)}


def _counts(word: str, setting: str, given: int | Sequence[int], children: int) -> tuple[int, ...]:
    counts = (given,) * children if isinstance(given, int) else tuple(given)
    if len(counts) != children or any(not isinstance(c, int) or c < 1 for c in counts):
        raise ConfigError(f"{word}: {setting}={given}: expected {children} numbers of 1 or more, one per adapter.")
    return counts


def _child(child: Any) -> Any:
    if isinstance(child, str | Composition):
        return child
    raise ConfigError(f"a composition holds adapters' names and compositions, not {child!r}.")


def _quoted(node: Any) -> str:
    return str(node) if isinstance(node, Composition) or re.fullmatch(r"[\w./-]+", node) else f'"{node}"'


_TOKEN = re.compile(r'\s*(?:"([^"]*)"|([\w./-]+)|([(),=\[\]]))')


def parse(text: str) -> Any:
    """Read the text form, such as `stack(lang, task)`; a bare name is itself.

    Raises:
        ConfigError: not a composition, with the place where it stops being one.
    """
    if "(" not in text:
        return text
    tokens: list[tuple[str, str, int]] = []
    at = 0
    while at < len(text.rstrip()):
        if (match := _TOKEN.match(text, at)) is None:
            raise ConfigError(f"{text!r} cannot be read as a composition: stopped at {text[at:]!r}.")
        kind = "name" if match[1] is not None else "word" if match[2] else match[3]
        tokens.append((kind, match[1] if match[1] is not None else match[2] or match[3], match.start()))
        at = match.end()
    reader = _Reader(text, tokens)
    node = reader.node()
    reader.expect_end()
    return node


class _Reader:
    """Recursive descent over the tokens of a text form."""

    def __init__(self, text: str, tokens: list[tuple[str, str, int]]) -> None:
        self.text, self.tokens, self.at = text, [*tokens, ("end", "", len(text))], 0

    def fail(self) -> ConfigError:
        rest = self.text[self.tokens[self.at][2] :].strip() or "the end"
        example = "Write for example stack(a, b) or split(a, b, splits=[8, 8])."
        return ConfigError(f"{self.text!r} cannot be read as a composition: stopped at {rest!r}. {example}")

    def take(self, *kinds: str) -> str:
        kind, value, _ = self.tokens[self.at]
        if kind not in kinds:
            raise self.fail()
        self.at += 1
        return value

    def expect_end(self) -> None:
        self.take("end")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)][0]

    def node(self) -> Any:
        if self.peek() == "name" or self.peek(1) != "(":
            return self.take("name", "word")
        word = self.take("word")
        if word not in WORDS:
            raise ConfigError(f"{self.text!r}: there is no composition {word!r}. There are: {', '.join(WORDS)}.")
        self.take("(")
        children, settings = [], {}
        while self.peek() != ")":
            if self.peek(1) == "=":
                key = self.take("word")
                self.take("=")
                settings[key] = self.value()
            else:
                children.append(self.node())
            if self.peek() != ")":
                self.take(",")
        self.take(")")
        try:
            return WORDS[word](*children, **settings)
        except TypeError as error:
            raise ConfigError(f"{self.text!r}: {word} {str(error).partition('() ')[2] or error}.") from error

    def value(self) -> Any:
        if self.peek() == "name":
            return self.take("name")
        if self.peek() != "[":
            return self.number()
        self.take("[")
        values = [self.number()]
        while self.peek() == ",":
            self.take(",")
            values.append(self.number())
        self.take("]")
        return values

    def number(self) -> float:
        text = self.take("word")
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            self.at -= 1
            raise self.fail() from None


def leaves(node: Any) -> list[str]:
    """Return the adapters' names in a composition, each once, those of fusions behind their children's."""
    if isinstance(node, str):
        return [node] if node else []
    names = [name for child in node.children for name in leaves(child)]
    return list(dict.fromkeys([*names, node.name] if isinstance(node, Fuse) and node.name else names))


def width(node: Any) -> int:
    """Return how many copies of the batch a composition makes: one, but for Parallel.

    Raises:
        ConfigError: children that make different numbers of copies, or rows split before they are copied.
    """
    if isinstance(node, str):
        return 1
    widths = [width(child) for child in node.children]
    if isinstance(node, Parallel):
        return sum(widths)
    most = max(widths)
    if any(w not in (1, most) for w in widths):
        raise ConfigError(f"{node}: its children make {widths} copies of the batch; they must make as many, or one.")
    if most > 1 and any(isinstance(n, BatchSplit) for n in [node, *node.children]):
        raise ConfigError(f"{node}: rows cannot be split where parallel copies them. Put batch_split inside parallel.")
    return most


def by_row(node: Any) -> bool:
    """Tell whether rows of one batch go through different adapters."""
    return isinstance(node, Composition) and (
        isinstance(node, Parallel | BatchSplit | PerRow) or any(by_row(child) for child in node.children)
    )


def head_of(node: Any, heads: Container[str]) -> str:
    """Return the adapter whose task head a composition uses: the last that has one, or `""`."""
    return next((name for name in reversed(leaves(node)) if name in heads), "")


def trained_names(node: Any) -> list[str]:
    """Return the adapters of a composition that train: all, but of a fusion only the fusion itself."""
    if isinstance(node, str):
        return [node] if node else []
    if isinstance(node, Fuse):
        return [node.name]
    return list(dict.fromkeys(name for child in node.children for name in trained_names(child)))


def prune(node: Any, here: Callable[[str], bool]) -> Any:
    """Keep of a composition what is at one site; `""` stands for nothing."""
    if isinstance(node, str):
        return node if node and here(node) else ""
    kept = tuple(prune(child, here) for child in node.children)
    if not any(kept):
        return ""
    if isinstance(node, Stack):
        kept = tuple(child for child in kept if child)
        if len(kept) == 1:
            return kept[0]
    pruned = replace_children(node, kept)
    return pruned


def expand(node: Any, fusions: Mapping[str, Any]) -> Any:
    """Put a fusion's composition in the place of its bare name."""
    if isinstance(node, str):
        return fusions.get(node, node)
    return replace_children(node, tuple(expand(child, fusions) for child in node.children))


def backwards(node: Any) -> Any:
    """Turn every stack of a composition around."""
    if isinstance(node, str):
        return node
    turned = tuple(backwards(child) for child in node.children)
    return replace_children(node, turned[::-1] if isinstance(node, Stack) else turned)


def replace_children(node: Composition, children: tuple[Any, ...]) -> Composition:
    """Return a composition like another with other children."""
    twin = object.__new__(type(node))
    twin.__dict__.update(node.__dict__, children=children)
    return twin
