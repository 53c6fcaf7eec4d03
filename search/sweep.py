"""The bridge's Optuna half: a study decides (ask, report, prune, tell); who runs the trials is not known here.

The study and the candidates on disk are the only state of a sweep. A trial that was interrupted, or waits at a rung
(--pruner promote, see promotion.py), stays RUNNING in the study and is handed out again under its own number, by this
process or the next that opens the study.
"""

import math
import time
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from upath import UPath

from ensemble.running import EnsembleSoFar
from search.budget import Budget, Goal, WeightStore
from search.costs import Costs
from search.study.objective import Contribution
from search.study.promotion import FACTOR, Rungs, rung_epochs
from search.study.proposals import Proposals, Suggest
from search.study.storage import flush
from search.study.values import Values
from search.timing import Timing
from trainables.config import TrialConfig
from trainables.job import DataSource, Job, Metrics, Outcome, Result, WeightSource
from trainables.run_directory import Candidate, list_candidates, read_candidate, remove_checkpoint, trial_id
from trainables.storage import StorageLost, exists, list_folder

SAVE_S = 60.0


class Sweep:
    """Hands out jobs, listens to their reports, and tells the study how each ended.

    Args:
        study: as of `open_study`.
        run: the run directory.
        data: what every job trains on.
        budget: when to end.
        weights: backbone -> where its pretrained weights lie, or None.
        suggest: makes the TrialConfig of an Optuna trial, see search.study.proposals.Suggest.
        costs: what trials take whose like has not been seen yet.
        promote: trials wait at rungs, see promotion.py; else the study's pruner stops them.
        live: the ensemble so far, which gets every candidate; needed by the budget's target, plateau and final seeds.
        contribution: values candidates by what they add to an ensemble; None: by their own score.
        store: deletes weights beyond the disk budget.
        save: puts the study where the next process finds it; called before a trial starts, after it has ended, and
            every SAVE_S seconds between.
        clock: time.time(), or a simulation's.

    `close` must be called when nothing is left to run.
    """

    def __init__(
        self, study: optuna.Study, run: UPath, data: DataSource, budget: Budget,
        weights: dict[str, WeightSource | None],
        suggest: Suggest, costs: Costs | None = None, promote: bool = False, live: EnsembleSoFar | None = None,
        contribution: Contribution | None = None, store: WeightStore | None = None,
        save: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.study, self.run, self.data, self.budget, self.weights = study, run, data, budget, weights
        self.live, self.contribution, self.store = live, contribution, store
        self.save, self.saved = save, clock()
        self.time, self.goal = Timing(study, budget, clock), Goal(budget, live)
        self.time.know(costs)
        self.rungs = Rungs() if promote else None
        self.values = Values(study, self.rungs, contribution)
        self.proposals = Proposals(study, self.time, live, self.values.retold, suggest)
        self.running: dict[str, Trial] = {}
        self.epochs: dict[str, int] = {}  # of every trial handed out
        self.stops: dict[str, tuple[int, ...]] = {}  # its epochs at which it may be stopped for its scores
        self.waiting: dict[str, Trial] = {}  # at a rung, with their checkpoints
        self.interrupted: list[Trial] = []
        self.retried: dict[str, int] = {}
        self.stopping = False
        self.counted = 0  # trials of the study that count towards the budget, running ones included
        self.tried: set[str] = set()  # trials that have ended, or reached a rung and wait
        self._resume()

    # what is left to do

    def has_more(self) -> bool:
        """Whether there is something to run, now or after a running trial's end, and time for it."""
        if self.time.left() <= 0 or self.enough():
            return False
        going_on = bool(self.interrupted) or bool(self.running) or self._promoted() is not None
        return going_on or self._wants_new()

    def enough(self) -> str | None:
        """Why the sweep has reached what it was to reach, or None."""
        return self.goal.reached(len(self.tried))

    def failures(self) -> list[tuple[str, str, str]]:
        """Trials that left no candidate through an error: id, what happened, and its traceback or ""."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            outcome, error = (trial.user_attrs.get(key) for key in ("outcome", "error"))
            # one that was killed while it was told, and then came to a better end, still has the error
            failed = outcome is not None and Outcome(outcome).is_failure and outcome != Outcome.INVALID
            if trial.state != TrialState.RUNNING and error is not None and failed:
                found.append((trial_id(trial.number), f"{outcome}: {error}", trial.user_attrs.get("traceback", "")))
        return found

    # a sweep is taken up where earlier processes left it

    def _resume(self) -> None:
        """Candidates never told of are told; trials cut in the middle or waiting at a rung are taken up."""
        done = {candidate.id: candidate for candidate in list_candidates(self.run)}
        for candidate in done.values():
            self._learn(candidate)
        for frozen in self.study.get_trials(deepcopy=False):
            id, attrs = trial_id(frozen.number), frozen.user_attrs
            self.proposals.note(frozen)
            if frozen.state == TrialState.RUNNING:
                trial = Trial(self.study, frozen._trial_id)
                self.retried[id] = int(attrs.get("retried", 0))
                if id in done:  # it died between writing the candidate and telling the study
                    trial.set_user_attr("outcome", done[id].info.outcome)
                    self._tell(trial, done[id])
                    self.counted += 1
                    self.tried.add(id)
                elif "config" in attrs:
                    self.counted += 1
                    if self._waits(id, frozen):
                        self.waiting[id] = trial
                        self.tried.add(id)
                    else:
                        self.interrupted.append(trial)
                else:  # it died before its configuration was known; one that had been enqueued is so again
                    if "fixed_params" in frozen.system_attrs:
                        self.study.enqueue_trial(frozen.system_attrs["fixed_params"], user_attrs=attrs)
                    self.study.tell(trial, state=TrialState.FAIL)
            elif attrs.get("outcome") not in (None, "invalid"):
                self.counted += 1
                self.tried.add(id)
                self.values.see(frozen)
                self._waits(id, frozen)
        attributes = [trial.user_attrs for trial in self.study.get_trials(deepcopy=False)]
        self.goal.restore([attrs["ensemble"] for attrs in attributes if "ensemble" in attrs])

    def _waits(self, id: str, frozen: FrozenTrial) -> bool:
        """Note the rungs that an earlier process saw the trial reach; whether it is RUNNING and waits at the last."""
        if self.rungs is None or id in self.proposals.seeds:
            return False
        scores = {epoch: self.values.score(value) for epoch, value in sorted(frozen.intermediate_values.items())}
        kind = frozen.user_attrs["config"]["backbone"] if scores else ""
        return self.rungs.replay(id, kind, _rungs(frozen), scores, frozen.state == TrialState.RUNNING)

    # the next job

    def next(self) -> Job | None:
        """The next job: an interrupted trial first, then one that is promoted, else a new one. None: nothing now."""
        if self.stopping or self.time.left() <= 0 or self.enough():
            return None
        if self.interrupted:
            trial = self.interrupted.pop(0)
        elif (waiting := self._promoted()) is not None and self.rungs is not None:
            self.rungs.go_on(waiting)
            trial = self.waiting.pop(waiting)
        elif self._wants_new() and (asked := self._ask()) is not None:
            trial = asked
            self.counted += 1
        else:
            return None
        id, config = trial_id(trial.number), TrialConfig.from_dict(trial.user_attrs["config"])
        self.running[id], self.epochs[id], self.stops[id] = trial, config.all_epochs, self._stops_at(id, config)
        self.time.begin(id)
        weights = self.weights.get(config.backbone) if config.pretrained else None
        left = self.time.left()
        deadline = None if left == math.inf else self.time.clock() + left
        self._save()
        return Job(id, config, str(self.run), self.data, weights, deadline=deadline, stops_at=self.stops[id])

    def _stops_at(self, id: str, config: TrialConfig) -> tuple[int, ...]:
        """Epochs at whose report the trial may be stopped for its scores.

        None where it is cross-fitted, because it has no scores before its end; none where it is a new seed of what has
        proved its worth; and no rung where the time left has no room for the others that the trial would be held
        against: it would only wait.
        """
        if id in self.proposals.seeds or (self.time.costs is not None and self.time.costs.trainings > 1):
            return ()
        if self.rungs is None:
            return tuple(range(1, config.all_epochs))
        has_room = self.time.room_for(config) >= FACTOR
        return rung_epochs(config.epochs, config.freeze_epochs) if has_room else ()

    def _wants_new(self) -> bool:
        return not self.proposals.out_of_time and (self.budget.trials is None or self.counted < self.budget.trials)

    def _promoted(self) -> str | None:
        """The waiting trial that goes on next, if any: by the rule, or because no new one can be finished in time."""
        if self.rungs is None:
            return None
        by_rule = self.rungs.promotable()
        left = self.time.left()
        if by_rule is not None or left == math.inf:
            return by_rule
        if self.proposals.out_of_time or self.time.too_short_for_a_trial():
            return next((id for id in self.rungs.ranked() if self._seconds_to_finish(id) < left), None)
        return None

    def _seconds_to_finish(self, id: str) -> float:
        frozen = self.study.get_trials(deepcopy=False)[self.waiting[id].number]
        config = TrialConfig.from_dict(frozen.user_attrs["config"])
        return self.time.to_finish(config, done=max(frozen.intermediate_values))

    def _ask(self) -> Trial | None:
        """A new trial, or None; in the last part of the budget a member of the ensemble again, with another seed."""
        share = self.budget.final_seeds
        if share and self._share_used() >= 1 - share:
            self.proposals.enqueue_seed()
        return self.proposals.ask()

    def _share_used(self) -> float:
        """How much of the budget is used, 0 to 1: of whichever limit is nearest."""
        return max(self.time.share_used(), self.counted / self.budget.trials if self.budget.trials else 0.0)

    # what trials tell

    def report(self, id: str, metrics: Metrics) -> bool:
        """An epoch's tune scores; True when the trial is to stop: for good, to wait at a rung, or with the sweep."""
        trial, epoch = self.running[id], int(metrics["epoch"])
        if self.values.metric not in metrics:  # of a cross-fitted candidate, before all of it can be scored
            return self.stopping or self.enough() is not None
        # a lane that was started again repeats epochs; the first report stands
        trial.report(float(metrics[self.values.metric]), epoch)
        if epoch >= self.epochs[id]:  # then it is a candidate, and stopping it saves nothing
            return False
        if self.stopping or self.enough():
            return True
        if epoch not in self.stops[id]:
            return False
        if self.rungs is None:
            pruned = trial.should_prune()
            flush(self.study)  # the rung that it has noted
            return pruned
        rung = self.rungs.at(epoch, _rungs(trial))
        if rung is None:
            return False
        score = self.values.score(metrics[self.values.metric])
        if self.rungs.reach(id, trial.user_attrs["config"]["backbone"], rung, score):
            return False
        self.waiting[id] = trial
        return True

    def finish(self, id: str, result: Result) -> str:
        """Every outcome of a trial, in one place. Called once for each job of `next`.

        Returns where the trial stands now: "waiting" at a rung, else the outcome.
        """
        trial, outcome = self.running.pop(id), result.outcome
        self.time.end(id)
        if id in self.waiting:  # also when it was cut or lost just there: the checkpoint is older than the report
            self.tried.add(id)
            self._save()
            return "waiting"
        if outcome is Outcome.STORAGE_LOST:  # there is nothing that could be continued
            self.interrupted.append(trial)
            raise StorageLost(result.error)
        if outcome.continues or self.retried.get(id, 0) < outcome.retries:
            # it stays RUNNING in the study, and its checkpoint stays on disk
            if not outcome.continues:
                self.retried[id] = self.retried.get(id, 0) + 1
                trial.set_user_attr("retried", self.retried[id])
            self.interrupted.append(trial)
            flush(self.study)
            return outcome
        self.tried.add(id)
        trial.set_user_attr("outcome", outcome.value)
        for key in ("error", "traceback", "seconds"):
            if getattr(result, key):
                trial.set_user_attr(key, getattr(result, key))
        if outcome.leaves_candidate:
            candidate = read_candidate(self.run / "candidates" / id)
            self._learn(candidate)
            self._extend_ensemble(trial, candidate)
            self._tell(trial, candidate)
        elif outcome is Outcome.PRUNED:
            self.values.see(self.study.tell(trial, state=TrialState.PRUNED))
        elif outcome.teaches:
            self.study.tell(trial, self.values.worst())
        else:  # a bug, a lost node that stayed lost, an invalid configuration found late
            self.study.tell(trial, state=TrialState.FAIL)
            self.counted -= outcome is Outcome.INVALID  # as if it had been refused at once
        if not outcome.leaves_candidate:
            remove_checkpoint(self.run, id)
        self._save()
        return outcome

    def _tell(self, trial: Trial, candidate: Candidate) -> None:
        """Tell the study of a candidate, and of epochs whose reports were lost with a process."""
        for row in candidate.info.curve:
            if self.values.metric in row:  # those that it has stand
                trial.report(float(row[self.values.metric]), int(row["epoch"]))
        self.values.see(self.study.tell(trial, self.values.of_candidate(candidate.id, candidate.info.metrics)))

    def _extend_ensemble(self, trial: Trial, candidate: Candidate) -> None:
        """Let the live ensemble see a new candidate, and keep its score with the trial: the curve outlives a kill."""
        if self.live is not None:
            self.live.add(candidate)
            trial.set_user_attr("ensemble", self.goal.note(len(self.tried)))
        if self.store is not None:
            self.store.trim(set(self.live.members) if self.live is not None else set())

    def close(self) -> None:
        """End a sweep that has nothing left to run: trials that still wait, or that time ran out for, are pruned."""
        for trial in [*self.waiting.values(), *self.interrupted]:
            trial.set_user_attr("outcome", "pruned")
            self.study.tell(trial, state=TrialState.PRUNED)
            remove_checkpoint(self.run, trial_id(trial.number))
        self.waiting, self.interrupted = {}, []
        self._save()

    def tick(self) -> None:
        """Called a few times a second while trials run."""
        self.time.save()
        if self.time.clock() - self.saved > SAVE_S:  # what was spent outlives the machine that this runs on
            self._save()

    def remove_stale_checkpoints(self) -> None:
        """Delete checkpoints of trials that have ended: one that was pruned may have written its last too late.

        What lies there under another name is not this sweep's, and stays.
        """
        ended = {trial_id(t.number) for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()}
        for path in list_folder(self.run / "checkpoints"):
            if path.name in ended:
                remove_checkpoint(self.run, path.name)

    def _save(self) -> None:
        self.saved = self.time.clock()
        flush(self.study)
        self.save()

    def _learn(self, candidate: Candidate) -> None:
        if self.contribution is not None and exists(candidate.path / "tune_probs.npy"):
            self.contribution.add(candidate.id, candidate.probs("tune"))
        if self.store is not None:
            self.store.add(candidate)
        self.time.learn(candidate)


def _rungs(trial: FrozenTrial | Trial) -> tuple[int, ...]:
    """The epochs of its rungs; none when it died before its configuration was known."""
    config = trial.user_attrs.get("config", {})
    return rung_epochs(config.get("epochs", 0), config.get("freeze_epochs", 0))
