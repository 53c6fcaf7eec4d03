"""Searches replayed on recorded learning curves: the deciding parts are real, training is looked up, time is virtual.

Every method below is the library's own object asked and told as the library's own loop would do it. A device takes as
long over an epoch as the recording did; whatever deciding costs is not counted.
"""

import contextlib
import heapq
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
from upath import UPath

from benchmarks.recorded.curves import EPOCHS, GRID, POINTS, Curves, config_of
from search.budget import Budget
from search.config import Objective, Pruner
from search.study.objective import Contribution
from search.sweep import Sweep
from trainables.job import DataSource, Outcome, Result
from trainables.run.records import Records
from trainables.run_directory import CandidateInfo, write_candidate

ORDERED = ("lr",)  # levels that a sampler may take for a scale; the others are categories


class Method(Protocol):
    """A search: what it decides, and what it hears."""

    def next(self, now: float) -> tuple[str, int, int] | None:
        """The next trial to train: its name, index of its point, epochs that it has already had. None: nothing now."""

    def report(self, name: str, epoch: int, loss: float) -> bool:
        """An epoch's tune log-loss; True stops the trial."""

    def end(self, name: str, index: int, outcome: str) -> None:
        """It has "finished", "stopped" as `report` said, or "diverged"."""


def replay(method: Method, curves: Curves, devices: int) -> Iterator[tuple[float, int]]:
    """(device-seconds, index of the point) of every trial that is trained to its end, in that order; endless.

    Device-seconds count all devices from the start, idle or not.
    """
    order = itertools.count()  # simultaneous events stay in the order in which they came about
    events: list[tuple[float, int, str, int, int]] = []
    now, idle = 0.0, devices
    while True:
        while idle and (job := method.next(now)) is not None:
            name, index, done = job
            heapq.heappush(events, (now + curves.seconds[index, done], next(order), name, index, done + 1))
            idle -= 1
        if not events:
            return
        now, _, name, index, epoch = heapq.heappop(events)
        loss = float(curves.log_loss[index, epoch - 1])
        stop = np.isfinite(loss) and method.report(name, epoch, loss)
        if np.isfinite(loss) and epoch < EPOCHS and not stop:
            heapq.heappush(events, (now + curves.seconds[index, epoch], next(order), name, index, epoch + 1))
            continue
        idle += 1
        if not np.isfinite(loss):
            method.end(name, index, "diverged")
        elif epoch == EPOCHS:
            method.end(name, index, "finished")
            yield now * devices, index
        else:
            method.end(name, index, "stopped")


def suggest(trial: Any) -> tuple[int, ...]:
    """A point of the grid; the same for every method."""
    return tuple(
        trial.suggest_int(name, 0, len(levels) - 1)
        if name in ORDERED
        else trial.suggest_categorical(name, list(range(len(levels))))
        for name, levels in GRID.items()
    )


class Ours:
    """search.sweep.Sweep as `python -m search.run` makes it, with an unlimited budget and a clock of its own."""

    def __init__(self, curves: Curves, seed: int, pruner: Pruner, objective: Objective = "log_loss") -> None:
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = tempfile.TemporaryDirectory(prefix="replay-", dir=folder)
        self.curves, self.now = curves, 0.0
        self.done: dict[str, int] = {}
        self.index: dict[str, int] = {}
        labels = np.zeros(curves.true_probs["tune"].shape[1], int)  # two classes will do: the true one, and the rest
        run = UPath(self.folder.name)
        self.sweep = Sweep(
            Records(run), run, DataSource("", "curves"), Budget(), {}, lambda trial, left: config_of(suggest(trial)),
            "tpe", seed, objective, pruner,
            contribution=Contribution(labels, 9) if objective == "ensemble" else None, clock=lambda: self.now,
        )  # fmt: skip

    def next(self, now: float) -> tuple[str, int, int] | None:
        self.now = now
        job = self.sweep.next()
        if job is None:
            return None
        self.index[job.id] = job.config.seed  # config_of gives each point its own
        return job.id, self.index[job.id], self.done.get(job.id, 0)

    def report(self, name: str, epoch: int, loss: float) -> bool:
        self.done[name] = epoch
        accuracy = float(self.curves.accuracy[self.index[name], epoch - 1])
        return self.sweep.report(name, {"epoch": epoch, "tune_log_loss": loss, "tune_accuracy": accuracy})

    def end(self, name: str, index: int, outcome: str) -> None:
        if outcome != "finished":
            how = Outcome.PRUNED if outcome == "stopped" else Outcome(outcome)
            self.sweep.finish(name, Result(how, error=outcome))
            return
        metrics = {
            "tune_log_loss": float(self.curves.log_loss[index, -1]),
            "tune_accuracy": float(self.curves.accuracy[index, -1]),
        }
        true = self.curves.true_probs["tune"][index]
        probs = np.stack([true, 1 - true], axis=1)
        info = CandidateInfo(name, self.sweep.records[name].config, metrics=metrics, outcome="finished")
        write_candidate(self.sweep.run, info, probs[:1], probs)
        self.sweep.finish(name, Result(Outcome.FINISHED, metrics))


