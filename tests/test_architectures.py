"""Some of the odder architectures of `benchmarks/architectures.py`, which runs them all; and the page it wrote."""

from __future__ import annotations

import re

import pytest
from benchmarks.architectures import PAGE, WAYS, check_type, passed

ODD = {
    "albert": "layers in groups",
    "bamba": "state spaces and attention in turn",
    "blt": "layers that are an attention",
    "canine": "layers that the head does not use",
    "deepseek_v3": "latent attention, routed experts",
    "fsmt": "time before batch",
    "funnel": "lists of layers in a list",
    "gemma3": "a vision tower that text does not pass",
    "llama4": "experts that flatten the batch",
    "mobilebert": "bottlenecks of its own",
    "qwen4_exp": "several residual streams",
    "rwkv": "no attention",
    "whisper": "a decoder that reads sound",
    "xlnet": "no checkpointing layers",
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_architecture(kind: str) -> None:
    row = check_type(kind)
    assert row["plain"] == "yes", row
    assert set(row["ways"]) == set(WAYS)
    assert passed(row), row


def test_the_page_says_what_was_found() -> None:
    page = PAGE.read_text("utf-8")
    counts = re.search(r"Of the (\d+) text model types, (\d+) were built .*; (\d+) of these passed", page)
    assert counts is not None
    total, plain, good = map(int, counts.groups())
    rows = re.findall(r"^\| (\S+) \| \w+ \| .* \|$", page, flags=re.MULTILINE)[1:]
    assert len(rows) == plain
    assert plain >= 235
    assert good >= 0.98 * plain
    assert total - plain == len(re.findall(r"^- ", page.split("## Not built")[1], flags=re.MULTILINE))
