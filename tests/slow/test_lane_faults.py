"""Lanes with real Ray: deaths and disagreements that take long to notice."""

import os
import signal
from pathlib import Path

import pytest
from ray.util.state import list_actors

from cluster import lane
from cluster.lane import LaneLost
from tests.cluster.test_lane import (  # noqa: F401
    ONE,
    TWO,
    Collect,
    count_epochs,
    kill,
    ray_cluster,
    run_in_lane,
    train_together,
)
from tests.errand import errand


@pytest.mark.parametrize("victims", [("TrainController",), ("PlacementGroupCleaner", "TrainController")])
def test_the_job_of_a_killed_controller_goes_on_in_a_new_lane(victims, tmp_path, monkeypatch):
    """Before: when Ray's cleaner had died, too, the lane's places were never free again, and the sweep hung."""
    monkeypatch.setattr(lane, "START_S", 60.0)

    def kill_controllers(metrics):
        actors = list_actors(filters=[("state", "=", "ALIVE")])
        for victim in victims:
            for actor in actors:
                if actor.class_name == victim:
                    os.kill(actor.pid, signal.SIGKILL)

    report = Collect(at=1, do=kill_controllers)
    job = {"epochs": 8, "epoch_s": 0.5, "checkpoint": str(tmp_path / "epoch")}
    for _ in range(2):  # twice: two CPUs that are not freed again would leave the third lane without any
        with pytest.raises(LaneLost):
            run_in_lane(count_epochs, ONE, errand(**job), report)
        result = run_in_lane(count_epochs, ONE, errand(**job), report)
        assert result.outcome == "finished"
        assert result.metrics["first"] >= 2
        assert report.epochs[-1] == 7
        assert len(set(report.pids)) == 2
        report = Collect(at=1, do=kill_controllers)
        Path(job["checkpoint"]).unlink()


def test_a_rank_that_raises_alone_is_a_bug_and_the_next_job_gets_a_new_lane(tmp_path):
    job = {"epochs": 3, "folder": str(tmp_path)}
    result = run_in_lane(train_together, TWO, errand(**{**job, "raise_alone": True}), Collect())
    assert (result.outcome, result.error) == ("bug", "ValueError: only rank 1")
    assert run_in_lane(train_together, TWO, errand(**job), Collect()).outcome == "finished"


def test_a_rank_that_runs_out_of_memory_ends_the_job_as_that_without_another_try(tmp_path):
    job = {"epochs": 3, "folder": str(tmp_path)}
    result = run_in_lane(train_together, TWO, errand(**{**job, "run_out_of_memory": True}), Collect())
    assert (result.outcome, result.error) == ("out of memory", "MemoryError: only rank 1 ran out")
    assert run_in_lane(train_together, TWO, errand(**job), Collect()).outcome == "finished"
