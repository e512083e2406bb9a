"""The command line: help, kinds, layers to skip, compositions of stored adapters."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import interleaf
from interleaf import bundled, cli
from interleaf.adapter import Registry
from interleaf.cli.app import VERBS
from interleaf.errors import ConfigError, StoreError
from interleaf.evaluate import open_adapter
from tests.zoo import build, randomise

ROOT = Path(__file__).parent.parent
FAST = ["--base", "bundled:minilm", "--epochs", "1", "--max-length", "8", "--batch-size", "16"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; return what it printed, or the one line that says why it was refused."""

    def command(*words: object, refused: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["interleaf", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "300")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert int(stop.value.code or 0) == (2 if refused else 0), said.err
        return said.err if refused else said.out

    return command


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_shows_an_example(run: Any, verb: str) -> None:
    assert f"Example: interleaf {verb}" in run(verb, "--help").replace(
        "Example: echo 'A joy to watch.' | ", "Example: "
    )


def test_help_is_quick_because_it_loads_no_library_of_weight() -> None:
    code = (
        "import sys; sys.argv = ['interleaf', '--help']\n"
        "from interleaf.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'peft', 'datasets', 'pandas', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


def test_the_presets_are_listed_in_one_place(run: Any) -> None:
    shown = run("train", "--help")
    assert "interleaf kinds" in shown
    assert not any(preset in shown for preset in ("houlsby", "adapter_plus"))


def test_kinds_lists_the_registry(run: Any) -> None:
    shown, told = run("kinds"), json.loads(run("kinds", "--json"))
    assert [kind["kind"] for kind in told] == sorted(Registry.kinds)
    assert {p for kind in told for p in kind["presets"]} == set(Registry.presets())
    for kind in told:
        assert kind["kind"] in shown
        assert kind["description"].endswith("."), kind
        assert kind["paper"] or kind["kind"] == "union", kind
        assert issubclass(getattr(interleaf, kind["config"]), interleaf.AdapterConfig)


@pytest.mark.parametrize("name", sorted({*Registry.kinds, *Registry.presets()} | {"glow"}))
def test_kinds_describes_every_setting(run: Any, name: str) -> None:
    told = json.loads(run("kinds", name, "--json"))
    config_cls = Registry.kinds[told["kind"]].config_cls
    peft = {f.name for f in dataclasses.fields(interleaf.AdapterConfig.__mro__[1])}
    expected = {f.name for f in dataclasses.fields(config_cls)} - peft
    assert {s["name"] for s in told["settings"]} == expected
    for setting in told["settings"]:
        assert setting["description"].endswith("."), setting
        assert setting["type"]
    if name in Registry.presets():
        made: Any = Registry.presets()[name]
        shown = config_cls(**{s["name"]: s["value"] for s in told["settings"]})
        assert {n: shown.to_dict()[n] for n in expected} == {n: made.to_dict()[n] for n in expected}


def test_kinds_shows_types_whole_and_refuses_strangers(run: Any) -> None:
    assert "list[str] | None" in run("kinds", "pfeiffer")
    assert "there is no kind or preset 'pfeifer'. There are: adapter_plus" in run("kinds", "pfeifer", refused=True)


def test_the_page_of_kinds_is_what_the_command_prints(run: Any) -> None:
    """After a change of a kind: interleaf kinds --markdown > docs/kinds.md"""
    assert (ROOT / "docs" / "kinds.md").read_text("utf-8") == run("kinds", "--markdown")


def test_a_preset_belongs_to_one_kind() -> None:
    with pytest.raises(ConfigError, match="there is a preset 'glow' of another kind already"):
        interleaf.register_adapter("flow", {"glow": {}})(interleaf.AdapterConfig)
    assert "flow" not in Registry.kinds


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the default name, one of them without the first layers; and one of no task."""
    folder = tmp_path_factory.mktemp("out")
    frame = pd.read_json(bundled.resolve("bundled:movie-reviews"), lines=True)
    frame.groupby("label").head(24).to_csv(folder / "reviews.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, words in (("a", ["--seed", "1"]), ("b", ["--set", "layers=last:3", "--adapter", "houlsby"])):
            data = ["--train", str(folder / "reviews.csv"), "--out", str(folder / name)]
            patch.setattr(sys, "argv", ["interleaf", "train", *FAST, *data, *words, "--json"])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
            _exaggerate(folder / name)
    model: Any = interleaf.adapt(build("minilm"))
    model.add_adapter("lang", "glu", modules_to_save=[])
    randomise(model, std=0.05)
    model.save_adapter(folder / "lang", "lang")
    return folder


def _exaggerate(path: Path) -> None:
    """One epoch changes little: make the stored adapter one whose effect is seen."""
    opened = open_adapter(path)
    opened.model.train_adapter("adapter")
    randomise(opened.model, std=0.05)
    adaptation = interleaf.Adaptation(task={"name": opened.task.name, "state": opened.task.state()})
    opened.model.peft_config["adapter"].base_model_name_or_path = "bundled:minilm"
    opened.model.save_adapter(path, "adapter", adaptation, overwrite=True)


TEXT = "A joy to watch from the first scene to the last."


def scores(run: Any, folder: Path, setup: str, *words: str) -> torch.Tensor:
    (folder / "texts.txt").write_text(f"{TEXT}\nDull.\n", "utf-8")
    setup = setup.replace("out/", f"{folder}/")
    lines = run("predict", setup, folder / "texts.txt", "--json", *words).splitlines()
    return torch.tensor([list(json.loads(line)["scores"].values()) for line in lines])


def test_training_without_the_first_layers(out: Path) -> None:
    config = json.loads((out / "b" / "adapter_config.json").read_text("utf-8"))
    assert config["layers"] == "last:3"
    layers = {key.split(".layer.")[1][0] for key in load_file(out / "b" / "adapter_model.safetensors") if "slot" in key}
    assert layers == {"3", "4", "5"}


def test_layers_are_skipped_at_inference(run: Any, out: Path) -> None:
    whole = scores(run, out, "out/a")
    model = open_adapter(out / "a")
    for words, skip in (("first:2", "first:2"), ("0,1", [0, 1]), ("last:1", "last:1")):
        model.model.set_adapter("adapter", skip_layers=skip)
        expected = torch.tensor([list(row["scores"].values()) for row in model.predict([TEXT, "Dull."])])
        found = scores(run, out, "out/a", "--skip-layers", words)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, whole, atol=1e-4)
    skipped = json.loads(run("evaluate", out / "a", out / "reviews.csv", "--skip-layers", "first:5", "--json"))
    assert 0 <= skipped["accuracy"] <= 1


def test_layers_that_cannot_be_skipped(run: Any, out: Path) -> None:
    for adapter, words, said in (
        ("a", "first:6", "skip_layers=first:6 leaves no adapter. Layers with adapters: 0, 1, 2, 3, 4, 5."),
        ("a", "0,1,2,3,4,5", "leaves no adapter"),
        ("a", "first:7", "n from 1 to 6"),
        ("a", "9", "there is no layer 9; they run from 0 to 5"),
        ("b", "first:3", "skip_layers=first:3: no adapter is there. Layers with adapters: 3, 4, 5."),
        ("a", "the lowest", "layers 'the lowest': expected first:n, last:n, or numbers such as 0,1."),
    ):
        assert said in run("predict", out / adapter, out / "reviews.csv", "--skip-layers", words, refused=True)


@pytest.mark.parametrize("word", ["stack", "average"])
def test_a_composition_of_stored_adapters(run: Any, out: Path, word: str) -> None:
    """Both are called `adapter`, as `interleaf train` does when it is told no name."""
    found = scores(run, out, f"{word}(out/a, out/b)")
    opened = open_adapter(out / "a")
    opened.model.load_adapter(out / "b", "second")
    opened.model.set_adapter(f"{word}(adapter, second)")
    expected = [list(row["scores"].values()) for row in opened.predict([TEXT, "Dull."])]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not torch.allclose(found, scores(run, out, "out/b"), atol=1e-4)


def test_the_last_adapter_with_a_task_gives_task_and_head(run: Any, out: Path) -> None:
    alone, stacked = scores(run, out, "out/a"), scores(run, out, "stack(out/lang, out/a)")
    assert not torch.allclose(stacked, alone, atol=1e-4)
    assert not torch.allclose(scores(run, out, "stack(out/a, out/lang)"), alone, atol=1e-4)
    measured = json.loads(run("evaluate", f"stack({out}/lang, {out}/a)", out / "reviews.csv", "--json"))
    assert set(measured["per_class"]) == {"negative", "positive"}
    with pytest.raises(StoreError, match="stored without a task"):
        open_adapter(out / "lang")


def test_a_stored_fusion_runs_with_what_it_fuses(run: Any, out: Path) -> None:
    model = open_adapter(out / "a").model
    for name in ("a", "b"):
        model.load_adapter(out / name, name)
    model.add_adapter("both", interleaf.FusionConfig(children=["a", "b"]))
    model.save_adapter(out / "fused", "both", _adaptation(out / "a"))
    for name in ("a", "b"):
        model.save_adapter(out / f"{name}_named", name, _adaptation(out / name))
    found = scores(run, out, 'fuse(out/a_named, out/b_named, name="out/fused")')
    assert found.shape == (2, 2)
    assert not torch.allclose(found, scores(run, out, "out/b"), atol=1e-4)
    said = run("predict", f"fuse({out}/a, {out}/b)", "-", refused=True)
    assert 'name the folder of the trained fusion too: fuse(a, b, name="out/fused")' in said


def _adaptation(path: Path) -> interleaf.Adaptation:
    return interleaf.Adaptation(task=json.loads((path / "interleaf.json").read_text("utf-8"))["task"])


def test_compositions_that_cannot_be_used(run: Any, out: Path) -> None:
    for setup, said in (
        (f"parallel({out}/a, {out}/b)", "give no one answer a row"),
        (f"batch_split({out}/a, {out}/b, batch_sizes=2)", "give no one answer a row"),
        (f"stack({out}/a, {out}/nowhere)", "nowhere is no adapter folder"),
        (f"stak({out}/a, {out}/b)", "there is no composition 'stak'"),
        (f"stack({out}/a", "cannot be read as a composition"),
    ):
        assert said in run("predict", setup, "-", refused=True)


def test_a_folder_may_have_brackets_in_its_name(run: Any, out: Path) -> None:
    copy = out / "a (1)"
    if not copy.exists():
        open_adapter(out / "a").model.save_adapter(copy, "adapter", _adaptation(out / "a"))
    torch.testing.assert_close(scores(run, out, "out/a (1)", "--base", "bundled:minilm"), scores(run, out, "out/a"))


def test_one_name_for_two_is_refused_where_a_third_needs_it(out: Path) -> None:
    model = open_adapter(out / "a").model
    model.load_adapter(out / "b", "b")
    model.add_adapter("both", interleaf.FusionConfig(children=["adapter", "b"]))
    model.save_adapter(out / "unclear", "both")
    with pytest.raises(StoreError, match="needs the adapter 'adapter', and two of these are called that"):
        open_adapter(f'stack({out}/a, fuse({out}/a, {out}/b, name="{out}/unclear"))')
