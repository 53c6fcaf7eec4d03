"""A sweep driven by hand, as lanes would, without Ray."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from upath import UPath

from ensemble.running import EnsembleSoFar
from search.budget import Budget, WeightStore, parse_keep
from search.study.mirror import open_mirror
from search.study.objective import Contribution
from search.study.proposals import Suggest
from search.sweep import Sweep
from search.track.tracker import Tracker
from search.track.tracking import Tracking
from trainables.config import TrialConfig
from trainables.job import DataSource, Job, Outcome, Result
from trainables.run.records import Records
from trainables.run_directory import CandidateInfo, write_candidate
from trainables.storage import write_array, write_json


def suggest(trial: optuna.Trial, left: float = math.inf) -> TrialConfig:
    return TrialConfig(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True), epochs=6, seed=trial.number)


LABELS = np.array([0, 1, 0, 1])  # of the tune and of the select split


def sweep(
    run: Path, trials: int | None = 4, deadline: float | None = None, keep: str = "", suggest: Suggest = suggest,
    storage: str | None = None, name: str = "test", trackers: Sequence[Tracker] = (), **options: Any,
) -> Sweep:  # fmt: skip
    """A sweep with its live ensemble; options are the sweep's or those of the budget."""
    asked = {
        "objective": "accuracy",
        "sampler": "random",
        "pruner": "none",
        "seed": 0,
        "warm": (),
        "workers": 1,
    } | options
    own = {name: asked.pop(name) for name in ("objective", "sampler", "pruner", "seed", "warm", "workers")}
    if not (run / "run.json").exists():
        write_array(UPath(run / "select_labels.npy"), LABELS)
        write_json(UPath(run / "run.json"), {"classes": ["a", "b"], "split_fingerprint": "f"})
    records = Records(UPath(run))
    tracking = Tracking(trackers, UPath(run), records, "tune_accuracy")
    return Sweep(
        records, UPath(run), DataSource("/nowhere/x-0123456789abcdef", "folder"), Budget(trials, deadline, **asked),
        {}, suggest, **own, live=EnsembleSoFar(UPath(run), 2),
        contribution=Contribution(LABELS, 2) if own["objective"] == "ensemble" else None,
        store=WeightStore(UPath(run), parse_keep(keep)) if keep else None,
        mirror=open_mirror(UPath(run), storage, name, own["objective"] == "accuracy", records), tracking=tracking,
    )  # fmt: skip


def scores(accuracy: float, epoch: int = 1) -> dict[str, Any]:
    return {"epoch": epoch, "tune_accuracy": accuracy, "tune_log_loss": 1 - accuracy}


def finish(s: Sweep, job: Job, accuracy: float = 0.5, seconds: float = 6.0, true: Sequence[float] = (0.5,) * 4) -> None:
    """As a lane would: the candidate on disk first, then the result. `true`: probabilities of the true classes."""
    metrics = {"tune_accuracy": accuracy, "tune_log_loss": 1 - accuracy, "select_log_loss": 1 - accuracy}
    epochs = job.config.epochs
    curve = [{"epoch": e + 1, "seconds": seconds * (e + 1) / epochs} for e in range(epochs)]
    info = CandidateInfo(
        job.id, job.config, metrics, tuple(curve), "finished", seconds=seconds,
        split_fingerprint="f",
    )  # fmt: skip
    probs = np.where(np.arange(2) == LABELS[:, None], np.array(true)[:, None], 1 - np.array(true)[:, None])
    write_candidate(s.run, info, probs, probs, b"weights")
    s.finish(job.id, Result(Outcome.FINISHED, metrics, seconds))


def states(s: Sweep) -> list[str]:
    """Of every trial: its outcome, or where it stands."""
    return [str(record.outcome or record.stage) for record in s.records]


def told(s: Sweep) -> list[FrozenTrial]:
    """The trials as the sampler sees them."""
    return s.values.told(s.records)


def take(s: Sweep) -> Job:
    job = s.next()
    assert job is not None
    return job


def climb(s: Sweep, job: Job, accuracy: float, first: int = 1) -> int:
    """Report epochs until the trial is to stop, or has finished; returns the last epoch."""
    for epoch in range(first, job.config.epochs + 1):
        if s.report(job.id, scores(accuracy, epoch)):
            s.finish(job.id, Result(Outcome.PRUNED))
            return epoch
    finish(s, job, accuracy)
    return job.config.epochs
