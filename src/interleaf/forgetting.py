"""What a model forgets while it learns a task: the same measure before, with the adapter on, and with it off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from interleaf.errors import ConfigError
from interleaf.tasks import TASKS, Task
from interleaf.tasks.generation import Generation
from interleaf.tasks.rows import TEXT_COLUMNS, find_column, read_rows

WINDOW, ROWS = 256, 400


@dataclass(frozen=True)
class Memory:
    """One measure of what a model knew before: its name, whether more is better, and how it is taken."""

    name: str
    higher_is_better: bool
    measure: Callable[[Any], float]

    def lost(self, before: float, after: float) -> float:
        """Return the share that was lost; below nought, something was gained."""
        change = before - after if self.higher_is_better else after - before
        return change / abs(before)


def memory_of(model: Any, task: Task, tokenizer: Any, ref: str, seed: int = 0) -> Memory:
    """Choose the measure for a model, and take from the untouched model what it needs.

    A decoder: perplexity on texts. An encoder-decoder: the loss on other pairs. A classifier: the accuracy of an
    earlier task's linear probe, fitted to the untouched trunk's features.

    Args:
        ref: texts, pairs, or labelled texts.

    Raises:
        DataError: the data has not that form.
    """
    if not isinstance(task, Generation):
        return _probe(model, tokenizer, ref, seed)
    if task.encoder_decoder:
        other = TASKS[task.name](**{**task.state(), "text": None, "label": None, "group": None, "dev_groups": []})
        rows = other.load_one(ref)
        rows = rows.select(range(min(ROWS, len(rows))))
        return Memory("loss on other text", False, lambda m: other.loss(m, tokenizer, rows, 32))
    data = read_rows(ref)
    texts = data[find_column(data, None, TEXT_COLUMNS, "text", [])]
    return Memory("perplexity on general text", False, lambda m: perplexity(m, tokenizer, texts))


def perplexity(model: Any, tokenizer: Any, texts: list[str], windows: int = 64) -> float:
    """Return the perplexity of a causal model over windows of 256 tokens, evenly taken from the texts."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    count = len(ids) // WINDOW
    if count == 0:
        raise ConfigError(f"the texts to measure perplexity on have {len(ids)} tokens; {WINDOW} are needed.")
    chosen = [int(i) for i in np.linspace(0, count - 1, min(windows, count))]
    batches = torch.tensor([ids[i * WINDOW : (i + 1) * WINDOW] for i in chosen]).split(8)
    training, total = model.training, 0.0
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(model.device)
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    model.train(training)
    return math.exp(total / len(chosen))


def _probe(model: Any, tokenizer: Any, ref: str, seed: int) -> Memory:
    from sklearn.linear_model import LogisticRegression

    earlier = TASKS["classification"](max_length=64)
    splits = earlier.load(ref, dev_fraction=0.5, seed=seed, limit=ROWS * 2)
    held = splits.dev.select(range(min(ROWS * 2, len(splits.dev))))
    known = LogisticRegression(max_iter=2000, C=10.0)
    known.fit(features(model, earlier, tokenizer, splits.train), splits.train["labels"])
    return Memory(
        "accuracy of an earlier task's probe",
        True,
        lambda m: float(known.score(features(m, earlier, tokenizer, held), held["labels"])),
    )


def features(model: Any, task: Any, tokenizer: Any, rows: Any) -> np.ndarray:
    """Return the trunk's mean hidden state of each row, shape [N, D]."""
    loader = torch.utils.data.DataLoader(
        task.encode(rows, tokenizer), batch_size=64, collate_fn=task.collator(tokenizer)
    )
    training, found = model.training, []
    model.eval()
    with torch.inference_mode():
        for batch in loader:
            batch = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            hidden = model.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())
    model.train(training)
    return np.concatenate(found)
