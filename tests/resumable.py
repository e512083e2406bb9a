"""A training in a process of its own, which `test_resume.py` kills: WAY FOLDER [resume]."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import interleaf
from interleaf import BottleneckConfig
from tests.zoo import build

CONFIG = {"bottleneck_dim": 4, "activation": "gelu", "dropout": 0.1}


class Rows(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 99, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.sum() % 2}


class Slow(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)


def attach(way: str) -> Any:
    base: Any = build("bert")
    set_seed(1)
    if way == "peft":
        return get_peft_model(base, BottleneckConfig(**CONFIG))
    if way == "base.add_adapter":
        base.add_adapter(BottleneckConfig(**CONFIG), "my_adapter")
        return base
    model: Any = interleaf.adapt(base)
    model.add_adapter("my_adapter", BottleneckConfig(**CONFIG))
    model.train_adapter("my_adapter")
    return model


def main(way: str, folder: Path, resume: bool) -> None:
    model = attach(way)
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Slow()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "run")) if resume else None)
    tensors = {
        k: v.contiguous() for k, v in model.state_dict().items() if "adapter_slot" in k or "modules_to_save" in k
    }
    save_file(tensors, folder / "final.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "resume" in sys.argv[3:])
