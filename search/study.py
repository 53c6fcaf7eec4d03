"""The bridge's Optuna half: a study decides (ask, report, prune, tell); who runs the trials is not known here.

The study and the candidates on disk are the only state of a sweep. A trial that was interrupted, or waits at a rung
(--pruner promote, see promotion.py), stays RUNNING in the study and is handed out again under its own number, by this
process or the next that opens the study.
"""

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from upath import UPath

from search.config import Objective, Pruner, Sampler
from search.promotion import Rungs
from search.view import ViewSampler
from trainables.candidate import list_candidates, read_json, remove_checkpoint
from trainables.config import TrialConfig
from trainables.errors import UserError

CANDIDATE_OUTCOMES = ("finished", "time")  # the trial left a candidate
TEACHING_OUTCOMES = ("diverged", "out of memory")  # told to the sampler as the worst value seen
RETRIES = {"bug": 1, "lost node": 5}  # how often a trial is run again in one sweep
MOST_INVALID = 50  # proposals in a row that cannot be trained: the space is wrong, not unlucky
MOST_TOO_SLOW = 5  # proposals in a row that do not fit into the time left
SQLITE = "sqlite:///"  # and then a file's path
SECONDS_USED = "seconds_used"  # study attribute: time spent by earlier processes of this sweep


class Board(Protocol):
    """Who watches a sweep (search/live.py); nothing depends on what it does."""

    def started(self, id: str, config: TrialConfig) -> None: ...
    def epoch(self, id: str, metrics: dict[str, Any]) -> None: ...
    def ended(self, id: str, outcome: str, result: dict[str, Any]) -> None: ...
    def refresh(self) -> None: ...


