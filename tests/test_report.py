"""The report of a run: one page without network, the same as Markdown and JSON, that opens on a phone."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from interleaf import report, store
from interleaf.compare import ArmRun, summary
from interleaf.errors import ConfigError, StoreError
from interleaf.metrics import classification_metrics
from interleaf.record import CURVE_POINTS, EXAMPLE_LENGTH, curves, side_by_side
from interleaf.report.blocks import RunReport, number
from interleaf.report.figures import confusion, scale_is_log
from interleaf.report.render import as_html, as_markdown, escaped, fenced
from interleaf.report.trained import always_the_most_frequent
from interleaf.settings import TrainSettings
from interleaf.train import prepare
from tests.browser import Browser
from tests.test_bad_input import run
from tests.test_generation import translates

HOSTILE = ["<script>alert('label')</script>", "a|b `$x_{$ **bold** & 好"]
TEXT = "<img src=http://example.org/x.png onerror=alert(1)> ``` </dd></dl>"


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on rows whose labels and texts would like to be markup; followed with TensorBoard."""
    folder = tmp_path_factory.mktemp("classified")
    rows = [{"text": f"{TEXT} {i}", "label": HOSTILE[i % 2]} for i in range(60)]
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    settings = TrainSettings(
        base="bundled:minilm",
        train=str(folder / "rows.csv"),
        out=str(folder / "out"),
        epochs=2,
        max_length=8,
        batch_size=4,
        dev_fraction=0.4,
        examples=6,
        report_to=["tensorboard"],
    )
    prepare(settings).train()
    return folder / "out"


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a task whose base can answer without an adapter."""
    folder = tmp_path_factory.mktemp("translated")
    prepare(translates(folder, "llama", batch_size=2, examples=2)).train()
    return folder / "out"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `interleaf compare` writes, of figures made up."""
    folder = tmp_path_factory.mktemp("compared")
    arms = {"adapter": (0.82, 100_000), "full": (0.84, 22_000_000), "head": (0.7, 770)}
    runs = [arm_run(arm, seed, *arms[arm]) for seed in (0, 1, 2) for arm in arms]
    found = {
        "settings": TrainSettings(base="bundled:minilm", train="bundled:tweets", out="out").as_dict(),
        "environment": {"torch": "2.13.0"},
        "command": "interleaf compare configs/classification.yaml",
        "arms": {arm: summary([one for one in runs if one.arm == arm]) for arm in arms},
        "runs": [dataclasses.asdict(one) for one in runs],
    }
    (folder / "compare.json").write_text(json.dumps(found))
    return folder


def arm_run(arm: str, seed: int, accuracy: float, parameters: int) -> ArmRun:
    accuracy += seed / 100
    history = [{"eval_f1_macro": accuracy - 0.1 / e, "eval_loss": 1 / e, "epoch": float(e), "step": e} for e in (1, 2)]
    on = 0.8 if arm == "head" else 0.7
    return ArmRun(
        arm=arm,
        seed=seed,
        metrics={"accuracy": accuracy, "f1_macro": accuracy - 0.01, "f1_micro": accuracy, "rows": 100},
        trained_parameters=parameters,
        stored_bytes=4 * parameters,
        seconds=60.0 + seed,
        seconds_to_best=30.0 + seed,
        peak_memory_bytes=10**9 + seed,
        flops_per_step=10**10,
        forgetting={
            "measure": "accuracy of an earlier task's probe",
            "before": 0.8,
            "on": on,
            "off": 0.8 if arm == "adapter" else None,
            "lost": (0.8 - on) / 0.8,
        },
        history=history,
    )


@pytest.fixture(scope="module")
def runs(classified: Path, translated: Path, compared: Path) -> list[RunReport]:
    return report.read([classified, translated, compared])


