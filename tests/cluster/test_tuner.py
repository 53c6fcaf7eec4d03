"""run_trials with real Ray: Tune, lanes and faults. The sweep is a list of jobs; the targets do no training."""

import dataclasses
import gc
import os
import signal
import time
from pathlib import Path

import pytest
from ray.tune.experiment import Trial

from cluster import tuner
from cluster.connect import connect, disconnect, nodes
from cluster.lane import LaneSpec
from cluster.tuner import Lost, run_trials
from tests.errand import Errand, bridge_over
from trainables.job import Outcome, Result

LANE = LaneSpec(workers=1, cpus=1)


IMPORTABLE = str(Path(__file__).parents[2])  # for Ray's processes


@pytest.fixture(scope="module")
def ray_cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORTABLE)
        dashboard = connect(cpus=2)
    assert [(node.cpus, node.here) for node in nodes()] == [(2, True)]
    assert dashboard.startswith("http://127.0.0.1:")
    yield
    disconnect()


def count_epochs(job, report):
    """Reports epochs, going on from a checkpoint file if there is one."""
    job = job.options
    checkpoint = Path(job["checkpoint"]) if "checkpoint" in job else None
    first = int(checkpoint.read_text()) if checkpoint and checkpoint.exists() else 0
    for epoch in range(first, job["epochs"]):
        while epoch == job.get("held_epoch") and not Path(job["held_until"]).exists():
            time.sleep(0.05)
        if epoch == job.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if checkpoint:
            checkpoint.write_text(str(epoch + 1))
        if report({"epoch": epoch, "pid": os.getpid()}):
            return Result(Outcome.PRUNED)
        time.sleep(job.get("epoch_s", 0))
    if "error" in job:
        raise ValueError(job["error"])
    return Result(Outcome.FINISHED, {"first": first, "pid": os.getpid()})


class Sweep:
    """Hands out jobs; remembers what it is told; may prune, stop or do something at (job, epoch)."""

    def __init__(self, jobs, prune_at=None, stop_at=None, at=None, do=None):
        self.jobs = [Errand(f"{n:04d}", job) for n, job in enumerate(jobs)]
        self.left = list(self.jobs)
        self.prune_at, self.stop_at, self.at, self.do = prune_at or {}, stop_at, at, do
        self.stopping = False
        self.epochs = {job.id: [] for job in self.jobs}
        self.pids = []
        self.results = {}
        self.ticks = 0

    def next(self):
        return self.left.pop(0) if self.left else None

    def has_more(self):
        return bool(self.left)

    def report(self, id, metrics):
        self.epochs[id].append(metrics["epoch"])
        self.pids.append(metrics["pid"])
        if (id, metrics["epoch"]) == self.stop_at:
            self.stopping = True
        if (id, metrics["epoch"]) == self.at:
            self.at = None
            self.do()
        return self.stopping or metrics["epoch"] == self.prune_at.get(id)

    def finish(self, id, result):
        assert id not in self.results
        self.results[id] = result

    def tick(self):
        self.ticks += 1

    @property
    def outcomes(self):
        return [self.results[id].outcome for id in sorted(self.results)]


def kill_tune_actor():
    from ray.util.state import list_actors

    alive = list_actors(filters=[("state", "=", "ALIVE")])
    (actor,) = [actor for actor in alive if "ImplicitFunc" in actor.class_name]
    os.kill(actor.pid, signal.SIGKILL)


def test_trials_run_in_order_in_one_lane_with_pruning_and_bugs_between(ray_cluster, capfd):
    jobs = [{"epochs": 3}, {"epochs": 10_000, "epoch_s": 0.02}, {"epochs": 2, "error": "two\nlines"}, {"epochs": 0}]
    sweep = Sweep(jobs * 3, prune_at={"0001": 2, "0005": 0, "0009": 1})
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["finished", "pruned", "bug", "finished"] * 3
    assert list(sweep.epochs.values()) == [
        [0, 1, 2], [0, 1, 2], [0, 1], [],
        [0, 1, 2], [0], [0, 1], [],
        [0, 1, 2], [0, 1], [0, 1], [],
    ]  # fmt: skip
    assert sweep.results["0002"].error == "ValueError: two"
    assert "in count_epochs" in sweep.results["0002"].traceback
    assert len(set(sweep.pids)) == 1
    assert sweep.ticks > 2
    assert capfd.readouterr() == ("", "")  # quiet


