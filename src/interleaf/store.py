"""An adapter on disk: one folder with safetensors, JSON and a model card, tied to the base it was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interleaf import adapterhub
from interleaf.card import model_card
from interleaf.errors import InterleafError, StoreError
from interleaf.files import new_folder, read_json
from interleaf.sites import as_found, stack_weights

if TYPE_CHECKING:
    from interleaf.model import AdaptedModel

WEIGHTS, CONFIG, RECORD, CARD = "adapter_model.safetensors", "adapter_config.json", "interleaf.json", "README.md"
FORMAT = 1


@dataclass(frozen=True)
class Adaptation:
    """What is known of how an adapter came to be; stored beside its weights."""

    task: dict[str, Any] | None = None
    """The task's name and state: columns, labels, lengths."""
    run: dict[str, Any] = field(default_factory=dict)
    """The run's config."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures on held-out data."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What was trained: rows, steps, parameters, sites."""
    seconds: float | None = None
    """How long the run took."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The losses and held-out figures during training."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """A few held-out rows: input, expected, the adapter's answer and, where it has one, the base's."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and hardware."""
    command: str | None = None
    """The command line."""


@dataclass(frozen=True)
class Stored:
    """An adapter folder that was read and checked: whole, but not yet matched with a base."""

    path: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def adaptation(self) -> Adaptation:
        """How the adapter came to be."""
        names = [f.name for f in dataclasses.fields(Adaptation)]
        return Adaptation(**{n: self.record[n] for n in names if n in self.record})


