"""Bad input ends with one line that says what to do, exit code 2, and nothing written or lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import interleaf
from interleaf import bundled, cli
from interleaf.errors import StoreError
from tests.zoo import build, logits, randomise

FAST = ["--base", "bundled:minilm", "--epochs", "1", "--max-length", "8", "--batch-size", "8"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["interleaf", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command that must be refused, and return its one line."""

    def check(*words: object) -> str:
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        capsys.readouterr()
        assert run(monkeypatch, *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
        return lines[0]

    return check


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


ROWS = "".join(f"text number {i},{'good' if i % 2 else 'bad'}\n" for i in range(30))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.csv", "", "is empty"),
        ("header.csv", "text,label\n", "it has no rows"),
        ("one.csv", "text,label\na,good\nb,good\n", "one class only ('good')"),
        ("gap.csv", "text,label\na,good\n,bad\nc,bad\n", "column 'text' is empty in 1 rows, the first is row 2"),
        ("unlabelled.csv", "text,label\na,good\nb,\n", "column 'label' is empty in 1 rows"),
        ("nolabel.csv", "text,stars\na,1\nb,2\n", "no column looks like the label. The columns are: text, stars"),
        ("notext.csv", "n,label\n1,a\n2,b\n", ""),
        ("broken.jsonl", '{"text": "a", "label"\n', "cannot be read as json"),
        ("broken.parquet", "no parquet", "cannot be read as parquet"),
        ("rows.xlsx", "x", "files ending in '.xlsx' cannot be read"),
        ("rare.csv", "text,label\n" + ROWS + "x,rare\n", "'rare' has 1"),
    ],
)
def test_data_that_cannot_be_used(refused: Any, tmp_path: Path, name: str, text: str, said: str) -> None:
    data = write(tmp_path / name, text)
    assert said in refused("train", *FAST, "--train", data, "--out", tmp_path / "out")


def test_a_missing_column(refused: Any, tmp_path: Path, reviews: Path) -> None:
    line = refused("train", *FAST, "--train", reviews, "--out", tmp_path / "out", "--label", "stars")
    assert "no column 'stars' for the label. The columns are: text, label" in line


def test_a_label_in_dev_that_never_occurs_in_train(refused: Any, tmp_path: Path, reviews: Path) -> None:
    dev = write(tmp_path / "dev.csv", "text,label\na,positive\nb,neutral\n")
    line = refused("train", *FAST, "--train", reviews, "--dev", dev, "--out", tmp_path / "out")
    assert "has the label 'neutral', which never occurs in the training data (negative, positive)" in line


def test_unknown_bases_data_and_bundles(refused: Any, tmp_path: Path, reviews: Path) -> None:
    out = tmp_path / "out"
    base = ["train", "--train", reviews, "--out", out, "--base"]
    assert "base './nowhere' cannot be loaded" in refused(*base, "./nowhere")
    assert "there is no bundled 'minlm'. There are: minilm" in refused(*base, "bundled:minlm")
    assert "there is no data at" in refused("train", *FAST, "--train", tmp_path / "no.csv", "--out", out)


def test_unknown_settings(refused: Any, tmp_path: Path, reviews: Path) -> None:
    config = write(tmp_path / "run.yaml", f"base: bundled:minilm\ntrain: {reviews}\nout: {tmp_path}/out\n")
    for text, said in (
        ("epoch: 3\n", "unknown setting 'epoch' in"),
        ("epochs: many\n", "epochs='many': expected float"),
        ("batch_size: 0\n", "batch_size=0: expected more than 0"),
        ("adapter: pfeifer\n", "there is no preset 'pfeifer'"),
        ("adapter_options: {bottlenek_dim: 3}\n", "unknown adapter setting 'bottlenek_dim'"),
        ("adapter_options: {layers: [9]}\n", "there is no layer 9"),
        ("task: chess\n", "task='chess'"),
        ("a: b: c\n", "is no YAML"),
    ):
        assert said in refused("train", write(tmp_path / "run.yaml", config.read_text().split("epoch")[0] + text))
        config = write(tmp_path / "run.yaml", f"base: bundled:minilm\ntrain: {reviews}\nout: {tmp_path}/out\n")
    assert "setting 'base' is missing" in refused("train", "--train", reviews)
    assert "nothing to resume" in refused("train", config, "--resume")


def test_a_nan_loss(refused: Any, tmp_path: Path, reviews: Path) -> None:
    line = refused("train", *FAST, "--train", reviews, "--out", tmp_path / "out", "--learning-rate", "1e30")
    assert "Try a lower learning_rate" in line


