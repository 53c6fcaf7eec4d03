"""A real MLflow server on the loopback interface, with SQLite; and its store on this machine."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble import export
from ensemble.file import Ensemble, read_ensemble, write_ensemble
from ensemble.predict import Voters
from search.track import tracking
from search.track.mlflow import MlflowTracker
from search.track.tracking import Tracking, make_trackers
from tests.hand_sweep import finish, sweep, take
from tests.track.conftest import PATIENCE, MlflowServer, conclude, every_end
from trainables.data.decode import decode
from trainables.run.records import Records


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def client(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    return mlflow.MlflowClient(mlflow_server.url)


def sent(run: Path) -> list[list[int]]:
    """What the run directory says that the server has."""
    path = run / "tracking" / "mlflow.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


def runs_of(client: Any, experiment: str) -> tuple[list[Any], dict[str, Any]]:
    """The parent runs of an experiment, and the children of the first by the trial's id: each is there once."""
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) + len(children) == len(runs)
    by_id = {run.data.tags["ninefold.trial"]: run for run in children}
    assert len(by_id) == len(children)
    return parents, by_id


def test_a_sweep_is_a_run_with_a_child_for_each_trial(
    client: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["mlflow"]))
    every_end(s)
    conclude(s)
    (parent,), children = runs_of(client, tmp_path.name)
    assert {id: (run.info.status, run.data.tags["ninefold.outcome"]) for id, run in children.items()} == {
        "0000": ("FINISHED", "finished"), "0001": ("FAILED", "diverged"),
        "0002": ("KILLED", "pruned"), "0003": ("FINISHED", "finished"),
    }  # fmt: skip
    assert children["0001"].data.tags["ninefold.error"] == "loss is nan"
    best = children["0000"]
    assert best.data.params["backbone"] == "resnet18"
    assert float(best.data.params["lr"]) == s.records["0000"].params["lr"]
    assert best.data.metrics["select_log_loss"] == pytest.approx(0.2)
    assert best.data.metrics["seconds"] == 6
    history = client.get_metric_history(best.info.run_id, "curve/seconds")
    assert [(point.step, point.value) for point in history] == [(epoch, epoch) for epoch in range(1, 7)]
    history = client.get_metric_history(children["0002"].info.run_id, "curve/tune_accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {
        "select_claim_accuracy": 0.75, "select_claim_low": 0.3, "select_claim_high": 0.9, "select_claim_images": 4,
        "test_ensemble_accuracy": 0.5,
    }  # fmt: skip
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"best.json", "report.html", "report.json"}
    assert not client.search_registered_models(f"name = '{tmp_path.name}'")
    out, errors = capfd.readouterr()  # the board has the terminal
    assert out == ""
    assert errors.startswith("the ensemble is not registered as a model: ")
    assert errors.count("\n") == 1


