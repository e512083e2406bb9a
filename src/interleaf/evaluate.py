"""Use stored adapters, one or a composition: open them with base and task, measure them on data, predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interleaf import adapterhub, store
from interleaf.adapters import FusionConfig
from interleaf.compose import Fuse, Stack, by_row, head_of, leaves, parse, replace_children
from interleaf.errors import ConfigError, StoreError
from interleaf.model import adapt
from interleaf.slot import slots
from interleaf.tasks import TASKS, check_options
from interleaf.tasks.base import Task
from interleaf.tuner import task_head

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Opened:
    """A stored adapter on its base, with the task it was trained for."""

    task: Task
    model: Any
    tokenizer: Any
    record: dict[str, Any]

    def evaluate(
        self, data: str, batch_size: int = 64, *, limit: int | None = None, off: bool = False
    ) -> dict[str, Any]:
        """Return the task's full metrics on labelled data.

        Args:
            limit: so many rows only, evenly spread.
            off: with the adapter switched off: what the base alone can do.

        Raises:
            DataError: the data is not of the form the adapter was trained on.
            ConfigError: `off` for a task whose head was trained with the adapter.
        """
        if off and task_head(self.model):
            raise ConfigError(f"off: the base alone has no head for {self.task.name}, so it cannot be measured.")
        rows = self.task.load_one(data)
        rows = rows if limit is None else spread(rows, limit)
        with self.model.disable_adapter() if off else nullcontext():
            return self.task.evaluate(self.model, self.tokenizer, rows, batch_size)

    def predict(self, texts: Iterable[str], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Yield the task's prediction for each text, in order."""
        return self.task.predict(self.model, self.tokenizer, texts, batch_size)


