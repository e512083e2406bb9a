"""The frozen layers below the lowest adapter are run once; what is trained above is the same to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import interleaf
from interleaf import bundled
from interleaf.errors import ConfigError
from interleaf.fit import in_bfloat16
from interleaf.settings import TrainSettings
from interleaf.tasks.rows import token_batches
from interleaf.train import Run, prepare
from interleaf.trunk_cache import NoCache, cut_of, trunk_cache
from interleaf.trunk_cache.states import ABOUT, FILE, States
from tests.test_generation import translates
from tests.zoo import TINY, build


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over several threads may round one way now and another way then."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM without dropout."""
    folder = tmp_path_factory.mktemp("minilm")
    shutil.copytree(bundled.resolve("bundled:minilm"), folder, dirs_exist_ok=True)
    without_dropout(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return str(folder)


def without_dropout(folder: Path, **rates: float) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | rates))


@pytest.fixture
def encoder(minilm: str, reviews: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        base=minilm,
        train=str(reviews),
        out=str(tmp_path / "cached"),
        adapter_options={"layers": "last:2", "dropout": 0.1},
        limit=60,
        epochs=2,
        max_length=24,
        batch_size=8,
        examples=0,
    )


def generator(folder: Path, base: str, **options: Any) -> TrainSettings:
    made = translates(folder, base, out=str(folder / "generates"), adapter_options=options, batch_size=4, examples=0)
    without_dropout(Path(made.base), dropout_rate=0.0)
    return made


def trained(settings: TrainSettings) -> tuple[str, dict[str, torch.Tensor]]:
    result = prepare(settings).train()
    assert result.path is not None
    return result.trunk_cache, load_file(result.path / "adapter_model.safetensors")


def assert_same_as_uncached(settings: TrainSettings, said: str) -> None:
    told, cached = trained(settings)
    assert told.startswith(said), told
    told, plain = trained(replace(settings, cache="off", out=settings.out + "-plain"))
    assert told == "off"
    assert cached.keys() == plain.keys()
    for name in plain:
        assert torch.equal(cached[name], plain[name]), name


# ---- the same adapter


def test_an_encoders_adapter_is_the_same_to_the_bit(encoder: TrainSettings) -> None:
    assert_same_as_uncached(encoder, "the lowest 4 of 6 layers are run once and stored (")


def test_a_decoders_adapter_is_the_same_to_the_bit(tmp_path: Path) -> None:
    assert_same_as_uncached(generator(tmp_path, "llama", layers="last:1"), "the lowest 1 of 2 layers")


def test_a_decoders_adapter_behind_a_whole_encoder_is_the_same_to_the_bit(tmp_path: Path) -> None:
    targets = r"decoder\.block\.\d\.layer\.\d\..*\.(o|wo)"
    assert_same_as_uncached(generator(tmp_path, "t5", target_modules=targets), "the lowest 2 of 2 layers")


def test_gradient_checkpointing_changes_nothing(encoder: TrainSettings) -> None:
    assert_same_as_uncached(replace(encoder, activation_checkpointing=True), "the lowest 4 of 6 layers")


def test_half_of_the_bits_are_enough_if_asked_for(encoder: TrainSettings) -> None:
    full, one = trained(encoder)
    half, other = trained(replace(encoder, cache_dtype="bfloat16", out=encoder.out + "-half"))
    size = float(full.partition("(")[2].split()[0])
    assert float(half.partition("(")[2].split()[0]) == pytest.approx(size / 2, abs=1)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_trains_and_weights_stay_as_they_are(encoder: TrainSettings) -> None:
    _, full = trained(encoder)
    _, half = trained(replace(encoder, precision="bfloat16", out=encoder.out + "-bf16"))
    for name, tensor in half.items():
        assert tensor.dtype == full[name].dtype == torch.float32
        assert torch.isfinite(tensor).all()
    assert any(not torch.equal(full[name], half[name]) for name in full)
    with pytest.raises(ConfigError, match="expected auto, float32 or bfloat16"):
        replace(encoder, precision="int3")


