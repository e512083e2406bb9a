"""Measures of translations and programs: known values and properties."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interleaf import metrics
from interleaf.errors import DataError
from interleaf.metrics import (
    code_metrics,
    exact_match,
    headline,
    pass_at_k,
    translation_metrics,
    valid_syntax,
)

COUNTS = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
TEXTS = st.lists(st.text("abcd .", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(5, 2, 1, 0.4), (5, 2, 2, 1 - 3 / 10), (5, 2, 4, 1.0), (200, 0, 100, 0.0), (1, 1, 1, 1.0), (10, 1, 10, 1.0)],
)
def test_pass_at_k(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@given(COUNTS)
def test_pass_at_k_is_the_share_of_draws_with_a_pass(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(COUNTS)
def test_more_passes_and_more_tries_are_no_worse(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    assert pass_at_k(n, c, k) <= pass_at_k(n, min(c + 1, n), k) + 1e-12
    assert pass_at_k(n, c, k) <= pass_at_k(n, c, min(k + 1, n)) + 1e-12


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_precision() -> None:
    n, c, k = 100_000, 3, 50_000
    exact = 1 - (50_000 * 49_999 * 49_998) / (n * (n - 1) * (n - 2))
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(DataError):
        pass_at_k(n, c, k)


def test_code_metrics_are_means_over_problems_not_over_samples() -> None:
    found = code_metrics([[True, False], [False, False, False, False]], ks=(1, 2))
    assert found == {"problems": 2, "samples": 6, "pass@1": 0.25, "pass@2": 0.5}
    assert headline(found) == {"pass@1": 0.25, "pass@2": 0.5}
    with pytest.raises(DataError, match="no problems"):
        code_metrics([])
    with pytest.raises(DataError, match="at least 3 samples"):
        code_metrics([[True, True, True], [True]], ks=(3,))


def test_exact_match() -> None:
    assert exact_match(["a", " b\n", "c", "D"], ["a", "b", "x", "d"]) == 0.5
    for pair in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(DataError):
            exact_match(*pair)


def test_bleu_chrf_and_ter_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; one word of six to be changed
    found = translation_metrics(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert found["ter"] == pytest.approx(100 / 6)
    assert 0 < found["chrf"] < 100
    # four words against six: the brevity penalty
    short = translation_metrics(["a b c d"], ["a b c d e f"])
    assert short["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))
    # one character of two and of four, no pair of one and of three; F with recall weighing four times as much
    precision, recall = (1 / 2 + 0) / 2, (1 / 4 + 0) / 2
    chrf = 5 * precision * recall / (4 * precision + recall)
    assert translation_metrics(["ax"], ["abcd"])["chrf"] == pytest.approx(100 * chrf)


def test_signatures_name_what_decides_the_score() -> None:
    found = translation_metrics(["猫坐着。"], ["猫坐着。"], tokenize="zh")
    assert "tok:zh" in found["signatures"]["bleu"]
    assert set(found["signatures"]) == {"bleu", "chrf", "ter"}
    assert all("version:" in each and "nrefs:1" in each for each in found["signatures"].values())
    assert headline(found) == {"bleu": pytest.approx(100.0), "chrf": 100.0, "ter": 0.0}
    json.dumps(found, allow_nan=False)


@given(TEXTS)
def test_a_perfect_translation_cannot_be_improved(texts: list[str]) -> None:
    found = translation_metrics(texts, texts)
    assert found["ter"] == 0.0
    assert found["chrf"] == pytest.approx(100.0)


def test_the_best_of_several_references_counts_and_their_number_may_vary() -> None:
    hypotheses = ["the cat sat on the mat", "a dog barked at the moon"]
    references = [["it is late", "the cat sat on the mat"], ["a dog barked at the moon"]]
    found = translation_metrics(hypotheses, references)
    assert found["bleu"] == pytest.approx(100.0)
    assert found["ter"] == 0.0
    assert "nrefs:var" in found["signatures"]["bleu"]
    assert translation_metrics(hypotheses, [row[0] for row in references])["bleu"] < 60


def test_intervals_come_from_resampling_and_are_named_in_the_signature() -> None:
    hypotheses = [f"the {a} sat on the {b} mat" for a in ("cat", "dog", "cow") for b in ("red", "old", "big")]
    references = [f"the {a} sat on the {b} mat" for a in ("cat", "dog", "pig") for b in ("red", "old", "wet")]
    found = translation_metrics(hypotheses, references, bootstrap=200)
    for name in ("bleu", "chrf", "ter"):
        interval = found["intervals"][name]
        assert interval["half_width"] > 0
        assert abs(interval["mean"] - found[name]) < interval["half_width"]
        assert "bs:200|seed:" in found["signatures"][name]
    assert found == translation_metrics(hypotheses, references, bootstrap=200)
    assert "intervals" not in translation_metrics(hypotheses, references)


@pytest.mark.parametrize(
    ("hypotheses", "references", "tokenize", "said"),
    [
        ([], [], "13a", "0 translations"),
        (["a"], ["a", "b"], "13a", "1 translations, 2 rows"),
        (["a"], [[]], "13a", "at least one"),
        (["a"], ["a"], "klingon", "no tokenizer 'klingon'; sacrebleu has none, zh"),
    ],
)
def test_unusable_rows_are_refused(hypotheses: list[str], references: list[str], tokenize: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        translation_metrics(hypotheses, references, tokenize=tokenize)


def test_valid_syntax() -> None:
    texts = {
        "x = 1": True,
        "": True,
        "def f(:": False,
        "print 'old'": False,
        "'\\d'": True,  # only a warning
        "x = '\0'": False,
        "\ud800": False,
        "return": True,  # wrong, but not for the parser
        "raise SystemExit": True,  # parsed, not run
        "import os; os._exit(1)": True,
    }
    assert dict(zip(texts, valid_syntax(list(texts)), strict=True)) == texts
    assert valid_syntax([]) == []


def test_texts_that_the_parser_cannot_cope_with_are_invalid_and_stop_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    nested, long = "(" * 100_000 + ")" * 100_000, "x" + ".a" * 100_000
    assert valid_syntax(["x", nested, "y =", long, "z"]) == [True, False, False, False, True]
    # one that ends the parser's process, and one that never ends
    parse = "{'crash': lambda: os._exit(1), 'hang': lambda: time.sleep(99)}.get(source, int)(); ast.parse(source)"
    program = metrics._PARSE.replace("ast.parse(source)", parse).replace("import ast", "import ast, os, time")
    monkeypatch.setattr(metrics, "_PARSE", program.replace("{'", "{{'").replace("99)}", "99)}}"))
    texts = ["x", "crash", "y =", "crash", "hang", "z"]
    assert valid_syntax(texts, timeout_s=1.0) == [True, False, False, False, False, True]
