"""A search over adapters' structures: what it draws, what it recommends, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from interleaf.errors import ConfigError
from interleaf.settings import TrainSettings, read_settings
from interleaf.studies.search import Behind, Job, as_config, open_study, recommended, search, suggest
from interleaf.studies.search_page import page


@pytest.fixture
def settings(reviews: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        base="bundled:minilm",
        train=str(reviews),
        out=str(tmp_path / "best"),
        adapter_options={"layers": "last:1"},
        limit=40,
        epochs=1,
        max_length=8,
        batch_size=8,
    )


def test_trials_are_kept_and_one_is_recommended(settings: TrainSettings, tmp_path: Path) -> None:
    study = search(Job(settings, str(tmp_path / "study"), trials=3))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    for trial in study.trials:
        quality, parameters, latency = trial.values
        assert 0 <= quality <= 1
        assert parameters > 0
        assert latency > 0.5
        assert (tmp_path / "study" / "trials" / str(trial.number) / "adapter_model.safetensors").exists()
    chosen = recommended(study, 1.0)
    assert chosen.values[1] == min(trial.values[1] for trial in study.trials)
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(as_config(chosen, settings)))
    again = read_settings(tmp_path / "best.yaml", {})
    assert again.learning_rate == chosen.params["learning_rate"]
    assert again.adapter_options["layers"] == "last:1", "what the config names stays as it is"
    told = page(study, "f1_macro", chosen, "Search")
    assert len(told.record["trials"]) == 3


def test_several_are_trained_at_once(settings: TrainSettings, tmp_path: Path) -> None:
    study = search(Job(settings, str(tmp_path / "study"), trials=2, together=2))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2


@pytest.mark.slow
def test_two_worker_processes_share_a_study(settings: TrainSettings, tmp_path: Path) -> None:
    study = search(Job(settings, str(tmp_path / "study"), trials=3), workers=2)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) >= 3
    assert len({trial.user_attrs["process"] for trial in done}) == 2


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_share_a_study(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_bytes(Path(settings.train).read_bytes())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        study = search(Job(dataclasses.replace(settings, train="rows.csv"), "study", trials=3), 2, cluster.address)
    finally:
        cluster.shutdown()
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) >= 3
    processes = {trial.user_attrs["process"] for trial in done}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert Path("study/trials/0/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on(settings: TrainSettings, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    given = {k: v for k, v in dataclasses.asdict(settings).items() if v not in (None, {}, [])}
    config.write_text(yaml.safe_dump(given))
    command = [
        str(Path(sys.executable).parent / "interleaf"),
        "search",
        str(config),
        "--out",
        str(tmp_path / "s"),
        "--trials",
        "3",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(_done(tmp_path / "s")) < 1:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = _done(tmp_path / "s")
    assert 1 <= len(before) < 3
    said = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=True)
    after = _done(tmp_path / "s")
    assert after[: len(before)] == before, "what was done is not done again"
    assert len(after) == 3
    assert json.loads(said.stdout)["recommended"]["out"] == settings.out
    assert (tmp_path / "s" / "best.yaml").exists()
    assert (tmp_path / "s" / "page" / "report.html").exists()


def _done(folder: Path) -> list[tuple[dict[str, Any], Any]]:
    if not (folder / "study.log").exists():
        return []
    study = open_study(folder, "f1_macro")
    return [(trial.params, trial.values) for trial in study.trials if trial.state.name == "COMPLETE"]


def test_only_kinds_that_have_the_fixed_settings_are_drawn(settings: TrainSettings) -> None:
    study = optuna.create_study()
    fixed = dataclasses.replace(settings, adapter_options={"norm_before": True, "reduction_factor": 8})
    for _ in range(10):
        trial = study.ask()
        drawn = suggest(trial, fixed, 6, "out")
        assert drawn.adapter == "pfeiffer"
        assert "width" not in trial.params
        study.tell(trial, 0)


@pytest.mark.parametrize(("metric", "scores", "stops"), [("f1_macro", 0.4, True), ("loss", 0.4, False)])
def test_a_trial_behind_the_median_stops(metric: str, scores: float, stops: bool) -> None:
    class Now:
        epoch, should_training_stop, num_train_epochs = 1.0, False, 3

    watcher, control = Behind(metric, [[0.5]] * 4), Now()
    watcher.on_evaluate(Now(), Now(), control, {f"eval_{metric}": scores})
    assert (watcher.stopped, control.should_training_stop) == (stops, stops)


def test_none_is_stopped_before_there_are_others_or_after_its_last_pass() -> None:
    class Now:
        epoch, should_training_stop, num_train_epochs = 1.0, False, 1

    for watcher in (Behind("f1_macro", [[0.5]] * 3), Behind("f1_macro", [[0.5]] * 9)):
        watcher.on_evaluate(Now(), Now(), Now(), {"eval_f1_macro": 0.1})
        assert not watcher.stopped


def test_a_study_in_which_all_fails_says_why(settings: TrainSettings, tmp_path: Path) -> None:
    bad = dataclasses.replace(settings, adapter_options={"layers": [99]})
    with pytest.raises(ConfigError, match=r"no trial came to its end: .*99"):
        recommended(search(Job(bad, str(tmp_path / "study"), trials=1)), 0.01)
    with pytest.raises(ConfigError, match="1 or more"):
        search(Job(settings, str(tmp_path / "study"), trials=0))