def fingerprint(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Identify a base by its architecture, and by the shapes and bytes of its repeated layers and embeddings.

    Heads are left out: the same trunk carries many. The bytes are compared between equal float types only.
    """
    found = _fingerprint(model)
    return {**found, "tokenizer": tokenizer_hash(tokenizer)} if tokenizer is not None else dict(found)


_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = weakref.WeakKeyDictionary()


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """Hash a base's weights, or remember what was found while none of them was written to."""
    known = _fingerprints.get(model)
    if known is not None and as_found(model) and all(_unwritten(*one) for one in known[0]):
        return known[1]
    named = list(stack_weights(model))
    shapes, weights = hashlib.sha256(), xxhash.xxh3_128()
    dtype = ""
    for name, tensor in named:
        shapes.update(f"{name}{tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
    found = {
        "architecture": str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        "shapes": shapes.hexdigest()[:32],
        "dtype": dtype,
        "weights": weights.hexdigest(),
    }
    hashed = {id(tensor) for _, tensor in named}
    parts = [part for module in model.modules() for part in (module._parameters, module._buffers)]
    held = [(part, key, t) for part in parts for key, t in part.items() if t is not None and id(t) in hashed]
    _fingerprints[model] = [(part, key, t, t.data_ptr(), t._version) for part, key, t in held], found
    return found


def _unwritten(part: dict[str, Any], key: str, tensor: Tensor, address: int, version: int) -> bool:
    """Say whether a module has the same tensor as before, and nothing was written to it."""
    return part.get(key) is tensor and tensor.data_ptr() == address and tensor._version == version


def tokenizer_hash(tokenizer: Any) -> str:
    """Identify a tokenizer by its vocabulary and special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    text = json.dumps([vocabulary, {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def save(
    model: AdaptedModel,
    path: str | Path,
    name: str,
    adaptation: Adaptation | None = None,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    stored_name: str | None = None,
) -> Path:
    """Write one adapter of a model, with its head, to a folder of its own.

    Args:
        stored_name: how it is called when it is loaded, if not as on the model.

    Raises:
        StoreError: the folder exists, or the disk is full; nothing is left behind.
    """
    from interleaf import __version__
    from interleaf.model import adapter_tensors

    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model._module, name).items()}
    if bad := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
        raise StoreError(f"adapter {name!r} holds NaN or infinity in {bad[0]}; it was not saved.")
    config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
    config["inference_mode"] = True
    with new_folder(path, overwrite) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        record = {
            "format": FORMAT,
            "interleaf": __version__,
            "name": stored_name or name,
            "base": fingerprint(model._module, tokenizer),
            "sha256": _sha256(folder / WEIGHTS),
            **dataclasses.asdict(adaptation or Adaptation()),
        }
        _write_json(folder / CONFIG, config)
        _write_json(folder / RECORD, record)
        (folder / CARD).write_text(model_card(config, record, (folder / WEIGHTS).stat().st_size), "utf-8")
    return Path(path)


def read(path: str | Path) -> Stored:
    """Read an adapter folder, or one on the hub, and check that it is whole.

    Raises:
        StoreError: a file that is missing, truncated, corrupt or of an unknown kind, and which.
    """
    folder = _folder(path)
    config = _config(folder)
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    if record.get("format", FORMAT) != FORMAT:
        raise StoreError(f"{folder / RECORD}: format {record['format']} is newer than this interleaf can read.")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise StoreError(f"{weights} is missing: {folder} holds no adapter weights.")
    if "sha256" in record and record["sha256"] != _sha256(weights):
        raise StoreError(f"{weights} is corrupt or truncated: its checksum is not the one in {RECORD}.")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{weights} is corrupt or truncated: {error}.") from error
    return Stored(folder, config, tensors, record)


def load(
    model: AdaptedModel,
    path: str | Path,
    name: str | None = None,
    *,
    is_trainable: bool = False,
    tokenizer: Any = None,
    with_head: bool | None = None,
) -> str:
    """Load an adapter onto a model and make it active; an adapter of that name gets the weights instead.

    Args:
        with_head: bring the task's head along; by default our own adapters do and AdapterHub's do not.

    Returns:
        the adapter's name.

    Raises:
        StoreError: made for another base, or damaged; the model stays as it was.
    """
    folder = _folder(path)
    if adapterhub.is_adapterhub(folder):
        name = adapterhub.load(model, folder, name, with_head=bool(with_head))
        _trainable(model, name, is_trainable)
        return name
    stored = read(folder)
    _same_base(stored, model._module, tokenizer)
    name = name or stored.record.get("name", "default")
    fresh = name not in model.adapters
    if with_head is False:
        stored = _headless(stored)
    before = model.active_adapters()
    if fresh:
        stored.config.inference_mode = not is_trainable
        with torch.random.fork_rng(devices=[]):  # loading draws no random numbers a user could notice
            model._inject(stored.config, name)
    try:
        _fill(model._module, stored, name, with_head is not False)
    except StoreError:
        if fresh:
            model.delete_adapter(name)
            model.set_adapter(before) if before else None
        raise
    if fresh or is_trainable:
        if name not in before:  # what runs with others goes on doing so
            model.set_adapter(name)
        _trainable(model, name, is_trainable)
    return name


def _headless(stored: Stored) -> Stored:
    """Return the same without the head."""
    kept = _without_head(stored.tensors, stored.config)
    stored.config.modules_to_save = []
    return dataclasses.replace(stored, tensors=kept)


def _without_head(tensors: dict[str, Tensor], config: PeftConfig) -> dict[str, Tensor]:
    heads = tuple(f"base_model.model.{name}." for name in getattr(config, "modules_to_save", None) or [])
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}


def _fill(model: Any, stored: Stored, name: str, with_head: bool) -> None:
    from interleaf.model import adapter_tensors

    expected = adapter_tensors(model, name)
    if not with_head:
        expected = _without_head(expected, model.peft_config[name])
    where = f"{stored.path / WEIGHTS} does not fit this model"
    if missing := sorted(expected.keys() - stored.tensors.keys()):
        raise StoreError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    if extra := sorted(stored.tensors.keys() - expected.keys()):
        raise StoreError(f"{where}: {len(extra)} tensors have no place in it, the first is {extra[0]}.")
    for key, tensor in stored.tensors.items():
        if tensor.shape != expected[key].shape:
            got, want = tuple(tensor.shape), tuple(expected[key].shape)
            raise StoreError(f"{where}: {key} has shape {got}, the model wants {want}.")
    for key, tensor in stored.tensors.items():
        expected[key].copy_(tensor)  # state dicts alias the live weights


def _trainable(model: AdaptedModel, name: str, trains: bool) -> None:
    for part in model.parts(name).values():
        part.requires_grad_(trains)


def _same_base(stored: Stored, model: nn.Module, tokenizer: Any) -> None:
    made_for = stored.record.get("base")
    if not made_for:
        return
    here = fingerprint(model, tokenizer)
    reasons = {
        "architecture": "another architecture",
        "shapes": "layers of other names or shapes",
        "weights": "other pretrained weights",
        "tokenizer": "another tokenizer",
    }
    for key, reason in reasons.items():
        comparable = key in made_for and key in here and (key != "weights" or made_for["dtype"] == here["dtype"])
        if comparable and made_for[key] != here[key]:
            detail = f" ({made_for[key]}, this one is {here[key]})" if key == "architecture" else ""
            raise StoreError(f"{stored.path} was made for another base: {reason}{detail}. Load that base first.")


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise StoreError(f"{path} is no adapter folder, and no name on the hub (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.bin", CARD]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StoreError(f"{path} is no folder here and could not be fetched from the hub: {reason}") from error


def _config(folder: Path) -> PeftConfig:
    import interleaf.adapters  # noqa: F401  (registers the kinds)

    values = read_json(folder / CONFIG)
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise StoreError(f"{folder / CONFIG}: {kind!r} is no adapter kind that this version knows.")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    own = {f.name for f in dataclasses.fields(cls) if f.init} - {"peft_type"}
    known = own | {"peft_type", "peft_version", "auto_mapping"}
    if unknown := sorted(values.keys() - known):
        raise StoreError(f"{folder / CONFIG}: unknown setting {unknown[0]!r}; a newer version wrote it.")
    try:
        return cls(**{k: v for k, v in values.items() if k in own})
    except (InterleafError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / CONFIG}: {error}") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return str(value)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def push_to_hub(path: str | Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an adapter folder to the hub, after checking it; returns its address.

    Raises:
        StoreError: the folder is damaged, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    stored = read(path)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=stored.path, commit_message="Adapter by interleaf"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StoreError(f"the hub did not take {path} as {repo}: {str(error).splitlines()[0]}") from error


__all__ = ["Adaptation", "Stored", "fingerprint", "load", "push_to_hub", "read", "save"]
