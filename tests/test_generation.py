"""Tasks whose answer is a text: their data, what a model is given and trained on, and what it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polib
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer, PreTrainedTokenizerFast

import interleaf
from interleaf.errors import ConfigError, DataError, InterleafError
from interleaf.settings import TrainSettings
from interleaf.tasks import TASKS, Code, Translation
from interleaf.tasks.generation import IGNORED
from interleaf.train import make_task, prepare
from tests.zoo import tiny_lm

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def save_base(folder: Path, name: str) -> str:
    """A tiny random model with a tokenizer of bytes, on disk as any base is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bytes_only.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / name)
    tiny_lm(name, vocab_size=len(vocabulary)).save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder, name) for name in ("llama", "t5")}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"source": f"the number {i}", "target": f"o número {i}", **more} for i in range(count)]


def translates(folder: Path, base: str, **settings: Any) -> TrainSettings:
    """A run of a tiny random model on a few pairs, which answers with a few tokens."""
    given = {"task_options": {"max_new_tokens": 5}, "epochs": 2, "batch_size": 8, "out": str(folder / "out")}
    rows = write(folder / "rows.jsonl", pairs(24))
    return TrainSettings(base=save_base(folder, base), train=rows, task="translation", **{**given, **settings})


# ---- data


def test_pairs_come_from_tables_aligned_files_and_catalogs(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n", "utf-8")
    (tmp_path / "a.pt").write_text("um\ndois\n", "utf-8")
    (tmp_path / "a.tsv").write_text("source\ttarget\none\tum\ntwo\tdois\n", "utf-8")
    catalog = polib.POFile()
    catalog.append(polib.POEntry(msgid="one", msgstr="um"))
    catalog.append(polib.POEntry(msgid="two", msgstr="dois"))
    catalog.append(polib.POEntry(msgid="three", msgstr="três", flags=["fuzzy"]))
    catalog.append(polib.POEntry(msgid="four", msgstr=""))
    catalog.save(str(tmp_path / "a.po"))
    catalog.save_as_mofile(str(tmp_path / "a.mo"))
    refs = [f"{tmp_path}/a.en,{tmp_path}/a.pt", f"{tmp_path}/a.tsv", f"{tmp_path}/a.po", f"{tmp_path}/a.mo"]
    for ref in refs:
        rows = Translation().load_one(ref).to_dict()
        assert sorted(zip(rows["text"], rows["target"], strict=True)) == [("one", "um"), ("two", "dois")], ref


def test_plural_messages_are_pairs_too(tmp_path: Path) -> None:
    catalog = polib.POFile()
    catalog.append(polib.POEntry(msgid="a day", msgid_plural="days", msgstr_plural={0: "um dia", 1: "dias"}))
    catalog.save(str(tmp_path / "a.po"))
    assert Translation().load_one(str(tmp_path / "a.po")).to_dict()["target"] == ["um dia", "dias"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.po", "", "holds no translated message"),
        ("a.mo", "nothing", "cannot be read as a gettext catalog"),
        ("a.tsv", "source\ttarget\none\t\n", "column 'target' is empty in 1 rows, the first is row 1"),
        ("a.tsv", "source\tother\none\tum\n", "no column looks like the label"),
        ("a.jsonl", "", "is empty"),
    ],
)
def test_what_holds_no_pairs_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=said):
        Translation().load(str(tmp_path / name))
    with pytest.raises(DataError, match="no file"):
        Translation().load(f"{tmp_path}/x.po")


def test_files_that_are_not_aligned_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n", "utf-8")
    (tmp_path / "b").write_text("um\n", "utf-8")
    with pytest.raises(DataError, match=r"2 lines and .* 1: they are not aligned"):
        Translation().load(f"{tmp_path}/a,{tmp_path}/b")


def test_rows_unfit_to_learn_from_are_counted(tmp_path: Path) -> None:
    odd = [
        {"source": "word " * 9, "target": "a b c"},
        {"source": "one two", "target": "um dois " * 20},
        {"source": "a", "target": "b c"},
        {"source": "the number 3", "target": "o número 3"},
    ]
    task = Translation(min_words=2, max_words=8, max_ratio=2)
    splits = task.load(write(tmp_path / "rows.jsonl", pairs(20) + odd), dev_fraction=0.2)
    assert splits.dropped == {"too long": 2, "too short": 1, "repeated": 1}
    assert len(splits.train) + len(splits.dev) == 20
    with pytest.raises(DataError, match="no row is left to learn from"):
        Translation(min_words=9).load(str(tmp_path / "rows.jsonl"))