def test_a_server_that_is_killed_and_started_again_has_everything_once(
    client: Any, mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(tracking, "AGAIN_S", 1.0)
    s = sweep(tmp_path, trials=9, pruner="median", trackers=make_trackers(["mlflow"]))
    every_end(s)
    wait_until(lambda: sent(tmp_path) == [[0, 3]])
    mlflow_server.kill()
    try:
        every_end(s)
        wait_until(lambda: "mlflow failed, the sweep continues" in capsys.readouterr().err)
        assert len([record for record in s.records if record.outcome is not None]) == 8
    finally:
        mlflow_server.start()
    wait_until(lambda: sent(tmp_path) == [[0, 7]])
    finish(s, take(s))
    conclude(s)
    (parent,), children = runs_of(client, tmp_path.name)
    assert sorted(children) == [f"000{i}" for i in range(9)]
    assert {run.info.status for run in children.values()} == {"FINISHED", "FAILED", "KILLED"}
    assert parent.info.status == "FINISHED"


def test_a_sweep_whose_server_is_away_at_the_end_is_continued_in_the_same_run(
    client: Any, mlflow_server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    s = sweep(tmp_path, trials=5, pruner="median", trackers=make_trackers(["mlflow"]))
    every_end(s)
    wait_until(lambda: sent(tmp_path) == [[0, 3]])
    mlflow_server.kill()
    try:
        finish(s, take(s))
        conclude(s)
        assert "mlflow lacks 1 of 5 trials and the end" in capsys.readouterr().err
    finally:
        mlflow_server.start()
    (parent,), children = runs_of(client, tmp_path.name)
    assert (parent.info.status, len(children)) == ("RUNNING", 4)
    for trials in (6, 6):  # with a larger budget, and the same command once more
        s = sweep(tmp_path, trials=trials, pruner="median", trackers=make_trackers(["mlflow"]))
        while s.has_more():
            finish(s, take(s))
        conclude(s)
    (again,), children = runs_of(client, tmp_path.name)
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert sorted(children) == [f"000{i}" for i in range(6)]
    history = client.get_metric_history(parent.info.run_id, "select_claim_accuracy")
    assert [(point.step, point.value) for point in history] == [(6, 0.75)]


def test_what_was_cut_in_the_middle_is_completed(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of a trial is there, but its answer was lost, or the rest of it never sent."""
    monkeypatch.setattr(tracking, "AGAIN_S", 0.2)
    (tracker,) = make_trackers(["mlflow"])
    assert isinstance(tracker, MlflowTracker)
    log, failures = tracker._log, ["before the curve", "after it"]

    def fail(run: str, params: dict[str, Any], metrics: list[Any]) -> None:
        what = failures.pop() if metrics and failures else ""
        if what != "before the curve":
            log(run, params, metrics)
        if what:
            raise ConnectionError(what)

    monkeypatch.setattr(tracker, "_log", fail)
    s = sweep(tmp_path, trials=1, trackers=[tracker])
    finish(s, take(s))
    wait_until(lambda: [run.info.status for run in runs_of(client, tmp_path.name)[1].values()] == ["FINISHED"])
    conclude(s)
    _, children = runs_of(client, tmp_path.name)
    history = client.get_metric_history(children["0000"].info.run_id, "curve/seconds")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert not failures


def test_a_run_that_somebody_deleted_is_made_anew(client: Any, tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["mlflow"]))
    every_end(s)
    conclude(s)
    (parent,), children = runs_of(client, tmp_path.name)
    for run in [parent, *children.values()]:
        client.delete_run(run.info.run_id)
    conclude(sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["mlflow"])))
    (again,), children = runs_of(client, tmp_path.name)
    assert again.info.run_id != parent.info.run_id
    assert len(children) == 4


def test_without_an_address_it_says_where_it_writes(tmp_path: Path) -> None:
    import mlflow

    s = sweep(tmp_path / "run", trials=4, pruner="median", trackers=make_trackers(["mlflow"]))
    assert s.tracking is not None
    assert s.tracking.places() == [f"mlflow: sqlite:///{tmp_path}/mlflow.db (MLFLOW_TRACKING_URI names another place)"]
    every_end(s)
    conclude(s)
    (parent,), children = runs_of(mlflow.MlflowClient(), "ninefold")
    assert parent.info.run_name == "run"
    assert len(children) == 4


def test_the_ensemble_is_a_version_of_a_registered_model(
    client: Any, small_run: UPath, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    import mlflow.pyfunc

    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))

    def conclude_with(ensemble: Ensemble) -> list[Any]:
        """Its versions after the sweep has ended with this ensemble."""
        write_ensemble(run, ensemble)
        Tracking(make_trackers(["mlflow"]), run, Records(run), "tune_accuracy").close(ensemble, complete=True)
        assert capsys.readouterr().err == ""
        return sorted(client.search_model_versions(f"name = '{tmp_path.name}'"), key=lambda one: int(one.version))

    claim = {"split": "select", "images": 18, "accuracy": 0.75}
    equal = replace(read_ensemble(small_run), scores={"claim": claim})
    (first,) = conclude_with(equal)
    (parent,), _ = runs_of(client, tmp_path.name)
    assert first.run_id == parent.info.run_id
    assert first.description == "select_claim_accuracy 0.75, select_claim_images 18"
    with monkeypatch.context() as patch:  # the same command again: what is there is not written anew
        patch.setattr(export, "export", None)
        assert len(conclude_with(equal)) == 1
    (run / "tracking" / "mlflow.json").unlink()  # an answer that was lost
    assert len(conclude_with(equal)) == 1
    one = replace(equal, members=equal.members[:1])
    assert [version.version for version in conclude_with(one)] == ["1", "2"]

    images = sorted((pictures / "test").glob("*/*.png"))[:5]
    model = mlflow.pyfunc.load_model(f"models:/{tmp_path.name}/2")
    answers = model.predict({"image": [str(path) for path in images]})
    voters = Voters.load([run], one, "cpu", precision="fp32")
    expected = voters(np.stack([decode(Image.open(path), voters.canvas) for path in images]))
    np.testing.assert_allclose(np.stack(answers["probabilities"]), expected, atol=1e-4)
