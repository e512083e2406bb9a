"""Prediction heads in AdapterHub's files: those of Hugging Face's own classes, and AdapterHub's flexible ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interleaf.adapterhub.disk import HEAD, VERSION, WEIGHTS, read_files
from interleaf.blocks import is_linear
from interleaf.errors import StoreError
from interleaf.tuner import task_head

_SEQUENCE = ("classification", "multilabel_classification")
_TOKENS = ("tagging", "question_answering")


@dataclass(frozen=True)
class Head:
    """A head from a folder, as weights of a model's own modules."""

    folder: Path
    modules: list[str]
    """The modules that play it: an adapter that brings it has copies of them."""
    tensors: dict[str, Tensor]
    """Its weights, by the model's names."""
    flexible: dict[str, Any] | None
    """What AdapterHub tells of a flexible head; None for the head of one of Hugging Face's classes."""
    labels: dict[str, int] | None

    @classmethod
    def read(cls, base: Any, folder: Path) -> Head:
        """Read the head of a folder and match it with the modules of a model.

        Raises:
            StoreError: there is none, or the model has no head that it could be.
        """
        if not (folder / HEAD).is_file():
            raise StoreError(f"{folder} holds no prediction head ({HEAD}). Load it without with_head.")
        told, tensors = read_files(folder, HEAD)
        modules, flexible = task_head(base), told.get("config")
        theirs, ours = told.get("model_class"), base.__class__.__name__
        if not modules:
            raise StoreError(
                f"{folder}: a {ours} has no task head to load it into. Take a class with one, such as "
                "AutoModelForSequenceClassification, or leave out with_head."
            )
        if flexible is None and theirs != ours:
            raise StoreError(f"{folder}: the head is a {theirs}'s, this model is a {ours}. Load it into the former.")
        if flexible is not None:
            if flexible.get("head_type") not in (*_SEQUENCE, *_TOKENS):
                raise StoreError(f"{folder}: a {flexible.get('head_type')} head has no equal; see docs/adapterhub.md.")
            modules, tensors = _matched(base, modules, tensors, folder)
        head = cls(folder, modules, tensors, flexible, told.get("label2id") or (flexible or {}).get("label2id"))
        head._check_shapes(base)
        return head

    def _check_shapes(self, base: nn.Module) -> None:
        wanted = {n: tuple(p.shape) for m in self.modules for n, p in _parameters(base, m)}
        given = {n: tuple(t.shape) for n, t in self.tensors.items()}
        if wrong := sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n)):
            key = wrong[0]
            raise StoreError(
                f"{self.folder}: the head does not fit: {key} has shape {given.get(key)}, the model wants "
                f"{wanted.get(key)}. Has the model as many labels (num_labels)?"
            )

    def fill(self, base: Any, name: str) -> None:
        """Put the weights into an adapter's own copy of the modules.

        Raises:
            StoreError: the model's head is another function than AdapterHub's.
        """
        with torch.no_grad():
            for module in self.modules:
                copy: Any = base.get_submodule(module).modules_to_save[name]
                for key, parameter in copy.named_parameters():
                    parameter.copy_(self.tensors[f"{module}.{key}"])
        if self.flexible is not None and not self._is_the_models(base):
            raise StoreError(
                f"{self.folder}: its {self.flexible.get('head_type')} head is another function than the head of "
                f"{base.__class__.__name__}; see docs/adapterhub.md."
            )
        if self.labels and len(self.labels) == base.config.num_labels:
            base.config.label2id = {label: int(i) for label, i in self.labels.items()}
            base.config.id2label = {i: label for label, i in base.config.label2id.items()}

    def _is_the_models(self, base: Any) -> bool:
        """Run the model on a few tokens, and what AdapterHub's head makes of its hidden states beside it."""
        seen: dict[str, Tensor] = {}
        hook = base.base_model.register_forward_hook(lambda _m, _a, out: seen.update(out))
        was_training = base.training
        try:
            with torch.no_grad():
                out = base.eval()(input_ids=_tokens(base))
                wanted = list(self._outputs(seen))
        finally:
            hook.remove()
            base.train(was_training)
        got = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=-1)
        return any(w.shape == got.shape and (w - got).abs().max() <= 1e-3 * got.abs().max() for w in wanted)

    def _outputs(self, seen: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield what AdapterHub's head gives; for the first and the last token where it depends on the model."""
        told: dict[str, Any] = self.flexible or {}
        hidden, pooled = seen["last_hidden_state"], seen.get("pooler_output")
        if told["head_type"] in _TOKENS:
            features = [hidden]
        elif told.get("use_pooler"):
            features = [] if pooled is None else [pooled]
        else:
            features = [hidden[:, 0], hidden[:, -1]]
        name = told.get("activation_function")
        activation = ACT2FN[name] if name else nn.Identity()
        maps = [key.removesuffix(".weight") for key in self.tensors if key.endswith(".weight")]
        for x in features:
            for i, key in enumerate(maps):
                bias = self.tensors.get(f"{key}.bias")
                x = nn.functional.linear(activation(x) if i else x, self.tensors[f"{key}.weight"].to(x), bias)
            yield x


def _matched(
    base: Any, own: list[str], tensors: dict[str, Tensor], folder: Path
) -> tuple[list[str], dict[str, Tensor]]:
    """Match the linear maps of a flexible head with those of a model's, the pooler's included where one more is told.

    Raises:
        StoreError: another number of them.
    """
    numbers = sorted({int(key.split(".")[-2]) for key in tensors})
    pooler = next((n for n, m in base.named_modules() if m is getattr(base.base_model, "pooler", None)), "")
    for modules in (own, [pooler, *own] if pooler else own):
        maps = [n for module in modules for n in _linears(base, module)]
        if len(maps) != len(numbers):
            continue
        names = dict(zip(numbers, maps, strict=True))
        ends = {key: (int(key.split(".")[-2]), key.split(".")[-1]) for key in tensors}
        return modules, {f"{names[ends[k][0]]}.{ends[k][1]}": tensors[k] for k in sorted(tensors, key=ends.__getitem__)}
    raise StoreError(
        f"{folder}: its head has {len(numbers)} linear maps, the head of {base.__class__.__name__} "
        f"{len([n for m in own for n in _linears(base, m)])}; see docs/adapterhub.md."
    )


def _plain(base: nn.Module, module: str) -> Any:
    found = base.get_submodule(module)
    return getattr(found, "original_module", found)


def _parameters(base: nn.Module, module: str) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{module}.{n}", p) for n, p in _plain(base, module).named_parameters())


def _linears(base: nn.Module, module: str) -> list[str]:
    return [f"{module}.{n}".rstrip(".") for n, m in _plain(base, module).named_modules() if is_linear(m)]


def _tokens(base: Any) -> Tensor:
    """Make one row of tokens without padding, with the end that some heads look for."""
    device = next(base.parameters()).device
    ids = [i % base.config.get_text_config().vocab_size for i in range(3, 9)]
    special = (base.config.pad_token_id, base.config.eos_token_id)
    end = [base.config.eos_token_id] if isinstance(base.config.eos_token_id, int) else []
    return torch.tensor([[i for i in ids if i not in special] + end], device=device)


def write_head(base: Any, name: str, folder: Path) -> None:
    """Write an adapter's own head as that of one of Hugging Face's classes.

    Raises:
        StoreError: it has none, or one that AdapterHub keeps no file for.
    """
    own = task_head(base)
    held = [n for n, m in base.named_modules() if name in getattr(m, "modules_to_save", {})]
    if not held or sorted(held) != sorted(own):
        found = ", ".join(held) or "nothing"
        raise StoreError(f"{name!r} trains {found} beside the adapter; AdapterHub's file is for {', '.join(own)} only.")
    tensors = {
        f"{module}.{key}": tensor.detach().cpu().contiguous().clone()
        for module in held
        for key, tensor in base.get_submodule(module).modules_to_save[name].state_dict().items()
    }
    told = {
        "config": None,
        "hidden_size": base.config.hidden_size,
        "label2id": base.config.label2id,
        "model_class": base.__class__.__name__,
        "model_name": base.name_or_path,
        "model_type": base.config.model_type,
        "name": None,
        "num_labels": base.config.num_labels,
        "version": VERSION,
    }
    save_file(tensors, folder / WEIGHTS[HEAD][0])
    (folder / HEAD).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
