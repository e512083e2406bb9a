"""The contract of every adapter kind in the registry, on every tiny family: to register a kind is to test it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import interleaf
from interleaf import MTLConfig
from interleaf.adapter import Registry
from interleaf.errors import AdapterError, ConfigError, InterleafError
from tests.zoo import TINY, base_weights, build, inputs, logits, mixed_and_alone, randomise, same

# importing a name registers the kinds
PRESETS = sorted(Registry.presets()) if interleaf.BottleneckConfig else []
EVERY_TINY = pytest.mark.parametrize("name", list(TINY))
# an encoder, a decoder, an encoder-decoder, a mixture of experts
SOME = pytest.mark.parametrize("name", ["bert", "llama", "t5", "mixtral"])
EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS)


def adapted(name: str, preset: str, trained: bool = True) -> Any:
    model = interleaf.adapt(build(name))
    model.add_adapter("a", preset, modules_to_save=[])
    if trained:
        randomise(model, std=0.2)
    return model


def virtual(preset: str) -> bool:
    """Whether a preset has virtual tokens: it is not the identity at first, and runs on whole batches only."""
    return Registry.preset(preset).virtual_tokens


@EVERY_TINY
@EVERY_PRESET
def test_a_kind_keeps_the_contract(name: str, preset: str, tmp_path: Path) -> None:
    base = build(name)
    before, weights, modules = logits(base), base_weights(base), [n for n, _ in base.named_modules()]
    model = interleaf.adapt(base)
    model.add_adapter("a", preset, modules_to_save=[])
    assert torch.equal(logits(model), before) is not virtual(preset), "a fresh adapter is the identity"

    model.train_adapter("a")
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        out = model(**inputs(model)).logits
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert still == [], "every weight is part of the computation"
        optimizer.step()
    assert same(base_weights(model), weights), "the base does not change"
    assert not torch.equal(logits(model), before), "training changes something"

    randomise(model, std=0.2)
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before), "switched off it is the base"
    model.save_adapter(tmp_path / "a", "a")
    fresh = interleaf.adapt(build(name))
    fresh.load_adapter(tmp_path / "a")
    model.requires_grad_(False)
    assert torch.equal(logits(fresh), logits(model)), "saved and loaded it is the same"
    torch.testing.assert_close(logits(model), after)

    model.delete_adapter("a")
    assert same(dict(model.state_dict()), weights)
    assert [n for n, _ in model.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), before), "deleted it was never there"


@SOME
@EVERY_PRESET
def test_a_row_gets_in_a_batch_what_it_gets_alone(name: str, preset: str) -> None:
    model = adapted(name, preset)
    model.add_adapter("b", "pfeiffer", modules_to_save=[])
    randomise(model, std=0.2)
    if virtual(preset):
        with pytest.raises(AdapterError, match="take a whole batch"):
            mixed_and_alone(model)
        return
    mixed, alone = mixed_and_alone(model)
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)


@SOME
@EVERY_PRESET
def test_it_composes_and_moves(name: str, preset: str) -> None:
    model = adapted(name, preset)
    model.add_adapter("b", preset, modules_to_save=[])
    randomise(model, std=0.2)
    model.set_adapter("stack(a, b)")
    assert logits(model).isfinite().all()
    for setup in ("average(a, b)", "split(a, b, splits=[2, 9])", "parallel(a, b)"):
        if virtual(preset):
            with pytest.raises(AdapterError, match="take a whole batch"):
                model.set_adapter(setup)
            continue
        model.set_adapter(setup)
        assert logits(model).isfinite().all(), setup
    model.set_adapter("a")
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["bert", "llama"])
@EVERY_PRESET
def test_it_compiles_to_one_graph(name: str, preset: str) -> None:
    model = adapted(name, preset)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@EVERY_PRESET
def test_cached_generation_equals_uncached(name: str, preset: str) -> None:
    model = adapted(name, preset)
    asked = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, uncached = (model.generate(**asked, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@EVERY_PRESET
def test_a_fresh_adapter_on_a_half_precision_model_is_the_identity(preset: str) -> None:
    """AdapterHub's fail there at the first forward."""
    base = build("llama").to(torch.bfloat16)
    before = logits(base)
    model: Any = interleaf.adapt(base)
    model.add_adapter("a", preset)
    assert torch.equal(logits(model), before) is not virtual(preset)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", sorted(Registry.kinds))
def test_settings_are_described_and_checked(kind: str) -> None:
    import ast
    import inspect

    cls = Registry.kinds[kind].config_cls
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    for i in fields:
        assert isinstance(body[i + 1], ast.Expr), f"{kind}: {ast.unparse(body[i])} has no description"
    needed: dict[str, Any] = {"parts": ["pfeiffer", "glu"]} if kind == "union" else {}
    with pytest.raises(InterleafError, match="unknown adapter setting 'depht'"):
        interleaf.adapter.as_config(cls(**needed), depht=3)  # type: ignore[attr-defined]


# ---- what is particular to one kind


def test_the_compacters_rule_is_shared_and_its_maps_are_kronecker_products() -> None:
    model = adapted("bert", "compacter")
    rules = [n for n, _ in model.named_parameters() if n.endswith("a.rule")]
    assert len(rules) == 1
    sites = [m for m in model.modules() if type(m).__name__ == "Compacter"]
    assert len(sites) == 4
    rule, down = sites[0].rule, sites[0].down
    matrix = sum(torch.kron(rule[i].T.contiguous(), down.left[i] @ down.right[i]) for i in range(4))
    # kron over (b, a) blocks: the rule maps the input's block a to the output's block b
    z = torch.randn(3, 32)
    blocks = z.unflatten(-1, (4, 8))
    expected = sum(
        torch.einsum("xai,ab->xbi", blocks, rule[i]) @ (down.left[i] @ down.right[i]) for i in range(4)
    ).flatten(-2)
    torch.testing.assert_close(down(z, rule), expected + down.bias)
    assert isinstance(matrix, torch.Tensor)


