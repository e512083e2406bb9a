"""Compositions: their text form, what each computes, and that a row or token gets what it would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import interleaf
from interleaf import Average, BatchSplit, BottleneckConfig, Fuse, FusionConfig, Parallel, Split, Stack, bundled
from interleaf.compose import WORDS, leaves, parse, prune, width
from interleaf.errors import AdapterError, ConfigError, SiteError
from tests.zoo import GENERATORS, TINY, base_weights, build, inputs, logits, randomise, same

EVERY_TINY = pytest.mark.parametrize("name", list(TINY))
SERIAL = BottleneckConfig(positions=["attention", "cross_attention", "ffn"], bottleneck_dim=8, activation="gelu")
BESIDE = BottleneckConfig(positions=["ffn"], connection="parallel", bottleneck_dim=4, activation="gelu")
INPUT = BottleneckConfig(positions=["ffn"], connection="serial_input", bottleneck_dim=4, activation="gelu")


def three(name: str, fusion: bool = False, heads: bool = False) -> Any:
    """A model with the adapters a, b and c of three kinds, and the fusion of a and b, as if trained."""
    model = interleaf.adapt(build(name))
    own = None if heads else []
    for seed, (adapter, config) in enumerate({"a": SERIAL, "b": BESIDE, "c": INPUT}.items()):
        model.add_adapter(adapter, config, modules_to_save=own)
        model.train_adapter(adapter)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    if fusion:
        model.add_adapter("a,b", FusionConfig(children=["a", "b"], modules_to_save=own))
        model.train_adapter("a,b")
        randomise(model, std=0.1)
    return model.eval()


def with_setup(model: Any, setup: Any, **changed: Tensor) -> Tensor:
    model.set_adapter(setup)
    return logits(model, **changed)


# ---- as data


def trees() -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "lang-1", "my.task", "two words", ""])

    def nest(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        several = st.lists(children, min_size=1, max_size=3)
        return st.one_of(
            several.map(lambda c: Stack(*c)),
            several.map(lambda c: Parallel(*c)),
            several.map(lambda c: Fuse(*c)),
            several.map(lambda c: Fuse(*c, name="f 1")),
            several.map(lambda c: Average(*c)),
            several.map(lambda c: Average(*c, weights=[0.5 + i for i in range(len(c))])),
            several.map(lambda c: Split(*c, splits=3)),
            several.map(lambda c: BatchSplit(*c, batch_sizes=list(range(1, len(c) + 1)))),
        )

    return st.recursive(names, nest, max_leaves=6)


@given(trees())
def test_the_text_form_says_it_all(tree: Any) -> None:
    assert parse(str(tree)) == tree or isinstance(tree, str)
    assert {name for name in leaves(tree) if name} == set(leaves(tree))


def test_compositions_are_compared_by_what_they_are() -> None:
    assert Stack("a", "b") == Stack("a", "b") != Stack("b", "a")
    assert Stack("a", "b") != Parallel("a", "b")
    assert Average("a", "b", weights=[1, 2]) != Average("a", "b")
    assert len({Stack("a"), Stack("a"), Fuse("a")}) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stak(a, b)", "no composition 'stak'. There are: stack, fuse, parallel"),
        ("stack(a, b", "stopped at 'the end'"),
        ("stack(a b)", "stopped at 'b)'"),
        ("stack(a) b", "stopped at 'b'"),
        ("stack()", "no adapters in it"),
        ("split(a, b)", "splits"),
        ("split(a, b, splits=[1])", "expected 2 numbers"),
        ("split(a, b, splits=[0, 2])", "1 or more"),
        ("split(a, b, splits=x)", "stopped at 'x)'"),
        ("average(a, weights=[0])", "positive sum"),
        ("stack(a, depth=2)", "depth"),
        ("stack(a; b)", "stopped at '; b)'"),
    ],
)
def test_what_is_no_composition_says_where(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert said in str(raised.value)


def test_what_cannot_run_is_refused_before_it_runs() -> None:
    assert width(Stack("a", Parallel("a", Stack("b", Parallel("c", "a"))))) == 3
    for node in (
        Stack(Parallel("a", "b"), Parallel("a", "b", "c")),
        Stack(BatchSplit("a", "b", batch_sizes=1), Parallel("a", "b")),
        BatchSplit(Parallel("a", "b"), "c", batch_sizes=1),
    ):
        with pytest.raises(ConfigError, match="copies"):
            width(node)
    model = three("bert")
    for setup, said in (("x", "no adapter 'x'"), ("stack(a, x)", "no adapter 'x'"), ("fuse(a, c)", "no adapter 'a,c'")):
        with pytest.raises(AdapterError, match=said):
            model.set_adapter(setup)
    with pytest.raises(ConfigError, match="wants 3 rows"):
        with_setup(model, "batch_split(a, b, batch_sizes=[1, 2])")


def test_pruning_keeps_what_is_at_a_site() -> None:
    node = Stack("a", Average("b", "c"), Stack("d"))
    assert prune(node, lambda n: n == "a") == "a"
    assert prune(node, lambda n: n in "ac") == Stack("a", Average("", "c"))
    assert prune(node, lambda n: n == "x") == ""


# ---- what each computes


@EVERY_TINY
def test_stack_runs_one_after_the_other(name: str) -> None:
    model = three(name)
    one = with_setup(model, "stack(a, b, c)")
    assert torch.equal(with_setup(model, ["a", "b", "c"]), one)
    assert torch.equal(with_setup(model, Stack("a", Stack("b", "c"))), one)
    assert torch.equal(with_setup(model, "stack(a)"), with_setup(model, "a"))
    assert torch.equal(with_setup(model, 'stack(a, "")'), with_setup(model, "a"))
    assert model.active_adapters() == ["a"]
    assert not torch.allclose(with_setup(model, "stack(a, b)"), with_setup(model, "a"))


@EVERY_TINY
@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_the_average_of_equal_adapters_is_one_of_them(name: str, copies: int) -> None:
    """AdapterHub gives a third of an adapter for three of the same."""
    model = three(name)
    one = with_setup(model, "a")
    torch.testing.assert_close(with_setup(model, Average(*["a"] * copies)), one)
    torch.testing.assert_close(with_setup(model, Average("a", "b", weights=[7, 0])), one)


def test_an_average_weighs_what_is_added() -> None:
    model = interleaf.adapt(build("bert"))
    site = ["encoder.layer.0.output.dense"]
    for name in "ab":
        model.add_adapter(name, BottleneckConfig(target_modules=site, bottleneck_dim=4, residual=False))
        randomise(model)
    seen: list[Tensor] = []
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    layer.register_forward_hook(lambda _, args, out: seen.append(out))
    for setup in ("a", "b", "average(a, b, weights=[1, 3])"):
        with_setup(model, setup)
    torch.testing.assert_close(seen[2], 0.25 * seen[0] + 0.75 * seen[1])


@EVERY_TINY
def test_fresh_adapters_are_the_identity_in_every_composition(name: str) -> None:
    model: Any = build(name)
    before = logits(model)
    interleaf.adapt(model)
    for adapter, config in {"a": SERIAL, "b": BESIDE, "c": INPUT}.items():
        model.add_adapter(adapter, config)
    model.add_adapter("a,b", FusionConfig(children=["a", "b"]))
    for setup in ("stack(a, b, c)", "average(a, b, c)", "fuse(a, b)", "a,b", "split(a, b, splits=[2, 3])"):
        assert torch.equal(with_setup(model, setup), before), setup
    torch.testing.assert_close(with_setup(model, "parallel(a, stack(b, c))"), torch.cat([before, before]))


@EVERY_TINY
@pytest.mark.parametrize("heads", [True, False])
def test_every_row_has_its_own_adapter(name: str, heads: bool) -> None:
    model = three(name, fusion=True, heads=heads)
    rows = inputs(model, rows=6)
    names = ["c", "", "a", "stack(a, b)", "a", "a,b"]
    alone = [
        with_setup(model, each or None, **{k: v[i : i + 1] for k, v in rows.items()}) for i, each in enumerate(names)
    ]
    model.set_adapter("b")
    mixed = logits(model, **rows, adapter_names=names)  # type: ignore[arg-type]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, **rows), with_setup(model, "b", **rows))  # and the setup is as it was


@EVERY_TINY
def test_the_batch_is_split_by_rows(name: str) -> None:
    model = three(name, heads=True)
    rows = inputs(model, rows=4)
    mixed = with_setup(model, "batch_split(stack(a, b), c, batch_sizes=[1, 3])", **rows)
    first = with_setup(model, "stack(a, b)", **{k: v[:1] for k, v in rows.items()})
    rest = with_setup(model, "c", **{k: v[1:] for k, v in rows.items()})
    torch.testing.assert_close(mixed, torch.cat([first, rest]), rtol=1e-4, atol=1e-5)


@EVERY_TINY
def test_parallel_puts_outputs_side_by_side(name: str) -> None:
    model = three(name, fusion=True, heads=True)
    single = [with_setup(model, setup) for setup in ("a", "stack(a, b)", "a,b")]
    together = with_setup(model, "parallel(a, stack(a, b), fuse(a, b))")
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-5)
    nested = with_setup(model, "stack(a, parallel(b, c))")
    single = [with_setup(model, setup) for setup in ("stack(a, b)", "stack(a, c)")]
    torch.testing.assert_close(nested, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_each_adapter_brings_its_own_head() -> None:
    model = three("roberta", heads=True)  # whose head is more than one linear map
    heads = [m for m in model.modules() if hasattr(m, "modules_to_save")]
    assert len(heads) == 1
    assert set(heads[0].modules_to_save) == {"a", "b", "c"}
    for adapter in "abc":
        with_setup(model, adapter)
        assert heads[0].active_adapters == [adapter]


@EVERY_TINY
def test_tokens_are_split(name: str) -> None:
    model = three(name)
    assert torch.equal(with_setup(model, "split(a, b, splits=[99, 1])"), with_setup(model, "a"))
    both = with_setup(model, "split(a, b, splits=[3, 99])")
    if name in ("gpt2", "llama", "qwen3", "mixtral"):  # causal: the first tokens do not see the later ones
        torch.testing.assert_close(both[:, :3], with_setup(model, "a")[:, :3])
        assert not torch.allclose(both[:, 3:], with_setup(model, "a")[:, 3:])


@EVERY_TINY
@pytest.mark.parametrize("tokens", ["first:2", "last:1", "first:1,last:2"])
def test_chosen_tokens_are_those_of_the_row_alone(name: str, tokens: str) -> None:
    model = interleaf.adapt(build(name))
    model.add_adapter("a", SERIAL, tokens=tokens)
    randomise(model)
    rows = inputs(model)
    causal = name in ("gpt2", "llama", "qwen3", "mixtral")
    keep = slice(3, None) if causal else slice(0, 4)  # padding on the left for those that generate
    rows["attention_mask"][1] = 0
    rows["attention_mask"][1, keep] = 1
    positions = {"position_ids": (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)} if causal else {}
    alone = {k: v[1:, keep] if not k.startswith("decoder") else v[1:] for k, v in rows.items()}
    together, single = logits(model, **rows, **positions)[1:], logits(model, **alone)
    if causal:
        together = together[:, keep]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


# ---- in training and in generation


@EVERY_TINY
def test_fusion_trains_alone_and_shows_its_attention(name: str, tmp_path: Path) -> None:
    model = three(name)
    weights = base_weights(model)
    children = {n: p.clone() for n, p in model.named_parameters() if ".adapters.a." in n or ".adapters.b." in n}
    model.add_adapter("a,b", FusionConfig(children=["a", "b"]))
    model.train_adapter("fuse(a, b)")
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains
    assert all(".adapters.a,b." in n or ".modules_to_save.a,b." in n for n in trains)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn(logits(model).shape)
    model.eval()
    (model(**inputs(model)).logits * target).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    assert all(torch.equal(p, children[n]) for n, p in model.named_parameters() if n in children)
    assert same(base_weights(model), weights)
    with model.observe() as seen:
        after = logits(model)
    assert seen
    for (adapter, _), quantities in seen.items():
        assert adapter == "a,b"
        assert quantities["attention"].shape[-1] == 2
        torch.testing.assert_close(quantities["attention"].sum(-1), torch.ones(quantities["attention"].shape[:-1]))
    for each in ("a", "b", "a,b"):
        model.save_adapter(tmp_path / each, each)
    fresh = interleaf.adapt(build(name))
    with pytest.raises(AdapterError, match="add or load it first"):
        fresh.load_adapter(tmp_path / "a,b")
    for each in ("a", "b", "a,b"):
        fresh.load_adapter(tmp_path / each)
    assert torch.equal(logits(fresh), after)
    with pytest.raises(AdapterError, match="'a,b' needs 'a'"):
        fresh.delete_adapter("a")
    fresh.delete_adapter(["a,b", "a", "b"])
    assert same(dict(fresh.state_dict()), base_weights(build(name)))


def test_the_fusions_penalty_is_in_the_loss() -> None:
    model = three("bert", fusion=True)
    rows = {**inputs(model), "labels": torch.tensor([0, 1])}
    model.set_adapter("a,b")
    plain = model(**rows).loss
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    values = [p for n, p in model.named_parameters() if "a,b.value" in n]
    expected = sum(0.01 * (v - torch.eye(32)).pow(2).sum() for v in values)
    torch.testing.assert_close(model(**rows).loss, plain + expected)


def test_train_within_a_composition() -> None:
    model = three("bert")
    model.train_adapter("b", within="stack(a, b)")
    assert model.active_adapters() == ["a", "b"]
    assert all(".b." in n for n, p in model.named_parameters() if p.requires_grad)
    model.train_adapter(["a", "b"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".adapters.")[1][0] for n in trains} == {"a", "b"}
    with pytest.raises(AdapterError, match="'c' is to be trained but does not run"):
        model.train_adapter("c", within="stack(a, b)")


SETUPS = ["stack(a, b, c)", "average(a, b)", "fuse(a, b)", "split(a, b, splits=[4, 6])"]


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("setup", SETUPS)
def test_cached_generation_equals_uncached(name: str, setup: str) -> None:
    model = three(name, fusion=True)
    model.set_adapter(setup)
    check_generation(model, {})


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("tokens", ["first:3", "last:2", "first:1,last:1"])
def test_generation_with_chosen_tokens(name: str, tokens: str) -> None:
    """AdapterHub's LoReFT gives other tokens with a cache than without."""
    model = interleaf.adapt(build(name))
    model.add_adapter("a", SERIAL, tokens=tokens)
    randomise(model)
    check_generation(model, {})


