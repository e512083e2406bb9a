"""Text classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from interleaf.base import load_base
from interleaf.errors import DataError
from interleaf.metrics import classification_metrics, headline
from interleaf.tasks.base import Splits
from interleaf.tasks.rows import LABEL_COLUMNS, TEXT_COLUMNS, by_length, find_column, no_gaps, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


class TextClassification:
    """Reads labelled texts, makes the model with its head, measures and predicts.

    Args:
        text: column of the text; found if not given.
        text_pair: column of a second text.
        label: column of the label; found if not given.
        max_length: longest input in tokens; longer ones are cut.
        labels: the class names in order; read from the training data if not given.
    """

    name: ClassVar[str] = "classification"
    best_metric: ClassVar[str] = "f1_macro"

    def __init__(
        self,
        *,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        max_length: int = 128,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.text, self.text_pair, self.label = text, text_pair, label
        self.max_length = max_length
        self.labels = list(labels) if labels is not None else None

    def load(
        self, train: str, dev: str | None = None, *, dev_fraction: float = 0.1, seed: int = 0, limit: int | None = None
    ) -> Splits:
        """Read and check the rows, find the labels, hold a stratified share out if there is no dev data.

        Raises:
            DataError: a missing column, an empty cell, one class only, a label that never occurs in train.
        """
        kept = self.load_all(train)
        held = self._known(*self._rows(dev), dev) if dev else None
        if held is None:
            kept, held = self._split(kept, dev_fraction, seed)
        if limit is not None and limit < len(kept):
            kept, _ = self._split(kept, 1 - limit / len(kept), seed)
        return Splits(kept, held)

    def load_all(self, ref: str) -> Dataset:
        """Read and check the rows of one table and find the labels; nothing is held out.

        Raises:
            DataError: as `load`.
        """
        rows, names = self._rows(ref)
        self.labels = self._label_order(names, ref)
        return self._known(rows, names, ref)

    def load_one(self, ref: str) -> Dataset:
        """Read and check rows whose labels must be the known ones.

        Raises:
            DataError: a label that the adapter was not trained on, or rows that cannot be used.
        """
        return self._known(*self._rows(ref), ref)

    def _rows(self, ref: str) -> tuple[Dataset, list[str]]:
        """Read a table into columns text (and text_pair), and its labels as strings."""
        data = read_rows(ref)
        label = find_column(data, self.label, LABEL_COLUMNS, "label")
        text = find_column(data, self.text, TEXT_COLUMNS, "text", [label])
        columns = {
            "text": text,
            **({"text_pair": find_column(data, self.text_pair, (), "text_pair")} if self.text_pair else {}),
        }
        for column in [*columns.values(), label]:
            no_gaps(data[column], column, ref)
        names = _label_names(data, label)
        kept = data.select_columns(list(columns.values())).rename_columns({v: k for k, v in columns.items() if v != k})
        return kept, names

    def _label_order(self, names: Sequence[str], ref: str) -> list[str]:
        found = set(names)
        if len(found) < 2:
            raise DataError(f"{ref} has one class only ({found.pop()!r}): there is nothing to tell apart.")
        if all(name.lstrip("-").isdigit() for name in found):
            return sorted(found, key=int)
        return sorted(found)

    def _known(self, rows: Dataset, names: Sequence[str], ref: str) -> Dataset:
        number = {label: i for i, label in enumerate(self.labels or [])}
        if strange := sorted(set(names) - number.keys()):
            raise DataError(
                f"{ref} has the label {strange[0]!r}, which never occurs in the training data ({', '.join(number)})."
            )
        return rows.add_column("labels", [number[name] for name in names])

    def _split(self, rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Hold a share out so that every class keeps its share in both parts."""
        from sklearn.model_selection import train_test_split

        counts = Counter(rows["labels"])
        rare = min(counts, key=lambda c: counts[c])
        classes = len(counts)
        held = math.ceil(fraction * len(rows))
        if counts[rare] < 2 or held < classes or len(rows) - held < classes:
            name = (self.labels or [])[rare]
            raise DataError(
                f"{len(rows)} rows cannot be divided into two parts with all {classes} classes "
                f"({name!r} has {counts[rare]}). Give more rows, or dev data of its own."
            )
        kept, out = train_test_split(range(len(rows)), test_size=held, random_state=seed, stratify=rows["labels"])
        return rows.select(sorted(kept)), rows.select(sorted(out))

    def tokenizer(self, base: str) -> Any:
        """Load the base's tokenizer; one without padding pads with its end-of-text token.

        Raises:
            BaseModelError: there is no such model.
        """
        from transformers import AutoTokenizer

        found = load_base(base, AutoTokenizer.from_pretrained)
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found

    def model(self, base: str) -> Any:
        """Load the base with a classification head for the labels.

        Raises:
            BaseModelError: there is no such model, or none that classifies.
        """
        from transformers import AutoModelForSequenceClassification

        labels = self.labels or []
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        found = load_base(
            base, lambda path: AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels), **names)
        )
        if found.config.get_text_config().pad_token_id is None:
            found.config.get_text_config().pad_token_id = self.tokenizer(base).pad_token_id
        return found

    def encode(self, data: Dataset, tokenizer: Any) -> Dataset:
        """Turn rows into token ids of at most max_length, with their labels."""
        length = min(self.max_length, tokenizer.model_max_length)

        def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
            return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=length))

        texts = [c for c in data.column_names if c.startswith("text")]
        return data.map(tokens, batched=True, remove_columns=texts, keep_in_memory=True)

    def collator(self, tokenizer: Any) -> Any:
        """Return what pads encoded rows to the longest of a batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Return the headline metrics, in the Trainer's form."""
        return headline(self._report(prediction.label_ids, prediction.predictions))

    def _report(self, true: Any, scores: Any) -> dict[str, Any]:
        """Return all metrics on class numbers [N] and scores [N, C]."""
        scores = scores[0] if isinstance(scores, tuple) else scores  # BART and T5 return states beside logits
        return classification_metrics(true, scores, self.labels or [])

    def evaluate(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int = 64) -> dict[str, Any]:
        """Return all metrics on rows."""
        return self._report(data["labels"], self.scores(model, tokenizer, data, batch_size))

    def scores(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int = 64) -> Any:
        """Return the logits of rows in their order, shape [N, C]; rows of like length share a batch."""
        import numpy as np
        import torch

        rows = self.encode(data, tokenizer)
        order = by_length(rows)
        loader = torch.utils.data.DataLoader(
            rows.select(order), batch_size=batch_size, collate_fn=self.collator(tokenizer)
        )
        found = []
        model.eval()
        with torch.inference_mode():
            for batch in loader:
                batch = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
                found.append(model(**batch).logits.float().cpu().numpy())
        return np.concatenate(found)[np.argsort(order)]

    def examples(self, model: Any, tokenizer: Any, data: Dataset, count: int) -> list[dict[str, Any]]:
        """Return of the first 500 rows the surest mistakes, half of `count` at most, and then rows that are right."""
        import torch

        data = data.select(range(min(500, len(data))))
        chances = torch.from_numpy(self.scores(model, tokenizer, data)).softmax(-1).numpy()
        said = chances.argmax(-1)
        wrong = sorted((i for i, true in enumerate(data["labels"]) if said[i] != true), key=lambda i: -chances[i].max())
        right = [i for i, true in enumerate(data["labels"]) if said[i] == true]
        errors = wrong[: max(count // 2, count - len(right))]
        names = self.labels or []
        return [
            {
                "input": "\n".join(data[i][c] for c in ("text", "text_pair") if c in data.column_names),
                "expected": names[data[i]["labels"]],
                "answer": names[said[i]],
                "score": float(chances[i].max()),
            }
            for i in [*errors, *right[: count - len(errors)]]
        ]

    def predict(
        self, model: Any, tokenizer: Any, texts: Iterable[str], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Yield label, probability and all probabilities for each text, in order."""
        import torch

        training, source = model.training, iter(texts)
        model.eval()
        length = min(self.max_length, tokenizer.model_max_length)
        try:
            while chunk := list(islice(source, batch_size)):
                batch = tokenizer(chunk, truncation=True, max_length=length, padding=True, return_tensors="pt")
                with torch.inference_mode():
                    scores = model(**batch.to(model.device)).logits.float().softmax(-1).tolist()
                yield from (self._prediction(text, row) for text, row in zip(chunk, scores, strict=True))
        finally:
            model.train(training)

    def _prediction(self, text: str, scores: list[float]) -> dict[str, Any]:
        named = dict(zip(self.labels or [], scores, strict=True))
        best = max(named, key=lambda label: named[label])
        return {"text": text, "label": best, "score": named[best], "scores": named}

    def state(self) -> dict[str, Any]:
        """Return what is stored with the adapter."""
        names = ("text", "text_pair", "label", "max_length", "labels")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TextClassification:
        """Make the task again from what was stored."""
        return cls(**state)


def _label_names(data: Dataset, column: str) -> list[str]:
    feature = data.features[column]
    if hasattr(feature, "int2str"):
        return list(feature.int2str(data[column]))
    return [_plain(value) for value in data[column]]


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
