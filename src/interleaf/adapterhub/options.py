"""AdapterHub's options of a bottleneck: their defaults, what older files call them, and which have no equal here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from interleaf.errors import StoreError

# of `BnConfig`; older files lack the newer ones
DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": False,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
# of the first version; AdapterHub does nothing with the first two any more
_OLD = ("attention_type", "new_attention_norm", "invertible_adapter", "architecture")
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_ACTIVATIONS = {"leakyrelu": "leaky_relu", "swish": "silu"}

# AdapterHub's classes for these, unless with its flexible heads, never undo an invertible adapter
_OWN_CLASSES = (
    *("albert", "bart", "bert", "bert-generation", "deberta", "deberta-v2", "distilbert", "electra"),
    *("encoder-decoder", "gpt2", "gptj", "llama", "mbart", "mistral", "mt5", "plbart", "roberta", "t5"),
    *("whisper", "xlm-roberta", "xmod"),
)


def read_options(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return all options of a bottleneck from its file, whatever version of AdapterHub's library wrote it.

    Raises:
        StoreError: no bottleneck, or an option that is not known or has no equal here.
    """
    given = {key: value for key, value in told["config"].items() if value is not None}
    if "architecture" in given or "mh_adapter" not in given:
        method = given.get("architecture", "an unknown method")
        raise StoreError(f"{folder} is no bottleneck adapter but {method}: train it anew here; see docs/adapterhub.md.")
    if unknown := sorted(key for key in given.keys() - DEFAULTS.keys() if key not in _OLD and given[key]):
        raise StoreError(f"{folder}: the option {unknown[0]} is not known here; a newer AdapterHub wrote it.")
    inverse = given.get("invertible_adapter") or {}
    old = {"inv_adapter": inverse.get("block_type"), "inv_adapter_reduction_factor": inverse.get("reduction_factor")}
    options = {**DEFAULTS, **old, **{key: value for key, value in given.items() if key in DEFAULTS}}
    name = str(options["non_linearity"]).lower()
    if "version" not in told:
        name = _OLD_ACTIVATIONS.get(name, name)
    options["non_linearity"] = _ACTIVATIONS.get(name, name)
    if reason := _no_equal(options):
        raise StoreError(f"{folder}: {reason}; see docs/adapterhub.md.")
    return options


def their_activation(name: str) -> str:
    """Return AdapterHub's name of one of our activations."""
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == name), name)


def undone(made_by: str, base: Any) -> bool:
    """Tell whether AdapterHub undoes an invertible adapter before the words are predicted, in a class of its own."""
    return made_by.endswith(("AdapterModel", "ModelWithHeads")) or base.config.model_type not in _OWN_CLASSES


def _no_equal(c: dict[str, Any]) -> str:
    """Say why an adapter has no equal here; empty if it has one."""
    plain = c["scaling"] == 1.0 and not c["use_gating"]
    compacter = not (isinstance(c["scaling"], str) or c["use_gating"] or c["ln_before"] or c["ln_after"])
    compacter = compacter and c["factorized_phm_W"] and not c["shared_W_phm"] and c["phm_bias"]
    compacter = compacter and c["shared_phm_rule"] and not c["factorized_phm_rule"]
    reasons = {
        f"the activation {c['non_linearity']!r} is not known here": c["non_linearity"] not in ACT2FN,
        f"inv_adapter={c['inv_adapter']!r} does not run in AdapterHub either": c["inv_adapter"] not in (None, "nice"),
        "ln_after with a gate or a factor before it has no equal here": c["ln_after"] and not plain,
        "ln_after over the residual too has no equal here": c["ln_after"]
        and c["adapter_residual_before_ln"]
        and not c["is_parallel"],
        "this form of Compacter has no equal here": c["phm_layer"] and not compacter,
        "this combination of original_ln_* and residual_before_ln has no equal here": not connection(c, post_norm=True),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def connection(c: dict[str, Any], post_norm: bool) -> str:
    """Return how an adapter joins its layer: a connection of ours or `after_norm`; empty where there is no equal.

    Args:
        c: all options.
        post_norm: whether the model's norms come after the addition.
    """
    before, after, residual = c["original_ln_before"], c["original_ln_after"], c["residual_before_ln"]
    if c["is_parallel"]:
        return "parallel" if after else ""
    if not before:
        return "serial" if after and residual in (True, False) else ""
    if residual is True and after:
        return "stream"
    if residual is False and not after:
        return "after_norm" if post_norm else "stream"
    return ""