def check_generation(model: Any, extra: dict[str, Any]) -> Tensor:
    asked = {k: v for k, v in inputs(model, rows=3).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **extra}
    cached, uncached = (model.generate(**asked, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    return cached


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_generate_with_their_own_adapter(name: str, beams: int) -> None:
    model = three(name)
    asked = {k: v for k, v in inputs(model, rows=3).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    names = ["stack(a, c)", "", "b"]
    mixed = check_generation(model, {"num_beams": beams, "adapter_names": names})
    for i, each in enumerate(names):
        model.set_adapter(each or None)
        alone = model.generate(**{k: v[i : i + 1] for k, v in asked.items()}, **options)
        assert torch.equal(mixed[i : i + 1], alone)


@pytest.mark.parametrize("name", GENERATORS)
def test_parallel_generates_side_by_side(name: str) -> None:
    model = three(name)
    model.set_adapter("parallel(a, b)")
    together = check_generation(model, {})
    for i, each in enumerate("ab"):
        model.set_adapter(each)
        assert torch.equal(together[3 * i : 3 * i + 3], check_generation(model, {}))


NESTED = "stack(parallel(average(a, b), fuse(a, b)), split(a, c, splits=[2, 4]))"
BY_ROW = ["parallel(a, b)", "batch_split(a, b, batch_sizes=1)"]


@pytest.mark.parametrize(
    ("name", "setup"), [*((name, NESTED) for name in TINY), *(("llama", setup) for setup in [*SETUPS, *BY_ROW])]
)
def test_it_compiles_to_one_graph(name: str, setup: str) -> None:
    model = three(name, fusion=True)
    model.set_adapter(setup)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "mixtral"])
@pytest.mark.parametrize("setup", [*SETUPS, *BY_ROW])
def test_gradients_are_the_same_under_gradient_checkpointing(name: str, setup: str) -> None:
    model = three(name, fusion=True)
    model.train_adapter(setup)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        out = model(**inputs(model)).logits
        (out * torch.randn(out.shape)).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(plain)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for key, value in gradients().items():
        torch.testing.assert_close(value, plain[key])


def test_per_row_adapters_through_peft() -> None:
    model = get_peft_model(build("bert"), BottleneckConfig(), adapter_name="one").eval()
    model.add_adapter("two", SERIAL)
    randomise(model)
    model.set_adapter("two")
    randomise(model, std=0.2)
    rows = inputs(model)
    model.set_adapter("one")
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    mixed = logits(model, adapter_names=["one", "__base__"])  # type: ignore[arg-type]
    torch.testing.assert_close(mixed[0], one[0])
    torch.testing.assert_close(mixed[1], logits(build("bert"))[1])
    torch.testing.assert_close(logits(model), two)
    for names, said in ((["one", "x"], "no adapter 'x'"), (["one"] * 3, "3 names, the batch has 2 rows")):
        with pytest.raises((AdapterError, ConfigError), match=said):
            logits(model, **rows, adapter_names=names)  # type: ignore[arg-type]


def test_lora_is_stacked_but_not_composed() -> None:
    model = three("bert")
    model.add_adapter("l", LoraConfig(target_modules=["query"]))
    model.set_adapter(["a", "l"])
    with pytest.raises(AdapterError, match="'l' is a method of PEFT's own"):
        model.set_adapter("parallel(a, l)")


def test_layers_are_skipped() -> None:
    model = three("bert")
    full = with_setup(model, "a")
    model.set_adapter("a", skip_layers="first:1")
    first = logits(model)
    model.set_adapter("a", skip_layers=[1])
    second = logits(model)
    model.set_adapter("a", skip_layers=[0, 1])
    none = logits(model)
    assert len({tuple(t.flatten().tolist()) for t in (full, first, second, none)}) == 4
    model.add_adapter("upper", SERIAL, layers="last:1")
    assert torch.equal(with_setup(model, "a"), full)
    with pytest.raises(SiteError, match="there is no layer 7"):
        model.set_adapter("a", skip_layers=[7])


def test_the_stock_trainer_trains_a_fusion(tmp_path: Path) -> None:
    """On a real encoder: two adapters, then their fusion, whose loss falls."""
    base = bundled.resolve("bundled:minilm")
    model = interleaf.adapt(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2))
    for adapter in "ab":
        model.add_adapter(adapter, "pfeiffer")
    model.add_adapter("a,b", FusionConfig(children=["a", "b"]))
    model.train_adapter("a,b")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 999, (8,), generator=generator), "labels": i % 2} for i in range(16)]
    args = TrainingArguments(tmp_path, max_steps=6, learning_rate=1e-3, report_to=[], logging_steps=3, use_cpu=True)
    trainer = Trainer(model=model, args=args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_every_word_is_public() -> None:
    assert {cls.__name__ for cls in WORDS.values()} <= set(interleaf.__all__)
