"""What a model forgets while it learns a task: the same measure before, with the adapter on, and with it off."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from interleaf.errors import ConfigError, TrainingError
from interleaf.tasks import TASKS, Task
from interleaf.tasks.generation import Generation
from interleaf.tasks.rows import TEXT_COLUMNS, find_column, read_rows

WINDOW, ROWS = 256, 400


@dataclass(frozen=True)
class Memory:
    """One measure of what a model knew before: its name, whether more is better, how it is taken, and what it was."""

    name: str
    higher_is_better: bool
    measure: Callable[[Any], float]
    before: float

    def lost(self, now: float) -> float:
        """Return the share that was lost; below nought, something was gained."""
        change = self.before - now if self.higher_is_better else now - self.before
        return change / abs(self.before)

    def told(self, model: Any, adapted: bool) -> dict[str, Any]:
        """Return the measure before, now and, of an adapted model, with the adapter off; and the share lost."""
        on, off = self.measure(model), None
        if adapted:
            with model.disable_adapter():
                off = self.measure(model)
        return {"measure": self.name, "before": self.before, "on": on, "off": off, "lost": self.lost(on)}


class ForgetBudget(TrainerCallback):
    """Stops training when more was forgotten than is allowed; weights that forgot more are never the best.

    Args:
        memory: what may be forgotten.
        budget: the share of it that may be lost.
        metric: what the Trainer chooses the best epoch by; `loss` is better when lower.
    """

    def __init__(self, memory: Memory, budget: float, metric: str) -> None:
        self.memory, self.budget, self.metric = memory, budget, metric
        self.lost: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # loading rows draws a number, and training goes on as if it had not
            self.lost.append(self.memory.lost(self.memory.measure(kwargs["model"])))
        if self.lost[-1] > self.budget:
            control.should_training_stop = True
            # what the Trainer compares next, with the best so far
            kwargs["metrics"][f"eval_{self.metric}"] = math.inf if self.metric == "loss" else -math.inf

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.lost and state.best_model_checkpoint is None:
            raise TrainingError(
                f"forget_budget={self.budget:g}: {self.lost[0]:.1%} was lost already when first measured "
                f"({self.memory.name}). Nothing was saved. Try a lower learning_rate, fewer layers, or fewer rows."
            )


def memory_of(model: Any, task: Task, tokenizer: Any, ref: str, adapted: bool, seed: int = 0) -> Memory:
    """Choose the measure for a model whose base is still untouched, and take it.

    A decoder: perplexity on texts. An encoder-decoder: the loss on other pairs. A classifier: the accuracy of an
    earlier task's linear probe, fitted to the untouched trunk's features.

    Args:
        ref: texts, pairs, or labelled texts.
        adapted: whether it has an adapter, which is switched off for that.

    Raises:
        DataError: the data has not that form.
    """
    with model.disable_adapter() if adapted else nullcontext():  # a fresh prefix is not the identity
        name, higher_is_better, measure = _measure(model, task, tokenizer, ref, seed)
        return Memory(name, higher_is_better, measure, measure(model))


def _measure(model: Any, task: Task, tokenizer: Any, ref: str, seed: int) -> tuple[str, bool, Callable[[Any], float]]:
    if not isinstance(task, Generation):
        return "accuracy of an earlier task's probe", True, _probe(model, tokenizer, ref, seed)
    if task.encoder_decoder:
        other = TASKS[task.name](**{**task.state(), "text": None, "label": None, "group": None, "dev_groups": []})
        rows = other.load_one(ref)
        rows = rows.select(range(min(ROWS, len(rows))))
        return "loss on other text", False, lambda m: other.loss(m, tokenizer, rows, 32)
    data = read_rows(ref)
    texts = data[find_column(data, None, TEXT_COLUMNS, "text", [])]
    return "perplexity on general text", False, lambda m: perplexity(m, tokenizer, texts)


def perplexity(model: Any, tokenizer: Any, texts: list[str], windows: int = 32) -> float:
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
    return math.exp(min(total / len(chosen), 700))


def _probe(model: Any, tokenizer: Any, ref: str, seed: int) -> Callable[[Any], float]:
    from sklearn.linear_model import LogisticRegression

    earlier = TASKS["classification"](max_length=64)
    splits = earlier.load(ref, dev_fraction=0.5, seed=seed, limit=ROWS)
    held = splits.dev.shuffle(seed=seed).select(range(min(ROWS, len(splits.dev))))
    known = LogisticRegression(max_iter=2000, C=10.0)
    known.fit(features(model, earlier, tokenizer, splits.train), splits.train["labels"])
    return lambda m: float(known.score(features(m, earlier, tokenizer, held), held["labels"]))


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
