"""docs/adapterdrop.md is what the benchmark makes of its stored figures."""

from __future__ import annotations

import json

from benchmarks import adapterdrop


def test_the_page_shows_the_stored_figures() -> None:
    stored = json.loads(adapterdrop.RESULTS.read_text("utf-8"))
    assert adapterdrop.PAGE.read_text("utf-8") == adapterdrop.page(stored)
    assert stored["quality"]
    for arms in stored["quality"].values():
        assert {name: len(rows) for name, rows in arms.items()} == dict.fromkeys(
            ("skipped", "robust", "specialised"), adapterdrop.LAYERS
        )
