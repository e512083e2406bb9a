"""Rules that name a setup without trying any, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interleaf.settings import TrainSettings, read_settings
from interleaf.studies.recommend import Facts, as_config, facts, rules
from interleaf.train import prepare


def named(**changed: Any) -> dict[str, Any]:
    of = Facts(
        **{
            **{"task": "classification", "rows": 3000, "longest": 50, "layers": 12, "width": 768},
            **{"minutes": None, "megabytes": None},
            **changed,
        }
    )
    found = rules(of)
    assert all(rule.reason for rule in found)
    return {rule.setting: rule.value for rule in found}


def test_more_rows_get_more_places_and_wider_bottlenecks() -> None:
    factor = "adapter_options.reduction_factor"
    widths = [768 // named(rows=rows)[factor] for rows in (100, 3000, 50_000)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert named(rows=100)["adapter"] == "pfeiffer"
    assert named(rows=3000)["adapter"] == "houlsby"
    assert named(rows=100)["epochs"] > named(rows=50_000)["epochs"]


def test_little_time_means_fewer_layers_and_little_room_narrower_ones() -> None:
    layers, factor = "adapter_options.layers", "adapter_options.reduction_factor"
    assert named()[layers] == "last:6"
    assert named(minutes=1)[layers] == "last:4"
    assert layers not in named(task="translation")
    small = named(megabytes=0.2)
    assert small[factor] > named()[factor]
    assert 4 * 2 * 6 * 2 * 768 * (768 // small[factor]) < 0.2e6


def test_what_is_recommended_can_be_trained(reviews: Path, tmp_path: Path) -> None:
    settings = TrainSettings(base="bundled:minilm", train=str(reviews), out=str(tmp_path / "out"))
    of = facts(settings, 1, None)
    assert (of.rows, of.layers, of.width) == (72, 6, 384)
    config = tmp_path / "run.yaml"
    import yaml

    config.write_text(yaml.safe_dump(as_config(settings, rules(of))))
    made = read_settings(config, {})
    assert made.max_length == 64 >= of.longest
    assert prepare(made).plan().adapter_parameters > 0


def test_long_texts_are_cut_where_only_their_class_is_asked() -> None:
    assert named(longest=400)["max_length"] == 128
    assert named(longest=400, task="translation")["max_length"] == 512


@pytest.mark.parametrize("rows", [50, 499, 500, 10_001])
def test_every_size_has_a_rate(rows: int) -> None:
    assert named(rows=rows)["learning_rate"] > 0