def spread(rows: Dataset, limit: int) -> Dataset:
    """Return so many rows, evenly spread.

    Raises:
        ConfigError: none are asked for.
    """
    if limit < 1:
        raise ConfigError(f"limit={limit}: expected 1 or more.")
    return rows.select([i * len(rows) // limit for i in range(limit)]) if limit < len(rows) else rows


def open_adapter(
    setup: str | Path,
    base: str | None = None,
    skip_layers: str | list[int] | None = None,
    task_options: dict[str, Any] | None = None,
) -> Opened:
    """Load an adapter, or a composition of several, with the base and the task it names.

    Args:
        setup: an adapter folder or a hub name, or a composition of such, as `stack(out/lang, out/task)`. The last one
            with a task gives the task and the head.
        base: where the base is, if not where it was when the adapter was trained.
        skip_layers: layers that run without adapters (AdapterDrop): first:n, last:n, or a list.
        task_options: settings of the task that differ from those it was trained with.

    Raises:
        StoreError: damaged, made for another base, or stored without a task.
        BaseModelError: the base cannot be found.
        ConfigError: a composition that gives no one answer a row, or layers that cannot be skipped.
    """
    node = _with_what_it_needs(_read_setup(setup))
    stored = {path: _read(path) for path in leaves(node)}
    with_task = [path for path, one in stored.items() if one is not None and one.adaptation.task]
    if not with_task:
        raise StoreError(f"{setup} was stored without a task, so nothing is known of its data and labels.")
    described = stored[with_task[-1]]
    assert described is not None
    task = _task(described, task_options or {})
    base = base or described.config.base_model_name_or_path
    if not base:
        raise StoreError(f"{with_task[-1]} does not say which base it was trained on. Name it with --base.")
    tokenizer = task.tokenizer(base)
    model = adapt(task.model(base))
    names = {
        # a composition gives one answer, by one head: another's may have other labels
        path: model.load_adapter(path, name, tokenizer=tokenizer, with_head=None if path == with_task[-1] else False)
        for path, name in _names(stored).items()
    }
    _activate(model, _renamed(node, names), skip_layers, names[with_task[-1]])
    if torch.cuda.is_available():
        model.to("cuda")
    return Opened(task, model.eval(), tokenizer, described.record)


def _read_setup(setup: str | Path) -> Any:
    """Read a composition of folders; a folder may have brackets in its name."""
    node = str(setup) if Path(setup).exists() else parse(str(setup))
    if by_row(node):
        raise ConfigError(f"{node}: parallel and batch_split give no one answer a row. Use stack, fuse or average.")
    for part in _parts(node):
        if isinstance(part, Fuse) and not part.settings():
            raise ConfigError(f'{part}: name the folder of the trained fusion too: fuse(a, b, name="out/fused").')
    return node


def _with_what_it_needs(node: Any) -> Any:
    """Put below an adapter that stands alone those that it was trained onto."""
    one = _read(node) if isinstance(node, str) else None
    onto = one.adaptation.run.get("onto") if one is not None else None
    if not onto:
        return node
    # folders that were moved together find one another
    beside = [str(Path(node).parent / Path(path).name) for path in onto]
    onto = [path if Path(path).exists() else near for path, near in zip(onto, beside, strict=True)]
    return Fuse(*onto, name=node) if one is not None and isinstance(one.config, FusionConfig) else Stack(*onto, node)


def _parts(node: Any) -> list[Any]:
    return [node, *(part for child in getattr(node, "children", ()) for part in _parts(child))]


def _read(path: str) -> store.Stored | None:
    """Read and check a folder, or a name on the hub; AdapterHub's files say nothing of a task."""
    return None if adapterhub.is_adapterhub(store._folder(path)) else store.read(path)


def _task(stored: store.Stored, options: dict[str, Any]) -> Task:
    described = stored.adaptation.task or {}
    if described["name"] not in TASKS:
        raise StoreError(f"{stored.path}: this version has no task {described['name']!r}.")
    check_options(described["name"], options)
    return TASKS[described["name"]].from_state({**described["state"], **options})


def _names(stored: dict[str, store.Stored | None]) -> dict[str, str | None]:
    """Keep each adapter's own name, with a number behind it where an earlier one has it; None: the folder knows.

    Raises:
        StoreError: an adapter needs another by a name that two have.
    """
    names: dict[str, str | None] = {}
    twice = set()
    for path, one in stored.items():
        own = None if one is None else str(one.record.get("name", "default"))
        if own is not None and own in names.values():
            twice.add(own)
            own = f"{own}_{len(names) + 1}"
        names[path] = own
    for path, one in stored.items():
        if one is not None and (unclear := twice & set(getattr(one.config, "needs", []))):
            raise StoreError(f"{path} needs the adapter {unclear.pop()!r}, and two of these are called that.")
    return names


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """Put the adapters' names in the place of their folders."""
    if isinstance(node, str):
        return names.get(node, node)
    children = tuple(_renamed(child, names) for child in node.children)
    return Fuse(*children, name=names[node.name]) if isinstance(node, Fuse) else replace_children(node, children)


def _activate(model: Any, node: Any, skip_layers: str | list[int] | None, with_task: str) -> None:
    """Run a composition, and check that its head is the task's and that layers to skip have adapters."""
    model.set_adapter(node, skip_layers=skip_layers)
    heads = [name for name, config in model.adapters.items() if config.modules_to_save]
    if (head := head_of(node, heads)) not in ("", with_task):
        raise StoreError(f"{node}: the head of {head!r} would be used, but it was stored without a task.")
    if skip_layers is None:
        return
    there = {slot.site.layer for slot in slots(model) if any(name in slot.adapters for name in leaves(node))}
    skipped = {layer for slot in slots(model) for layer in slot.running.skip_layers}
    listed = ", ".join(map(str, sorted(there))) or "none"
    if not there & skipped:
        raise ConfigError(f"skip_layers={skip_layers}: no adapter is there. Layers with adapters: {listed}.")
    if there <= skipped:
        raise ConfigError(f"skip_layers={skip_layers} leaves no adapter. Layers with adapters: {listed}.")
