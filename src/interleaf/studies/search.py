"""Look for an adapter's kind, place, width and learning rate with Optuna: quality against parameters and latency.

Each trial is a run of `interleaf train` whose adapter is kept. Trials share stored hidden states, stop early when they
fall behind the others, and can be trained several at once. The study is a file that any number of workers write to.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import TrainerCallback

from interleaf.adapter import Registry
from interleaf.blocks import stacks_of
from interleaf.cohort import prepare_cohort, train_cohort
from interleaf.errors import ConfigError, InterleafError
from interleaf.settings import TrainSettings
from interleaf.train import Result, Run, make_task, prepare

STUDY, TRIALS, BEST = "study.log", "trials", "best.yaml"
KINDS = {"bottleneck": "pfeiffer", "glu": "glu", "compacter": "compacter"}
"""The kinds among which it looks, and the preset that each starts from."""
STARTUP = 4  # trials that none is compared with before they are done
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def suggest(trial: Trial, settings: TrainSettings, depth: int, out: str) -> TrainSettings:
    """Draw a run: what the config's `adapter_options` name stays as it is, the rest of the structure is drawn.

    Args:
        depth: layers of the base.
        out: the trial's folder.
    """
    fixed = settings.adapter_options
    kind = trial.suggest_categorical("kind", [kind for kind in KINDS if fixed.keys() <= settings_of(kind)])
    drawn: dict[str, Any] = {}
    if "positions" not in fixed:
        places = trial.suggest_categorical("positions", ["attention", "ffn", "attention+ffn"])
        drawn["positions"] = places.split("+")
    if "layers" not in fixed:
        drawn["layers"] = f"last:{trial.suggest_int('layers', 1, depth)}"
    if "activation" not in fixed:
        drawn["activation"] = trial.suggest_categorical("activation", ["relu", "gelu", "silu"])
    if not {"bottleneck_dim", "reduction_factor"} & fixed.keys():
        drawn["bottleneck_dim"] = trial.suggest_categorical("width", [4, 8, 16, 32, 64])
    if "connection" not in fixed and kind == "bottleneck":
        drawn["connection"] = trial.suggest_categorical("connection", ["serial", "parallel", "skip"])
    rate = trial.suggest_float("learning_rate", 2e-4, 5e-3, log=True)
    return dataclasses.replace(
        settings, adapter=KINDS[kind], adapter_options={**drawn, **fixed}, learning_rate=rate, out=out, examples=0
    )


def settings_of(kind: str) -> set[str]:
    """Name the settings that a kind's adapters have."""
    return {setting.name for setting in dataclasses.fields(Registry.preset(KINDS[kind]))}


class Behind(TrainerCallback):
    """Stops a trial whose dev score is below the median of the others after the same number of passes.

    Optuna's own pruners are for one objective only.

    Args:
        metric: the dev score; `loss` is better when lower.
        others: the scores of trials that are done, pass by pass.
    """

    def __init__(self, metric: str, others: Sequence[Sequence[float]]) -> None:
        self.key, self.sign, self.others = f"eval_{metric}", -1 if metric == "loss" else 1, others
        self.scores: list[float] = []
        self.stopped = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.scores.append(float(metrics[self.key]))
        number = len(self.scores)
        known = [curve[number - 1] for curve in self.others if len(curve) >= number]
        last = state.epoch is not None and state.epoch >= args.num_train_epochs
        if not last and len(known) >= STARTUP and self.sign * self.scores[-1] < self.sign * statistics.median(known):
            self.stopped = control.should_training_stop = True


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is given."""

    settings: TrainSettings
    out: str
    trials: int
    together: int = 1
    number: int = 0


def open_study(out: str | Path, metric: str, seed: int = 0) -> optuna.Study:
    """Open the study in a folder, or begin one: quality, then parameters and latency, which are to be small."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(Path(out) / STUDY))),
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, group=True),
        directions=["minimize" if metric == "loss" else "maximize", "minimize", "minimize"],
        load_if_exists=True,
    )


def work(job: Job, say: Callable[[str], None] = lambda text: None) -> None:
    """Run trials until the study has as many as are wanted; any number of workers may do so at once."""
    from interleaf.cli.app import quiet

    quiet()
    settings = job.settings
    task = make_task(settings)
    study = open_study(job.out, task.best_metric, settings.seed + job.number)
    # the labels of the data decide the base's head
    task.load(settings.train, settings.dev, dev_fraction=settings.dev_fraction, seed=settings.seed)
    depth = max(len(layers) for _, layers in stacks_of(task.model(settings.base)))
    while (wanted := job.trials - len(study.get_trials(deepcopy=False))) > 0:
        trials = [study.ask() for _ in range(min(job.together, wanted))]
        drawn = [suggest(t, settings, depth, str(Path(job.out) / TRIALS / str(t.number))) for t in trials]
        try:
            _run(study, trials, drawn, task.best_metric)
        except InterleafError as error:
            for trial in trials:
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=TrialState.FAIL)
        for trial in trials:
            say(told(study.trials[trial.number]))


