"""What a sweep does next, and what becomes of its trials; who runs them is not known here.

The trials' records and the candidates on disk are the only state of a sweep (see trainables/run/records.py). A trial
that was interrupted, or waits at a rung (--pruner promote, see promotion.py), is handed out again under its own number,
by this process or the next.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial
from upath import UPath

from ensemble.running import EnsembleSoFar
from search.budget import Budget, Goal, WeightStore
from search.config import Pruner, Sampler
from search.costs import Costs
from search.study.mirror import Mirror
from search.study.objective import Contribution, OwnScores, Valued
from search.study.promotion import FACTOR, Rungs, rung_epochs
from search.study.proposals import Proposals, Suggest
from search.study.pruning import Pruning
from search.study.sampling import Sampling
from search.study.values import Values
from search.timing import Timing
from search.track.tracking import Tracking
from trainables.config import TrialConfig
from trainables.job import DataSource, Job, Metrics, Outcome, Result, WeightSource
from trainables.run.records import Records, Stage, TrialRecord
from trainables.run_directory import (
    Candidate,
    find_candidates,
    read_candidate,
    remove_checkpoint,
)
from trainables.storage import StorageLost, exists, list_folder

SAVE_S = 5.0
KEPT = 9  # trials that wait when a sweep ends and keep their checkpoints, for one that goes on with a larger budget


class Sweep:
    """Hands out jobs, listens to their reports, and records how each ended.

    Args:
        records: of the run.
        run: the run directory.
        data: what every job trains on.
        budget: when to end.
        weights: backbone -> where its pretrained weights lie, or None.
        suggest: makes the TrialConfig of an Optuna trial, see search.study.proposals.Suggest.
        sampler, seed, objective: how parameters are proposed, and what for.
        pruner: who stops trials; "promote": nobody, but they wait at rungs, see promotion.py.
        warm: trials of earlier sweeps that the sampler learns from.
        costs: what trials take whose like has not been seen yet.
        live: the ensemble so far, which gets every candidate; needed by the budget's target, plateau and final seeds.
        contribution: values candidates by what they add to an ensemble, or by a metric; None: by their own score.
        store: deletes weights beyond the disk budget.
        mirror: shows the trials to Optuna's tools.
        tracking: shows them to experiment trackers; whoever made it closes it.
        workers: of a trial.
        clock: time.time(), or a simulation's.

    `close` must be called when nothing is left to run.
    """

    def __init__(
        self, records: Records, run: UPath, data: DataSource, budget: Budget,
        weights: dict[str, WeightSource | None], suggest: Suggest,
        sampler: Sampler = "tpe", seed: int = 0, objective: Valued = "accuracy", pruner: Pruner = "promote",
        warm: Iterable[FrozenTrial] = (), costs: Costs | None = None, live: EnsembleSoFar | None = None,
        contribution: Contribution | OwnScores | None = None, store: WeightStore | None = None,
        mirror: Mirror | None = None, tracking: Tracking | None = None, workers: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.records, self.run, self.data, self.budget, self.weights = records, run, data, budget, weights
        self.live, self.contribution, self.store = live, contribution, store
        self.mirror, self.tracking, self.workers = mirror, tracking, workers
        self.time, self.goal = Timing(records.spent, budget, clock), Goal(budget, live)
        self.time.know(costs)
        self.saved = clock()
        self.rungs = Rungs() if pruner == "promote" else None
        self.values = Values(objective, self.rungs, contribution, warm)
        self.pruning = None if pruner in ("promote", "none") else Pruning(pruner, self.values.maximise)
        sampling = Sampling(sampler, self.values.maximise, seed, told=lambda: self.values.told(records))
        self.proposals = Proposals(records, sampling, self.time, live, suggest)
        self.running: dict[str, tuple[int, ...]] = {}  # and the epochs at which each may be stopped for its scores
        self.interrupted: list[str] = []  # to be handed out again
        self.arrived: set[str] = set()  # running trials that are to wait at the rung that they have reached
        self.stopping = False
        self.counted = 0  # trials that count towards the budget, running ones included
        self.tried: set[str] = set()  # trials that have ended, or reached a rung and waited
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

    def waiting(self) -> list[str]:
        """Trials that wait at a rung, the most promising first."""
        return self.rungs.ranked() if self.rungs is not None else []

    def failures(self) -> list[TrialRecord]:
        """Trials that left no candidate through an error."""
        return [r for r in self.records if r.outcome is not None and r.outcome.is_failure and r.counts]

    # a sweep is taken up where earlier processes left it

    def _resume(self) -> None:
        """Candidates never heard of are recorded; trials cut in the middle or waiting at a rung are taken up."""
        candidates, damaged = find_candidates(self.run)
        done = {candidate.id: candidate for candidate in candidates}
        for id in [*done, *damaged]:  # a name that some other tool has taken is no trial's
            if id.isdigit() and id not in self.records:
                self.records.next_number = max(self.records.next_number, int(id) + 1)
        for candidate in candidates:
            self._learn(candidate)
        for record in self.records:
            self.counted += record.counts
            if record.outcome is None and record.id in done:  # killed between candidate and record
                record = self._end_with_candidate(record, done[record.id])
            if record.outcome is None:
                if self._waits(record):
                    self.tried.add(record.id)
                    self.values.see(record)
                else:
                    self.interrupted.append(record.id)
            elif record.counts:
                self.tried.add(record.id)
                self.values.see(record)
                self._waits(record)
            if self.pruning is not None and record.scores:
                self.pruning.replay(record)
        self.goal.restore([record.ensemble for record in self.records if record.ensemble])

    def _waits(self, record: TrialRecord) -> bool:
        """Note the rungs that an earlier process saw the trial reach; whether it waits at the last."""
        if self.rungs is None or record.id in self.proposals.seeds or record.config is None:
            return False
        scores = {epoch: self.values.score(value) for epoch, value in record.scores}
        waits = record.stage is Stage.WAITING
        return self.rungs.replay(record.id, record.config.backbone, _rungs(record.config), scores, waits) and waits

    # the next job

    def next(self) -> Job | None:
        """The next job: an interrupted trial first, then one that is promoted, else a new one. None: nothing now."""
        if self.stopping or self.time.left() <= 0 or self.enough():
            return None
        if self.interrupted:
            record = self.records.put(self.records[self.interrupted.pop(0)].goes_on())
        elif (waiting := self._promoted()) is not None and self.rungs is not None:
            self.rungs.go_on(waiting)
            record = self.records.put(self.records[waiting].goes_on())
        elif self._wants_new() and (asked := self._ask()) is not None:
            record = asked
            self.counted += 1
        else:
            return None
        config = record.config
        assert config is not None
        stops = self._stops_at(record.id, config)
        self.running[record.id] = stops
        if self.pruning is not None:
            self.pruning.begin(record.id)
        self.time.begin(record.id)
        weights = self.weights.get(config.backbone) if config.pretrained else None
        left = self.time.left()
        deadline = None if left == math.inf else self.time.clock() + left
        return Job(record.id, config, str(self.run), self.data, weights, deadline=deadline, stops_at=stops)

    def _stops_at(self, id: str, config: TrialConfig) -> tuple[int, ...]:
        """Epochs at whose report the trial may be stopped for its scores.

        None where it is cross-fitted, because it has no scores before its end; none where it is a new seed of what has
        proved its worth; and no rung where the time left has no room for the others that the trial would be held
        against: it would only wait.
        """
        if id in self.proposals.seeds or (self.time.costs is not None and self.time.costs.trainings > 1):
            return ()
        if self.rungs is None:
            return self.pruning.stops_at(config.all_epochs) if self.pruning is not None else ()
        has_room = self.time.room_for(config) >= FACTOR
        return _rungs(config) if has_room else ()

    def _wants_new(self) -> bool:
        return not self.proposals.exhausted and (self.budget.trials is None or self.counted < self.budget.trials)

    def _promoted(self) -> str | None:
        """The waiting trial that goes on next, if any: by the rule, or because no new one can be finished in time."""
        if self.rungs is None:
            return None
        by_rule = self.rungs.promotable()
        if by_rule is not None:
            return by_rule if by_rule not in self.running else None  # it has still to come to its end
        left = self.time.left()
        if left < math.inf and (self.proposals.exhausted or self.time.too_short_for_a_trial()):
            waiting = [id for id in self.rungs.ranked() if id not in self.running]
            return next((id for id in waiting if self._seconds_to_finish(id) < left), None)
        return None

    def _seconds_to_finish(self, id: str) -> float:
        record = self.records[id]
        assert record.config is not None
        return self.time.to_finish(record.config, done=record.scores[-1][0])

    def _ask(self) -> TrialRecord | None:
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
        epoch, score = int(metrics["epoch"]), metrics.get(self.values.metric)
        if score is None:  # of a cross-fitted candidate, before all of it can be scored
            return self.stopping or self.enough() is not None
        before = self.records[id]
        record = self.records.note(before.scored(epoch, float(score)))
        assert record.config is not None
        stops = self.pruning is not None and record is not before and self.pruning.should_stop(id, epoch, float(score))
        # then it is a candidate, and stopping it saves nothing: its time may be over, or it may have learned enough
        if epoch >= record.config.all_epochs or metrics.get("last"):
            return False
        if self.stopping or self.enough():
            return True
        if epoch not in self.running[id]:
            return False
        if self.rungs is None:
            return stops
        rung = self.rungs.at(epoch, _rungs(record.config))
        if rung is None or self.rungs.reach(id, record.config.backbone, rung, self.values.score(score)):
            return False
        self.arrived.add(id)
        return True

    def finish(self, id: str, result: Result) -> str:
        """Every outcome of a trial, in one place. Called once for each job of `next`.

        Returns where the trial stands now: "waiting" at a rung, else the outcome.
        """
        del self.running[id]
        self.time.end(id)
        record, outcome = self.records[id], result.outcome
        written = self.run / "candidates" / id
        arrived = id in self.arrived
        self.arrived.discard(id)
        # A lane that is lost behind the last file has lost nothing, whether the trial got another one or not.
        may_have = outcome in (Outcome.LOST_NODE, Outcome.INTERRUPTED) and exists(written / "candidate.json")
        if outcome.leaves_candidate or may_have:  # also at a rung, where its time was over
            return self._end_with_candidate(record, read_candidate(written), learn=True).outcome or ""
        if arrived:  # also when it was lost just there: the checkpoint is older than the report
            self.tried.add(id)
            self.values.see(record)
            return self.records.put(record.waits()).stage.value
        if outcome is Outcome.STORAGE_LOST:  # there is nothing that could be continued
            self.interrupted.append(id)
            raise StorageLost(result.error)
        if outcome is Outcome.OUT_OF_MEMORY and self.workers > 1 and (smaller := _halved(record)) is not None:
            # alone a trial halves its micro-batch by itself; ranks cannot, because the others wait in a collective
            self.interrupted.append(self.records.put(smaller).id)
            return Outcome.INTERRUPTED
        if outcome.continues or record.retries < outcome.retries:
            self.records.put(record if outcome.continues else record.retried())
            if not (outcome is Outcome.INTERRUPTED and result.error):  # its own time was over: only more would help it
                self.interrupted.append(id)
            return outcome
        self._end(record, outcome, value=self.values.worst() if outcome.teaches else None,
                  error=result.error, traceback=result.traceback, seconds=result.seconds)  # fmt: skip
        self.counted -= outcome is Outcome.INVALID  # as if it had been refused at once
        remove_checkpoint(self.run, id)
        return outcome

    def _end_with_candidate(self, record: TrialRecord, candidate: Candidate, learn: bool = False) -> TrialRecord:
        """The trial has become a candidate: its scores are the candidate's, reports that were lost among them.

        Another tool may have put a candidate of its own in its place: then the trial has ended without one.
        """
        info = candidate.info
        if record.config is None or not record.config.is_same(info.config):
            self.counted -= 1
            return self._end(
                record, Outcome.INVALID, error=f"candidates/{record.id} is of another configuration than this trial's"
            )
        for row in info.curve:
            if self.values.metric in row:
                record = record.scored(int(row["epoch"]), float(row[self.values.metric]))
        if learn:
            self._learn(candidate)
        value = self.values.of_candidate(record.id, info.metrics)
        points: dict[str, Any] = {}
        if learn and self.live is not None:  # with the trial, so that the ensemble's curve outlives a kill
            self.live.add(candidate)
            self.tried.add(record.id)
            points = self.goal.note(len(self.tried))
        if learn and self.store is not None:
            self.store.trim(set(self.live.members) if self.live is not None else set())
        return self._end(replace(record, ensemble=points), Outcome(info.outcome), value=value, seconds=info.seconds)

    def _end(self, record: TrialRecord, outcome: Outcome, **what: Any) -> TrialRecord:
        """The one place where trials end."""
        record = self.records.put(record.ends(outcome, ended=self.time.clock(), **what))
        self.tried.add(record.id)
        if self.rungs is not None and record.id in self.rungs.waiting:
            self.rungs.go_on(record.id)
        self.values.see(record)
        if self.pruning is not None and record.id in self.pruning.trials:
            self.pruning.end(record)
        if self.mirror is not None:
            self.mirror.add(record)
        if self.tracking is not None:
            self.tracking.add(record)
        return record

    def close(self) -> None:
        """End a sweep that has nothing left to run: what waits, or time ran out for, is pruned.

        But for the best KEPT of those that wait: they keep their checkpoints, and with a larger budget go on.
        """
        kept = set(self.waiting()[:KEPT])
        for id in [*self.waiting(), *self.interrupted]:
            if id not in kept:
                self._end(self.records[id], Outcome.PRUNED)
                remove_checkpoint(self.run, id)
        self.interrupted = []
        self.save()
        if self.mirror is not None:
            self.mirror.close()

    def tick(self) -> None:
        """Called a few times a second while trials run."""
        if self.time.clock() - self.saved > SAVE_S:  # what was spent outlives the machine that this runs on
            self.save()
        if self.mirror is not None:
            self.mirror.flush()

    def save(self) -> None:
        """Write what has not been written yet, and the time that was spent."""
        self.saved = self.time.clock()
        self.records.flush()
        self.records.spend(self.time.spent())

    def remove_stale_checkpoints(self) -> None:
        """Delete checkpoints of trials that have ended: one that was pruned may have written its last too late.

        What lies there under another name is not this sweep's, and stays.
        """
        for path in list_folder(self.run / "checkpoints"):
            if path.name in self.records and self.records[path.name].stage is Stage.ENDED:
                remove_checkpoint(self.run, path.name)

    def _learn(self, candidate: Candidate) -> None:
        if self.contribution is not None and exists(candidate.path / "tune_probs.npy"):
            self.contribution.add(candidate.id, candidate.probs("tune"))
        if self.store is not None:
            self.store.add(candidate)
        self.time.learn(candidate)


def _halved(record: TrialRecord) -> TrialRecord | None:
    """The trial with half the micro-batch, or None where that is one image already."""
    config = record.config
    if config is None or config.accumulate >= config.batch_size:
        return None
    return replace(record, config=replace(config, accumulate=2 * config.accumulate))


def _rungs(config: TrialConfig) -> tuple[int, ...]:
    return rung_epochs(config.epochs, config.freeze_epochs)
