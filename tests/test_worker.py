"""Lanes with real Ray, without Tune: this process plays the Tune actor."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest
from ray.util.state import list_actors

from cluster.connect import connect, disconnect
from trainables import worker
from trainables.worker import LaneLost, LaneSpec, Mailbox, run_in_lane

ONE = LaneSpec(workers=1, cpus=1)
TWO = LaneSpec(workers=2, cpus=1)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with pytest.MonkeyPatch.context() as patch:
        tests = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))  # Ray's processes import targets
        connect(cpus=2)
    yield
    worker._close_lane()
    disconnect()


# Targets, importable by the lane's workers.


def count_epochs(job, report):
    """Reports `epochs` epochs, going on from a checkpoint file if there is one; may do something bad in one of them."""
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
            return {"outcome": "pruned"}
        held = epoch == job.get("held_at") and not first
        end = time.monotonic() + (60 if held else job.get("epoch_s", 0))
        while time.monotonic() < end:
            report.alive()
            time.sleep(0.02)
    return {"outcome": "finished", "first": first, "pid": os.getpid(), **({"set": {1}} if "set" in job else {})}


def train_together(job, report):
    """Two ranks sum their ranks each epoch; one may raise alone, leaving the other in the collective."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
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
            return {"outcome": "pruned"}
    return {"outcome": "finished"}


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
    results = [run_in_lane(count_epochs, ONE, {"epochs": 4}, report) for report in reports]
    assert [report.epochs for report in reports] == [[0, 1, 2, 3]] * 3
    assert {result["outcome"] for result in results} == {"finished"}
    assert len({result["pid"] for result in results}) == 1
    assert results[0]["pid"] != os.getpid()


def test_a_stopped_trial_is_abandoned_at_its_next_epoch_and_the_next_one_starts():
    before = run_in_lane(count_epochs, ONE, {"epochs": 1}, Collect())
    report = Collect(at=1, do=stop)
    with pytest.raises(Stopped):
        run_in_lane(count_epochs, ONE, {"epochs": 10_000, "epoch_s": 0.1}, report)
    assert report.epochs == [0, 1]
    after = Collect()
    result = run_in_lane(count_epochs, ONE, {"epochs": 2}, after)  # would never come if the 10,000 epochs went on
    assert after.epochs == [0, 1]
    assert result["pid"] == before["pid"]


def test_a_bug_in_the_target_returns_its_traceback_and_the_lane_lives_on():
    before = run_in_lane(count_epochs, ONE, {"epochs": 1}, Collect())
    report = Collect()
    result = run_in_lane(count_epochs, ONE, {"epochs": 4, "raise_at": 2}, report)
    assert report.epochs == [0, 1]
    assert (result["outcome"], result["error"]) == ("bug", "ValueError: no such")
    assert "in count_epochs" in result["traceback"]
    assert run_in_lane(count_epochs, ONE, {"epochs": 1}, Collect())["pid"] == before["pid"]


def test_a_long_epoch_with_signs_of_life_is_no_hang():
    job = {"epochs": 1, "epoch_s": 8, "hang_s": 6}
    before = run_in_lane(count_epochs, ONE, {"epochs": 1}, Collect())
    assert run_in_lane(count_epochs, ONE, job, Collect())["pid"] == before["pid"]


def test_a_result_that_json_cannot_hold_is_the_targets_bug():
    result = run_in_lane(count_epochs, ONE, {"epochs": 1, "set": True}, Collect())
    assert (result["outcome"], result["error"]) == ("bug", "TypeError: Object of type set is not JSON serializable")


def test_the_job_of_a_killed_worker_goes_on_from_its_checkpoint_in_a_new_lane(tmp_path):
    report = Collect(at=2, do=kill)
    job = {"epochs": 5, "held_at": 2, "checkpoint": str(tmp_path / "epoch")}
    with pytest.raises(LaneLost):
        run_in_lane(count_epochs, ONE, job, report)
    result = run_in_lane(count_epochs, ONE, job, report)
    assert result["outcome"] == "finished"
    assert result["first"] == 3
    assert report.epochs == [0, 1, 2, 3, 4]
    assert len(set(report.pids)) == 2


@pytest.mark.slow
def test_the_job_of_a_killed_controller_goes_on_in_a_new_lane(tmp_path):
    def kill_controllers(metrics):
        for actor in list_actors(filters=[("state", "=", "ALIVE")]):
            if actor.class_name == "TrainController":
                os.kill(actor.pid, signal.SIGKILL)

    report = Collect(at=1, do=kill_controllers)
    job = {"epochs": 8, "epoch_s": 0.5, "checkpoint": str(tmp_path / "epoch")}
    for _ in range(2):  # twice: two CPUs that are not freed again would leave the third lane without any
        with pytest.raises(LaneLost):
            run_in_lane(count_epochs, ONE, job, report)
        result = run_in_lane(count_epochs, ONE, job, report)
        assert result["outcome"] == "finished"
        assert result["first"] >= 2
        assert report.epochs[-1] == 7
        assert len(set(report.pids)) == 2
        report = Collect(at=1, do=kill_controllers)
        Path(job["checkpoint"]).unlink()