def _run(study: optuna.Study, trials: Sequence[Trial], drawn: Sequence[TrainSettings], metric: str) -> None:
    curves = [trial.user_attrs["curve"] for trial in study.trials if "curve" in trial.user_attrs]
    watchers = [Behind(metric, curves) for _ in trials]
    if len(trials) == 1:
        runs = [prepare(drawn[0])]
        results: list[Result] = [runs[0].train(watchers[0])]
    else:
        runs = prepare_cohort(drawn)
        results = train_cohort(runs, lambda number: (watchers[number],))
    for trial, run, result, watcher in zip(trials, runs, results, watchers, strict=True):
        trial.set_user_attr("curve", watcher.scores)
        trial.set_user_attr("seconds", result.seconds)
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("settings", run.settings.as_dict())
        values = [float(result.metrics[metric]), run.summary().adapter_parameters, latency(run)]
        trial.set_user_attr("values", values)
        if watcher.stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, values)


def latency(run: Run, rounds: int = 15) -> float:
    """Return how many times as long as the base a forward pass over held-out rows takes with the adapter."""
    rows = run.task.encode(run.splits.dev.select(range(min(16, len(run.splits.dev)))), run.tokenizer)
    batch = {k: v.to(run.model.device) for k, v in run.task.collator(run.tokenizer)(list(rows)).items()}
    run.model.eval()
    ratios = []
    with torch.inference_mode():
        for _ in range(rounds):
            on = _seconds(run.model, batch)
            with run.model.disable_adapter():
                ratios.append(on / _seconds(run.model, batch))
    return statistics.median(ratios)


def _seconds(model: Any, batch: Any) -> float:
    start = time.perf_counter()
    model(**batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def search(
    job: Job, workers: int = 1, ray_address: str | None = None, say: Callable[[str], None] = lambda text: None
) -> optuna.Study:
    """Run a study to its end, here, in several processes, or on a Ray cluster that shares the folder.

    What a killed study left half done is counted as failed and done anew.

    Raises:
        ConfigError: nothing to do, or Ray is not installed.
    """
    if job.trials < 1 or job.together < 1 or workers < 1:
        raise ConfigError("trials, together and workers: expected 1 or more each.")
    Path(job.out).mkdir(parents=True, exist_ok=True)
    task = make_task(job.settings)
    study = open_study(job.out, task.best_metric)
    left = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL)
    broken = sum(trial.state == TrialState.FAIL and "error" not in trial.user_attrs for trial in study.trials)
    job = dataclasses.replace(
        job, trials=job.trials + broken, settings=dataclasses.replace(job.settings, overwrite=True)
    )
    jobs = [dataclasses.replace(job, number=number) for number in range(workers)]
    if ray_address is not None:
        _on_ray(ray_address, jobs)
    elif workers == 1:
        work(job, say)
    else:
        _in_processes(jobs)
    return open_study(job.out, task.best_metric)


def _in_processes(jobs: Sequence[Job]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise ConfigError(f"{len(codes)} of {len(processes)} workers stopped (exit code {codes[0]}); see above.")


def _on_ray(address: str, jobs: Sequence[Job]) -> None:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray. Run: pip install 'interleaf[ray]'") from error
    mine = not ray.is_initialized()
    ray.init(address=address, ignore_reinit_error=True)
    try:
        remote = ray.remote(_there)
        ray.get([remote.remote(os.getcwd(), job) for job in jobs])
    finally:
        if mine:
            ray.shutdown()


def _there(folder: str, job: Job) -> None:
    """Work in a folder that a worker of a cluster shares: paths of a config may be relative."""
    os.chdir(folder)
    work(job)


def told(trial: FrozenTrial) -> str:
    """Return a line on a trial."""
    what = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    values = trial.user_attrs.get("values")
    if values is None:
        return f"trial {trial.number}: failed: {trial.user_attrs.get('error', 'stopped')} ({what})"
    quality, parameters, slower = values
    stopped = ", stopped early" if trial.state == TrialState.PRUNED else ""
    return f"trial {trial.number}: {quality:.4f}, {parameters:,.0f} parameters, {slower:.2f} x base{stopped} ({what})"


def recommended(study: optuna.Study, tolerance: float) -> FrozenTrial:
    """Return, of the trials within the tolerance of the best quality, the one with the fewest parameters.

    Raises:
        ConfigError: no trial came to its end.
    """
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
        raise ConfigError(f"no trial came to its end{': ' + errors[0] if errors else ''}.")
    lower = study.directions[0] == optuna.study.StudyDirection.MINIMIZE
    best = min(t.values[0] for t in done) if lower else max(t.values[0] for t in done)
    near = [t for t in done if (t.values[0] <= best * (1 + tolerance) if lower else t.values[0] >= best - tolerance)]
    return min(near, key=lambda trial: (trial.values[1], trial.values[2]))


def as_config(trial: FrozenTrial, settings: TrainSettings) -> dict[str, Any]:
    """Return a trial's run as a config: what differs from the defaults."""
    ran = trial.user_attrs["settings"]
    usual = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
    kept = {key: value for key, value in ran.items() if value != usual.get(key) and value not in ({}, [], None)}
    return {**json.loads(json.dumps(kept)), "out": settings.out, "examples": settings.examples}
