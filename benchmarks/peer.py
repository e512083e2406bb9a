"""One measurement of one library, in a process of its own; `peers.py` starts it. Prints one JSON object a line.

It imports what it measures and no more, so that it runs in a virtual environment that lacks the others:

    python benchmarks/peer.py interleaf JOB.json
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
STARTED = float(os.environ.get("STARTED", time.time()))  # when the process that started this one did so
ROWS, TOKENS = 32, 64


def say(**values: Any) -> None:
    """Print what was measured."""
    print(json.dumps(values), flush=True)


def peak_mib() -> float:
    """Return the largest memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def base_model(job: dict[str, Any]) -> Any:
    """Load the base with a head for the job's labels."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=job["labels"])


# ---- the libraries


def with_hooks(job: dict[str, Any]) -> Any:
    """The floor: bottleneck adapters written by hand, a hook behind each feed-forward sublayer."""
    import torch
    from torch import nn

    model = base_model(job)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    width = model.config.hidden_size
    model.extra = nn.ModuleList()
    for layer in model.bert.encoder.layer:
        down, up = nn.Linear(width, width // 16), nn.Linear(width // 16, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        model.extra.extend([down, up])
        layer.output.dense.register_forward_hook(
            lambda module, args, y, down=down, up=up: y + up(torch.relu(down(y))),
        )
    return model


def with_interleaf(job: dict[str, Any]) -> Any:
    """Our own: `pfeiffer`, the same adapters at the same places."""
    import interleaf

    model: Any = interleaf.adapt(base_model(job))
    model.add_adapter("a", "pfeiffer")
    model.train_adapter("a")
    return model


def compiled(job: dict[str, Any]) -> Any:
    """Our own, by torch.compile."""
    model = with_interleaf(job)
    model.compile()
    return model


def with_peft(job: dict[str, Any]) -> Any:
    """PEFT's LoRA at query and value; its rank gives it about as many weights as the adapters have."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=12, lora_alpha=24, target_modules=["query", "value"], lora_dropout=0.1)
    return get_peft_model(base_model(job), config)


def with_adapters(job: dict[str, Any]) -> Any:
    """AdapterHub's `seq_bn`, the adapter of Pfeiffer et al., with the base's own head."""
    import adapters

    model = base_model(job)
    adapters.init(model)
    model.add_adapter("a", config="seq_bn")
    model.train_adapter("a")
    return model


def whole(job: dict[str, Any]) -> Any:
    """Full fine-tuning."""
    return base_model(job)


MODELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "floor": with_hooks,
    "interleaf": with_interleaf,
    "compiled": compiled,
    "peft": with_peft,
    "adapters": with_adapters,
    "full": whole,
}


# ---- time to an accuracy


def learn(name: str, job: dict[str, Any]) -> None:
    """Train on the job's rows; say after each pass how good the held-out rows are answered, and when that was known."""
    (_learn_ours if name == "interleaf" else _learn_theirs)(name, job)
    say(peak_mib=peak_mib())


def _reporter() -> Any:
    from transformers import TrainerCallback

    class Reports(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            say(seconds=time.time() - STARTED, accuracy=metrics["eval_accuracy"], epoch=state.epoch)

    return Reports()


def _learn_ours(name: str, job: dict[str, Any]) -> None:
    from interleaf.cli.app import quiet
    from interleaf.settings import TrainSettings
    from interleaf.train import prepare

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            base=job["base"],
            train=job["train"],
            dev=job["dev"],
            out=f"{folder}/adapter",
            adapter=job.get("adapter", "pfeiffer"),
            adapter_options=job.get("adapter_options", {}),
            learning_rate=job["learning_rate"],
            epochs=job["epochs"],
            batch_size=job["batch_size"],
            max_length=job["max_length"],
            seed=job["seed"],
            examples=0,
        )
        say(trunk_cache=prepare(settings).train(_reporter()).trunk_cache)


def _learn_theirs(name: str, job: dict[str, Any]) -> None:
    import numpy as np
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments, set_seed
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    parts = []
    for path in (job["train"], job["dev"]):
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        labels = job["names"]
        data = Dataset.from_list([{"text": row["text"], "labels": labels.index(row["label"])} for row in rows])
        parts.append(
            data.map(
                lambda batch: tokenizer(batch["text"], truncation=True, max_length=job["max_length"]),
                batched=True,
                remove_columns=["text"],
            )
        )
    # of AdapterHub's transformers 4, and of transformers 5
    older = "group_by_length" in TrainingArguments.__dataclass_fields__
    grouped = {"group_by_length": True} if older else {"train_sampling_strategy": "group_by_length"}
    warmup = {"warmup_ratio": 0.06} if older else {"warmup_steps": 0.06}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=job["epochs"],
            learning_rate=job["learning_rate"],
            per_device_train_batch_size=job["batch_size"],
            per_device_eval_batch_size=2 * job["batch_size"],
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=job["seed"],
            dataloader_pin_memory=False,
            **grouped,
            **warmup,
        )
        _trainer(name)(
            model=MODELS[name](job),
            args=arguments,
            train_dataset=parts[0],
            eval_dataset=parts[1].map(lambda row: {"size": len(row["input_ids"])}).sort("size").remove_columns("size"),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": float((np.argmax(found.predictions, axis=-1) == found.label_ids).mean())
            },
            callbacks=[_reporter()],
        ).train()


def _trainer(name: str) -> Any:
    if name == "adapters":
        from adapters import AdapterTrainer

        return AdapterTrainer
    from transformers import Trainer

    return Trainer


# ---- steps and forward passes, several libraries in turn


