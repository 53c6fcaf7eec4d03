"""What trials are worth: as the study is told when they end, and as samplers see it later (see view.py)."""

import copy
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.study.objective import Contribution
from search.study.promotion import Rungs
from search.study.warm_start import rescaled
from trainables.run_directory import trial_id


class Values:
    """The objective's value of every trial of a study.

    Args:
        study: its direction says whether trials are valued by tune accuracy or by tune log-loss.
        rungs: where trials wait, with --pruner promote.
        contribution: values candidates by what they add to an ensemble; None: by their own score.
    """

    def __init__(self, study: optuna.Study, rungs: Rungs | None, contribution: Contribution | None) -> None:
        self.rungs, self.contribution = rungs, contribution
        self.maximise = study.direction == optuna.study.StudyDirection.MAXIMIZE
        self.metric = "tune_accuracy" if self.maximise else "tune_log_loss"
        self._worst: float | None = None

    def score(self, value: float) -> float:
        """A value as one to be maximised; and back."""
        return float(value) if self.maximise else -float(value)

    def of_candidate(self, id: str, metrics: dict[str, Any]) -> float:
        values = self.contribution.values() if self.contribution is not None else {}
        return values.get(id, float(metrics[self.metric]))

    def see(self, frozen: FrozenTrial) -> None:
        """Note a trial that has ended, for `worst`."""
        if frozen.value is not None:
            worse = min if self.maximise else max
            self._worst = frozen.value if self._worst is None else worse(self._worst, frozen.value)

    def worst(self) -> float:
        """What a failure counts as: the worst seen so far, or no better than guessing."""
        if self._worst is not None:
            return self._worst
        return 0.0 if self.maximise else 10.0

    def retold(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The study's trials as samplers shall see them."""
        values = self.contribution.values() if self.contribution is not None else {}
        told = [self._retell(trial, values) for trial in trials]
        for number, value in rescaled(told).items():
            told[number] = copy.copy(told[number])
            told[number].values = [value]
        return told

    def _retell(self, trial: FrozenTrial, values: dict[str, float]) -> FrozenTrial:
        """A candidate with what it is worth to the ensemble now; a trial that has reached a rung and no end as pruned
        there, the upper rung counting for more."""
        id = trial_id(trial.number)
        told = trial
        if trial.state == TrialState.COMPLETE:
            if id in values:
                told = copy.copy(trial)
                told.values = [values[id]]
        elif self.rungs is not None:
            reached = [rung for rung, scores in self.rungs.scores.items() if id in scores]
            if reached:
                told = copy.copy(trial)
                score = self.score(self.rungs.scores[min(reached)][id])
                told.state, told.intermediate_values = TrialState.PRUNED, {-min(reached): score}
        return told