def retried(bridge, trial_id):
    """The next job, once the machines have been looked at again."""
    bridge.looked = float("-inf")
    return bridge.next(trial_id).job


class Weighing(Sweep):
    """Looks at what Tune has kept of the trials before."""

    kept = None

    def finish(self, id, result):
        super().finish(id, result)
        there = [thing for thing in gc.get_objects() if isinstance(thing, Trial) and thing.is_finished()]
        self.kept = {name for trial in there for name in trial.metric_analysis}
        self.ended = len(there)


def test_tune_keeps_no_statistics_of_a_trial(ray_cluster):
    sweep = Weighing([{"epochs": 2}] * 3)
    run_trials(sweep, count_epochs, LANE, 1)
    assert sweep.ended >= 2
    assert sweep.kept == set()


def test_what_a_lost_lane_leaves_goes_first_and_the_count_starts_anew_with_every_epoch():
    sweep = Sweep([{"epochs": 1}] * 3)
    bridge = bridge_over(sweep, lambda: 2)
    first, second = bridge.next("a").job, bridge.next("b").job
    assert bridge.next("c") is None  # two lanes
    for _ in range(tuner.MOST_LOSSES):
        bridge.lose("a", Lost("gone"))
        assert sweep.results == {}
        assert retried(bridge, "a") == first
    assert not bridge.hear("a", {"epoch": 1, "pid": 0})
    bridge.lose("a", Lost("gone"))
    assert retried(bridge, "a") == first
    bridge.finish("b", Result(Outcome.FINISHED))
    for _ in range(tuner.MOST_LOSSES - 1):
        assert not bridge.hear("a", {"epoch": 1, "pid": 0})  # a repeated epoch is no progress
        bridge.lose("a", Lost("gone"))
        assert retried(bridge, "a") == first
    for _ in range(tuner.MOST_LOSSES):
        assert not bridge.hear("a", {"epoch": 1.4, "pid": 0})  # a part of one is, at first
        bridge.lose("a", Lost("gone"))
        assert retried(bridge, "a") == first
    bridge.lose("a", Lost("gone"))
    assert sweep.results.pop(second.id) == Result(Outcome.FINISHED)
    assert sweep.results.pop(first.id) == Result(Outcome.LOST_NODE, error="gone")
    last = retried(bridge, "d")
    bridge.lose("d", Lost("gone"))
    assert bridge.has_more()
    bridge.interrupt()
    assert sweep.results[last.id] == Result(Outcome.INTERRUPTED)


def test_a_job_that_finds_no_room_waits_and_has_lost_nothing(capfd):
    sweep = Sweep([{"epochs": 1}])
    bridge = bridge_over(sweep, lambda: 1)
    job = bridge.next("a").job
    for _ in range(tuner.MOST_LOSSES + 1):
        bridge.lose("a", Lost("no room", started=False))
        assert retried(bridge, "a") == job
    assert f"{job.id} waits: no room" in capfd.readouterr().err
    bridge.finish("a", Result(Outcome.FINISHED))
    assert sweep.results == {job.id: Result(Outcome.FINISHED)}


def test_failures_in_a_row_without_an_epoch_end_everything():
    """Before: a broken installation failed thousands of trials, one after another."""
    source = Sweep([{"epochs": 1}] * 20)
    bridge = bridge_over(source, lambda: 1)
    for n in range(tuner.MOST_BARREN - 1):
        assert bridge.next(str(n)) is not None
        bridge.hear(str(n), Result(Outcome.BUG, error="ImportError: no torch"))
    bridge.next("a")
    assert not bridge.hear("a", {"epoch": 0, "pid": 0})
    bridge.hear("a", Result(Outcome.FINISHED))
    for n in range(tuner.MOST_BARREN):
        assert bridge.error is None
        bridge.next(f"x{n}")
        bridge.hear(f"x{n}", Result(Outcome.BUG, error="ImportError: no torch"))
    assert "ImportError: no torch" in str(bridge.error)
    assert source.stopping
    assert not bridge.has_more()