def batch(job: dict[str, Any]) -> dict[str, Any]:
    """Make a batch of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, job["labels"], (ROWS,), generator=generator),
    }


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each way once a round, so that what else the machine does hits all alike; return seconds by way."""
    for name, way in ways.items():
        say(first={name: _timed(way)})
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways) if number % 2 else list(reversed(ways))
        for name in order:
            start = time.perf_counter()
            ways[name]()
            found[name].append(time.perf_counter() - start)
    return found


def steps(name: str, job: dict[str, Any]) -> None:
    """Time training steps of the job's libraries: forward, backward, AdamW."""
    import torch

    inputs = batch(job)

    def stepping(model: Any) -> Callable[[], Any]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    ways = {one: stepping(MODELS[one](job)) for one in job["libraries"]}
    say(step=in_turn(ways, job["rounds"]))


def forward(name: str, job: dict[str, Any]) -> None:
    """Time forward passes: the base, an adapter on, an adapter off."""
    import torch

    inputs = {k: v for k, v in batch(job).items() if k != "labels"}
    ways = {"base": _passing(base_model(job).eval(), inputs)}
    for one in job["libraries"]:
        ways[one] = _passing(MODELS[one](job).eval(), inputs)
    if "interleaf" in job["libraries"]:
        off = MODELS["interleaf"](job).eval()
        off.disable_adapters()
        ways["interleaf, off"] = _passing(off, inputs)
    if "peft" in job["libraries"]:
        lora = MODELS["peft"](job).eval()
        lora.base_model.disable_adapter_layers()
        ways["peft, off"] = _passing(lora, inputs)
    with torch.inference_mode():
        say(forward=in_turn(ways, job["rounds"]))


def _passing(model: Any, inputs: dict[str, Any], **more: Any) -> Callable[[], Any]:
    return lambda: model(**inputs, **more)


def rows(name: str, job: dict[str, Any]) -> None:
    """Time a batch whose rows have 1, 8 and 32 different adapters, beside the base."""
    import torch

    inputs = {k: v for k, v in batch(job).items() if k != "labels"}
    model = MODELS[name](job).eval()
    names = [f"n{i}" for i in range(ROWS)]
    for one in names:
        _add(name, model, one)
    ways = {"base": _passing(base_model(job).eval(), inputs)}
    for count in (1, 8, 32):
        own = [names[i * count // ROWS] for i in range(ROWS)]
        if name == "adapters":
            ways[str(count)] = _split(model, own, inputs)
        else:
            ways[str(count)] = _passing(model, inputs, adapter_names=own)
    model.eval()
    with torch.inference_mode():
        say(rows=in_turn(ways, job["rounds"]))


def _split(model: Any, own: list[str], inputs: dict[str, Any]) -> Callable[[], Any]:
    from adapters.composition import BatchSplit

    kinds = list(dict.fromkeys(own))
    setup = BatchSplit(*kinds, batch_sizes=[own.count(kind) for kind in kinds]) if len(kinds) > 1 else kinds[0]

    def run() -> Any:
        model.active_adapters = setup
        return model(**inputs)

    return run


# ---- attach, load, switch, import


def _add(name: str, model: Any, adapter: str) -> None:
    if name == "interleaf":
        model.add_adapter(adapter, "pfeiffer")
    elif name == "peft":
        model.add_adapter(adapter, model.peft_config["default"])
    else:
        model.add_adapter(adapter, config="seq_bn")


def _switch(name: str, model: Any, adapter: str) -> None:
    if name == "adapters":
        model.set_active_adapters(adapter)
    else:
        model.set_adapter(adapter)


def files(name: str, job: dict[str, Any]) -> None:
    """Time attaching, loading from disk, and switching among many adapters in memory."""
    import torch

    model = MODELS[name](job).eval()
    own = "default" if name == "peft" else "a"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/saved"
        if name == "interleaf":
            model.save_adapter(path, own)
        elif name == "peft":
            model.save_pretrained(path)
        else:
            model.save_adapter(path, own)
        attach, load = [], []
        for number in range(job["rounds"]):
            attach.append(_timed(lambda: _add(name, model, f"new{number}")))  # noqa: B023
            start = time.perf_counter()
            if name == "peft":
                model.load_adapter(path, adapter_name=f"read{number}")
            elif name == "interleaf":
                model.load_adapter(path, f"read{number}")
            else:
                model.load_adapter(path, load_as=f"read{number}", set_active=True)
            load.append(time.perf_counter() - start)
    many = [f"many{i}" for i in range(job["many"])]
    start = time.perf_counter()
    for one in many:
        _add(name, model, one)
    inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    switch, first, later = [], [], []
    with torch.inference_mode():
        for number in range(job["rounds"]):
            one = many[number * 37 % len(many)]
            switch.append(_timed(lambda: _switch(name, model, one)))  # noqa: B023
            first.append(_timed(lambda: model(**inputs)))
            later.append(_timed(lambda: model(**inputs)))
    say(attach=attach, load=load, switch=switch, many=len(many), first_pass=first, later_pass=later)


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def imports(name: str, job: dict[str, Any]) -> None:
    """Time the import of a library, with torch and transformers."""
    modules = {"interleaf": "interleaf", "peft": "peft", "adapters": "adapters", "full": "transformers"}
    __import__(modules[name])
    if name == "full":
        from transformers import Trainer  # noqa: F401
    say(seconds=time.time() - STARTED)


JOBS = {one.__name__: one for one in (learn, steps, forward, rows, files, imports)}


def main() -> None:
    """Do a job."""
    name, path = sys.argv[1:]
    job = json.loads(Path(path).read_text("utf-8"))
    if job["job"] != "imports":
        import torch

        torch.set_num_threads(job["threads"])
    JOBS[job["job"]](name, job)


if __name__ == "__main__":
    main()