def open_study(
    storage: str, name: str, objective: Objective, sampler: Sampler, pruner: Pruner, seed: int
) -> optuna.Study:
    """Create the study or load it. Raises UserError when the storage cannot be opened or has another objective."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="The reported value is ignored")  # see Sweep.report
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    direction = minimize if objective == "log_loss" else maximize
    try:
        _create_file(storage)
        study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=True,
            sampler=_sampler(sampler, seed), pruner=_pruner(pruner),
        )  # fmt: skip
    except Exception as error:  # SQLAlchemy's many, and a driver that is not installed
        raise UserError(
            f"the study cannot be opened in {storage}: {str(error).splitlines()[0]}; check --storage"
        ) from error
    # several processes may have asked since: a seed alone would make each of them propose the same again
    if study.get_trials(deepcopy=False):
        study.sampler.reseed_rng()
    kept = study.user_attrs.get("objective", objective)
    if kept != objective:
        raise UserError(f"this run's objective is {kept}, not {objective}; use --objective {kept} or another --run")
    study.set_user_attr("objective", objective)
    return study


def _create_file(storage: str) -> None:
    """Make the tables of a new SQLite file aside, and rename it.

    A kill between a table and its index would leave a file without the index that keeps study names unique: the next
    process adds the study, and the one after that adds it again, after which nobody can open it.
    """
    if not storage.startswith(SQLITE) or Path(storage.removeprefix(SQLITE)).exists():
        return
    path = Path(storage.removeprefix(SQLITE))
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    made = optuna.storages.RDBStorage(f"{SQLITE}{new}")
    made.engine.dispose()
    new.replace(path)


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    samplers = optuna.samplers
    if name == "tpe":  # constant liar: parallel trials do not all ask for the same point
        return samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=10, seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed)
    if name == "qmc":
        return samplers.QMCSampler(seed=seed, warn_independent_sampling=False)
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return samplers.NSGAIISampler(seed=seed) if name == "nsga2" else samplers.RandomSampler(seed=seed)


def _pruner(name: Pruner) -> optuna.pruners.BasePruner:
    pruners = optuna.pruners
    if name == "asha":
        # Rungs at 3, 6, 12, ... epochs, the better half goes on. The textbook's factor of 3 from the first epoch on
        # leaves hardly any candidate to choose an ensemble from.
        return pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=2)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    # "promote" is the sweep's own matter, see promotion.py
    return pruners.WilcoxonPruner() if name == "wilcoxon" else pruners.NopPruner()


class Sweep:
    """Hands out jobs, listens to their reports, and tells the study how each ended.

    Args:
        study: as of `open_study`.
        run: the run directory.
        job: what every job carries besides `id`, `config` and `weights` (see trainables.trial.run_trial).
        trials: how many there are to be in all, None for no limit.
        deadline: time.time() at which running trials finish with what they have, None for no limit.
        weights: backbone -> where its pretrained weights lie, as a dict, or None.
        board: who watches.
        promote: trials wait at rungs, see promotion.py; else the study's pruner stops them.

    `propose_with` must be called before the first `next`, and `close` when nothing is left to run.
    """

    def __init__(
        self, study: optuna.Study, run: UPath, job: dict[str, Any], trials: int | None, deadline: float | None,
        weights: dict[str, Any], board: Board, promote: bool = False,
    ) -> None:  # fmt: skip
        self.study, self.run, self.job, self.weights = study, run, job, weights
        self.suggest: Callable[[Trial], TrialConfig] | None = None
        self.trials, self.deadline, self.board = trials, deadline, board
        self.maximise = study.direction == optuna.study.StudyDirection.MAXIMIZE
        self.metric = "tune_accuracy" if self.maximise else "tune_log_loss"
        self.running: dict[str, Trial] = {}
        self.epochs: dict[str, int] = {}  # of every trial handed out
        self.rungs = Rungs() if promote else None
        self.waiting: dict[str, Trial] = {}  # at a rung, with their checkpoints
        self.retried: dict[str, int] = {}
        self.seconds_per_epoch: dict[tuple[str, str], float] = {}  # by what decides it, see _speed_key
        self._seconds_of_trials: list[float] = []  # that were trained to the end
        self.worst: float | None = None
        self.stopping = False
        self.out_of_time = False  # too little is left for even one epoch of the next trial
        self.interrupted: list[Trial] = []
        self.counted = 0  # trials of the study that count towards `trials`, running ones included
        self._started, self._saved = time.time(), time.time()
        self._used = float(study.user_attrs.get(SECONDS_USED, 0.0))
        study.sampler = ViewSampler(study.sampler, study, self._retold)
        self._resume()

    def propose_with(self, suggest: Callable[[Trial], TrialConfig]) -> None:
        """Who proposes a TrialConfig for an Optuna trial; a UserError from it marks the proposal as invalid."""
        self.suggest = suggest

    def has_more(self) -> bool:
        """Whether there is something to run, now or after a running trial's end, and time for it."""
        wanted = not self.out_of_time and (self.trials is None or self.counted < self.trials)
        going_on = bool(self.interrupted) or bool(self.running) or self._promoted() is not None
        return self._time_left() > 0 and (wanted or going_on)

    def failures(self) -> list[tuple[str, str]]:
        """Trials that left no candidate through an error, with what happened."""
        told = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.RUNNING]
        return [
            (_id(t.number), f"{t.user_attrs['outcome']}: {t.user_attrs['error']}")
            for t in told
            if "error" in t.user_attrs and t.user_attrs.get("outcome") != "invalid"
        ]

    def _resume(self) -> None:
        """Take up what earlier processes left: candidates never told of, and trials cut in the middle."""
        done = {candidate.id: candidate for candidate in list_candidates(self.run)}
        for candidate in done.values():
            self._learn_speed(candidate.info)
        for frozen in self.study.get_trials(deepcopy=False):
            id = _id(frozen.number)
            if frozen.state == TrialState.RUNNING:
                trial = Trial(self.study, frozen._trial_id)
                if id in done:  # it died between writing the candidate and telling the study
                    trial.set_user_attr("outcome", done[id].info.get("outcome", "finished"))
                    self._see(self.study.tell(trial, self._value(done[id].info["metrics"])))
                    self.counted += 1
                elif "config" in frozen.user_attrs:
                    self.counted += 1
                    if self._waits(id, frozen):
                        self.waiting[id] = trial
                    else:
                        self.interrupted.append(trial)
                else:  # it died before its configuration was known
                    self.study.tell(trial, state=TrialState.FAIL)
            elif frozen.user_attrs.get("outcome") not in (None, "invalid"):
                self.counted += 1
                self._see(frozen)
                self._waits(id, frozen)

    def _waits(self, id: str, frozen: FrozenTrial) -> bool:
        """Note the rungs that an earlier process saw the trial reach; whether it is RUNNING and waits at the last."""
        epochs, reports = _epochs(frozen), frozen.intermediate_values
        if self.rungs is None or not reports:
            return False
        going_on = True
        for epoch in sorted(reports):
            rung = self.rungs.at(epoch, epochs)
            if rung is not None:
                going_on = self.rungs.reach(id, rung, self._score(reports[epoch]))
                is_last = frozen.state == TrialState.RUNNING and epoch == max(reports)
                if not going_on and not is_last:  # it was promoted, or has ended
                    self.rungs.go_on(id)
                    going_on = True
        return not going_on

    def next(self) -> dict[str, Any] | None:
        """The next job: an interrupted trial first, then one that is promoted, else a new one. None: nothing now."""
        if self.stopping or self._time_left() <= 0:
            return None
        waiting = self._promoted()
        if self.interrupted:
            trial = self.interrupted.pop(0)
            config = TrialConfig.from_dict(trial.user_attrs["config"])
        elif waiting is not None and self.rungs is not None:
            self.rungs.go_on(waiting)
            trial = self.waiting.pop(waiting)
            config = TrialConfig.from_dict(trial.user_attrs["config"])
        elif self.out_of_time:
            return None
        elif self.trials is None or self.counted < self.trials:
            found = self._ask()
            if found is None:
                return None
            trial, config = found
            self.counted += 1
        else:
            return None
        id = _id(trial.number)
        self.running[id], self.epochs[id] = trial, config.epochs
        self.board.started(id, config)
        weights = self.weights.get(config.backbone) if config.pretrained else None
        return {**self.job, "id": id, "config": config.to_dict(), "weights": weights, "deadline": self.deadline}

    def _promoted(self) -> str | None:
        """The waiting trial that goes on next, if any: by the rule, or because no new one can be finished in time."""
        if self.rungs is None:
            return None
        by_rule = self.rungs.promotable()
        if by_rule is not None or self.deadline is None:
            return by_rule
        left = self._time_left()
        needs = {id: self._seconds_to_finish(id) for id in self.rungs.ranked()}
        if self.out_of_time or (self._seconds_of_trials and left < statistics.median(self._seconds_of_trials)):
            return next((id for id, seconds in needs.items() if seconds < left), None)
        return None

    def _seconds_to_finish(self, id: str) -> float:
        frozen = self.study._storage.get_trial(self.waiting[id]._trial_id)
        done = max(frozen.intermediate_values)
        return self._seconds_per_epoch(frozen.user_attrs["config"]) * (_epochs(frozen) - done)

    def _ask(self) -> tuple[Trial, TrialConfig] | None:
        assert self.suggest is not None, "propose_with() was not called"
        reason, too_slow = "", 0
        for _ in range(MOST_INVALID):
            trial = self.study.ask()
            try:
                config = self.suggest(trial)
            except UserError as error:
                trial.set_user_attr("outcome", "invalid")
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
                reason = str(error)
                continue
            shortened = self._fit(config)
            if shortened is None:
                self.study.tell(trial, state=TrialState.FAIL)
                too_slow += 1
                if too_slow == MOST_TOO_SLOW:
                    self.out_of_time = True
                    return None
                continue
            trial.set_user_attr("config", shortened.to_dict())
            return trial, shortened
        raise UserError(
            f"{MOST_INVALID} proposals in a row cannot be trained, the last because {reason}; mend the space"
        )

    def _fit(self, config: TrialConfig) -> TrialConfig | None:
        """The config with as many epochs as the time left allows (its schedule then still ends at zero), or None."""
        speed = self._seconds_per_epoch(config.to_dict())
        if self.deadline is None or not speed:
            return config
        epochs = min(config.epochs, int(self._time_left() / speed))
        if epochs < 1:
            return None
        values = config.to_dict()
        return TrialConfig.from_dict({**values, "epochs": epochs, "freeze_epochs": min(config.freeze_epochs, epochs)})

    def _seconds_per_epoch(self, config: dict[str, Any]) -> float:
        """As measured, else of the slowest trial of its family so far; 0 when none is known."""
        family, exact = _speed_key(config)
        known = [speed for key, speed in self.seconds_per_epoch.items() if key[0] == family]
        return self.seconds_per_epoch.get((family, exact), max(known, default=0.0))

    def report(self, id: str, metrics: dict[str, Any]) -> bool:
        """An epoch's tune scores; True when the trial is to stop: for good, or to wait at a rung."""
        trial, epoch = self.running[id], int(metrics["epoch"])
        self.board.epoch(id, metrics)
        # a lane that was started again repeats epochs; the first report stands
        trial.report(float(metrics[self.metric]), epoch)
        if epoch >= self.epochs[id]:  # then it is a candidate, and stopping it saves nothing
            return False
        if self.rungs is None:
            return trial.should_prune()
        rung = self.rungs.at(epoch, self.epochs[id])
        if rung is None or self.rungs.reach(id, rung, self._score(metrics[self.metric])):
            return False
        self.waiting[id] = trial
        return True

    def finish(self, id: str, result: dict[str, Any]) -> None:
        """Every outcome of a trial, in one place. Called once for each job of `next`."""
        trial = self.running.pop(id)
        outcome = str(result["outcome"])
        if id in self.waiting:  # also when it was cut or lost just there: the checkpoint is older than the report
            self.board.ended(id, "waiting", result)
            return
        if outcome == "interrupted" or (outcome in RETRIES and self.retried.get(id, 0) < RETRIES[outcome]):
            # it stays RUNNING in the study, and its checkpoint stays on disk
            self.retried[id] = self.retried.get(id, 0) + (outcome != "interrupted")
            self.interrupted.append(trial)
            self.board.ended(id, outcome, result)
            return
        trial.set_user_attr("outcome", outcome)
        for key in ("error", "traceback", "seconds"):
            if result.get(key) is not None:
                trial.set_user_attr(key, result[key])
        if outcome in CANDIDATE_OUTCOMES:
            info = read_json(self.run / "candidates" / id / "candidate.json")
            self._learn_speed(info)
            self._see(self.study.tell(trial, self._value(result)))
        elif outcome == "pruned":
            self._see(self.study.tell(trial, state=TrialState.PRUNED))
        elif outcome in TEACHING_OUTCOMES:
            self.study.tell(trial, self._worst_value())
        else:  # a bug, a lost node that stayed lost, an invalid configuration found late
            self.study.tell(trial, state=TrialState.FAIL)
            self.counted -= outcome == "invalid"  # as if it had been refused at once
        if outcome not in CANDIDATE_OUTCOMES:
            remove_checkpoint(self.run, id)
        self.board.ended(id, outcome, result)

    def close(self) -> None:
        """End a sweep that has nothing left to run: trials that still wait, or that time ran out for, are pruned."""
        for trial in [*self.waiting.values(), *self.interrupted]:
            trial.set_user_attr("outcome", "pruned")
            self.study.tell(trial, state=TrialState.PRUNED)
            remove_checkpoint(self.run, _id(trial.number))
        self.waiting, self.interrupted = {}, []

    def tick(self) -> None:
        """Called a few times a second while trials run."""
        now = time.time()
        if now - self._saved > 5:
            self._saved = now
            self.study.set_user_attr(SECONDS_USED, self._used + now - self._started)
        self.board.refresh()

    def remove_stale_checkpoints(self) -> None:
        """Forget checkpoints of trials that have ended: one that was pruned may have written its last too late."""
        going_on = {_id(t.number) for t in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])}
        folder = self.run / "checkpoints"
        for path in folder.iterdir() if folder.exists() else ():
            if path.name not in going_on:
                remove_checkpoint(self.run, path.name)

    def _retold(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The study as samplers shall see it: see view.py."""
        return [self._as_pruned(trial) if self.rungs is not None else trial for trial in trials]

    def _as_pruned(self, trial: FrozenTrial) -> FrozenTrial:
        """A trial that has reached a rung and no end: as pruned there, the upper rung counting for more."""
        if trial.state == TrialState.COMPLETE or self.rungs is None:
            return trial
        reached = [rung for rung, scores in self.rungs.scores.items() if _id(trial.number) in scores]
        if not reached:
            return trial
        score = self.rungs.scores[min(reached)][_id(trial.number)]
        told = copy.copy(trial)
        told.state, told.intermediate_values = TrialState.PRUNED, {-min(reached): self._score(score)}
        return told

    def _score(self, value: float) -> float:
        """The study's value as one to be maximised; and back."""
        return float(value) if self.maximise else -float(value)

    def _time_left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.time()

    def _value(self, metrics: dict[str, Any]) -> float:
        return float(metrics[self.metric])

    def _see(self, frozen: FrozenTrial) -> None:
        if frozen.value is not None:
            worse = min if self.maximise else max
            self.worst = frozen.value if self.worst is None else worse(self.worst, frozen.value)

    def _worst_value(self) -> float:
        """What a failure counts as: the worst seen so far, or no better than guessing."""
        if self.worst is not None:
            return self.worst
        return 0.0 if self.maximise else 10.0

    def _learn_speed(self, info: dict[str, Any]) -> None:
        """Median seconds of an epoch: the first may have computed what later trials find cached."""
        ends = [float(row["seconds"]) for row in info.get("curve") or [] if "seconds" in row]
        if ends and "config" in info:
            epochs = [after - before for before, after in pairwise([0.0, *ends])]
            self.seconds_per_epoch[_speed_key(info["config"])] = statistics.median(epochs)
            self._seconds_of_trials.append(ends[-1])


def _epochs(trial: FrozenTrial) -> int:
    """How many epochs its configuration asks for; 0 when it died before that was known."""
    return int(trial.user_attrs.get("config", {}).get("epochs", 0))


def _id(number: int) -> str:
    return f"{number:04d}"


def _speed_key(config: dict[str, Any]) -> tuple[str, str]:
    """What an epoch's seconds depend on: much (the first part), and a little (the second)."""
    frozen = config["freeze_epochs"] >= config["epochs"]
    return f"{config['backbone']} {frozen}", f"{config['image_size']} {config['width']:.2f} {config['stem']}"
