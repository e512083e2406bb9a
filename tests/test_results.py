"""docs/results.md is what the benchmark makes of its stored figures, and what is claimed stands in them."""

from __future__ import annotations

import json

import pytest
from benchmarks import beyond, beyond_page, explained, results

STORED = results.load()


def test_the_page_is_made_of_the_stored_figures() -> None:
    text, figures = results.page(STORED)
    assert results.PAGE.read_text("utf-8") == text
    assert {path.name for path in results.FIGURES.iterdir()} == figures.keys()
    for name in figures:
        assert f"results/{name}" in text


def test_every_part_was_run() -> None:
    assert STORED.keys() == {*results.COMPARISONS, *results.TRAINED}


@pytest.mark.parametrize("name", results.COMPARISONS)
def test_what_is_switched_off_is_the_base(name: str) -> None:
    for arm, of in STORED[name]["arms"].items():
        told = of["forgetting"]
        assert (told["off_minus_before"] == 0) if arm in ("adapter", "lora") else told["off"] is None


@pytest.mark.parametrize("name", [name for name in results.TRAINED if name.startswith("translation")])
def test_translation_is_better_with_the_adapter(name: str) -> None:
    metrics = STORED[name]["metrics"]
    for key in ("bleu", "chrf"):
        assert metrics[key] > metrics["base"][key]
    assert metrics["forgetting"]["off"] == metrics["forgetting"]["before"]


def test_code_is_better_with_the_adapter() -> None:
    metrics = STORED["code"]["metrics"]
    assert metrics["loss"] < metrics["base"]["loss"]
    assert metrics["valid_syntax"] > metrics["base"]["valid_syntax"]
    assert STORED["code"]["other"]["on"]["problems"] == 164


def test_units_that_are_named_important_are_so() -> None:
    stored = json.loads(explained.STORED.read_text("utf-8"))
    assert explained.page(stored) == explained.PAGE.read_text("utf-8")
    for run in stored["seeds"]:
        tenth, *more = run["faithful"]  # what a tenth of the units is worth is too little to tell apart in every seed
        assert tenth["share"] == 0.1
        for check in more:
            assert check["important"] > max(check["random"])


def test_what_goes_beyond_the_plain_adapter_is_told_as_measured() -> None:
    stored, text = beyond.load(), beyond.PAGE.read_text("utf-8")
    assert beyond.PARTS.keys() == beyond_page.TOLD.keys()
    assert beyond_page.page(stored, text) == text
    for part in beyond.PARTS:
        told = text.partition(beyond_page.MARK.format(part, part))[2].partition(beyond_page.END)[0]
        assert ("|" in told) is (part in stored), part
        assert ("Not measured yet." in told) is (part not in stored), part
    if "rewards" in stored:
        drawn = (beyond.PAGE.parent / beyond_page.FIGURE).read_text("utf-8")
        assert drawn == beyond_page.curve(stored["rewards"]["figures"]).svg + "\n"
    if "commands" in stored:
        timed = stored["commands"]["figures"]
        assert list(timed) == beyond.given(text)
        assert max(timed.values()) < 600  # seconds
