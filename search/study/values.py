"""What trials are worth: as their records say when they end, and as samplers see it later (see sampling.py)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial

from ensemble.report.study import as_trial
from search.study.objective import Contribution, OwnScores, Valued
from search.study.promotion import Rungs
from search.study.warm_start import rescaled
from trainables.job import Outcome
from trainables.run.records import Stage, TrialRecord

MOST = 256
"""Trials that a sampler looks at: the best and the latest. A proposal then costs the same late in a long sweep as
early, and TPE, which models the best tenth (at most 25) against all others, has what it needs."""
TOP = 100  # the step at which a trial at the last rung before the end is told as pruned; lower rungs count for less


class Values:
    """The objective's value of every trial.

    Args:
        objective: what trials are valued by.
        rungs: where trials wait, with --pruner promote.
        contribution: values candidates by what they add to an ensemble, or by a metric; None: by their own score.
        warm: trials of earlier sweeps, see warm_start.py.
    """

    def __init__(
        self, objective: Valued, rungs: Rungs | None, contribution: Contribution | OwnScores | None,
        warm: Iterable[FrozenTrial] = (),
    ) -> None:  # fmt: skip
        self.rungs, self.contribution, self.warm = rungs, contribution, list(warm)
        self.maximise = objective == "accuracy"
        self.metric = "tune_accuracy" if self.maximise else "tune_log_loss"
        self._worst: float | None = None

    def score(self, value: float) -> float:
        """A value as one to be maximised; and back."""
        return float(value) if self.maximise else -float(value)

    def of_candidate(self, id: str, metrics: dict[str, Any]) -> float:
        values = self.contribution.values() if self.contribution is not None else {}
        return values.get(id, float(metrics[self.metric]))

    def see(self, record: TrialRecord) -> None:
        """Note a trial that has ended or waits, for `worst`."""
        value = record.value
        if value is None and record.outcome in (Outcome.PRUNED, None) and record.scores:
            value = record.scores[-1][1]
        if value is not None:
            worse = min if self.maximise else max
            self._worst = value if self._worst is None else worse(self._worst, value)

    def worst(self) -> float:
        """What a failure counts as: the worst seen so far, or no better than guessing."""
        if self._worst is not None:
            return self._worst
        return 0.0 if self.maximise else 10.0

    def told(self, records: Iterable[TrialRecord]) -> list[FrozenTrial]:
        """The trials as samplers shall see them, at most MOST of those that have ended."""
        values = self.contribution.values() if self.contribution is not None else {}
        now = [
            record if record.outcome is None else replace(record, value=values.get(record.id, record.value))
            for record in records if record.params and record.counts
        ]  # fmt: skip
        ended = [record for record in now if record.stage is Stage.ENDED]
        own = [record.value for record in ended if record.value is not None]
        if len(ended) > MOST:
            ranked = sorted(
                ended, key=lambda record: -self.score(record.value) if record.value is not None else float("inf")
            )
            chosen = {record.number for record in [*ranked[: MOST // 2], *ended[-MOST // 2 :]]}
            now = [record for record in now if record.stage is not Stage.ENDED or record.number in chosen]
        return [as_trial(self._retold(record)) for record in now] + rescaled(self.warm, own)

    def _retold(self, record: TrialRecord) -> TrialRecord:
        """One that was cut by the deadline as pruned at its last epoch; one that has reached a rung and no end as
        pruned there, the upper rung counting for more."""
        if record.outcome is Outcome.TIME and record.scores:
            return replace(record, stage=Stage.WAITING, outcome=None)
        if self.rungs is None or record.value is not None:
            return record
        reached = [rung for rung, scores in self.rungs.scores.items() if record.id in scores]
        if not reached:
            return record
        score = self.score(self.rungs.scores[min(reached)][record.id])
        return replace(record, stage=Stage.WAITING, outcome=None, scores=((TOP - min(reached), score),))
