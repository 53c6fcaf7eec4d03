"""What a sweep knows before its first trial: a space's own first configurations, and earlier sweeps (--warm-start).

An earlier sweep's trials become trials of this study, marked by the attribute "warm": samplers learn from them, budgets
and ensembles do not count them. They may come from other data, so their scores are only compared with each other: a
sampler sees each with the value that this sweep's trials have at the same rank (see `rescaled`).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from ensemble.report.trials import load_study, read_study
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.run_directory import list_candidates, open_run, study_name, trial_id
from trainables.storage import exists

WARM = "warm"  # trial attribute: which trial of which run it was
DRAWS = 100  # proposals from which the parameters of a space are learnt
FEWEST = 5  # own scores from which on those of earlier sweeps are put on their scale


def read_earlier(
    run: str, metric: str, suggest: Callable[[Trial], TrialConfig], storage: str | None = None
) -> list[FrozenTrial]:
    """Return the candidates of the run directory `run` as trials to add to a study, with the parameters of the space.

    `metric` is what the study is about ("tune_accuracy" or "tune_log_loss"). A run without a study.db has its study in
    a database: in `storage`, if the user named one. The address in its run.json is never dialled, because the run may
    be somebody else's. Raises UserError when there are none.
    """
    earlier = open_run(run)
    try:
        if not exists(earlier / "study.db") and storage:
            study = load_study(storage, study_name(earlier))
        else:
            study = read_study(earlier)
    except UserError as error:
        raise UserError(f"--warm-start {run}: {error}") from error
    scores = {c.id: c.info.metrics.get(metric) for c in list_candidates(earlier)}
    space, found = _distributions(suggest), []
    for trial in study.get_trials(deepcopy=False):
        id = trial_id(trial.number)
        shared = {key: value for key, value in trial.params.items() if key in space and _fits(value, space[key])}
        score = scores.get(id)
        if score is not None and shared:
            found.append(
                optuna.create_trial(
                    value=score, params=shared, distributions={key: space[key] for key in shared},
                    user_attrs={WARM: f"{earlier.absolute().name}/{id}"},
                )
            )  # fmt: skip
    if not found:
        raise UserError(f"--warm-start {run}: none of its candidates has a parameter of this search space")
    return found


def add_earlier(study: optuna.Study, earlier: list[FrozenTrial]) -> None:
    """Add trials of `read_earlier` to the study; those that it has already are not added again."""
    present = {trial.user_attrs.get(WARM) for trial in study.get_trials(deepcopy=False)}
    study.add_trials([trial for trial in earlier if trial.user_attrs[WARM] not in present])


def enqueue_first(study: optuna.Study, first: list[dict[str, Any]], backbones: list[str]) -> None:
    """Let the space's own first configurations be proposed first, those of backbones that take part; once."""
    for params in first:
        if params.get("backbone", backbones[0]) in backbones:
            study.enqueue_trial(params, skip_if_exists=True)


def rescaled(trials: list[FrozenTrial]) -> dict[int, float]:
    """Number -> value of the warm trials, at this study's own scale once that is known."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    warm = [t for t in complete if WARM in t.user_attrs]
    own = [t.value for t in complete if WARM not in t.user_attrs]
    if len(own) < FEWEST or not warm:
        return {}
    ranks = np.argsort(np.argsort([t.value for t in warm], kind="stable"))  # type: ignore[arg-type]
    values = np.quantile(np.array(own, float), (ranks + 0.5) / len(warm))
    return {trial.number: float(value) for trial, value in zip(warm, values, strict=True)}


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
