"""run_trials with real Ray: Tune, lanes and faults. The sweep is a list of jobs; the targets do no training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.connect import connect, disconnect, nodes
from search import tuner
from search.lanes import RAY_DIED
from search.tuner import run_trials
from trainables.worker import NOT_STARTED, LaneSpec

LANE = LaneSpec(workers=1, cpus=1)


IMPORTABLE = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])  # for Ray's processes


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
            return {"outcome": "pruned"}
        time.sleep(job.get("epoch_s", 0))
    if "error" in job:
        raise ValueError(job["error"])
    return {"outcome": "finished", "first": first, "pid": os.getpid()}


class Sweep:
    """Hands out jobs; remembers what it is told; may prune, stop or do something at (job, epoch)."""

    def __init__(self, jobs, prune_at=None, stop_at=None, at=None, do=None):
        self.jobs = [{"id": f"{n:04d}", **job} for n, job in enumerate(jobs)]
        self.left = list(self.jobs)
        self.prune_at, self.stop_at, self.at, self.do = prune_at or {}, stop_at, at, do
        self.stopping = False
        self.epochs = {job["id"]: [] for job in self.jobs}
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
        return [self.results[id]["outcome"] for id in sorted(self.results)]


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
    assert sweep.results["0002"]["error"] == "ValueError: two"
    assert "in count_epochs" in sweep.results["0002"]["traceback"]
    assert len(set(sweep.pids)) == 1
    assert sweep.ticks > 2
    assert capfd.readouterr() == ("", "")  # quiet


@pytest.mark.slow
def test_the_job_of_a_killed_tune_actor_goes_on_in_a_new_lane(ray_cluster, tmp_path):
    job = {"epochs": 6, "epoch_s": 0.3, "checkpoint": str(tmp_path / "epoch")}
    sweep = Sweep([job, {"epochs": 1}], at=("0000", 2), do=kill_tune_actor)
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["finished", "finished"]
    assert sweep.results["0000"]["first"] >= 3
    assert len(set(sweep.pids)) == 2
    with pytest.raises(ProcessLookupError):  # the orphaned lane does not train on beside the new one
        os.kill(sweep.pids[0], 0)
    assert sweep.epochs["0000"][-1] == 5


@pytest.mark.slow
def test_a_job_under_which_lanes_die_again_and_again_is_given_up(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "MAX_LOSSES", 1)
    job = {"epochs": 5, "epoch_s": 0.3, "checkpoint": str(tmp_path / "epoch"), "die_at": 2}
    sweep = Sweep([job, {"epochs": 1}])
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["lost node", "finished"]
    assert sweep.epochs["0000"] == [0, 1]
    assert len(set(sweep.pids)) == 2  # the first died after two epochs, the second before any, and so did its job


def test_what_a_lost_lane_leaves_goes_first_and_the_count_starts_anew_with_every_epoch():
    sweep = Sweep([{"epochs": 1}] * 3)
    bridge = tuner._Bridge(sweep, lambda: 2)
    first, second = bridge.next("a"), bridge.next("b")
    assert bridge.next("c") is None  # two lanes
    for _ in range(tuner.MAX_LOSSES):
        bridge.lose("a", "gone")
        assert sweep.results == {}
        assert bridge.next("a") == first
    assert not bridge.hear("a", {"metrics": {"epoch": 1, "pid": 0}})
    bridge.lose("a", "gone")
    assert bridge.next("a") == first
    bridge.finish("b", {"outcome": "finished"})
    for _ in range(tuner.MAX_LOSSES - 1):
        bridge.lose("a", "gone")
        assert bridge.next("a") == first
    bridge.lose("a", "gone")
    assert sweep.results.pop(second["id"]) == {"outcome": "finished"}
    assert sweep.results.pop(first["id"]) == {"outcome": "lost node", "error": "gone"}
    last = bridge.next("d")
    bridge.lose("d", "gone")
    assert bridge.has_more()
    bridge.interrupt()
    assert sweep.results[last["id"]] == {"outcome": "interrupted"}


def test_a_job_that_finds_no_room_waits_and_has_lost_nothing(capfd):
    sweep = Sweep([{"epochs": 1}])
    bridge = tuner._Bridge(sweep, lambda: 1)
    job = bridge.next("a")
    for _ in range(tuner.MAX_LOSSES + 1):
        bridge.lose("a", f"LaneLost: {NOT_STARTED} within 300 s")
        assert bridge.next("a") == job
    assert f"{job['id']} waits: LaneLost: {NOT_STARTED}" in capfd.readouterr().err
    bridge.finish("a", {"outcome": "finished"})
    assert sweep.results == {job["id"]: {"outcome": "finished"}}


def test_lanes_may_come_and_go():
    lanes = 0
    sweep = Sweep([{"epochs": 1}] * 5)
    bridge = tuner._Bridge(sweep, lambda: lanes)
    assert bridge.next("a") is None
    handed_out = []
    for lanes in (1, 3, 2):
        bridge.counted = float("-inf")  # the number is looked at twice a second
        handed_out.append([bridge.next(f"{lanes}{n}") is not None for n in range(3)])
    assert handed_out == [[True, False, False], [True, True, False], [False, False, False]]


def test_a_lost_lane_is_not_replaced_before_its_machine_would_be_missed(monkeypatch):
    now = 100.0
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now)
    bridge = tuner._Bridge(Sweep([{"epochs": 1}] * 5), lambda: 3, notice_s=30)
    first = [bridge.next(id) for id in "abc"][1]
    bridge.lose("b", "gone")
    assert bridge.next("d") is None
    bridge.finish("a", {"outcome": "finished"})
    assert bridge.next("d") == first  # on a lane that is surely there
    assert bridge.next("e") is None
    now += 31
    assert bridge.next("e") is not None


@pytest.mark.slow
def test_a_sweep_that_is_stopping_starts_nothing_more_and_interrupts_what_runs(ray_cluster):
    sweep = Sweep([{"epochs": 2}, {"epochs": 10_000, "epoch_s": 0.1}, {"epochs": 2}], stop_at=("0001", 1))
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["finished", "interrupted"]
    assert sweep.epochs["0001"] == [0, 1]


def test_nothing_to_do_needs_no_lane(ray_cluster):
    sweep = Sweep([])
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.results == {}


@pytest.mark.slow
def test_an_exception_of_the_sweep_comes_out_unchanged(ray_cluster):
    def fail():
        raise KeyError("no such trial")

    sweep = Sweep([{"epochs": 3}, {"epochs": 3}], at=("0000", 1), do=fail)
    with pytest.raises(KeyError, match="no such trial"):
        run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["interrupted"]


@pytest.mark.slow
def test_two_lanes_keep_their_workers(ray_cluster):
    sweep = Sweep([{"epochs": 3, "epoch_s": 0.05}] * 40)
    run_trials(sweep, count_epochs, LANE, lanes=2)
    assert sweep.outcomes == ["finished"] * 40
    assert len(set(sweep.pids)) == 2


DRIVER = """
import sys
from cluster.connect import connect, disconnect
from search.config import SearchConfig
from search.lanes import Lanes
from search.tuner import run_trials
from test_tuner import LANE, Sweep, count_epochs

