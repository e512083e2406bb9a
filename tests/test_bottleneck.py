"""The bottleneck adapter computes what its formula says, number for number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import interleaf
from interleaf import Bottleneck, BottleneckConfig
from interleaf.adapter import as_config
from interleaf.errors import ConfigError, SiteError
from interleaf.sites import Site
from tests.zoo import build

WIDTH = 16


class Adapter(nn.Module):
    """The textbook adapter, written down plainly."""

    def __init__(self, input_dim: int, down_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(input_dim, down_dim)
        self.bottleneck = nn.Linear(down_dim, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.down(x))
        h = torch.relu(self.bottleneck(h))
        return x + self.up(h)


class TwoMaps(nn.Module):
    def __init__(self, input_dim: int, down_dim: None, bottleneck_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(input_dim, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


def transformer_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=24, dropout=0.0, batch_first=True)


class Plain(nn.Module):
    """A layer with an adapter around it by hand: what the hooks must reproduce."""

    def __init__(self, adapter: nn.Module, connection: str) -> None:
        super().__init__()
        self.layer, self.adapter, self.connection = transformer_layer(), adapter, connection

    def forward(self, x: Tensor) -> Tensor:
        if self.connection == "serial":
            return self.adapter(self.layer(x))
        if self.connection == "serial_input":
            return self.layer(self.adapter(x))
        y = self.layer(x)
        return y + self.adapter(x if self.connection == "parallel" else y)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = transformer_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("connection", ["serial", "serial_input", "parallel", "skip"])
@pytest.mark.parametrize(("form", "down_dim"), [(Adapter, 12), (TwoMaps, None)])
@pytest.mark.parametrize("attach", ["peft", "inject"])
def test_it_reproduces_the_plain_adapter_around_a_transformer_layer(
    connection: str, form: type[nn.Module], down_dim: int | None, attach: str
) -> None:
    config = BottleneckConfig(
        connection=connection,
        residual=True,
        down_dim=down_dim,
        bottleneck_dim=4,
        input_dim=WIDTH,
        target_modules=["layer"],
    )
    host = Host()
    ours = get_peft_model(host, config) if attach == "peft" else inject_adapter_in_model(config, host)
    plain = Plain(form(WIDTH, down_dim, 4), connection)
    plain.layer.requires_grad_(False)  # frozen, as ours is
    mine = next(m for m in ours.modules() if isinstance(m, Bottleneck))
    names = {"down": "down", "middle": "bottleneck", "up": "up"}
    pairs = [
        (getattr(getattr(mine, here), kind), getattr(getattr(plain.adapter, there), kind))
        for here, there in names.items()
        if getattr(mine, here) is not None
        for kind in ("weight", "bias")
    ]
    assert len(pairs) == (6 if down_dim else 4)
    with torch.no_grad():
        for own, theirs in pairs:
            own.copy_(theirs)
    optimizers = [torch.optim.SGD(list(side), lr=0.01) for side in zip(*pairs, strict=True)]
    for _ in range(4):
        x = torch.randn(3, 5, WIDTH)
        got, want = ours(x), plain(x)
        assert torch.equal(got, want)
        for out, optimizer in ((got, optimizers[0]), (want, optimizers[1])):
            optimizer.zero_grad()
            out.pow(3).mean().backward()
        for own, theirs in pairs:
            assert torch.equal(own.grad, theirs.grad)
            assert own.grad.abs().sum() > 0
        for optimizer in optimizers:
            optimizer.step()


def make(**options: Any) -> Bottleneck:
    options = {"bottleneck_dim": 4, "activation": "gelu", **options}
    adapter = BottleneckConfig(**options).build(Site("", "", "ffn", "", 0, WIDTH))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter  # type: ignore[return-value]


def test_scaling_multiplies_what_is_added() -> None:
    y = torch.randn(2, 3, WIDTH)
    plain = make()
    for scaling in (4, 2.5):  # an int is a number too
        scaled = make(scaling=scaling)
        scaled.load_state_dict(plain.state_dict())
        torch.testing.assert_close(scaled(None, y) - y, scaling * (plain(None, y) - y))


@pytest.mark.parametrize(("scaling", "shape"), [("learned", (1,)), ("channel", (WIDTH,))])
def test_scaling_can_be_learned(scaling: str, shape: tuple[int, ...]) -> None:
    adapter = make(scaling=scaling)
    y = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(adapter(None, y), y + adapter.delta(y) * adapter.scaling)
    adapter(None, y).sum().backward()
    assert adapter.scaling.shape == shape  # type: ignore[union-attr]
    assert adapter.scaling.grad is not None  # type: ignore[union-attr]


def test_without_the_inner_residual_a_serial_adapter_replaces_its_input() -> None:
    adapter, y = make(residual=False), torch.randn(2, 3, WIDTH)
    assert torch.equal(adapter(None, y), adapter.up(adapter.activation(adapter.down(y))))


def test_dropout_acts_in_training_only() -> None:
    adapter, y = make(dropout=0.5), torch.randn(2, 3, WIDTH)
    adapter.train()
    assert not torch.equal(adapter(None, y), adapter(None, y))
    adapter.eval()
    assert torch.equal(adapter(None, y), adapter(None, y))


def test_the_gate_is_one_number_a_token() -> None:
    gated, y = make(gate=True), torch.randn(2, 3, WIDTH)
    bare = gated.up(gated.activation(gated.down(y)))
    torch.testing.assert_close(gated(None, y), y + bare * torch.sigmoid(gated.gate(y)))  # type: ignore[misc]


def test_norms_stand_before_the_down_and_after_the_up_projection() -> None:
    adapter, y = make(norm_before=True, norm_after=True), torch.randn(2, 3, WIDTH)
    inner = adapter.up(adapter.activation(adapter.down(adapter.norm_before(y))))  # type: ignore[misc]
    torch.testing.assert_close(adapter(None, y), y + adapter.norm_after(inner))  # type: ignore[misc]


def test_width_follows_the_reduction_factor_also_by_layer_and_is_at_least_one() -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "pfeiffer", reduction_factor={"0": 8, "default": 4})
    widths = [m.down.out_features for m in model.modules() if isinstance(m, Bottleneck)]
    assert widths == [4, 8]
    model.delete_adapter("a")
    model.add_adapter("a", "pfeiffer", reduction_factor=1000)
    assert {m.down.out_features for m in model.modules() if isinstance(m, Bottleneck)} == {1}


def test_the_textbook_preset_has_three_maps() -> None:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "textbook")
    adapter = next(m for m in model.modules() if isinstance(m, Bottleneck))
    shapes = [tuple(m.weight.shape) for m in (adapter.down, adapter.middle, adapter.up)]  # type: ignore[union-attr]
    assert shapes == [(64, 32), (16, 64), (32, 16)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"connection": "sideways"}, "connection='sideways': expected one of serial"),
        ({"activation": "rellu"}, "activation='rellu'"),
        ({"scaling": "big"}, "scaling='big'"),
        ({"init": "ones"}, "init='ones'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bottleneck_dim": 0}, "bottleneck_dim=0"),
        ({"down_dim": -1}, "down_dim=-1"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        BottleneckConfig(**options)


def test_an_unknown_preset_or_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'pfeifer'.*houlsby.*pfeiffer"):
        as_config("pfeifer")
    with pytest.raises(ConfigError, match="unknown adapter setting 'bottlenek_dim'"):
        as_config("pfeiffer", bottlenek_dim=3)


def test_a_kind_s_name_is_its_config_with_the_settings_given() -> None:
    assert as_config("bottleneck", bottleneck_dim=3) == BottleneckConfig(bottleneck_dim=3)
    with pytest.raises(ConfigError, match="name the parts"):
        as_config("union")


def test_a_position_or_layer_that_is_not_there_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = interleaf.adapt(build("bert"))
    for options, said in (
        ({"positions": ["atention"]}, "no position 'atention'"),
        ({"positions": ["cross_attention"]}, "match no site"),
        ({"layers": [7]}, "there is no layer 7"),
        ({"layers": "last:9"}, "last:9"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"reduction_factor": {"0": 2}}, "no entry for layer 1"),
    ):
        with pytest.raises((SiteError, ConfigError), match=said):
            model.add_adapter("a", "houlsby", **options)
        assert model.adapters == {}
        assert not any("adapter_slot" in n for n, _ in model.named_modules())
