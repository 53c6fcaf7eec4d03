"""An Optuna sampler asked for parameters, by public API alone.

The sampler looks at a study in memory that is made for it from the trials' records, as they stand when it is asked: a
candidate with what it is worth now, a trial that waits at a rung as pruned there (search.study.values says how each is
told). So nothing has to be kept up to date beside the records, and a sweep that goes on proposes as if it had never
stopped.
"""

from collections.abc import Callable
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.config import Sampler


class NumberedTrial:
    """An `optuna.Trial` as search spaces see it: under its number in the sweep. The study's own counts other things."""

    def __init__(self, trial: optuna.Trial, number: int) -> None:
        self.trial, self.number = trial, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)


class Sampling:
    """Proposals of a sampler.

    Args:
        sampler: its name in Optuna.
        maximise: whether its objective is to be maximised.
        seed: of the sampler's random numbers.
        told: the trials as it shall see them.
    """

    def __init__(self, sampler: Sampler, maximise: bool, seed: int, told: Callable[[], list[FrozenTrial]]) -> None:
        self.sampler, self.maximise, self.seed, self.told = sampler, maximise, seed, told
        self.study: optuna.Study | None = None
        self.seen = -1

    def ask(
        self, number: int, changes: int, given: dict[str, Any] | None = None, exploring: bool = False
    ) -> optuna.Trial:
        """A trial whose parameters come from the sampler, or at random while `exploring`.

        number: of the trial in the sweep. changes: differs from the last call's when trials have to be looked at again.
        given: parameters that are to be so.
        """
        if self.study is None or changes != self.seen:
            self.study, self.seen = self._study(number), changes
        if exploring:
            self.study.sampler = optuna.samplers.RandomSampler(seed=_mixed(self.seed, number))
            self.seen = -1
        if given:
            self.study.enqueue_trial(given)
        return cast(optuna.Trial, NumberedTrial(self.study.ask(), number))

    def refuse(self, trial: optuna.Trial) -> None:
        """Forget a proposal, of which nothing will be heard."""
        assert self.study is not None
        self.study.tell(cast(NumberedTrial, trial).trial, state=TrialState.FAIL)

    def _study(self, number: int) -> optuna.Study:
        # a seed of the number, or each study would begin with the same proposals
        sampler = make_sampler(self.sampler, _mixed(self.seed, number))
        study = optuna.create_study(direction="maximize" if self.maximise else "minimize", sampler=sampler)
        if self.sampler != "random":  # which would not look at them: telling 256 trials takes 30 ms
            study.add_trials(self.told())
        return study


def make_sampler(name: Sampler, seed: int) -> BaseSampler:
    if name == "tpe":  # constant liar: parallel trials do not all ask for the same point
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, n_startup_trials=10, seed=seed
        )
    return optuna.samplers.GPSampler(seed=seed) if name == "gp" else optuna.samplers.RandomSampler(seed=seed)


def _mixed(seed: int, number: int) -> int:
    return (1_000_003 * seed + number) % 2**32