def test_nothing_held_out_is_learnt_from(tmp_path: Path) -> None:
    train, dev = write(tmp_path / "train.jsonl", pairs(9)), write(tmp_path / "dev.jsonl", pairs(3))
    splits = Translation().load(train, dev)
    assert splits.dropped == {"in the held-out rows too": 3}
    assert not set(splits.train["text"]) & set(splits.dev["text"])
    with pytest.raises(DataError, match="every row is among the held-out rows"):
        Translation().load(dev, train)


def test_what_belongs_together_stays_together(tmp_path: Path) -> None:
    rows = [{"source": f"{g} {i}", "target": "x", "book": g} for g in "abcde" for i in range(4)]
    ref = write(tmp_path / "rows.jsonl", rows)
    splits = Translation(group="book").load(ref, dev_fraction=0.2, seed=1)
    assert not set(splits.train["group"]) & set(splits.dev["group"])
    named = Translation(group="book", dev_groups=["b", "d"]).load(ref, limit=5)
    assert set(named.dev["group"]) == {"b", "d"}
    assert len(named.train) == 5
    with pytest.raises(DataError, match=r"no group 'x'\. It has: a, b, c, d, e"):
        Translation(group="book", dev_groups=["x"]).load(ref)
    with pytest.raises(DataError, match="no column 'chapter'"):
        Translation(group="chapter").load(ref)


# ---- what a model is given


def test_a_decoder_learns_the_answer_alone(bases: dict[str, str], tmp_path: Path) -> None:
    task = Translation(prompt="English: {text}\nPortuguese: ", max_length=12, max_new_tokens=4)
    tokenizer = task.tokenizer(bases["llama"])
    rows = task.load_one(write(tmp_path / "rows.jsonl", [{"source": "one", "target": "um, dois"}]))
    encoded = task.encode(rows, tokenizer)[0]
    labels = [t for t in encoded["labels"] if t != IGNORED]
    assert tokenizer.decode(labels) == "um,</s>"
    assert encoded["labels"][: len(encoded["labels"]) - len(labels)] == [IGNORED] * 12
    assert tokenizer.decode(encoded["input_ids"]) == "Portuguese: um,</s>", "of a long prompt the end is kept"


def test_an_encoder_decoder_reads_one_side_and_learns_the_other(bases: dict[str, str], tmp_path: Path) -> None:
    task = Translation(prompt="translate: {text}")
    tokenizer = task.tokenizer(bases["t5"])
    rows = task.load_one(write(tmp_path / "rows.jsonl", [{"source": "one", "target": "um"}]))
    encoded = task.encode(rows, tokenizer)[0]
    assert tokenizer.decode(encoded["input_ids"]) == "translate: one"
    assert tokenizer.decode(encoded["labels"]) == "um"


def test_the_chat_template_is_kept(bases: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        Translation(chat=True).tokenizer(bases["llama"])
    task = Translation(chat=True, chat_template=CHAT, prompt="Translate: {text}")
    again = Translation.from_state(json.loads(json.dumps(task.state())))
    tokenizer = again.tokenizer(bases["llama"])
    assert again.given({"text": ["one"]}, tokenizer) == ["<user>Translate: one\n<assistant>"]


def test_a_prompt_may_hold_other_columns(bases: dict[str, str], tmp_path: Path) -> None:
    task = Code(prompt="<prefix>{text}<suffix>{suffix}<middle>")
    ref = write(tmp_path / "rows.jsonl", [{"prompt": "a = ", "suffix": "\nb = 2", "completion": "1"}])
    tokenizer = task.tokenizer(bases["llama"])
    assert task.given(task.load_one(ref).to_dict(), tokenizer) == ["<prefix>a = <suffix>\nb = 2<middle>"]
    with pytest.raises(DataError, match="the prompt wants the column 'suffix' too"):
        list(task.predict(None, tokenizer, ["a = "]))
    with pytest.raises(DataError, match="no column 'suffix'"):
        task.load_one(write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}]))
    with pytest.raises(ConfigError, match=r"has no \{text\}"):
        Code(prompt="nothing")


