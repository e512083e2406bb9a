"""Preference and reinforcement learning of an adapter, by TRL: DPO, GRPO, and a reward model.

The reference that DPO and GRPO compare with is the same model with the adapter switched off, so there is no second one
in memory. DPO: Rafailov et al. 2023 (arXiv 2305.18290). GRPO: Shao et al. 2024 (2402.03300).
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, set_seed

from interleaf.adapter import as_config
from interleaf.base import load_base
from interleaf.errors import ConfigError, DataError
from interleaf.files import refuse_existing
from interleaf.fit import StopOnNaN, in_bfloat16
from interleaf.metrics import valid_syntax
from interleaf.model import adapt
from interleaf.record import command, environment
from interleaf.sandbox import run_programs
from interleaf.settings import TrainSettings
from interleaf.store import Adaptation
from interleaf.tasks.code import Code
from interleaf.tasks.rows import LABEL_COLUMNS, TEXT_COLUMNS, find_column, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

METHODS = ("dpo", "grpo", "reward")
REWARDS = ("parses", "tests", "matches")


@dataclasses.dataclass(frozen=True)
class AlignSettings:
    """What is learnt, and from what."""

    method: str = "dpo"
    """dpo, grpo, or reward: a reward model."""
    beta: float | None = None
    """How strongly to stay near the base; TRL's own if not given."""
    prefer: str | None = None
    """Label whose texts are preferred, where the data has labelled texts and not columns chosen and rejected."""
    prompt: str = ""
    """What stands before such texts."""
    reward: str = "parses"
    """What GRPO rewards: prompt and answer that parse as Python, that pass the `test` of the row, or an answer that
    matches a pattern."""
    pattern: str | None = None
    """Regular expression that an answer has to match whole, white space around it aside."""
    answers: int = 8
    """Answers to each prompt, which are compared with one another."""
    answer_tokens: int = 32
    """Longest answer."""
    steps: int | None = None
    """Steps, instead of `epochs`."""

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("reward", self.reward, REWARDS)):
            if value not in known:
                raise ConfigError(f"{name}={value!r}: expected {', '.join(known)}.")
        if (self.reward == "matches") != (self.pattern is not None):
            raise ConfigError("pattern and reward: matches go together.")
        if self.answers < 2 or self.answer_tokens < 1:
            raise ConfigError("answers: expected 2 or more, to compare; answer_tokens: 1 or more.")


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Where the adapter is, what TRL logged, and how long it took."""

    path: Path
    history: list[dict[str, Any]]
    seconds: float


def align(settings: TrainSettings, how: AlignSettings, *callbacks: TrainerCallback) -> Aligned:
    """Train an adapter by TRL's trainer of a method, with the adapter switched off as the reference, and save it.

    Raises:
        ConfigError: TRL is not installed, or settings that do not go together.
        DataError: rows without what the method learns from.
        TrainingError: the loss became NaN or infinite; nothing was saved.
    """
    start = time.monotonic()
    refuse_existing(Path(settings.out), settings.overwrite)
    train, dev = rows_for(settings, how)
    trainer = make_trainer(settings, how, train, dev)
    for callback in (StopOnNaN(), *callbacks):
        trainer.add_callback(callback)
    trainer.train()
    model: Any = adapt(trainer.model.get_base_model())
    name = model.active_adapters()[0]
    model.peft_config[name].base_model_name_or_path = settings.base
    history = [{k: v for k, v in one.items() if isinstance(v, int | float)} for one in trainer.state.log_history]
    seconds = time.monotonic() - start
    # what it learnt is to answer: `interleaf chat` and `predict` ask it
    task = Code(text="prompt", stop=[]) if how.method != "reward" else None
    adaptation = Adaptation(
        task=None if task is None else {"name": task.name, "state": task.state()},
        run={**settings.as_dict(), "align": dataclasses.asdict(how)},
        metrics=last(history, how),
        seconds=round(seconds, 1),
        history=history,
        environment=environment(),
        command=command(),
    )
    tokenizer = load_base(settings.base, _tokenizer)
    path = model.save_adapter(
        settings.out,
        name,
        adaptation,
        tokenizer=tokenizer,
        overwrite=settings.overwrite,
        stored_name=settings.name,  # TRL calls every adapter "default"
    )
    return Aligned(path, history, seconds)


def make_trainer(settings: TrainSettings, how: AlignSettings, train: Dataset, dev: Dataset | None) -> Any:
    """Make TRL's trainer for a base and an adapter.

    Raises:
        ConfigError: TRL is not installed.
        BaseModelError: there is no such model, or none for the method.
    """
    try:
        import trl
    except ImportError as error:
        raise ConfigError("align needs TRL. Run: pip install 'interleaf[align]'") from error
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    set_seed(settings.seed)
    tokenizer = load_base(settings.base, _tokenizer)
    if how.method == "reward":
        model = load_base(
            settings.base, lambda path: AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        )
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    else:
        model = load_base(settings.base, AutoModelForCausalLM.from_pretrained)
    options: dict[str, Any] = {}
    if how.beta is not None and how.method != "reward":
        options["beta"] = how.beta
    if how.method == "grpo":
        options |= {"num_generations": how.answers, "max_completion_length": how.answer_tokens, "temperature": 1.0}
    else:
        options["max_length"] = settings.max_length
    made, arguments = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[how.method]
    more = {"reward_funcs": reward_of(how)} if how.method == "grpo" else {"eval_dataset": dev}
    config = as_config(settings.adapter, **settings.adapter_options)
    if how.method == "reward":
        config.task_type = "SEQ_CLS"
    return made(
        model=model,
        args=arguments(**_arguments(settings, how), **options),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=config,
        **more,
    )


def _arguments(settings: TrainSettings, how: AlignSettings) -> dict[str, Any]:
    import torch

    return {
        "output_dir": settings.out + ".log",
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if how.steps is None else how.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": "linear",
        "eval_strategy": "no" if how.method == "grpo" else "epoch",
        "save_strategy": "no",
        "logging_steps": 1 if how.method == "grpo" else 10,
        "logging_nan_inf_filter": False,
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "seed": settings.seed,
        "bf16": in_bfloat16(settings.precision),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": settings.activation_checkpointing,
    }


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(path)
    if found.eos_token is None:  # an encoder's; TRL ends every text with one
        found.eos_token = found.sep_token
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def rows_for(settings: TrainSettings, how: AlignSettings) -> tuple[Dataset, Dataset | None]:
    """Read the rows that a method learns from, and hold a share of pairs out.

    Raises:
        DataError: a missing column, a label that does not occur, or too few rows.
    """
    data = read_rows(settings.train)
    if how.method == "grpo":
        data = _prompts(data, settings, how)
        return (data if settings.limit is None else data.select(range(min(settings.limit, len(data))))), None
    if how.prefer is not None:
        data = pairs(data, settings, how)
    if missing := [name for name in ("chosen", "rejected") if name not in data.column_names]:
        raise DataError(
            f"{settings.train} has no column {missing[0]!r}. Pairs need chosen and rejected (and may have a prompt); "
            "of labelled texts, --prefer LABEL makes them."
        )
    data = data.select_columns([name for name in ("prompt", "chosen", "rejected") if name in data.column_names])
    if settings.dev is not None:
        held = read_rows(settings.dev)
        return data, pairs(held, settings, how) if how.prefer is not None else held
    if settings.limit is not None and settings.limit < len(data):
        data = data.shuffle(seed=settings.seed).select(range(settings.limit))
    if len(data) < 2:
        raise DataError(f"{settings.train} gives {len(data)} pairs: too few to hold some out.")
    split = data.train_test_split(settings.dev_fraction, seed=settings.seed)
    return split["train"], split["test"]


def pairs(data: Dataset, settings: TrainSettings, how: AlignSettings) -> Dataset:
    """Pair each text of the preferred label with one of another, at random.

    Raises:
        DataError: the label does not occur, or there is no other.
    """
    from datasets import Dataset

    label = find_column(data, settings.label, LABEL_COLUMNS, "label")
    text = find_column(data, settings.text, TEXT_COLUMNS, "text", [label])
    names = [str(name) for name in data[label]]
    wanted = [t for t, name in zip(data[text], names, strict=True) if name == how.prefer]
    others = [t for t, name in zip(data[text], names, strict=True) if name != how.prefer]
    if not wanted or not others:
        raise DataError(f"{settings.train}: prefer={how.prefer!r}, but the labels are {', '.join(sorted(set(names)))}.")
    rng = random.Random(settings.seed)
    rng.shuffle(wanted)
    rng.shuffle(others)
    count = min(len(wanted), len(others))
    prompt = how.prompt.rstrip()
    gap = how.prompt[len(prompt) :]  # a tokenizer joins a space to the word after it
    chosen, rejected = ([gap + text for text in texts[:count]] for texts in (wanted, others))
    return Dataset.from_dict({"prompt": [prompt] * count, "chosen": chosen, "rejected": rejected})


def _prompts(data: Dataset, settings: TrainSettings, how: AlignSettings) -> Dataset:
    text = find_column(data, settings.text, ("prompt", "source", "instruction", *TEXT_COLUMNS), "prompt")
    kept = ["test", "entry_point"] if how.reward == "tests" else []
    if missing := [name for name in kept[:1] if name not in data.column_names]:
        raise DataError(f"{settings.train} has no column {missing[0]!r} with the tests that a program is to pass.")
    data = data.select_columns([text, *(name for name in kept if name in data.column_names)])
    return data if text == "prompt" else data.rename_column(text, "prompt")


def reward_of(how: AlignSettings) -> Callable[..., list[float]]:
    """Return the function that rewards answers, 1 or 0 each; programs run in the sandbox only."""

    def parses(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        texts = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        return [float(valid) for valid in valid_syntax(texts)]

    def tests(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        names = columns.get("entry_point", [""] * len(prompts))
        checks = [f"{test}\ncheck({name})" if name else test for test, name in zip(columns["test"], names, strict=True)]
        programs = [(p + a, check) for p, a, check in zip(prompts, completions, checks, strict=True)]
        return [float(outcome.passed) for outcome in run_programs(programs)]

    def matches(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(re.fullmatch(how.pattern or "", answer.strip(), re.DOTALL) is not None) for answer in completions]

    return {"parses": parses, "tests": tests, "matches": matches}[how.reward]


def last(history: Sequence[dict[str, Any]], how: AlignSettings) -> dict[str, float]:
    """Return the last held-out figures, or GRPO's mean reward of the first and last tenth of the steps."""
    if how.method == "grpo":
        rewards = [one["reward"] for one in history if "reward" in one]
        tenth = max(1, len(rewards) // 10)
        return {
            "reward at first": sum(rewards[:tenth]) / tenth,
            "reward at the end": sum(rewards[-tenth:]) / tenth,
        }
    measured = [one for one in history if "eval_loss" in one]
    keep = ("eval_loss", "eval_accuracy", "eval_rewards/accuracies", "eval_rewards/margins", "eval_margin")
    return {key.removeprefix("eval_"): measured[-1][key] for key in keep if measured and key in measured[-1]}
