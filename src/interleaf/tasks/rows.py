"""How a task's rows are read from any kind of file."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interleaf.bundled import resolve
from interleaf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet", "document")
LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "topic", "target")


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
        raise DataError(f"{ref} cannot be read as {READERS[path.suffix]}: {first_line(error)}") from error
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
        raise DataError(f"{ref} is no folder that `datasets` saved: {first_line(error)}") from error
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
        raise DataError(f"{ref} is no file here and could not be read from the hub: {first_line(error)}") from error


def padding(tokenizer: Any) -> int | None:
    """Return what lengths are padded to a multiple of: 8, where the model's longest input allows it.

    Vector units add up 8 numbers at a time. So a row's states are the same to the bit in any batch, on the CPU.
    """
    return 8 if tokenizer.model_max_length % 8 == 0 else None


def shortest_first(rows: Dataset) -> Dataset:
    """Sort encoded rows by their number of tokens, so that a batch to evaluate holds little padding."""
    return rows.select(by_length(rows))


def by_length(rows: Dataset) -> list[int]:
    """Return the numbers of encoded rows, those with the fewest tokens first."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return sorted(range(len(rows)), key=lengths.__getitem__)


def token_batches(rows: Dataset, budget: int, seed: int) -> list[list[int]]:
    """Put encoded rows of like length together, each batch with at most so many tokens, its padding counted.

    Raises:
        ConfigError: a row is longer than that.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    if max(lengths) > budget:
        raise ConfigError(f"batch_tokens={budget}: a row has {max(lengths)} tokens. Allow more, or lower max_length.")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    batches: list[list[int]] = [[]]
    for number in sorted(order, key=lengths.__getitem__):  # those of one length stay shuffled
        if (len(batches[-1]) + 1) * lengths[number] > budget:
            batches.append([])
        batches[-1].append(number)
    return batches


def model_inputs(rows: Dataset, model: Any) -> Dataset:
    """Keep of encoded rows the columns that a model takes."""
    taken = inspect.signature(model.forward).parameters
    return rows.select_columns([c for c in rows.column_names if c in taken or c == "labels"])


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


def no_gaps(values: Iterable[Any], column: str, ref: str) -> None:
    """Check that a column has something in every row.

    Raises:
        DataError: an empty cell, and where.
    """
    empty = [i for i, v in enumerate(values) if v is None or v != v or not str(v).strip()]
    if empty:
        raise DataError(f"{ref}: column {column!r} is empty in {len(empty)} rows, the first is row {empty[0] + 1}.")


def read_pairs(ref: str) -> Dataset:
    """Read a table, two line-aligned text files (`a.en,a.pt`), or a gettext catalog, into a table of pairs.

    Raises:
        DataError: it is missing, empty or malformed, or the two files differ in length.
    """
    first, _, second = ref.partition(",")
    if second:
        return _aligned(Path(first), Path(second))
    if Path(ref).suffix in (".po", ".mo"):
        return _catalog(Path(ref))
    return read_rows(ref)


def _aligned(left: Path, right: Path) -> Dataset:
    from datasets import Dataset

    for path in (left, right):
        if not path.is_file():
            raise DataError(f"there is no file {str(path)!r}.")
    sources, targets = (path.read_text("utf-8").splitlines() for path in (left, right))
    if len(sources) != len(targets):
        raise DataError(f"{left} has {len(sources)} lines and {right} {len(targets)}: they are not aligned.")
    if not sources:
        raise DataError(f"{left} is empty.")
    return Dataset.from_dict({"source": sources, "target": targets})


def _catalog(path: Path) -> Dataset:
    """Read the translated messages of a gettext catalog; fuzzy and obsolete ones are no translations."""
    import polib
    from datasets import Dataset

    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}.")
    try:
        entries = polib.pofile(str(path)) if path.suffix == ".po" else polib.mofile(str(path))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a gettext catalog: {first_line(error)}") from error
    pairs = [
        pair for entry in entries if not entry.obsolete and "fuzzy" not in entry.flags for pair in _messages(entry)
    ]
    if not pairs:
        raise DataError(f"{path} holds no translated message.")
    return Dataset.from_dict({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]})


def _messages(entry: Any) -> Iterator[tuple[str, str]]:
    if entry.msgid and entry.msgstr:
        yield entry.msgid, entry.msgstr
    if entry.msgid_plural:
        for source, number in ((entry.msgid, 0), (entry.msgid_plural, 1)):
            if target := entry.msgstr_plural.get(number):
                yield source, target


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


def first_line(error: Exception) -> str:
    """Return the first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