class Announced(Sweep):
    # Says when its trial is held; not from `report`, where a signal would still end the trial with that epoch.
    def tick(self):
        if not self.ticks and 2 in self.epochs["0000"]:
            self.ticks += 1
            print("ready", flush=True)

connect(cpus=1)
lanes = Lanes(SearchConfig())
held = {"held_epoch": 3, "held_until": sys.argv[1] + "/go"}
job = {"epochs": 10_000, "epoch_s": 0.5, "checkpoint": sys.argv[1] + "/epoch", **held}
sweep = Announced([job, {"epochs": 1}])
try:
    run_trials(sweep, count_epochs, LANE, lambda: lanes.now(None))
finally:
    disconnect()
    print(sweep.outcomes, sweep.stopping, sweep.pids[0])
"""
LONG = 12  # seconds that the epoch goes on after the first Ctrl-C


@pytest.fixture
def driver(request, tmp_path):
    """A driver whose only trial is held in its fourth epoch until the file "go" appears.

    With a true parameter it starts as a shell's background job does: SIGINT is ignored.
    """
    ignore = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if getattr(request, "param", False) else None
    # Its own process group, all of which gets the signal, as a terminal's Ctrl-C does.
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": IMPORTABLE},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
        preexec_fn=ignore,
    )  # fmt: skip
    try:
        assert driver.stdout.readline() == "ready\n", driver.communicate()
        yield driver
    finally:
        driver.kill()


@pytest.mark.slow  # tests/test_pipeline.py, too, has a Ctrl-C, in a short epoch
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_one_ctrl_c_or_sigterm_ends_the_sweep_when_the_running_epoch_has_ended(driver, sign, tmp_path):
    (os.killpg if sign == signal.SIGINT else os.kill)(driver.pid, sign)
    assert driver.stderr.readline() == tuner.STOPPING + "\n"
    time.sleep(LONG)
    assert driver.poll() is None
    assert (tmp_path / "epoch").read_text() == "3"
    (tmp_path / "go").touch()
    out, err = driver.communicate(timeout=60)
    assert (driver.returncode, err) == (0, "")
    assert out.startswith("['interrupted'] True")
    assert int((tmp_path / "epoch").read_text()) >= 4  # it may have begun the next ones before it heard


@pytest.mark.slow
@pytest.mark.parametrize("driver", [False, True], indirect=True, ids=["foreground", "background"])
def test_a_second_ctrl_c_does_not_wait_for_the_epoch(driver, tmp_path):
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.stderr.readline() == tuner.STOPPING + "\n"
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert driver.returncode != 0
    outcome, stopping, pid = out.split()
    assert (outcome, stopping) == ("['interrupted']", "True")
    assert (tmp_path / "epoch").read_text() == "3"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.slow
def test_a_driver_whose_ray_has_died_does_not_wait_for_it(driver):
    (raylet,) = (child for child in psutil.Process(driver.pid).children() if child.name() == "raylet")
    raylet.kill()  # it dies as well with any of its agents
    out, err = driver.communicate(timeout=60)
    assert f"UserError: {RAY_DIED}" in err
    assert driver.returncode != 0
    assert "['interrupted'] True" in out  # Ray, too, has had something to say
