"""What must hold for every adapter on every architecture, bit for bit where that makes sense."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import interleaf
from interleaf import BottleneckConfig
from tests.zoo import GENERATORS, MODELS, TINY, base_weights, build, inputs, logits, randomise, same

EVERY = pytest.mark.parametrize("name", list(MODELS))
EVERY_TINY = pytest.mark.parametrize("name", list(TINY))

# a smooth activation, so that no unit is dead and every gradient is real
SMOOTH: dict[str, Any] = {"bottleneck_dim": 8, "activation": "gelu"}
WAYS: dict[str, BottleneckConfig] = {
    "serial": BottleneckConfig(positions=["attention", "cross_attention", "ffn"], **SMOOTH),
    "serial_input": BottleneckConfig(connection="serial_input", **SMOOTH),
    "parallel": BottleneckConfig(positions=["attention", "cross_attention", "ffn"], connection="parallel", **SMOOTH),
    "skip": BottleneckConfig(connection="skip", positions=["block"], **SMOOTH),
    "parallel block": BottleneckConfig(connection="parallel", positions=["block"], **SMOOTH),
    "textbook": BottleneckConfig(down_dim=12, **SMOOTH),
    "everything": BottleneckConfig(
        scaling="channel", gate=True, norm_before=True, norm_after=True, init="houlsby", **SMOOTH
    ),
}
EVERY_WAY = pytest.mark.parametrize("way", list(WAYS))


def adapted(name: str, way: str = "serial", trained: bool = False) -> Any:
    model = interleaf.adapt(build(name))
    model.add_adapter("a", WAYS[way])
    if trained:
        randomise(model)
    return model


def loss_of(model: Any) -> torch.Tensor:
    # a random projection: a symmetric loss such as the sum of squares has gradients of nought
    out = model(**inputs(model)).logits
    return (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()


def train_steps(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@EVERY
@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_identity(name: str, way: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    before = logits(model)
    interleaf.adapt(model).add_adapter("a", WAYS[way])
    assert all(p.dtype == dtype for p in model.parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel", "adapter_plus", "textbook"])
@EVERY_TINY
def test_every_preset_is_the_identity_at_first(name: str, preset: str) -> None:
    model = build(name)
    before = logits(model)
    interleaf.adapt(model).add_adapter("a", preset)
    assert torch.equal(logits(model), before)


@EVERY
@EVERY_WAY
def test_training_changes_every_adapter_and_nothing_of_the_base(name: str, way: str) -> None:
    model = adapted(name, way)
    model.train_adapter("a")
    model.eval()  # no dropout: with it, a unit may get no gradient by chance
    before, weights = logits(model), base_weights(model)
    own = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert own
    assert all(".adapter_slot." in n or ".modules_to_save." in n for n in own)
    train_steps(model)
    still = [n for n, p in model.named_parameters() if n in own and torch.equal(p, own[n])]
    assert still == []
    assert same(base_weights(model), weights)
    assert not torch.equal(logits(model), before)


@EVERY
@EVERY_WAY
def test_switched_off_it_is_the_base(name: str, way: str) -> None:
    before = logits(build(name))
    model = adapted(name, way, trained=True)
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    after = logits(model)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trains
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    assert model.active_adapters() == []


@EVERY
@EVERY_WAY
def test_saved_and_loaded_it_gives_the_same_logits(name: str, way: str, tmp_path: Path) -> None:
    model = adapted(name, way, trained=True)
    model.save_adapter(tmp_path / "a", "a")
    fresh = interleaf.adapt(build(name))
    assert fresh.load_adapter(tmp_path / "a") == "a"
    assert torch.equal(logits(fresh), logits(model))
    assert not any(p.requires_grad for p in fresh.parameters())


@EVERY
@EVERY_WAY
def test_deleted_it_was_never_there(name: str, way: str) -> None:
    model = build(name)
    before, weights, names = logits(model), base_weights(model), [n for n, _ in model.named_modules()]
    trains = [p.requires_grad for p in model.parameters()]
    interleaf.adapt(model).add_adapter("a", WAYS[way])
    randomise(model)
    model.delete_adapter("a")
    assert same(dict(model.state_dict()), weights)
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == trains
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), before)


@EVERY
def test_it_moves_with_the_model(name: str) -> None:
    model = adapted(name, "everything", trained=True)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@EVERY
@EVERY_WAY
def test_gradient_checkpointing_gives_the_same_gradients(name: str, way: str) -> None:
    model = adapted(name, way, trained=True)
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)  # the same dropout each time
        loss_of(model).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = gradients()
        model.activation_checkpointing_disable()
        assert checkpointed.keys() == plain.keys()
        for key, value in plain.items():
            # gradients of 20 and more, summed in another order
            torch.testing.assert_close(checkpointed[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
@EVERY_WAY
def test_cached_generation_equals_uncached(name: str, way: str) -> None:
    model = adapted(name, way, trained=True)
    asked = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**asked, **options, use_cache=True)
    uncached = model.generate(**asked, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for left, right in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_fresh_adapter_is_the_bases(name: str) -> None:
    asked = {k: v for k, v in inputs(build(name)).items() if not k.startswith("decoder")}
    before = build(name).generate(**asked, max_new_tokens=8, do_sample=False)
    assert torch.equal(adapted(name).generate(**asked, max_new_tokens=8, do_sample=False), before)


@EVERY_TINY
def test_it_compiles_without_a_graph_break_where_the_base_does(name: str) -> None:
    torch._dynamo.reset()
    base = torch.compile(build(name), backend="eager", fullgraph=True)
    plain = logits(base)  # every base of the zoo compiles to one graph
    torch._dynamo.reset()
    model: Any = interleaf.adapt(build(name))
    for way, config in WAYS.items():
        model.add_adapter(way, config, layers="last:1")
    model.train_adapter(list(WAYS))  # all ways in at once: tracing is slow
    randomise(model.eval(), std=0.05)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    assert not torch.allclose(plain, logits(model))


@EVERY
@EVERY_WAY
def test_a_row_in_a_batch_is_the_row_alone(name: str, way: str) -> None:
    model = adapted(name, way, trained=True)
    both = inputs(model)
    both["attention_mask"][1, 4:] = 0
    both["input_ids"][1, 4:] = model.config.pad_token_id or 0
    alone = {k: v[1:, :4] if not k.startswith("decoder") else v[1:] for k, v in both.items()}
    together = logits(model, **both)[1]
    single = logits(model, **alone)[0]
    if together.shape != single.shape:  # a causal model's logits, a token each: the padding's have no meaning
        together = together[:4]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


@EVERY_TINY
def test_two_adapters_are_switched_and_run_in_turn(name: str) -> None:
    model = adapted(name, trained=True)
    one = logits(model)
    model.add_adapter("b", WAYS["serial"])
    assert model.active_adapters() == ["b"]
    fresh = logits(model)
    model.train_adapter("b")
    model.eval()
    randomise(model, std=0.2)
    two = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), one)
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    both = logits(model)
    assert not any(torch.equal(both, other) for other in (one, two, fresh))
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model), two)


@EVERY_TINY
def test_copies_and_pickles_are_the_same_model(name: str) -> None:
    model = adapted(name, trained=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(logits(twin), logits(model))
        twin.delete_adapter("a")
        assert "a" in model.adapters
    assert isinstance(model, MODELS[name]().__class__)


def test_the_same_seed_makes_the_same_adapter() -> None:
    one, two = (dict(adapted("bert").named_parameters()) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    adapted("bert").save_adapter(tmp_path / "a", "a")
    model = interleaf.adapt(build("bert"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model.load_adapter(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