@pytest.mark.parametrize("preset", ["nice", "glow"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_invertible_adapters_undo_what_they_do(name: str, preset: str) -> None:
    model = adapted(name, preset)
    sites = [m for m in model.modules() if type(m).__name__ == "Invertible"]
    assert [m.undo for m in sites].count(True) == 1
    y = torch.randn(2, 5, 32)
    there = next(m for m in sites if not m.undo)
    back = next(m for m in sites if m.undo)
    assert not torch.allclose(there(None, y), y)
    torch.testing.assert_close(back(None, there(None, y)), y, rtol=1e-4, atol=1e-5)


def test_a_stack_of_invertible_adapters_is_undone_backwards() -> None:
    model = adapted("llama", "nice")
    model.add_adapter("b", "glow", modules_to_save=[])
    randomise(model, std=0.2)
    model.set_adapter("stack(a, b)")
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    hidden = model.get_input_embeddings()(inputs(model)["input_ids"])
    assert not torch.allclose(seen[0], hidden)
    head = model.get_output_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(head(seen[0]), hidden @ head.weight.T, rtol=1e-4, atol=1e-5)


def test_reft_edits_only_a_subspace_of_chosen_tokens() -> None:
    model = interleaf.adapt(build("llama"))
    model.add_adapter("a", "loreft", tokens="first:2", layers=[1], rank=3)
    randomise(model)
    before, after = logits(build("llama")), logits(model)
    assert not torch.allclose(after[:, :2], before[:, :2])
    torch.testing.assert_close(after[:, 2:], before[:, 2:])
    site = next(m for m in model.modules() if type(m).__name__ == "Reft")
    torch.testing.assert_close(site.rows() @ site.rows().T, torch.eye(3), rtol=1e-4, atol=1e-5)
    y = torch.randn(4, 32)
    change = site(None, y) - y
    torch.testing.assert_close(change @ site.rows().T @ site.rows(), change, rtol=1e-4, atol=1e-5)


def test_tasks_share_a_part(tmp_path: Path) -> None:
    model = interleaf.adapt(build("bert"))
    with pytest.raises(AdapterError, match="needs the adapter 'one'"):
        model.add_adapter("two", MTLConfig(shared_with="one"))
    model.add_adapter("one", "mtl")
    model.add_adapter("two", MTLConfig(shared_with="one"))
    own = {n: sum(p.numel() for k, p in model.named_parameters() if f".adapters.{n}." in k) for n in ("one", "two")}
    assert own["two"] < own["one"] / 2
    model.train_adapter(["one", "two"], within="parallel(one, two)")
    model.eval()
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    out = model(**inputs(model)).logits
    assert out.shape[0] == 4
    randomise(model)
    (model(**inputs(model)).logits * torch.randn(4, out.shape[1])).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in before)
    model.set_adapter("two")
    after = logits(model)
    for name in ("one", "two"):
        model.save_adapter(tmp_path / name, name)
    with pytest.raises(AdapterError, match="'two' needs 'one'"):
        model.delete_adapter("one")
    fresh = interleaf.adapt(build("bert"))
    for name in ("one", "two"):
        fresh.load_adapter(tmp_path / name)
    torch.testing.assert_close(logits(fresh), after)
    with pytest.raises(ConfigError, match="another bottleneck_dim"):
        fresh.add_adapter("three", MTLConfig(shared_with="one", bottleneck_dim=3))


def test_stochastic_depth_leaves_out_whole_rows() -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "adapter_plus", stochastic_depth=0.5, layers=[0])
    randomise(model)
    site = next(m for m in model.modules() if isinstance(m, interleaf.Bottleneck))
    y = torch.randn(200, 3, 32)
    full = site.eval()(None, y) - y
    part = site.train()(None, y) - y
    kept = part.abs().sum((1, 2)) > 0
    assert 60 < int(kept.sum()) < 140
    torch.testing.assert_close(part[kept], 2 * full[kept])


def test_glu_is_a_gated_linear_unit() -> None:
    model = adapted("llama", "glu")
    site = next(m for m in model.modules() if type(m).__name__ == "GLU")
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    expected = y + site.up(torch.nn.functional.silu(site.gate(x)) * site.value(x))
    torch.testing.assert_close(site(x, y), expected)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_union_is_one_adapter(name: str, tmp_path: Path) -> None:
    model = interleaf.adapt(build(name))
    before = logits(model)
    parts = ["houlsby", interleaf.GLUConfig(connection="serial", bottleneck_dim=3), "nice"]
    model.add_adapter("a", interleaf.UnionConfig(parts=parts))
    assert torch.equal(logits(model), before)
    randomise(model, std=0.2)
    after = logits(model)
    model.save_adapter(tmp_path / "a", "a")
    fresh = interleaf.adapt(build(name))
    fresh.load_adapter(tmp_path / "a")
    torch.testing.assert_close(logits(fresh), after)
    kinds = {type(m).__name__ for m in fresh.modules()}
    assert {"Bottleneck", "GLU", "Several", "Invertible"} <= kinds
    model.delete_adapter("a")
    assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="name the parts"):
        interleaf.UnionConfig(parts=[])
    with pytest.raises(ConfigError, match="read different places"):
        model.add_adapter("b", interleaf.UnionConfig(parts=["pfeiffer", INPUT]))


INPUT = interleaf.BottleneckConfig(positions=["ffn"], connection="serial_input")
