"""The interpreter of compositions: what a tree of adapters does to the output of one site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from interleaf.compose import Average, BatchSplit, Fuse, PerRow, Split, Stack, width
from interleaf.errors import ConfigError


class Rows(Protocol):
    """Where in a batch the running adapters are."""

    def narrow(self, rows: slice | Tensor) -> Rows:
        """Return the same for some of the rows."""

    def places(self, y: Tensor) -> Tensor:
        """Return each token's place among its row's real tokens, shape [B, T]."""

    def chosen(self, tokens: str, y: Tensor) -> Tensor:
        """Tell which tokens a `tokens` setting names, shape [B, T]."""


def row_slices(node: Any, rows: int) -> Iterator[tuple[Any, slice]]:
    """Yield the children of a Parallel or BatchSplit with the rows each has of a batch.

    Raises:
        ConfigError: a batch whose rows do not divide so.
    """
    sizes = node.batch_sizes if isinstance(node, BatchSplit) else [width(child) for child in node.children]
    times, rest = divmod(rows, sum(sizes))
    if rest:
        raise ConfigError(f"{node} wants {sum(sizes)} rows, or a multiple; the batch has {rows}.")
    start = 0
    for child, size in zip(node.children, sizes, strict=True):
        yield child, slice(start, start + size * times)
        start += size * times


def row_parts(node: Any, rows: int, device: torch.device) -> tuple[Tensor | None, Any]:
    """Return the order in which a composition takes its rows (None: as they are), and the composition that takes them.

    Raises:
        ConfigError: `adapter_names` of another length than the batch.
    """
    if not isinstance(node, PerRow):
        return None, node
    times, rest = divmod(rows, len(node.order))  # beams: generation repeats each row
    if rest or not times:
        raise ConfigError(f"adapter_names has {len(node.order)} names, the batch has {rows} rows.")
    if node.order == tuple(range(len(node.order))):
        return None, node.grouped()
    return torch.tensor([i * times + j for i in node.order for j in range(times)], device=device), node.grouped()


def run(node: Any, adapters: Mapping[str, Any], x: Tensor | None, y: Tensor, rows: Rows) -> Tensor:
    """Return the new `y` of a composition at one site.

    Args:
        node: the composition, pruned to this site.
        adapters: the site's adapters by name.
        x: what the site reads, shape [B, T, D]; None if no adapter needs it.
        y: what the site writes, shape [B, T, D].
        rows: where in the batch this is.
    """
    if isinstance(node, str):
        return _single(node, adapters, x, y, rows)
    if isinstance(node, Stack):
        for child in node.children:
            y = run(child, adapters, x, y, rows)
        return y
    if isinstance(node, Average):
        total = sum(node.weights)
        changes = [run(child, adapters, x, y, rows) - y for child in node.children]
        weighted = [c * (w / total) for c, w in zip(changes, node.weights, strict=True)]
        return y + torch.stack(weighted).sum(0)
    if isinstance(node, Fuse):
        changes = [run(child, adapters, x, y, rows) - y for child in node.children]
        fusion = adapters[node.name]
        fused: Tensor = fusion.fuse(torch.stack(changes, dim=-2), x if fusion.reads else None, y)
        return fused
    if isinstance(node, Split):
        return _by_token(node, adapters, x, y, rows)
    return _by_row(node, adapters, x, y, rows)


def _by_row(node: Any, adapters: Mapping[str, Any], x: Tensor | None, y: Tensor, rows: Rows) -> Tensor:
    order, node = row_parts(node, y.shape[0], y.device)
    if order is not None:
        x, y, rows = None if x is None else x[order], y[order], rows.narrow(order)
    parts = [
        run(child, adapters, None if x is None else x[part], y[part], rows.narrow(part))
        for child, part in row_slices(node, y.shape[0])
    ]
    joined = torch.cat(parts)
    return joined if order is None else joined[torch.argsort(order)]


def _single(name: str, adapters: Mapping[str, Any], x: Tensor | None, y: Tensor, rows: Rows) -> Tensor:
    if not name:
        return y
    adapter = adapters[name]
    changed: Tensor = adapter(x if adapter.reads else None, y)
    if adapter.tokens == "all":
        return changed
    return torch.where(rows.chosen(adapter.tokens, y).unsqueeze(-1), changed, y)


def _by_token(node: Split, adapters: Mapping[str, Any], x: Tensor | None, y: Tensor, rows: Rows) -> Tensor:
    places = rows.places(y).unsqueeze(-1)
    result, start = y, 0
    for child, size in zip(node.children, node.splits, strict=True):
        inside = (places >= start) & (places < start + size)
        result = torch.where(inside, run(child, adapters, x, y, rows), result)
        start += size
    return result
