"""What a sweep knows before its first trial: earlier sweeps (--warm-start).

Samplers learn from their trials, budgets and ensembles do not count them. They may come from other data, so their
scores are only compared with each other: a sampler sees each with the value that this sweep's trials have at the same
rank (see `rescaled`).
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, Trial

from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.run.records import read_records
from trainables.run_directory import list_candidates, open_run

DRAWS = 100  # proposals from which the parameters of a space are learnt
FEWEST = 5  # own scores from which on those of earlier sweeps are put on their scale


def read_earlier(run: str, metric: str, suggest: Callable[[Trial], TrialConfig]) -> list[FrozenTrial]:
    """Return the candidates of the run directory `run` as trials for a sampler, with the parameters of the space.

    `metric` is what it learns from ("tune_accuracy" or "tune_log_loss"). Raises UserError when there are none.
    """
    earlier = open_run(run)
    try:
        records = read_records(earlier)
    except UserError as error:
        raise UserError(f"--warm-start {run}: {error}") from error
    scores = {c.id: c.info.metrics.get(metric) for c in list_candidates(earlier)}
    space, found = _distributions(suggest), []
    for record in records:
        shared = {key: value for key, value in record.params.items() if key in space and _fits(value, space[key])}
        score = scores.get(record.id)
        if score is not None and shared:
            distributions = {key: space[key] for key in shared}
            found.append(optuna.trial.create_trial(value=score, params=shared, distributions=distributions))
    if not found:
        raise UserError(
            f"--warm-start {run}: none of its candidates has a record with a parameter of this search space"
        )
    return found


def rescaled(warm: list[FrozenTrial], own: list[float]) -> list[FrozenTrial]:
    """The trials of earlier sweeps, at the scale of this sweep's own values once there are enough of those."""
    if len(own) < FEWEST or not warm:
        return warm
    ranks = np.argsort(np.argsort([trial.value for trial in warm], kind="stable"))  # type: ignore[arg-type]
    values = np.quantile(np.array(own, float), (ranks + 0.5) / len(warm))
    told = []
    for trial, value in zip(warm, values, strict=True):
        told.append(copy.copy(trial))
        told[-1].values = [float(value)]
    return told


def _distributions(suggest: Callable[[Trial], TrialConfig]) -> dict[str, BaseDistribution]:
    """The parameters of a space, as many random proposals show them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found: dict[str, BaseDistribution] = {}
    for _ in range(DRAWS):
        trial = study.ask()
        with contextlib.suppress(UserError):  # refused as a whole; its parameters are good to know all the same
            suggest(trial)
        found.update(trial.distributions)
    return found


def _fits(value: Any, distribution: BaseDistribution) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and distribution.low <= value <= distribution.high  # type: ignore[attr-defined]
