"""docs/performance.md is what the benchmark makes of its stored figures, and what is claimed stands in them."""

from __future__ import annotations

import statistics

from benchmarks import peers

STORED = peers.load()


def ratio(found: dict[str, list[float]], name: str, other: str) -> float:
    return float(peers.against(found, name, other)[1])


def test_the_page_is_made_of_the_stored_figures() -> None:
    text, figures = peers.page(STORED)
    assert peers.PAGE.read_text("utf-8") == text
    assert {path.name for path in peers.FIGURES.iterdir()} == figures.keys()
    assert STORED.keys() == peers.PARTS.keys()


def test_a_step_takes_what_hand_written_hooks_take() -> None:
    assert ratio(STORED["steps"]["here"], "interleaf", "floor") <= 1.05


def test_an_adapter_is_next_to_nothing_of_a_forward_pass_and_nothing_when_off() -> None:
    assert ratio(STORED["forward"]["here"], "interleaf", "base") <= 1.05
    assert ratio(STORED["forward"]["here"], "interleaf, off", "base") <= 1.01


def test_a_batch_of_32_adapters_takes_little_more_than_the_base() -> None:
    assert ratio(STORED["rows"]["interleaf"], "32", "base") <= 1.3


def test_switching_among_a_thousand_takes_less_than_a_millisecond() -> None:
    assert STORED["files"]["interleaf"]["many"] == 1000
    assert statistics.median(STORED["files"]["interleaf"]["switch"]) < 1e-3