def test_lanes_may_come_and_go():
    lanes = 0
    sweep = Sweep([{"epochs": 1}] * 5)
    bridge = bridge_over(sweep, lambda: lanes)
    assert bridge.next("a") is None
    handed_out = []
    for lanes in (1, 3, 2):
        bridge.looked = float("-inf")  # the number is looked at twice a second
        handed_out.append([bridge.next(f"{lanes}{n}") is not None for n in range(3)])
    assert handed_out == [[True, False, False], [True, True, False], [False, False, False]]


def test_a_lost_lane_is_not_replaced_before_its_machine_would_be_missed(monkeypatch):
    now = 100.0
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now)
    bridge = bridge_over(Sweep([{"epochs": 1}] * 5), lambda: 3, notice_s=30)
    first = [bridge.next(id).job for id in "abc"][1]
    bridge.lose("b", Lost("gone"))
    assert bridge.next("d") is None
    bridge.finish("a", Result(Outcome.FINISHED))
    assert bridge.next("d").job == first  # on a lane that is surely there
    assert bridge.next("e") is None
    now += 31
    assert bridge.next("e") is not None


def test_all_lanes_of_a_lost_machine_are_one_failure(monkeypatch):
    """Before: a machine with six lanes or more ended the sweep when it was lost."""
    now = 100.0
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now)
    bridge = bridge_over(Sweep([{"epochs": 1}] * 20), lambda: 9, notice_s=30)
    for n in range(9):
        assert bridge.next(str(n)) is not None
    for n in range(8):
        bridge.lose(str(n), Lost("gone"))
    assert bridge.error is None
    assert bridge.barren == 1
    now += 31
    bridge.next("more")
    bridge.lose("more", Lost("gone"))
    assert bridge.barren == 2


def test_a_job_that_lost_its_lane_is_not_waited_for_beyond_its_deadline():
    """Before: with no machine left the driver waited without end, whatever --minutes said."""
    source, lanes = Sweep([{"epochs": 1}]), 1
    bridge = bridge_over(source, lambda: lanes)
    job = dataclasses.replace(bridge.next("a").job, deadline=time.time() - 1)
    bridge.running["a"] = dataclasses.replace(bridge.running["a"], job=job)
    bridge.lose("a", Lost("gone"))
    lanes, bridge.counted = 0, float("-inf")
    assert bridge.next("b") is None
    assert bridge.has_more()
    bridge.ticked = float("-inf")
    bridge.tick()
    assert source.results == {job.id: Result(Outcome.INTERRUPTED)}
    assert not bridge.has_more()


def test_nothing_to_do_needs_no_lane(ray_cluster):
    sweep = Sweep([])
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.results == {}


DRIVER = """
import sys
from trainables.job import LaneRequest
from cluster.capacity import Lanes
from cluster.tuner import run_trials
from tests.cluster.test_tuner import LANE, Sweep, count_epochs

class Announced(Sweep):
    # Says when its trial is held; not from `report`, where a signal would still end the trial with that epoch.
    def tick(self):
        if not self.ticks and 2 in self.epochs["0000"]:
            self.ticks += 1
            print("ready", flush=True)

held = {"held_epoch": 3, "held_until": sys.argv[1] + "/go"}
job = {"epochs": 10_000, "epoch_s": 0.5, "checkpoint": sys.argv[1] + "/epoch", **held}
sweep = Announced([job, {"epochs": 1}])
try:
    with Lanes(LaneRequest(cpus=1)) as lanes:
        run_trials(sweep, count_epochs, LANE, lambda: {id: min(1, count) for id, count in lanes.now(None).items()})
finally:
    print([str(outcome) for outcome in sweep.outcomes], sweep.stopping, sweep.pids[0])
"""
LONG = 12  # seconds that the epoch goes on after the first Ctrl-C