def test_a_hanging_job_is_resubmitted_once_and_goes_on(tmp_path):
    job = {"epochs": 3, "hang_at": 1, "once": True, "hang_s": 5, "checkpoint": str(tmp_path / "epoch")}
    report = Collect()
    result = run_in_lane(count_epochs, ONE, job, report)
    assert (result["outcome"], result["first"]) == ("finished", 1)
    assert report.epochs == [0, 1, 2]


@pytest.mark.slow
def test_a_job_that_hangs_twice_is_a_bug(tmp_path):
    result = run_in_lane(count_epochs, ONE, {"epochs": 3, "hang_at": 1, "hang_s": 2}, Collect())
    assert result["outcome"] == "bug"
    assert "training function hung" in result["error"]


def test_two_ranks_abandon_a_trial_and_fail_together(tmp_path):
    def notes():
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    job = {"epochs": 3, "folder": str(tmp_path)}
    totals = []
    result = run_in_lane(train_together, TWO, job, lambda metrics: totals.append(metrics["total"]))
    assert (result["outcome"], totals) == ("finished", [3, 3, 3])
    first = notes()

    with pytest.raises(Stopped):
        run_in_lane(train_together, TWO, {**job, "epochs": 1_000_000}, Collect(at=1, do=stop))
    result = run_in_lane(train_together, TWO, {**job, "raise_together": True}, Collect())
    assert (result["outcome"], result["error"]) == ("bug", "ValueError: both")
    abandoned = notes()
    assert abandoned[0]["abandoned_at"] is not None
    assert abandoned[0]["abandoned_at"] == abandoned[1]["abandoned_at"]

    assert run_in_lane(train_together, TWO, job, Collect())["outcome"] == "finished"
    assert [note["pid"] for note in notes()] == [note["pid"] for note in abandoned] == [note["pid"] for note in first]


@pytest.mark.slow
def test_a_rank_that_raises_alone_is_a_bug_and_the_next_job_gets_a_new_lane(tmp_path):
    job = {"epochs": 3, "folder": str(tmp_path)}
    result = run_in_lane(train_together, TWO, {**job, "raise_alone": True}, Collect())
    assert (result["outcome"], result["error"]) == ("bug", "ValueError: only rank 1")
    assert run_in_lane(train_together, TWO, job, Collect())["outcome"] == "finished"


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_ends_the_job_as_that_without_another_try(tmp_path):
    job = {"epochs": 3, "folder": str(tmp_path)}
    result = run_in_lane(train_together, TWO, {**job, "run_out_of_memory": True}, Collect())
    assert (result["outcome"], result["error"]) == ("out of memory", "MemoryError: only rank 1 ran out")
    assert run_in_lane(train_together, TWO, job, Collect())["outcome"] == "finished"


# The mailbox by itself.


def in_mailbox(workers, conversation):
    async def run():
        return await conversation(Mailbox(workers))

    return asyncio.run(run())


def test_all_ranks_get_the_same_job_even_if_one_was_given_up_before_they_asked():
    async def conversation(mailbox):
        first = asyncio.create_task(mailbox.take(0))
        given_up = await mailbox.submit({"id": "a"})
        await mailbox.abandon(given_up)
        await mailbox.submit({"id": "b"})
        await asyncio.sleep(0)
        return await asyncio.gather(first, mailbox.take(1))

    assert in_mailbox(2, conversation) == [(2, {"id": "b"})] * 2


def test_ranks_that_disagree_break_the_lane():
    async def conversation(mailbox):
        number = await mailbox.submit({})
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        answers = await asyncio.gather(
            mailbox.meet(0, number, "reported", {"epoch": 0}),
            mailbox.meet(1, number, "raised", {"outcome": "bug", "error": "e", "traceback": "t"}),
        )
        return answers, await mailbox.next_event(number, 1)

    answers, event = in_mailbox(2, conversation)
    assert answers == ["broken", "broken"]
    assert event == ("broken", {"outcome": "bug", "error": "e", "traceback": "t"})


def test_out_of_memory_on_any_rank_is_what_the_lane_tells():
    async def conversation(mailbox):
        number = await mailbox.submit({})
        await asyncio.gather(mailbox.take(0), mailbox.take(1))
        answers = await asyncio.gather(
            mailbox.meet(0, number, "raised", {"outcome": "bug", "error": "peer gone", "traceback": ""}),
            mailbox.meet(1, number, "raised", {"outcome": "out of memory", "error": "e", "traceback": ""}),
        )
        return answers, await mailbox.next_event(number, 1)

    answers, event = in_mailbox(2, conversation)
    assert answers == ["broken", "broken"]
    assert event == ("broken", {"outcome": "out of memory", "error": "e", "traceback": ""})


def test_ranks_still_busy_with_a_trial_that_was_given_up_hear_so_and_their_events_are_dropped():
    async def conversation(mailbox):
        old = await mailbox.submit({})
        await mailbox.take(0)
        await mailbox.abandon(old)
        new = await mailbox.submit({})
        answer = await mailbox.meet(0, old, "reported", {"epoch": 5})
        await mailbox.meet(0, old, "returned", {"outcome": "pruned"})
        await mailbox.take(0)
        await mailbox.meet(0, new, "reported", {"epoch": 0})
        return answer, await mailbox.next_event(new, 1)

    assert in_mailbox(1, conversation) == ("abandon", ("reported", {"epoch": 0}))
