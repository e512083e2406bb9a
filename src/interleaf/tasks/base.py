"""What every task is, and how its rows are read from any kind of file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from interleaf.bundled import resolve
from interleaf.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet", "document")
LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "topic", "target")


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows held out."""

    train: Dataset
    dev: Dataset


class Task(Protocol):
    """One object that knows a task's data, model, metrics and predictions."""

    name: ClassVar[str]
    best_metric: ClassVar[str]
    labels: list[str] | None

    def load(
        self, train: str, dev: str | None = None, *, dev_fraction: float = 0.1, seed: int = 0, limit: int | None = None
    ) -> Splits:
        """Read and check the rows; make a held-out split if none is given."""

    def load_one(self, ref: str) -> Dataset:
        """Read and check rows to evaluate on."""

    def tokenizer(self, base: str) -> Any:
        """Load the base's tokenizer."""

    def model(self, base: str) -> Any:
        """Load the base with this task's head."""

    def encode(self, data: Dataset, tokenizer: Any) -> Dataset:
        """Turn rows into model inputs."""

    def collator(self, tokenizer: Any) -> Any:
        """Return what makes a batch of encoded rows."""

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Return the headline metrics, in the Trainer's form."""

    def report(self, true: Any, scores: Any) -> dict[str, Any]:
        """Return all metrics."""

    def predict(
        self, model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Yield a prediction a text, in order."""

    def state(self) -> dict[str, Any]:
        """Return what is stored with the adapter."""


def read_rows(ref: str) -> Dataset:
    """Read a table: a file, a `datasets` folder, `bundled:NAME`, or `owner/name[@config][:split]` on the hub.

    Raises:
        DataError: it is missing, empty or malformed.
    """
    path = Path(resolve(ref))
    if path.is_dir():
        data = _read_folder(path, ref)
    elif path.is_file():
        data = _read_file(path, ref)
    elif path.suffix in READERS or ref.startswith((".", "/", "~")) or "/" not in ref:
        raise DataError(f"there is no data at {ref!r}: no such file or folder, and no name on the hub (owner/name).")
    else:
        data = _read_hub(ref)
    if len(data) == 0:
        raise DataError(f"{ref} is empty: it has no rows.")
    return data


def _read_file(path: Path, ref: str) -> Dataset:
    from datasets import Dataset

    if path.suffix not in READERS:
        raise DataError(f"{ref}: files ending in {path.suffix!r} cannot be read. Use {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{ref} is empty.")
    try:
        frame = _read_frame(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{ref} cannot be read as {READERS[path.suffix]}: {_first_line(error)}") from error
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_frame(path: Path) -> Any:
    import pandas as pd

    kind = READERS[path.suffix]
    if kind == "parquet":
        return pd.read_parquet(path)
    if kind == "json":
        return pd.read_json(path, lines=path.suffix == ".jsonl", dtype=False, convert_dates=False)
    # text such as "NA" or "None" is text; what is empty stays empty and is reported with its line
    separator = "\t" if path.suffix == ".tsv" else ","
    return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""], dtype=str, encoding="utf-8")


def _read_folder(path: Path, ref: str) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{ref} is no folder that `datasets` saved: {_first_line(error)}") from error
    if not isinstance(data, Dataset):
        raise DataError(f"{ref} holds several splits ({', '.join(data)}). Name one: {ref}/SPLIT.")
    return data


def _read_hub(ref: str) -> Dataset:
    from datasets import load_dataset

    name, _, split = ref.partition(":")
    name, _, config = name.partition("@")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        # the hub's client raises errors of many libraries; each means the same to a user
        raise DataError(f"{ref} is no file here and could not be read from the hub: {_first_line(error)}") from error


def shortest_first(rows: Dataset) -> Dataset:
    """Sort encoded rows by their number of tokens, so that a batch to evaluate holds little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def find_column(data: Dataset, given: str | None, usual: Sequence[str], what: str, taken: Sequence[str] = ()) -> str:
    """Return the name of a column: as given, or by its usual names, or the only one with text.

    Raises:
        DataError: it is not there, or there is more than one to choose from.
    """
    columns = [c for c in data.column_names if c not in taken]
    listed = ", ".join(data.column_names)
    if given is not None:
        if given not in data.column_names:
            raise DataError(f"there is no column {given!r} for the {what}. The columns are: {listed}.")
        return given
    hits = [c for c in columns if c.lower() in usual]
    if not hits and what == "text":
        hits = [c for c in columns if str(data.features[c].dtype) in ("string", "large_string")]
    if len(hits) == 1:
        return hits[0]
    problem = f"several columns could be the {what} ({', '.join(hits)})" if hits else f"no column looks like the {what}"
    raise DataError(f"{problem}. The columns are: {listed}. Name it with `{what}`.")


def read_texts(ref: str, column: str | None = None) -> Iterator[str]:
    """Yield texts to predict on: lines of standard input (`-`) or of a text file, or a table's text column.

    Raises:
        DataError: there is nothing to read.
    """
    if ref == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    path = Path(ref)
    if path.suffix == ".txt":
        if not path.is_file():
            raise DataError(f"there is no file {ref!r}.")
        yield from (line for line in path.read_text("utf-8").splitlines() if line.strip())
        return
    data = read_rows(ref)
    labels = [c for c in data.column_names if c.lower() in LABEL_COLUMNS]
    yield from (str(t) for t in data[find_column(data, column, TEXT_COLUMNS, "text", labels)])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