class RandomSearch:
    """Every configuration as likely as the next, each trained to its end."""

    def __init__(self, curves: Curves, seed: int) -> None:
        self.random, self.names = np.random.default_rng(seed), itertools.count()

    def next(self, now: float) -> tuple[str, int, int] | None:
        return str(next(self.names)), int(self.random.integers(len(POINTS))), 0

    def report(self, name: str, epoch: int, loss: float) -> bool:
        return False

    def end(self, name: str, index: int, outcome: str) -> None:
        pass


class Optuna:
    """Optuna's pairing with its own defaults: TPESampler and SuccessiveHalvingPruner, as Study.optimize uses them."""

    def __init__(self, curves: Curves, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler, pruner = optuna.samplers.TPESampler(seed=seed), optuna.pruners.SuccessiveHalvingPruner()
        self.study = optuna.create_study(sampler=sampler, pruner=pruner)
        self.trials: dict[str, optuna.Trial] = {}
        self.losses: dict[str, float] = {}

    def next(self, now: float) -> tuple[str, int, int] | None:
        trial = self.study.ask()
        self.trials[str(trial.number)] = trial
        return str(trial.number), POINTS.index(suggest(trial)), 0

    def report(self, name: str, epoch: int, loss: float) -> bool:
        self.losses[name] = loss
        self.trials[name].report(loss, epoch)
        return self.trials[name].should_prune()

    def end(self, name: str, index: int, outcome: str) -> None:
        states = optuna.trial.TrialState
        if outcome == "finished":
            self.study.tell(self.trials[name], self.losses[name])
        else:
            self.study.tell(self.trials[name], state=states.PRUNED if outcome == "stopped" else states.FAIL)


class RayTune:
    """Ray's OptunaSearch and ASHAScheduler, the real objects, called as Ray's TuneController calls them.

    ASHA's longest trial is EPOCHS, as its documentation asks for; the rest are defaults (grace period 1, factor 4). The
    controller hands a result to the scheduler first, and to the searcher on_trial_result when the trial goes on,
    on_trial_complete when it does not (TuneController._process_trial_result, Ray 2.60).
    """

    def __init__(self, curves: Curves, seed: int) -> None:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        np.random.seed(seed)
        self.search = OptunaSearch(space=_define_by_run, metric="loss", mode="min", seed=seed)
        self.scheduler = ASHAScheduler(metric="loss", mode="min", max_t=EPOCHS)
        self.names = itertools.count()
        self.last: dict[str, dict[str, Any]] = {}

    def next(self, now: float) -> tuple[str, int, int] | None:
        name = str(next(self.names))
        with contextlib.redirect_stderr(None):
            config = self.search.suggest(name)
        assert config is not None
        self.scheduler.on_trial_add(None, _trial(name))  # type: ignore[arg-type]
        return name, POINTS.index(tuple(config[part] for part in GRID)), 0

    def report(self, name: str, epoch: int, loss: float) -> bool:
        self.last[name] = {"loss": loss, "training_iteration": epoch}
        action = self.scheduler.on_trial_result(None, _trial(name), self.last[name])  # type: ignore[arg-type]
        if action == self.scheduler.CONTINUE:
            self.search.on_trial_result(name, self.last[name])
        return action == self.scheduler.STOP

    def end(self, name: str, index: int, outcome: str) -> None:
        if outcome == "diverged":
            self.scheduler.on_trial_error(None, _trial(name))  # type: ignore[arg-type]
            self.search.on_trial_complete(name, error=True)
        else:
            self.search.on_trial_complete(name, result=self.last[name])


def _define_by_run(trial: Any) -> None:
    suggest(trial)


def _trial(name: str) -> SimpleNamespace:
    """What a scheduler looks at in a Tune trial."""
    return SimpleNamespace(trial_id=name)
