"""Some of the odder architectures of `benchmarks/architectures.py`, which runs them all; and the page it wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from benchmarks.architectures import PAGE, RUNS, WAYS, Job, check_type, passed

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
    "zamba": "an attention that reads two streams side by side",
}
JOBS = {
    **{kind: Job(kind) for kind in ODD},
    "bert, as wide inside as outside": Job("bert", "square"),
    "sparse layers among dense ones": Job("switch_transformers", "deep"),
    "a picture and a text, side by side": Job("clip", "base", "beyond"),
    "sound": Job("wav2vec2", "base", "beyond"),
    "sound to text": Job("whisper", "base", "beyond"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over several threads may round one way now and another way then; the checks are bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", JOBS)
def test_an_odd_architecture(name: str) -> None:
    row = check_type(JOBS[name])
    assert row["plain"] == "yes", row
    assert set(row["ways"]) <= set(WAYS)
    assert set(row["ways"]) >= {"parallel", "skip"}
    assert passed(row), row


def test_the_page_says_what_was_found() -> None:
    page = PAGE.read_text("utf-8")
    counts = re.search(r"Of the (\d+) text model types, (\d+) were built .*; (\d+) of these passed", page)
    assert counts is not None
    total, plain, good = map(int, counts.groups())
    text, beyond = (re.findall(r"^\| [\w.-]+ \| \w+ \| .* \|$", part, re.MULTILINE)[1:] for part in parts(page))
    assert len(text) == plain
    assert len(beyond) >= 10
    assert plain >= 235
    assert good >= 0.98 * plain
    assert total - plain == len(re.findall(r"^- ", page.split("## Not built")[1], flags=re.MULTILINE))


def parts(page: str) -> tuple[str, str]:
    text, rest = page.split("## Beyond text")
    return text, rest.split("## Other shapes")[0]


def test_the_page_tells_of_every_shape_and_head() -> None:
    rows = re.findall(r"^\| \w+ \| .* \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == len(RUNS)
    for types, plain, good in rows:
        assert int(plain) >= 0.9 * int(types)
        assert int(good) >= 0.98 * int(plain) - 1
