"""What a sampler sees of the study, which is not always what the storage says.

A trial that waits at a rung is RUNNING in the storage, so that a killed sweep can take it up again. A sampler would
take it for one of unknown score, and as a bad sign besides (TPE's constant liar). Here samplers are given a view of
the study in which the sweep may retell trials: a waiting one as pruned at its rung, for instance.
"""

from collections.abc import Callable, Container
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

Retell = Callable[[list[FrozenTrial]], list[FrozenTrial]]


class View(optuna.Study):
    """The study as retold; read once for each new trial, and not at all for a sampler that does not look."""

    retell: Retell
    seen: list[FrozenTrial] | None = None

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self.seen is None:
            self.seen = self.retell(super()._get_trials(deepcopy=False))
        return [trial for trial in self.seen if states is None or trial.state in states]


class ViewSampler(BaseSampler):
    """Any sampler, looking at a View of its study. While `exploring`, proposals are random instead."""

    def __init__(self, sampler: BaseSampler, study: optuna.Study, retell: Retell, seed: int) -> None:
        self.sampler, self.random, self.exploring = sampler, RandomSampler(seed), False
        self.view = View(study.study_name, study._storage, sampler)
        self.view.retell = retell

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.view.seen = None
        self.sampler.before_trial(self.view, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if self.exploring else self.sampler.infer_relative_search_space(self.view, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if self.exploring else self.sampler.sample_relative(self.view, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = self.random if self.exploring else self.sampler
        return sampler.sample_independent(self.view, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.sampler.after_trial(self.view, trial, state, values)

    def reseed_rng(self) -> None:
        self.sampler.reseed_rng()
