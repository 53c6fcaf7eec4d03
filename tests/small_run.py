"""A real run without Ray: a few tiny nets trained in this process, their study, and the ensemble."""

from pathlib import Path

import numpy as np
import optuna
from upath import UPath

from ensemble.file import Ensemble, write_ensemble
from ensemble.select import Select, choose
from search import run as search_run
from search.config import SearchConfig
from search.plan import make_plan
from search.study.open import open_study
from tests.errand import Hear
from trainables.config import TrialConfig
from trainables.job import DataSource, Job
from trainables.run_directory import list_candidates
from trainables.storage import write_array
from trainables.trial import run_trial


def train_run(path: Path, data_dir: Path, trials: int = 3, epochs: int = 4) -> tuple[UPath, Ensemble]:
    """A run directory as `search.run` leaves it, of `trials` candidates, a pruned trial and two that failed."""
    config = SearchConfig(data="folder", data_dir=data_dir, space="auto", backbones=("speednet",), run=str(path))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    study = open_study(f"sqlite:///{path}/study.db", plan.study, "accuracy", "tpe", "none", 0)
    source = DataSource(str(plan.data.path), "folder", str(data_dir))
    for number in range(trials):
        trial = study.ask()
        config = TrialConfig(
            backbone="speednet", width=0.25, image_size=16, epochs=epochs, batch_size=8, weight_decay=0.0,
            lr=trial.suggest_float("lr", 3e-3, 3e-2, log=True), seed=number, precision="fp32",
        )  # fmt: skip
        trial.set_user_attr("config", config.to_dict())

        def report(metrics: dict, trial: optuna.Trial = trial) -> bool:
            if "tune_accuracy" in metrics:
                trial.report(metrics["tune_accuracy"], metrics["epoch"])
            return False

        result = run_trial(Job(f"{trial.number:04d}", config, str(plan.run), source), Hear(report))
        trial.set_user_attr("outcome", result.outcome.value)
        study.tell(trial, result.metrics["tune_accuracy"])
    _failed(study, "diverged", "loss is nan in epoch 1, step 3")
    _failed(study, "bug", "ValueError: <script>alert(1)</script>", traceback="Traceback ...\n  in <module>")
    pruned = study.ask()
    pruned.suggest_float("lr", 3e-3, 3e-2, log=True)
    pruned.set_user_attr("config", config.to_dict())
    pruned.set_user_attr("outcome", "pruned")
    pruned.report(0.4, 1)
    study.tell(pruned, state=optuna.trial.TrialState.PRUNED)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)  # proposed when too little time was left
    ensemble = choose(Select(run=(str(plan.run),), selector="greedy"))
    write_ensemble(plan.run, ensemble)
    return plan.run, ensemble


def _failed(study: optuna.Study, outcome: str, error: str, traceback: str = "") -> None:
    trial = study.ask()
    trial.suggest_float("lr", 3e-3, 3e-2, log=True)
    trial.set_user_attr("outcome", outcome)
    trial.set_user_attr("error", error)
    trial.set_user_attr("traceback", traceback)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


def doubt_first(run: UPath) -> None:
    """Let every candidate give the first image of the tune and select splits to another class than it did."""
    for candidate in list_candidates(run):
        for split in ("tune", "select"):
            probs = np.array(candidate.probs(split))
            probs[0] = np.roll(probs[0], 1)
            write_array(candidate.path / f"{split}_probs.npy", probs)
