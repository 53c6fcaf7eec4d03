"""A sweep's records as trials of an Optuna study: for its plots, its dashboard and its samplers."""

import functools
from collections.abc import Iterable
from datetime import datetime

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from trainables.errors import UserError
from trainables.job import Outcome
from trainables.run.records import Stage, TrialRecord


def as_trial(record: TrialRecord, value: float | None = None) -> FrozenTrial:
    """Return the record as Optuna knows trials, with this value instead of its own.

    Complete is what has a value: candidates, and failures that a sampler is to learn from. Pruned is what was stopped
    before its end, or waits. Raises UserError when its parameters are none of Optuna's.
    """
    value = record.value if value is None else value
    state = _state(record)
    attrs = {
        "id": record.id, "outcome": str(record.outcome or record.stage), "seed_of": record.seed_of,
        "error": record.error, "seconds": record.seconds,
    }  # fmt: skip
    try:
        began = datetime.fromtimestamp(record.began)
        return FrozenTrial(
            number=record.number, trial_id=record.number, state=state,
            value=value if state is TrialState.COMPLETE else None,
            datetime_start=began, datetime_complete=datetime.fromtimestamp(record.ended or record.began)
            if state.is_finished() else None,
            params=record.params, distributions={key: parsed(text) for key, text in record.distributions.items()},
            user_attrs={key: value for key, value in attrs.items() if value not in (None, "")}, system_attrs={},
            intermediate_values=dict(record.scores),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise UserError(f"the record of trial {record.id} holds parameters that cannot be read: {error}") from None


def _state(record: TrialRecord) -> TrialState:
    outcome = record.outcome
    if record.stage is Stage.RUNNING:
        return TrialState.RUNNING
    if record.stage is Stage.WAITING or outcome in (Outcome.PRUNED, Outcome.INTERRUPTED):
        return TrialState.PRUNED
    return TrialState.COMPLETE if record.value is not None else TrialState.FAIL


def as_study(records: Iterable[TrialRecord], maximise: bool) -> optuna.Study:
    """Return a study in memory with a trial for each record, at the record's number.

    Raises UserError when one of them cannot be a trial.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if maximise else "minimize")
    try:
        for record in records:
            study.add_trial(as_trial(record))
    except (ValueError, TypeError) as error:
        raise UserError(f"the record of trial {record.id} cannot be read: {error}") from None
    return study


@functools.cache
def parsed(distribution: str) -> BaseDistribution:
    """A distribution from Optuna's JSON; every proposal asks for the same few hundred."""
    return json_to_distribution(distribution)