def test_an_existing_output_folder(refused: Any, tmp_path: Path, reviews: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mine = write(out / "mine.txt", "dear to me")
    assert "exists already" in refused("train", *FAST, "--train", reviews, "--out", out)
    assert mine.read_text() == "dear to me"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "houlsby")
    randomise(model)
    model.save_adapter(tmp_path / "a", "a")
    return tmp_path / "a"


def refuse_load(name: str, path: Path, said: str) -> None:
    """Loading must be refused and leave the model as it was."""
    model = interleaf.adapt(build(name))
    model.add_adapter("mine", "pfeiffer")
    before, names = logits(model), [n for n, _ in model.named_modules()]
    with pytest.raises(StoreError, match=said):
        model.load_adapter(path, "theirs")
    assert list(model.adapters) == ["mine"]
    assert model.active_adapters() == ["mine"]
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


def test_an_adapter_for_another_base(stored: Path) -> None:
    refuse_load("llama", stored, r"made for another base: another architecture \(bert, this one is llama\)")
    refuse_load("minilm", stored, "made for another base: layers of other names or shapes")
    torch.manual_seed(1)
    other = type(build("bert"))(build("bert").config)
    with pytest.raises(StoreError, match="other pretrained weights"):
        interleaf.adapt(other).load_adapter(stored)


def test_files_that_are_damaged(stored: Path) -> None:
    weights = stored / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged, said in (
        (whole[: len(whole) // 2], "corrupt or truncated"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "corrupt or truncated"),
        (b"", "corrupt or truncated"),
    ):
        weights.write_bytes(damaged)
        refuse_load("bert", stored, said)
    weights.unlink()
    refuse_load("bert", stored, "is missing")
    weights.write_bytes(whole)
    (stored / "adapter_config.json").write_text('{"peft_type": "NOVEL"}')
    refuse_load("bert", stored, "'NOVEL' is no adapter kind")
    (stored / "adapter_config.json").write_text("{")
    refuse_load("bert", stored, "adapter_config.json is corrupt")
    (stored / "adapter_config.json").unlink()
    refuse_load("bert", stored, "adapter_config.json is missing")


@pytest.mark.parametrize("checksum", ["kept", "absent"])
def test_tensors_that_do_not_fit(stored: Path, checksum: str) -> None:
    weights, record = stored / "adapter_model.safetensors", stored / "interleaf.json"
    whole = load_file(weights)
    first = sorted(whole)[0]
    changes = {
        "1 tensors are missing": {k: v for k, v in whole.items() if k != first},
        "1 tensors have no place": {**whole, "stranger": torch.ones(1)},
        "has shape": {**whole, first: torch.ones(3)},
    }
    described = json.loads(record.read_text())
    for said, tensors in changes.items():
        save_file(tensors, weights)
        described.pop("sha256", None)
        if checksum == "absent":
            record.write_text(json.dumps(described))
        refuse_load("bert", stored, "corrupt" if checksum == "kept" else said)


def test_another_base_on_the_command_line(
    refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reviews: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert run(monkeypatch, "train", *FAST, "--train", reviews, "--out", out) == 0
    model = AutoModel.from_pretrained(bundled.resolve("bundled:minilm"))
    randomise(model)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(bundled.resolve("bundled:minilm")).save_pretrained(other)
    line = refused("evaluate", out, reviews, "--base", other)
    assert "out was made for another base: other pretrained weights. Load that base first." in line


def test_a_corrupt_adapter_on_the_command_line(refused: Any, stored: Path) -> None:
    weights = stored / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "corrupt or truncated" in refused("verify", stored)
    assert "is no adapter folder" in refused("show", stored.parent / "nothing")


def test_a_disk_that_refuses(tmp_path: Path, reviews: Path) -> None:
    """A file-size limit makes real writes fail, in checkpoints and in the adapter, as a full disk does."""
    command = [sys.executable, "-c", "from interleaf.cli import main; main()", "train", *FAST]
    command += ["--train", str(reviews), "--out", str(tmp_path / "out")]
    limit = 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, env=environment, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "cannot be written" in done.stderr.strip().splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reviews.csv"]


def test_a_save_that_fails_leaves_what_was_there(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "pfeiffer")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interleaf.store.save_file", full)
    with pytest.raises(StoreError, match=r"No space left on device\. Nothing was changed"):
        model.save_adapter(stored, "a", overwrite=True)
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == before
    assert [p.name for p in stored.parent.iterdir()] == ["a"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    model: Any = interleaf.adapt(build("bert"))
    model.add_adapter("a")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".up.weight" in n).fill_(float("nan"))
    with pytest.raises(StoreError, match="holds NaN"):
        model.save_adapter(tmp_path / "a", "a")
    assert list(tmp_path.iterdir()) == []