@pytest.mark.parametrize(
    ("instructions", "expected"), [(set(), False), ({"avx512_bf16"}, False), ({"avx512_bf16", "amx_bf16"}, True)]
)
def test_it_is_chosen_where_a_cpu_is_faster_so(
    instructions: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert in_bfloat16("auto") is expected
    assert not in_bfloat16("float32")


def test_batches_by_tokens_are_the_same_to_the_bit_too(encoder: TrainSettings) -> None:
    few = replace(encoder, batch_tokens=64)
    assert_same_as_uncached(few, "the lowest 4 of 6 layers")
    run = prepare(replace(few, out=few.out + "-planned"))
    encoded = run.task.encode(run.splits.train, run.tokenizer)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    batches = token_batches(encoded, 64, few.seed)
    assert run.plan().steps == 2 * len(batches)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= 64
    with pytest.raises(ConfigError, match=f"batch_tokens=5: a row has {max(lengths)} tokens"):
        token_batches(encoded, 5, few.seed)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "attention_mask": 0} | ({} if isinstance(rows[0]["labels"], int) else {"labels": -100})
    batch = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in filled.items()}
    return batch if "labels" in batch else {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize("family", TINY)
def test_a_family_gives_the_same_with_stored_states(family: str) -> None:
    model = interleaf.adapt(build(family))
    model.add_adapter("a", "houlsby", layers="last:1")
    model.train_adapter("a")
    model.eval()  # dropout would be another in each pass
    ids = [list(range(3, 3 + n)) for n in (5, 9, 3, 7)]
    labels = [0, 1, 0, 1] if hasattr(model, "classifier") else ids
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels})
    with trunk_cache(model, rows.select([0, 1, 2]), rows.select([3]), collate, TrainSettings("b", "t", "o")) as cached:
        if family == "t5":  # its first layer makes the position biases of all others
            assert cached.cached == "not used: the layers above need more than the hidden states of those below"
            return
        assert cached.cached.startswith("the lowest 1 of 2 layers")
        loss = model(**cached.collate([cached.train[0], cached.train[1]])).loss
    torch.testing.assert_close(model(**collate([rows[0], rows[1]])).loss, loss)


# ---- run once


def counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that the first layer sees while a run trains."""
    seen: list[int] = []
    layer = run.model.get_submodule(cut_of(run.model).layers[0])
    real = type(layer).forward
    monkeypatch.setattr(
        type(layer),
        "forward",
        lambda self, x, *a, **k: (self is layer and seen.append(len(x)), real(self, x, *a, **k))[1],
    )
    return seen


def test_the_layers_below_see_each_row_once_and_none_in_the_next_run(
    encoder: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(encoder)
    rows = len(first.splits.train) + len(first.splits.dev)
    seen = counted(first, monkeypatch)
    first.train()
    checked, measured = 1 + 2 * (1 + 3), len(first.splits.dev)
    assert sum(seen) == rows + checked + measured
    second = prepare(replace(encoder, learning_rate=1e-4, seed=encoder.seed, out=encoder.out + "-2"))
    seen = counted(second, monkeypatch)
    second.train()
    assert sum(seen) == checked + measured


@pytest.mark.parametrize(
    "change",
    [{"max_length": 16}, {"seed": 1}, {"adapter_options": {"layers": "last:1"}}, {"cache_dtype": "bfloat16"}],
    ids=["truncation", "rows", "lowest adapter", "float type"],
)
def test_what_the_states_depend_on_makes_new_ones(encoder: TrainSettings, change: dict[str, Any], trunk: Path) -> None:
    prepare(encoder).train()
    prepare(replace(encoder, **change, out=encoder.out + "-2")).train()
    assert len(list(trunk.iterdir())) == 2


def test_another_base_makes_new_ones(encoder: TrainSettings, trunk: Path) -> None:
    prepare(encoder).train()
    other = prepare(replace(encoder, out=encoder.out + "-2"))
    with torch.no_grad():
        other.model.get_submodule("bert.embeddings.LayerNorm").bias.add_(0.01)
    other.train()
    assert len(list(trunk.iterdir())) == 2


def test_a_damaged_file_is_made_again(encoder: TrainSettings, trunk: Path) -> None:
    _, whole = trained(encoder)
    (file,) = trunk.glob(f"*/{FILE}")
    for damaged in (file.read_bytes()[:-100], b"\0" * 100 + file.read_bytes()[100:]):
        file.write_bytes(damaged)
        _, again = trained(replace(encoder, out=encoder.out + "-2", overwrite=True))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    file.with_name(ABOUT).write_text("")
    _, again = trained(replace(encoder, out=encoder.out + "-2", overwrite=True))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_was_not_used_for_longest_makes_room(encoder: TrainSettings, trunk: Path) -> None:
    prepare(encoder).train()
    size = next(trunk.glob(f"*/{FILE}")).stat().st_size
    prepare(replace(encoder, max_length=16, cache_gb=1.2 * size / 1e9, out=encoder.out + "-2")).train()
    assert len(list(trunk.iterdir())) == 1


# ---- where it cannot be


def test_the_reason_is_told_where_it_cannot_be(encoder: TrainSettings, tmp_path: Path) -> None:
    every = replace(encoder, adapter_options={}, epochs=1)
    assert prepare(every).plan().trunk_cache.startswith("not used: the first layer is trained or adapted")
    told, _ = trained(every)
    assert told.startswith("not used: the first layer is trained or adapted: choose the upper ones")
    told, _ = trained(replace(encoder, cache_gb=1e-6, epochs=1, out=encoder.out + "-2"))
    assert told == "not used: it takes 0.00 GB, and cache_gb=1e-06"
    # T5's first layer makes the position biases of all others
    told, _ = trained(generator(tmp_path, "t5", layers="last:1"))
    assert "the layers above need more than" in told


def test_positions_that_count_padding_are_noticed(tmp_path: Path) -> None:
    settings = generator(tmp_path, "gpt2", layers="last:1")
    config = tmp_path / "gpt2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    told, _ = trained(replace(settings, epochs=1))
    assert told == "not used: rows are padded on the left, where positions may count the padding"


def test_few_bits_hide_no_difference(tmp_path: Path) -> None:
    told, _ = trained(replace(generator(tmp_path, "t5", layers="last:1"), epochs=1, cache_dtype="bfloat16"))
    assert "the layers above need more than" in told


def test_a_disk_that_refuses_is_no_reason_to_stop(encoder: TrainSettings, trunk: Path) -> None:
    trunk.rmdir()
    trunk.write_text("in the way")
    run = prepare(replace(encoder, epochs=1))
    assert run.train().trunk_cache.startswith("not used: ")
    assert not [name for name, module in run.model.named_modules() if "forward" in vars(module)]


def test_adapters_at_the_embedding_leave_nothing_to_cache(encoder: TrainSettings) -> None:
    run = prepare(encoder)
    run.model.add_adapter("language", "nice")
    run.model.set_adapter("stack(language, adapter)")
    with pytest.raises(NoCache, match=r"the first layer is trained or adapted|outside the layers"):
        cut_of(run.model)


def test_the_model_is_as_it_was_afterwards(encoder: TrainSettings) -> None:
    run = prepare(encoder)
    hooks = len(run.model._forward_pre_hooks), len(run.model._forward_hooks)
    run.train()
    assert (len(run.model._forward_pre_hooks), len(run.model._forward_hooks)) == hooks
    assert not [name for name, module in run.model.named_modules() if "forward" in vars(module)]


def test_states_are_padded_as_their_mask_is(tmp_path: Path) -> None:
    made = States(tmp_path, [2, 1], 3, torch.float32)
    made.tokens.copy_(torch.arange(9.0).view(3, 3))
    left = made.batch([1, 0], torch.tensor([[0, 1], [1, 1]]))
    assert left.tolist() == [[[0, 0, 0], [6, 7, 8]], [[0, 1, 2], [3, 4, 5]]]


def test_unknown_settings_are_refused() -> None:
    for wrong in ({"cache": "on"}, {"cache_dtype": "int8"}):
        with pytest.raises(ConfigError, match="expected"):
            TrainSettings(base="b", train="t", out="o", **wrong)