class Page(HTMLParser):
    """What a reader sees of a page, and the tags that it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- what a run leaves


def test_a_run_stores_what_its_report_shows(classified: Path, translated: Path) -> None:
    for folder, head in ((classified, True), (translated, False)):
        kept = store.read(folder).adaptation
        assert {"loss"} <= set().union(*kept.history)
        assert [e["epoch"] for e in kept.history if "eval_loss" in e] == [1.0, 2.0]
        assert not any("runtime" in key or "per_second" in key for e in kept.history for key in e)
        assert kept.plan["train_rows"] > kept.plan["dev_rows"] > 0
        assert kept.plan["head_parameters"] > 0 if head else kept.plan["head_parameters"] == 0
        assert {"torch", "transformers", "peft", "interleaf"} <= set(kept.environment)
        assert kept.command
        assert kept.seconds
        assert "report_to" not in kept.run
        assert (folder / "interleaf.json").stat().st_size < 30_000


def test_of_a_classifier_the_surest_mistakes_come_first(classified: Path) -> None:
    rows = store.read(classified).adaptation.examples
    wrong = [row for row in rows if row["answer"] != row["expected"]]
    assert len(rows) == 6
    assert rows[: len(wrong)] == wrong
    assert [row["score"] for row in wrong] == sorted((row["score"] for row in wrong), reverse=True)
    assert all(0.5 <= row["score"] <= 1 and row["expected"] in HOSTILE for row in rows)
    assert not any("base" in row for row in rows), "without its head the base says nothing"


def test_of_a_generator_the_bases_answer_stands_beside(translated: Path) -> None:
    rows = store.read(translated).adaptation.examples
    assert [set(row) for row in rows] == [{"input", "expected", "answer", "base"}] * 2
    assert any(row["base"] != row["answer"] for row in rows)


def test_no_examples_are_stored_if_none_are_wanted(classified: Path, tmp_path: Path) -> None:
    settings = TrainSettings("bundled:minilm", str(classified.parent / "rows.csv"), str(tmp_path), examples=0)
    assert prepare(settings).examples() == []
    with pytest.raises(ConfigError, match="examples=-1"):
        dataclasses.replace(settings, examples=-1)


def test_long_histories_and_texts_are_cut() -> None:
    steps = [{"loss": 1.0, "grad_norm": 2.0, "step": i, "epoch": i / 1000} for i in range(1000)]
    kept = curves([*steps, {"eval_loss": 0.5, "eval_runtime": 3.0, "step": 999, "epoch": 1.0}, {"train_loss": 1.0}])
    assert len(kept) <= CURVE_POINTS + 1
    assert kept[0] == {"loss": 1.0, "step": 0, "epoch": 0.0}
    assert kept[-1] == {"eval_loss": 0.5, "step": 999, "epoch": 1.0}
    assert curves([]) == []
    (row,) = side_by_side([{"answer": "x" * 5000, "score": 0.5}], [{"answer": "y"}])
    assert row == {"answer": "x" * EXAMPLE_LENGTH + " …", "score": 0.5, "base": "y"}


def test_tensorboards_files_outlive_the_run(classified: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = classified.glob("runs/*/events.*")
    told = EventAccumulator(str(events)).Reload()
    assert [event.step for event in told.Scalars("eval/loss")] == [9, 18]
    assert not classified.with_name("out.checkpoints").exists()


def test_loggers_that_are_not_there_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    settings = TrainSettings(base="nowhere", train="nothing", out=str(tmp_path / "out"))
    for name, said in (("trackio", "requires trackio to be installed"), ("chess", "chess is not supported")):
        with pytest.raises(ConfigError, match=rf"report_to=\['{name}'\]: .*{said}"):
            prepare(dataclasses.replace(settings, report_to=[name]))
    assert list(tmp_path.iterdir()) == []


# ---- what is written


def test_page_markdown_and_json_say_the_same(runs: list[RunReport]) -> None:
    page, markdown, data = Page(as_html(runs)), as_markdown(runs), report.as_json(runs)
    seen = " ".join(page.text.split())
    plain = " ".join(re.sub(r"\\([\W_])", r"\1", markdown).split())
    cells = 0
    for made in data["runs"]:
        for section in made["sections"]:
            assert section["title"] in seen
            assert section["title"] in plain
            for block in section["blocks"]:
                words = [cell for row in block.get("rows", []) for cell in row]
                words += [*block.get("columns", []), *block.get("texts", {}).values()]
                words += [block["reading"]] if "reading" in block else []
                for word in (" ".join(str(w).split()) for w in words):
                    assert word in seen
                    assert word in plain
                    cells += 1
    assert cells > 300


def test_every_part_is_there(runs: list[RunReport]) -> None:
    parts = [[section.title for section in made.sections] for made in runs]
    assert parts[0] == [
        "What was trained",
        "Results on held-out data",
        "Learning curves",
        "Confusion matrix",
        "Label by label",
        "Examples",
        "How to make it again",
        "Settings of the run",
        "Settings of the adapter",
    ]
    assert parts[1] == [title for title in parts[0] if title not in ("Confusion matrix", "Label by label")]
    assert parts[2] == [
        "What was compared",
        "Quality",
        "Cost",
        "Learning curves",
        "Forgetting",
        "How to make it again",
        "Settings of the runs",
    ]


def test_figures_stand_beside_those_of_the_base(translated: Path, runs: list[RunReport]) -> None:
    metrics = store.read(translated).adaptation.metrics
    table: Any = runs[1].sections[1].blocks[0]
    row = next(row for row in table.rows if row[0] == "loss")
    assert table.columns[1:3] == ["base alone", "with adapter"]
    assert row[1:4] == [number(metrics["base"]["loss"]), number(metrics["loss"]), "lower"]


def test_intervals_costs_and_forgetting_are_those_measured(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    (made,) = report.read([compared / "compare.json"])
    told = [section for section in made.sections if section.title in ("Quality", "Cost", "Forgetting")]
    tables = {section.title: {row[0]: row[1:] for row in section.blocks[0].rows} for section in told}
    score = found["arms"]["full"]["scores"]["accuracy"]
    assert tables["Quality"]["accuracy"][1] == f"{score['mean']:.4f} ± {score['half_width']:.4f}"
    assert tables["Cost"]["trained parameters"] == ["100,000", "22,000,000", "770"]
    assert tables["Forgetting"]["full"] == ["0.8000", "0.7000", "cannot be", "12.5%"]
    assert tables["Forgetting"]["adapter"][2] == "0.8000"


def test_what_runs_hold_stands_in_the_page_as_text(runs: list[RunReport]) -> None:
    page = Page(as_html(runs))
    seen = " ".join(page.text.split())
    assert all(label in seen for label in HOSTILE)
    assert TEXT in seen
    outside = re.sub(r"^(`{3,}).*?^\1$", "", as_markdown(runs), flags=re.MULTILINE | re.DOTALL)
    assert escaped(HOSTILE[0]) in outside
    assert not re.search(r"(?<!\\)<", outside)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "xlink:href", "style"):
            assert re.match(r"(#|data:|(?!.*(url\((?!#)|//)))", attributes.get(name) or ""), (tag, attributes)
    assert [a["href"] for t, a in page.tags if t == "link"] == ["data:,"]
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_markdown_is_escaped_and_fences_hold() -> None:
    assert escaped("<b> a|b\n`x` $1") == r"\<b\> a\|b \`x\` \$1"
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"


def test_a_folder_of_an_older_version_is_still_told_of(classified: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(classified, old)
    record = json.loads((old / "interleaf.json").read_text())
    for new in ("plan", "seconds", "history", "examples", "environment", "command"):
        del record[new]
    (old / "interleaf.json").write_text(json.dumps(record))
    assert store.read(old).adaptation.history == []
    (made,) = report.read([old])
    titles = [section.title for section in made.sections]
    assert "Confusion matrix" in titles
    assert not {"Learning curves", "Examples"} & set(titles)
    assert "neither its command nor its versions" in as_html([made])


def test_an_adapter_without_a_task_is_told_of_too(tmp_path: Path) -> None:
    import interleaf
    from tests.zoo import build

    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "houlsby")
    model.save_adapter(tmp_path / "a", "a")
    (made,) = report.read([tmp_path / "a"])
    assert made.sections[0].title == "What was trained"


# ---- figures


def test_the_baseline_is_a_classifier_that_always_says_the_same() -> None:
    true = [0] * 5 + [1] * 3 + [2] * 2
    found = classification_metrics(true, np.eye(3)[[0] * 10], ["a", "b", "c"])
    matrix = classification_metrics(true, np.eye(3)[true], ["a", "b", "c"])["confusion_matrix"]
    for key, value in always_the_most_frequent(matrix).items():
        assert value == pytest.approx(found[key]), key


def test_figures_say_what_they_show_in_words_too(runs: list[RunReport]) -> None:
    figures = [b for section in runs[2].sections for b in section.blocks if hasattr(b, "svg")]
    assert len(figures) == 2 + 6 + 2 + 1, "scores, costs, curves, forgetting"
    for figure in figures:
        assert html.escape(figure.alt) in figure.svg
        assert "adapter" in figure.alt
        assert figure.reading.endswith(".")
        assert "adapter" in re.sub("<svg[^>]*>", "", figure.svg), "letters are letters"


def test_many_labels_are_drawn_without_a_crowd() -> None:
    labels = [f"label number {i}" for i in range(60)]
    figure = confusion("Confusion matrix", labels, np.diag(range(60)).tolist(), "")
    assert 10 < figure.svg.count("<text") < 60
    assert len(figure.svg) < 60_000


def test_only_very_unlike_values_are_on_a_logarithmic_scale() -> None:
    assert scale_is_log([770, 22_000_000])
    assert not scale_is_log([0.7, 0.8])
    assert not scale_is_log([0.0, 100.0])


def test_numbers_are_written_for_people() -> None:
    shown = {0.5: "0.5000", 23.4567: "23.46", 12345.6: "12,346", 7: "7", 0.0: "0", float("nan"): "–", 1e300: "1e+300"}
    assert [number(value) for value in shown] == list(shown.values())
    assert number(None) == "–"


# ---- the command


def test_the_command_writes_the_files(
    compared: Path,
    classified: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "report"
    assert run(monkeypatch, "report", compared, classified, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["figures", "report.html", "report.json", "report.md"]
    linked = re.findall(r"\]\(figures/(.*?)\)", (out / "report.md").read_text("utf-8"))
    assert sorted(linked) == sorted(p.name for p in (out / "figures").iterdir())
    before = (out / "report.html").read_bytes()
    capsys.readouterr()
    assert run(monkeypatch, "report", compared, classified, "--out", out, "--overwrite", "--json") == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == json.loads((out / "report.json").read_text("utf-8"))
    assert (out / "report.html").read_bytes() == before, "the same runs give the same page"
    assert run(monkeypatch, "report", compared, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nothing", None, "is no run: it holds neither interleaf.json nor compare.json"),
        ("compare.json", "{", "is corrupt"),
        ("compare.json", "[]", "holds no JSON object"),
        ("compare.json", "{}", "the comparison has no 'arms'"),
        ("compare.json", '{"arms": {"a": 1}, "runs": [1], "settings": {"a": 1}}', "is damaged"),
        ("interleaf.json", "{", "adapter_config.json is missing"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    name: str,
    text: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if text is not None:
        (folder / name).write_text(text)
    assert run(monkeypatch, "report", folder, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_record_is_refused(classified: Path, tmp_path: Path) -> None:
    shutil.copytree(classified, tmp_path / "run")
    record = json.loads((tmp_path / "run/interleaf.json").read_text())
    for damage in ({"metrics": {"confusion_matrix": [[1]]}}, {"history": 3}, {"plan": {"labels": []}}):
        (tmp_path / "run/interleaf.json").write_text(json.dumps({**record, **damage}))
        with pytest.raises(StoreError, match="run is damaged"):
            report.read([tmp_path / "run"])


# ---- in a browser


@pytest.mark.slow
def test_the_page_opens_on_a_phone_and_a_desk(runs: list[RunReport], tmp_path: Path) -> None:
    page = report.write(runs, tmp_path / "report") / "report.html"
    count = sum(hasattr(block, "svg") for made in runs for section in made.sections for block in section.blocks)
    figures = "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
    letters = "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
    with Browser(tmp_path / "profile") as browser:
        for width, height in ((390, 844), (1280, 900)):
            browser.open(page, width, height)
            drawn = browser.run(f"{figures}.map(r => [r.left, r.width, r.height])")
            assert len(drawn) == count
            assert all(left >= 0 and wide > 250 and high > 80 and left + wide <= width for left, wide, high in drawn)
            there = "filter(e => e.getBBox().width + e.getBBox().height > 0).length"
            inside = f"s => [...s.querySelectorAll('path, image, text')].{there}"
            shapes = browser.run(f"[...document.querySelectorAll('figure svg')].map({inside})")
            assert min(shapes) > 10, "something is drawn in every figure"
            assert browser.run(f"Math.min(...{letters})") >= 10, "letters can be read"
            assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            assert HOSTILE[0] in browser.run("document.body.innerText")
            browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.run("document.documentElement.scrollWidth") <= width, "opened parts do not either"
            assert browser.errors() == []
            assert browser.requested() == [page.absolute().as_uri()]


@pytest.mark.slow
def test_the_browser_would_notice(tmp_path: Path) -> None:
    """The test above can fail: a page with faults has its faults found."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('x'); nothing()</script><img src='http://localhost:9/x.png' width=3000>")
    with Browser(tmp_path / "profile") as browser:
        browser.open(bad, 390, 844)
        assert len(browser.errors()) >= 2
        assert "http://localhost:9/x.png" in browser.requested()
        assert browser.run("document.documentElement.scrollWidth") > 390
