"""The study's database, for the one process that writes to a study.

What it has written it need not read again: Optuna reads every unfinished trial anew whenever somebody asks for the
trials, which happens several times for each new one. Trials that wait at rungs are unfinished (see promotion.py), so
with hundreds of them a proposal would take seconds. Here trials are read once, and every write goes to the database
and to the copy in memory. Others may look at the database at any time (optuna-dashboard does); what they write to a
study is seen by the next process.

And what belongs together it writes together: Optuna makes a transaction, and on a disk a wait, of every parameter and
attribute. Here they wait for the next report or state of any trial, for a new trial, or for `flush`.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState


def flush(study: optuna.Study) -> None:
    """Write what waits to be written; before a trial starts, for a process that is killed then must find it."""
    if isinstance(study._storage, OneWriter):
        study._storage.flush()


class OneWriter(_CachedStorage):
    """Optuna's cache in front of a database, of which it takes trials that run to be up to date, too."""

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._read: set[int] = set()  # studies
        self._waiting: list[Any] = []  # rows

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        if study_id not in self._read:
            super()._read_trials_from_remote_storage(study_id)
            self._read.add(study_id)

    def _get_cached_trial(self, trial_id: int) -> FrozenTrial | None:
        if trial_id not in self._trial_id_to_study_id_and_number:
            return None
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        return self._studies[study_id].trials[number]

    def flush(self) -> None:
        if self._waiting:
            with _create_scoped_session(self._backend.scoped_session) as session:
                session.add_all(self._waiting)
            self._waiting = []

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        self.flush()
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is not None:  # the copy would share its contents
            self._read_again(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
        known = self._studies[study_id].param_distribution.get(param_name)
        if known is None:  # the database may know it
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        else:
            check_distribution_compatibility(known, distribution)
            text = distribution_to_json(distribution)
            self._add(
                models.TrialParamModel(
                    trial_id=trial_id, param_name=param_name, param_value=param_value_internal, distribution_json=text
                )
            )
        self._note(trial_id, "params", param_name, distribution.to_external_repr(param_value_internal))
        self._note(trial_id, "distributions", param_name, distribution)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        if step in self.get_trial(trial_id).intermediate_values:
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        else:
            model = models.TrialIntermediateValueModel
            value, kind = model.intermediate_value_to_stored_repr(intermediate_value)
            self._add(model(trial_id=trial_id, step=step, intermediate_value=value, intermediate_value_type=kind))
            self.flush()
        self._note(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        if key in self.get_trial(trial_id).user_attrs:
            self.flush()
            super().set_trial_user_attr(trial_id, key, value)
        else:
            self._add(models.TrialUserAttributeModel(trial_id=trial_id, key=key, value_json=text))
        self._note(trial_id, "user_attrs", key, json.loads(text))  # as it is read, with lists for tuples

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        if key in self.get_trial(trial_id).system_attrs:
            self.flush()
            super().set_trial_system_attr(trial_id, key, value)
        else:
            self._add(models.TrialSystemAttributeModel(trial_id=trial_id, key=key, value_json=text))
        self._note(trial_id, "system_attrs", key, json.loads(text))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self.flush()
        done = super().set_trial_state_values(trial_id, state, values)
        self._read_again(trial_id)  # the database has noted the time, too
        return done

    def _add(self, row: Any) -> None:
        self._backend.check_trial_is_updatable(row.trial_id, self.get_trial(row.trial_id).state)
        self._waiting.append(row)

    def _read_again(self, trial_id: int) -> None:
        trial = self._backend.get_trial(trial_id)
        with self._lock:
            if trial_id in self._trial_id_to_study_id_and_number:
                study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
                self._add_trials_to_cache(study_id, [trial])

    def _note(self, trial_id: int, field: str, key: Any, value: Any) -> None:
        """Put a new FrozenTrial in place of the old one, which somebody may hold."""
        with self._lock:
            old = self._get_cached_trial(trial_id)
            if old is not None:
                new = copy.copy(old)
                setattr(new, field, {**getattr(old, field), key: value})
                study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
                self._add_trials_to_cache(study_id, [new])
