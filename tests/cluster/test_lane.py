"""Lanes with real Ray, without Tune: this process plays the driver and the Tune actor."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ray

from cluster import lane
from cluster.connect import connect, disconnect
from cluster.lane import Lane, LaneLost, LaneSpec
from cluster.ranks import Mailbox
from tests.errand import errand
from trainables.job import Outcome, Result

ONE = LaneSpec(workers=1, cpus=1)
TWO = LaneSpec(workers=2, cpus=1)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # Ray's processes import targets
        connect(cpus=2)
    yield
    close_lane()
    disconnect()


open_lanes = []  # at most one, with what it was started for


def run_in_lane(target, spec, job, report):
    """In the lane there is, or in a new one when it is of another kind or was lost."""
    if open_lanes and open_lanes[0][1:] != (target, spec):
        close_lane()
    if not open_lanes:
        open_lanes.append((Lane(target, spec), target, spec))
    try:
        return lane.run_in_lane(open_lanes[0][0].name, job, report)
    except LaneLost as loss:
        close_lane()
        if loss.fault is None:
            raise
        return loss.fault


def close_lane():
    for old, *_ in open_lanes:
        old.close()
        assert old.is_closed(wait_s=60)
    open_lanes.clear()


# Targets, importable by the lane's workers.


def count_epochs(job, report):
    """Reports `epochs` epochs, going on from a checkpoint file if there is one; may do something bad in one of them."""
    job = job.options
    checkpoint = Path(job["checkpoint"]) if "checkpoint" in job else None
    first = int(checkpoint.read_text()) if checkpoint and checkpoint.exists() else 0
    for epoch in range(first, job["epochs"]):
        if epoch == job.get("raise_at"):
            raise ValueError("no such\nbackbone")
        if epoch == job.get("hang_at") and not (first and job.get("once")):
            time.sleep(600)
        if checkpoint:
            checkpoint.write_text(str(epoch + 1))
        if report({"epoch": epoch, "pid": os.getpid()}):
            return Result(Outcome.PRUNED)
        held = epoch == job.get("held_at") and not first
        end = time.monotonic() + (60 if held else job.get("epoch_s", 0))
        while time.monotonic() < end:
            report.alive()
            time.sleep(0.02)
    return "no result" if "odd" in job else Result(Outcome.FINISHED, {"first": first, "pid": os.getpid()})


def train_together(job, report):
    """Two ranks sum their ranks each epoch; one may raise alone, leaving the other in the collective."""
    import torch
    import torch.distributed as dist

    rank, job = dist.get_rank(), job.options
    for epoch in range(job["epochs"]):
        if rank == 1 and job.get("raise_alone"):
            raise ValueError("only rank 1")
        if rank == 1 and job.get("run_out_of_memory"):
            raise MemoryError("only rank 1 ran out")
        if job.get("raise_together"):
            raise ValueError("both")
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        abandon = report({"epoch": epoch, "total": total.item()})
        note = {"pid": os.getpid(), "abandoned_at": epoch if abandon else None}
        Path(job["folder"], f"rank{rank}.json").write_text(json.dumps(note))
        if abandon:
            return Result(Outcome.PRUNED)
    return Result(Outcome.FINISHED)


class Stopped(BaseException):
    """What tune.report raises in a trial that Tune stops is no Exception either."""


class Collect:
    """A report function that remembers, and does something at one epoch."""

    def __init__(self, at=None, do=None):
        self.epochs, self.pids, self.at, self.do = [], [], at, do

    def __call__(self, metrics):
        self.epochs.append(metrics["epoch"])
        self.pids.append(metrics.get("pid"))
        if metrics["epoch"] == self.at:
            self.at = None  # once: a restarted lane may report this epoch again
            self.do(metrics)


def stop(metrics):
    raise Stopped


def kill(metrics):
    os.kill(metrics["pid"], signal.SIGKILL)


def test_one_lane_trains_trial_after_trial():
    reports = [Collect() for _ in range(3)]
    results = [run_in_lane(count_epochs, ONE, errand(epochs=4), report) for report in reports]
    assert [report.epochs for report in reports] == [[0, 1, 2, 3]] * 3
    assert {result.outcome for result in results} == {Outcome.FINISHED}
    assert len({result.metrics["pid"] for result in results}) == 1
    assert results[0].metrics["pid"] != os.getpid()


def test_a_stopped_trial_is_abandoned_at_its_next_epoch_and_the_next_one_starts():
    before = run_in_lane(count_epochs, ONE, errand(epochs=1), Collect())
    report = Collect(at=1, do=stop)
    with pytest.raises(Stopped):
        run_in_lane(count_epochs, ONE, errand(epochs=10_000, epoch_s=0.1), report)
    assert report.epochs == [0, 1]
    after = Collect()
    result = run_in_lane(count_epochs, ONE, errand(epochs=2), after)  # never, if the 10,000 went on
    assert after.epochs == [0, 1]
    assert result.metrics["pid"] == before.metrics["pid"]


def test_a_bug_in_the_target_returns_its_traceback_and_the_lane_lives_on():
    before = run_in_lane(count_epochs, ONE, errand(epochs=1), Collect())
    report = Collect()
    result = run_in_lane(count_epochs, ONE, errand(epochs=4, raise_at=2), report)
    assert report.epochs == [0, 1]
    assert (result.outcome, result.error) == ("bug", "ValueError: no such")
    assert "in count_epochs" in result.traceback
    assert run_in_lane(count_epochs, ONE, errand(epochs=1), Collect()).metrics["pid"] == before.metrics["pid"]


def test_a_long_epoch_with_signs_of_life_is_no_hang():
    job = {"epochs": 1, "epoch_s": 8, "hang_s": 6}
    before = run_in_lane(count_epochs, ONE, errand(epochs=1), Collect())
    assert run_in_lane(count_epochs, ONE, errand(**job), Collect()).metrics["pid"] == before.metrics["pid"]


def test_what_is_no_result_is_the_targets_bug():
    result = run_in_lane(count_epochs, ONE, errand(epochs=1, odd=True), Collect())
    assert (result.outcome, result.error) == ("bug", "TypeError: the target returned str, expected a Result")


def test_the_job_of_a_killed_worker_goes_on_from_its_checkpoint_in_a_new_lane(tmp_path):
    report = Collect(at=2, do=kill)
    job = {"epochs": 5, "held_at": 2, "checkpoint": str(tmp_path / "epoch")}
    with pytest.raises(LaneLost):
        run_in_lane(count_epochs, ONE, errand(**job), report)
    result = run_in_lane(count_epochs, ONE, errand(**job), report)
    assert result.outcome == "finished"
    assert result.metrics["first"] == 3
    assert report.epochs == [0, 1, 2, 3, 4]
    assert len(set(report.pids)) == 2


@pytest.mark.slow
def test_a_job_that_hangs_is_a_bug_and_the_next_one_continues_from_its_checkpoint(tmp_path):
    job = errand(epochs=3, hang_at=1, once=True, hang_s=5, checkpoint=str(tmp_path / "epoch"))
    result = run_in_lane(count_epochs, ONE, job, Collect())
    assert result.outcome is Outcome.BUG
    assert "training function hung" in result.error
    report = Collect()
    result = run_in_lane(count_epochs, ONE, job, report)
    assert (result.outcome, result.metrics["first"]) == ("finished", 1)
    assert report.epochs == [1, 2]


def test_a_trial_that_is_stopped_where_it_waits_trains_no_further_epoch(tmp_path):
    """Before: the ranks were told to go on before the verdict, so a stop cost the next epoch, too."""
    checkpoint = tmp_path / "epoch"
    job = errand(epochs=100, epoch_s=0.05, checkpoint=str(checkpoint), stops_at=(2,))
    report = Collect(at=2, do=stop)
    with pytest.raises(Stopped):
        run_in_lane(count_epochs, ONE, job, report)
    assert run_in_lane(count_epochs, ONE, errand(epochs=0), Collect()).outcome is Outcome.FINISHED
    assert checkpoint.read_text() == "3"  # of epochs 0 to 2
    report = Collect()
    assert run_in_lane(count_epochs, ONE, errand(epochs=4, stops_at=(1, 2)), report).outcome is Outcome.FINISHED
    assert report.epochs == [0, 1, 2, 3]


def fail_to_start(mailbox):
    raise ImportError("no torch on this machine")


def test_a_lane_that_cannot_start_says_why():
    """Before: its trial waited for ten minutes, and for another, without end."""
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(name="broken").remote(1)
    mailbox.run.remote(fail_to_start)
    with pytest.raises(LaneLost, match="did not start: ImportError: no torch on this machine") as caught:
        lane.run_in_lane("broken", errand(epochs=1), Collect())
    assert caught.value.started
    assert "in fail_to_start" in caught.value.details
    ray.kill(mailbox)


def test_a_job_that_comes_to_a_closed_lane_is_not_trained(tmp_path):
    """Before: ranks that started late took it, while another lane trained it, too."""
    late, checkpoint = Lane(count_epochs, ONE), tmp_path / "epoch"
    late.close()
    with pytest.raises(LaneLost):
        lane.run_in_lane(late.name, errand(epochs=2, checkpoint=str(checkpoint)), Collect())
    assert late.is_closed(wait_s=60)
    assert not checkpoint.exists()
    assert run_in_lane(count_epochs, TWO, errand(epochs=1), Collect()).outcome == "finished"  # all room is free


@pytest.mark.slow
def test_two_ranks_abandon_a_trial_and_fail_together(tmp_path):
    def notes():
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    job = {"epochs": 3, "folder": str(tmp_path)}
    totals = []
    result = run_in_lane(train_together, TWO, errand(**job), lambda metrics: totals.append(metrics["total"]))
    assert (result.outcome, totals) == ("finished", [3, 3, 3])
    first = notes()

    with pytest.raises(Stopped):
        run_in_lane(train_together, TWO, errand(**{**job, "epochs": 1_000_000}), Collect(at=1, do=stop))
    result = run_in_lane(train_together, TWO, errand(**{**job, "raise_together": True}), Collect())
    assert (result.outcome, result.error) == ("bug", "ValueError: both")
    abandoned = notes()
    assert abandoned[0]["abandoned_at"] is not None
    assert abandoned[0]["abandoned_at"] == abandoned[1]["abandoned_at"]

    assert run_in_lane(train_together, TWO, errand(**job), Collect()).outcome == "finished"
    assert [note["pid"] for note in notes()] == [note["pid"] for note in abandoned] == [note["pid"] for note in first]