# ---- what it answers


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_does_not_depend_on_the_batch(bases: dict[str, str], name: str, beams: int) -> None:
    task = Translation(max_new_tokens=6, num_beams=beams)
    tokenizer, model = task.tokenizer(bases[name]), task.model(bases[name])
    texts = ["a", "a much longer text than the others", "one more"]
    together = list(task.predict(model, tokenizer, texts, batch_size=3))
    alone = [row for text in texts for row in task.predict(model, tokenizer, [text])]
    assert together == alone
    assert [row["text"] for row in together] == texts


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_loss_is_the_models_own(bases: dict[str, str], name: str, tmp_path: Path) -> None:
    task = Translation()
    tokenizer, model = task.tokenizer(bases[name]), task.model(bases[name])
    rows = task.load_one(write(tmp_path / "rows.jsonl", [*pairs(3), {"source": "x", "target": "quite another one"}]))
    found = task.loss(model, tokenizer, rows, batch_size=2)
    total = count = 0.0
    with torch.no_grad():
        for row in task.encode(rows, tokenizer):
            one = {k: torch.tensor([v]) for k, v in row.items()}
            tokens = sum(t != IGNORED for t in row["labels"])
            total, count = total + float(model.eval()(**one).loss) * tokens, count + tokens
    assert found == pytest.approx(total / count, rel=1e-5)


def test_languages_are_set_and_forced(tmp_path: Path) -> None:
    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁", "a"])}
    tokenizer = NllbTokenizer(vocab=words, merges=[("▁", "a")])
    tokenizer.save_pretrained(tmp_path)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(tmp_path)
    task = Translation(source_lang="eng_Latn", target_lang="por_Latn", max_new_tokens=3)
    found, model = task.tokenizer(str(tmp_path)), task.model(str(tmp_path))
    rows = task.load_one(write(tmp_path / "rows.jsonl", [{"source": "a", "target": "a a"}]))
    encoded = task.encode(rows, found)[0]
    assert found.convert_ids_to_tokens(encoded["input_ids"])[0] == "eng_Latn"
    assert found.convert_ids_to_tokens(encoded["labels"])[0] == "por_Latn"
    seen: list[int] = []
    real = model.generate
    model.generate = lambda **options: seen.append(options["forced_bos_token_id"]) or real(**options)
    assert len(list(task.predict(model, found, ["a"]))) == 1
    assert found.convert_ids_to_tokens(seen) == ["por_Latn"]
    with pytest.raises(ConfigError, match="does not know the language 'xx'"):
        Translation(target_lang="xx").tokenizer(str(tmp_path))


def test_a_tokenizer_without_languages_is_said_so(bases: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="knows no languages"):
        Translation(source_lang="en").tokenizer(bases["t5"])


def test_completions_end_where_they_should() -> None:
    task = Code(stop=["\ndef ", "\nprint("])
    assert task.finish("    return 1\n\ndef f(): pass\nprint(2)") == "    return 1\n"
    assert task.finish("    return 1\n") == "    return 1\n"
    assert Translation(encoder_decoder=False).finish(" um\nEnglish: two") == "um"


# ---- as a run


@pytest.mark.parametrize("task", list(TASKS))
def test_unknown_settings_of_a_task_are_refused(task: str) -> None:
    run = TrainSettings(base="b", train="t", out="o", task=task, task_options={"beams": 3})
    with pytest.raises(InterleafError, match=f"task_options: {task} has no 'beams'. It has: .*max_length"):
        make_task(run)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_run_trains_saves_and_answers(bases: dict[str, str], name: str, tmp_path: Path) -> None:
    from interleaf.evaluate import open_adapter

    data = write(tmp_path / "rows.jsonl", pairs(24))
    options = {"prompt": "pt: {text} = ", "max_new_tokens": 5}
    settings = TrainSettings(
        base=bases[name], train=data, out=str(tmp_path / "out"), task="translation", task_options=options, epochs=3
    )
    run = prepare(settings)
    assert run.plan().head_parameters == 0
    result = run.train()
    assert result.metrics["loss"] < result.metrics["base"]["loss"], "an adapter alone lowers the loss"
    assert {"bleu", "chrf", "ter"} <= set(result.metrics)
    opened = open_adapter(tmp_path / "out")
    assert opened.task.state() == run.task.state()
    again = opened.evaluate(data)
    assert again["rows"] == 24
    answers = list(opened.predict(["the number 3"]))
    assert answers == list(run.task.predict(run.model, run.tokenizer, ["the number 3"]))
    with opened.model.disable_adapter():
        assert opened.task.loss(opened.model, opened.tokenizer, run.splits.dev, 8) == result.metrics["base"]["loss"]
    assert isinstance(opened.model, interleaf.AdaptedModel)
