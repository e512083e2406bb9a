"""What `make demo` claims: on held-out data the adapter is clearly above a trained head alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from interleaf import demo


@pytest.mark.slow
def test_the_adapter_is_clearly_above_the_head_alone(tmp_path: Path) -> None:
    found = demo.run(seed=1, rows=3000, epochs=3, out=str(tmp_path / "demo"), callbacks=lambda: ())
    head, adapter = found.arms
    assert adapter.accuracy > head.accuracy + 0.03
    assert adapter.f1_macro > head.f1_macro + 0.03
    assert head.trainable_parameters < adapter.trainable_parameters < 1_000_000
    assert adapter.size_bytes < 1_000_000
    assert head.trunk_cache.startswith("the lowest 6 of 6 layers are run once and stored")
    assert adapter.trunk_cache.startswith("the lowest 3 of 6 layers are run once and stored")
    assert adapter.saved_s > 1
    assert [row["text"] for row in found.said] == demo.SENTENCES
