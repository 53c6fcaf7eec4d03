"""The pruner that keeps its rungs sorted decides as Optuna's does."""

import numpy as np
import optuna
import pytest

from search.study.pruning import Pruning, SortedHalving


def test_a_trial_waits_for_an_answer_only_where_there_may_be_one() -> None:
    """Before: with "asha" a trial waited for the driver after every epoch, of which all but a few decide nothing."""
    assert [Pruning("asha", True).stops_at(epochs) for epochs in (3, 4, 24, 25)] == [
        (),
        (3,),
        (3, 6, 12),
        (3, 6, 12, 24),
    ]
    assert Pruning("median", True).stops_at(4) == (1, 2, 3)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("factor", [2, 3])
def test_halving_decides_as_optunas_does(direction: str, factor: int) -> None:
    """Trials side by side, scores with ties and some that are not a number, reports at every third epoch or so."""
    pruners = [
        SortedHalving(first=3, factor=factor),
        optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=factor),
    ]
    answers = []
    for pruner in pruners:
        random = np.random.default_rng(0)
        study = optuna.create_study(direction=direction, pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
        running: dict[optuna.Trial, int] = {}
        told: list[tuple[int, int, bool]] = []
        for _ in range(3000):
            if len(running) < 8:
                running[study.ask()] = 0
            trial = list(running)[random.integers(len(running))]
            running[trial] += int(random.integers(1, 4))
            score = float("nan") if random.random() < 0.02 else round(float(random.normal()), 1)
            trial.report(score, running[trial])
            told.append((trial.number, running[trial], trial.should_prune()))
            if told[-1][-1] or running[trial] > 40:
                del running[trial]
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        answers.append(told)
    assert answers[0] == answers[1]
    assert 100 < sum(stops for *_, stops in answers[0]) < 2500  # both answers were given
