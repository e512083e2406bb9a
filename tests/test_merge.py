"""Weights merged by task arithmetic into a new adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import interleaf
from interleaf import UnionConfig
from interleaf.errors import AdapterError, ConfigError
from tests.zoo import build, logits, randomise

LORA = UnionConfig(parts=[LoraConfig(r=2), "pfeiffer"])


def adapted(*configs: Any, base: str = "bert", **settings: Any) -> Any:
    """A model with adapters a, b, c ... of different weights."""
    model = interleaf.adapt(build(base))
    for i, config in enumerate(configs):
        model.add_adapter("abc"[i], config, **settings)
        model.train_adapter("abc"[i])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return model.eval()


def weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {k.replace(f".{name}.", ".*."): p.detach().clone() for k, p in model.named_parameters() if f".{name}." in k}


@pytest.mark.parametrize("kind", ["pfeiffer", "compacter", "loreft", "union"])
def test_linear_is_the_weighted_sum_of_every_tensor_and_of_the_heads(kind: str) -> None:
    config: Any = LORA if kind == "union" else kind
    model = adapted(config, config)
    model.merge_adapters("new", {"a": 0.7, "b": -0.3})
    a, b, new = (weights(model, name) for name in ("a", "b", "new"))
    assert any("modules_to_save" in key for key in new)
    assert len(new) >= 6
    for key in new:
        torch.testing.assert_close(new[key], 0.7 * a[key] - 0.3 * b[key])
    assert model.active_adapters() == ["new"]


@pytest.mark.parametrize("base", ["bert", "llama", "t5"])
def test_one_adapter_with_weight_one_is_that_adapter(base: str) -> None:
    model = adapted("houlsby", "houlsby", base=base)
    model.set_adapter("a")
    before = logits(model)
    model.merge_adapters("new", {"a": 1.0})
    assert torch.equal(logits(model), before)
    model.merge_adapters("nothing", {"a": 1, "b": 1, "new": -1})
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("nothing")
    torch.testing.assert_close(logits(model), expected)


def test_it_is_saved_loaded_trained_and_deleted_like_any(tmp_path: Path) -> None:
    model = adapted("pfeiffer", "pfeiffer")
    model.merge_adapters("new", {"a": 0.5, "b": 0.5}, "ties", density=0.4)
    after = logits(model)
    model.save_adapter(tmp_path / "new", "new")
    fresh = interleaf.adapt(build("bert"))
    fresh.load_adapter(tmp_path / "new")
    assert torch.equal(logits(fresh), after)
    model.train_adapter("new")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".new." in n for n in trained)
    model.eval()
    for name in ("a", "b", "new"):
        model.delete_adapter(name)
    assert torch.equal(logits(model), logits(build("bert")))


# ---- each method against a computation by hand

A = torch.tensor([[4.0, -1.0], [0.5, 2.0]])
B = torch.tensor([[-2.0, -3.0], [0.0, 1.0]])


def one_matrix(method: str, **options: Any) -> torch.Tensor:
    """Merge two adapters whose first matrix begins with A and B, else zero; return that corner."""
    model = adapted("pfeiffer", "pfeiffer", layers=[0], bottleneck_dim=2, input_dim=32)
    for name, matrix in (("a", A), ("b", B)):
        down = next(p for n, p in model.named_parameters() if f".{name}.down.weight" in n)
        with torch.no_grad():
            down.zero_()
            down[:, :2] = matrix
    model.merge_adapters("new", {"a": 0.5, "b": 1.0}, method, **options)
    new = next(p for n, p in model.named_parameters() if ".new.down.weight" in n).detach()
    assert not new[:, 2:].any()
    return new[:, :2]


def test_magnitude_pruning_keeps_the_largest() -> None:
    # 2 of 64 numbers: 4 and 2 of A, -3 and -2 of B
    expected = torch.tensor([[0.5 * 4 - 2, -3.0], [0.0, 0.5 * 2]])
    torch.testing.assert_close(one_matrix("magnitude_prune", density=2 / 64), expected)


def test_ties_elects_a_sign_and_leaves_the_others_out() -> None:
    # kept: A [[4, 0], [0, 2]], B [[-2, -3], [0, 0]]; their sums elect +, -, +, +
    # then the mean over those of the elected sign: 0.5 * 4; -3; and 0.5 * 2
    expected = torch.tensor([[2.0, -3.0], [0.0, 1.0]])
    torch.testing.assert_close(one_matrix("ties", density=2 / 64), expected)


def test_dare_drops_at_random_and_scales_up_what_stays() -> None:
    found = one_matrix("dare_linear", density=0.5, seed=4)
    possible = torch.stack([(i * 0.5 * A + j * B) / 0.5 for i in (0, 1) for j in (0, 1)])
    assert bool(((found - possible).abs() < 1e-6).any(0).all())
    assert not torch.equal(found, 0.5 * A + B)
    assert torch.equal(found, one_matrix("dare_linear", density=0.5, seed=4))
    many = torch.stack([one_matrix("dare_linear", density=0.5, seed=seed) for seed in range(12)])
    assert len({tuple(m.flatten().tolist()) for m in many}) > 6, "another seed drops others"
    assert torch.allclose(many.mean(0), 0.5 * A + B, atol=2.5)
    torch.testing.assert_close(one_matrix("dare_linear", density=1.0), 0.5 * A + B)
    torch.testing.assert_close(one_matrix("dare_ties", density=1.0), one_matrix("ties", density=1.0))


def test_no_random_number_of_the_users_is_used() -> None:
    model = adapted("pfeiffer", "pfeiffer")
    before = torch.get_rng_state()
    model.merge_adapters("new", {"a": 1.0, "b": 1.0}, "dare_ties", density=0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_matrices_lose_numbers() -> None:
    model = adapted("adapter_plus", "adapter_plus")
    model.merge_adapters("new", {"a": 0.5, "b": 0.5}, "magnitude_prune", density=0.1)
    a, b, new = (weights(model, name) for name in ("a", "b", "new"))
    for key in new:
        pruned = new[key].ndim > 1 and "modules_to_save" not in key
        assert torch.allclose(new[key], (a[key] + b[key]) / 2) is not pruned, key


def test_the_new_adapter_has_a_head_if_all_have_one() -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "pfeiffer")
    model.add_adapter("b", "pfeiffer", modules_to_save=[])
    randomise(model)
    model.merge_adapters("new", {"a": 0.5, "b": 0.5})
    assert {n: s.head_parameters > 0 for n, s in zip("abn", model.adapter_summary(), strict=True)} == {
        "a": True,
        "b": False,
        "n": False,
    }


def test_what_cannot_be_merged_is_refused_and_nothing_changes() -> None:
    model = adapted("pfeiffer", "houlsby", LORA)
    model.add_adapter("d", LoraConfig(target_modules=["query"]))
    model.add_adapter("e", UnionConfig(parts=[LoraConfig(r=4), "pfeiffer"]))
    names = list(model.adapters)
    cases: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({"a": 1, "x": 1}, {}, AdapterError, "no adapter 'x' on this model"),
        ({"a": 1, "b": 1}, {}, AdapterError, "'a' and 'b' cannot be merged: activation is 'relu' and 'silu'"),
        ({"a": 1, "c": 1}, {}, AdapterError, "cannot be merged: "),
        ({"c": 1, "e": 1}, {}, AdapterError, "cannot be merged: parts is"),
        ({"d": 1}, {}, AdapterError, "'d' is a method of PEFT's own"),
        ({"a": 1}, {"name": "b"}, AdapterError, "an adapter 'b' already"),
        ({}, {}, ConfigError, "name the adapters"),
        ({"a": "1"}, {}, ConfigError, "weight of 'a' is '1'"),
        ({"a": float("nan")}, {}, ConfigError, "weight of 'a' is nan"),
        ({"a": True}, {}, ConfigError, "weight of 'a' is True"),
        ({"a": 1}, {"method": "mean"}, ConfigError, "method='mean': expected one of linear"),
        ({"a": 1}, {"method": "ties"}, ConfigError, "density=None: ties needs"),
        ({"a": 1}, {"method": "ties", "density": 0}, ConfigError, "density=0: ties needs"),
        ({"a": 1}, {"method": "dare_ties", "density": 1.5}, ConfigError, "density=1.5"),
        ({"a": 1}, {"density": 0.5}, ConfigError, "linear keeps everything"),
    ]
    for given, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            model.merge_adapters(**{"name": "new", "weights": given, **options})
        assert list(model.adapters) == names
