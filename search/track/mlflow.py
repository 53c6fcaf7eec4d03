"""--track mlflow: a run for the sweep with a nested run for each trial, wherever MLFLOW_TRACKING_URI says.

Runs are found again by their tags, `ninefold.sweep` and `ninefold.trial`, and every time that is sent is the trial's
own. So a trial that is sent twice, because an answer was lost, is one run with the same points.

The ensemble of a sweep that has ended becomes a version of a registered model that has the experiment's name.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search.track.tracker import CURVE, PROJECT, EndedTrial, SweepEnd, SweepInfo, missing
from trainables.job import Outcome
from trainables.storage import hide_password

SWEEP, TRIAL, PARENT, ENSEMBLE = "ninefold.sweep", "ninefold.trial", "mlflow.parentRunId", "ninefold.ensemble"
DESCRIBED = (
    "select_claim_accuracy", "select_claim_low", "select_claim_high", "select_claim_images",
    "test_ensemble_accuracy", "test_ensemble_images",
)  # fmt: skip
MOST_PARAMS, MOST_METRICS = 100, 1000  # of one request, by MLflow's REST API
LONGEST = 500  # characters of a value that every version of MLflow takes
RETRIES = 2  # of a request; MLflow's own 7 take four minutes, and the feed tries again itself


class MlflowTracker:
    """A sweep on an MLflow server, or in a store on this machine. Raises UserError when MLflow is not installed."""

    name = "mlflow"
    registers = True

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(RETRIES))
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each trial
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each of the retries
        try:
            import mlflow
        except ImportError as error:
            raise missing(self.name, error) from None
        self.mlflow = mlflow
        self.client: Any = None
        self.experiment = self.parent = ""

    def where(self, sweep: SweepInfo) -> str:
        hint = "" if self.mlflow.tracking.is_tracking_uri_set() else " (MLFLOW_TRACKING_URI names another place)"
        return hide_password(self.mlflow.get_tracking_uri()) + hint

    def open(self, sweep: SweepInfo, key: str) -> str:
        self.client = self.mlflow.MlflowClient()  # here, because a store on this machine is made with it
        self.experiment = self._experiment()
        found = self._find({SWEEP: sweep.key})
        if found is None:
            tags = {SWEEP: sweep.key}
            found = self.client.create_run(self.experiment, tags=tags, run_name=sweep.name).info.run_id
        self.parent = found
        self._log(found, sweep.options, [])
        self.client.update_run(found, status="RUNNING")
        return self.parent

    def add(self, trial: EndedTrial) -> None:
        tags = {PARENT: self.parent, TRIAL: trial.id}
        run = self._find(tags)
        if run is None:
            tags |= {"ninefold.outcome": str(trial.outcome)} | ({"ninefold.error": trial.error} if trial.error else {})
            run = self.client.create_run(self.experiment, _ms(trial.began), tags, trial.id).info.run_id
        metrics = [
            self._metric(CURVE + name, value, trial.time_of(row), int(row["epoch"]))
            for row in trial.curve for name, value in row.items() if name != "epoch"
        ]  # fmt: skip
        last = int(trial.curve[-1]["epoch"]) if trial.curve else 0
        metrics += [self._metric(name, value, trial.ended, last) for name, value in trial.scores.items()]
        self._log(run, trial.params, metrics)
        self.client.set_terminated(run, _status(trial.outcome), _ms(trial.ended))

    def conclude(self, end: SweepEnd) -> None:
        self._log(self.parent, {}, [self._metric(n, value, end.at, end.trials) for n, value in end.scores.items()])
        for name, text in end.files.items():
            self.client.log_text(self.parent, text, name)
        if end.model is not None:
            self._register(end.model, end.digest, end.scores)
        self.client.set_terminated(self.parent, "FINISHED" if end.complete else "KILLED")

    def _register(self, folder: Path, digest: str, scores: dict[str, float]) -> None:
        """Make a model version of the ensemble in this folder, unless the run has one of it."""
        versions = self.client.search_model_versions(f"run_id = '{self.parent}'")
        if any(version.tags.get(ENSEMBLE) == digest for version in versions):
            return
        place = f"model-{digest[:8]}"
        self.client.log_artifacts(self.parent, str(folder), place)
        model = self.client.get_experiment(self.experiment).name
        if not self.client.search_registered_models(f"name = '{model}'"):
            self.client.create_registered_model(model)
        where = f"{self.client.get_run(self.parent).info.artifact_uri}/{place}"
        version = self.client.create_model_version(
            model, where, self.parent, tags={ENSEMBLE: digest}, await_creation_for=0
        )
        claim = ", ".join(f"{name} {scores[name]:.4g}" for name in DESCRIBED if name in scores)
        self.client.update_model_version(model, version.version, claim)

    def _experiment(self) -> str:
        """The id of the experiment that MLflow's variables name, or of "ninefold", which is made."""
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        return str(self.client.create_experiment(name) if experiment is None else experiment.experiment_id)

    def _find(self, tags: dict[str, str]) -> str | None:
        """The id of the oldest run of the experiment with these tags that nobody has deleted, or None."""
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        runs = self.client.search_runs([self.experiment], query, max_results=1, order_by=["start_time ASC"])
        return str(runs[0].info.run_id) if runs else None

    def _log(self, run: str, params: dict[str, Any], metrics: Sequence[Any]) -> None:
        pairs = [self.mlflow.entities.Param(name, str(value)[:LONGEST]) for name, value in params.items()]
        for start in range(0, len(pairs), MOST_PARAMS):
            self.client.log_batch(run, params=pairs[start : start + MOST_PARAMS])
        for start in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(run, metrics=metrics[start : start + MOST_METRICS])

    def _metric(self, name: str, value: float, at: float, step: int) -> Any:
        return self.mlflow.entities.Metric(name, float(value), _ms(at), step)


def _status(outcome: Outcome) -> str:
    """MLflow's word for it: killed is what was stopped without fault."""
    return "FINISHED" if outcome.leaves_candidate else "FAILED" if outcome.is_failure else "KILLED"


def _ms(seconds: float) -> int:
    return int(1000 * seconds)
