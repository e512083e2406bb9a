"""A router sends each token to some of several bottlenecks, or past them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import interleaf
from interleaf.adapters.routed import Routed, RoutedConfig, unevenness
from interleaf.errors import ConfigError
from interleaf.slot import slots
from tests.zoo import build, inputs, logits, randomise


def routed(**settings: Any) -> Any:
    model: Any = interleaf.adapt(build("bert"))
    model.add_adapter("a", RoutedConfig(**settings))
    return model


def send_all_to_the_first(model: Any) -> None:
    for slot in slots(model):
        adapter: Any = slot.adapters["a"]
        with torch.no_grad():
            adapter.router.bias[0] = 3.0


def used(model: Any) -> torch.Tensor:
    """Return the share of tokens whose first choice each expert is, summed over the places, shape [E]."""
    with torch.no_grad(), model.observe() as seen:
        model(**inputs(model, rows=32))
    first = [found["router"][..., :4].argmax(-1).flatten() for found in seen.values()]
    return torch.bincount(torch.cat(first), minlength=4) / sum(map(len, first))


@pytest.mark.parametrize("balance", [0.0, 0.1])
def test_the_router_balances(balance: float) -> None:
    """A router that sends all to one expert spreads out, but only where that is asked for."""
    model = routed(balance=balance, skip=False)
    model.train_adapter("a")
    for slot in slots(model):
        torch.nn.init.normal_(slot.adapters["a"].up, std=0.1)
    send_all_to_the_first(model)
    assert used(model)[0] == 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        model(**inputs(model, rows=32), labels=torch.arange(32) % 2).loss.backward()
        optimizer.step()
    model.eval()
    assert bool(used(model).max() < 0.5) is (balance > 0), used(model)


def test_unevenness_is_nought_for_all_alike_and_the_rest_for_one_that_has_all() -> None:
    assert unevenness(100 * torch.eye(4)) == pytest.approx(0, abs=1e-5)
    assert unevenness(100 * torch.eye(4)[:1].repeat(7, 1)) == pytest.approx(3, abs=1e-5)


def test_the_balancing_term_is_part_of_the_training_loss_only() -> None:
    model = routed(balance=0.5)
    send_all_to_the_first(model)
    batch, labels = inputs(model), torch.tensor([0, 1])
    plain = cross_entropy(logits(model), labels)
    assert model(**batch, labels=labels).loss == plain
    model.train_adapter("a")
    for module in model.modules():
        module.training = module is model or isinstance(module, Routed)  # no dropout
    loss = model(**batch, labels=labels).loss
    assert loss > plain
    loss.backward()
    assert all(slot.adapters["a"].router.weight.grad.abs().sum() > 0 for slot in slots(model))


def test_a_token_is_changed_by_the_experts_that_it_takes() -> None:
    """Against the sum written out expert by expert."""
    torch.manual_seed(0)
    for active in (1, 2):
        config = RoutedConfig(experts=3, bottleneck_dim=5, active=active, skip=True)
        adapter = Routed(16, config)
        torch.nn.init.normal_(adapter.up)
        y = torch.randn(2, 7, 16)
        expected = y.clone()
        for row in range(2):
            for token in range(7):
                z = y[row, token]
                chances = adapter.router(z).softmax(-1)
                for expert in chances.topk(active).indices.tolist():
                    if expert < 3:  # the fourth choice is to skip
                        hidden = torch.relu(adapter.down(z)[5 * expert : 5 * expert + 5])
                        expected[row, token] += 3 / active * chances[expert] * hidden @ adapter.up[expert]
        torch.testing.assert_close(adapter(None, y), expected)


def test_few_tokens_skip_at_the_start() -> None:
    model = routed()
    with torch.no_grad(), model.observe() as seen:
        model(**inputs(model, rows=32))
    first = torch.cat([found["router"].argmax(-1).flatten() for found in seen.values()])
    assert (first == 4).float().mean() < 0.15


def test_a_token_that_skips_passes_unchanged() -> None:
    model = routed()
    before = logits(model)
    randomise(model)
    assert not torch.equal(logits(model), before)
    for slot in slots(model):
        with torch.no_grad():
            adapter: Any = slot.adapters["a"]
            adapter.router.bias[-1] = 1e4
    with model.disable_adapter():
        off = model.base_model(**inputs(model)).last_hidden_state
    assert torch.equal(model.base_model(**inputs(model)).last_hidden_state, off)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"experts": 1}, "expected 2 and 1 or more"),
        ({"active": 5}, "active=5: expected 1 to 4"),
        ({"activation": "none"}, "activation='none'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RoutedConfig(**settings)
