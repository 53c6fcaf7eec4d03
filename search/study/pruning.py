"""An Optuna pruner that stops trials, by public API alone: it sees every trial's scores in a study in memory."""

import bisect
import math
from collections import defaultdict

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search.config import Pruner
from trainables.run.records import Stage, TrialRecord


class Pruning:
    """Hears the scores of trials, and says which of them are to stop.

    Args:
        pruner: its name; of those that Optuna has.
        maximise: whether scores are to be maximised.
    """

    def __init__(self, pruner: Pruner, maximise: bool) -> None:
        self.study = optuna.create_study(
            direction="maximize" if maximise else "minimize", pruner=make_pruner(pruner),
            sampler=optuna.samplers.RandomSampler(),
        )  # fmt: skip
        self.trials: dict[str, optuna.Trial] = {}

    def stops_at(self, epochs: int) -> tuple[int, ...]:
        """The epochs, but for the last, after which a trial of `epochs` epochs waits to hear whether it stops."""
        if isinstance(self.study.pruner, SortedHalving):
            return self.study.pruner.rungs_below(epochs)
        return tuple(range(1, epochs))

    def replay(self, record: TrialRecord) -> None:
        """Hear all that an earlier process has heard of a trial."""
        self.begin(record.id)
        for epoch, score in record.scores:
            self.should_stop(record.id, epoch, score)
        if record.stage is Stage.ENDED:
            self.end(record)

    def begin(self, id: str) -> None:
        if id not in self.trials:
            self.trials[id] = self.study.ask()

    def should_stop(self, id: str, epoch: int, score: float) -> bool:
        """Whether a trial is to stop after this epoch; call it once for each."""
        self.trials[id].report(score, epoch)
        return self.trials[id].should_prune()

    def end(self, record: TrialRecord) -> None:
        trial = self.trials.pop(record.id)
        if record.outcome is not None and record.outcome.leaves_candidate and record.value is not None:
            self.study.tell(trial, record.value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED if record.scores else TrialState.FAIL)


class SortedHalving(BasePruner):
    """Optuna's SuccessiveHalvingPruner, which looks through all trials at every rung, with the rungs kept sorted.

    The decisions are the same (tests/search/study/test_pruning.py), and the ten-thousandth costs what the first did.
    One object serves one study, from its first trial on. Scores are to be maximised or minimised as the study says.

    Source: Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning" (ASHA), which only stops here.

    Args:
        first: epochs of the first rung; the others lie at its multiples by `factor`.
        factor: of `factor` trials at a rung one goes on; at least 2.
    """

    def __init__(self, first: int, factor: int) -> None:
        self.first, self.factor = first, factor
        self.rungs: defaultdict[int, list[float]] = defaultdict(list)  # epoch -> losses there, sorted
        self.passed: dict[int, int] = {}  # trial -> the epoch of its next rung

    def rungs_below(self, epochs: int) -> tuple[int, ...]:
        """The rungs, as epochs, that lie before epoch `epochs`."""
        found: list[int] = []
        while (epoch := self.first * self.factor ** len(found)) < epochs:
            found.append(epoch)
        return tuple(found)

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        step = trial.last_step
        if step is None:
            return False
        score = trial.intermediate_values[step]
        loss = -score if study.direction == StudyDirection.MAXIMIZE else score
        while step >= (epoch := self.passed.get(trial.number, self.first)):
            if math.isnan(loss):
                return True
            rung = self.rungs[epoch]
            bisect.insort(rung, loss)
            self.passed[trial.number] = self.factor * epoch
            if loss > rung[max(1, len(rung) // self.factor) - 1]:
                return True
        return False


def make_pruner(name: Pruner) -> BasePruner:
    """The pruner of that name; "promote" is the sweep's own matter, see promotion.py."""
    pruners = optuna.pruners
    if name == "asha":
        # Rungs at 3, 6, 12, ... epochs, the better half goes on. The textbook's factor of 3 from the first epoch on
        # leaves hardly any candidate to choose an ensemble from.
        return SortedHalving(first=3, factor=2)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return pruners.WilcoxonPruner() if name == "wilcoxon" else pruners.NopPruner()
