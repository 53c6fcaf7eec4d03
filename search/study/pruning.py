"""An Optuna pruner that stops trials, by public API alone: it sees every trial's scores in a study in memory."""

import optuna
from optuna.pruners import BasePruner
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


def make_pruner(name: Pruner) -> BasePruner:
    """The pruner of that name; "promote" is the sweep's own matter, see promotion.py."""
    pruners = optuna.pruners
    if name == "asha":
        # Rungs at 3, 6, 12, ... epochs, the better half goes on. The textbook's factor of 3 from the first epoch on
        # leaves hardly any candidate to choose an ensemble from.
        return pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=2)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    return pruners.WilcoxonPruner() if name == "wilcoxon" else pruners.NopPruner()
