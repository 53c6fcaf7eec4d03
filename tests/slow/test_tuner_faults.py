"""run_trials with real Ray: deaths, interrupts and many trials."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cluster import tuner
from cluster.capacity import RAY_DIED
from cluster.tuner import run_trials
from tests.cluster.test_tuner import DRIVER, IMPORTABLE, LANE, LONG, Sweep, count_epochs, kill_tune_actor, ray_cluster  # noqa: F401


def test_the_job_of_a_killed_tune_actor_goes_on_in_a_new_lane(ray_cluster, tmp_path):
    job = {"epochs": 6, "epoch_s": 0.3, "checkpoint": str(tmp_path / "epoch")}
    sweep = Sweep([job, {"epochs": 1}], at=("0000", 2), do=kill_tune_actor)
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["finished", "finished"]
    assert sweep.results["0000"].metrics["first"] >= 3
    assert len(set(sweep.pids)) == 2
    with pytest.raises(ProcessLookupError):  # the orphaned lane does not train on beside the new one
        os.kill(sweep.pids[0], 0)
    assert sweep.epochs["0000"][-1] == 5


def test_a_job_under_which_lanes_die_again_and_again_is_given_up(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "MOST_LOSSES", 1)
    job = {"epochs": 5, "epoch_s": 0.3, "checkpoint": str(tmp_path / "epoch"), "die_at": 2}
    sweep = Sweep([job, {"epochs": 1}])
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["lost node", "finished"]
    assert sweep.epochs["0000"] == [0, 1]
    assert len(set(sweep.pids)) == 2  # the first died after two epochs, the second before any, and so did its job


def test_a_sweep_that_is_stopping_starts_nothing_more_and_interrupts_what_runs(ray_cluster):
    sweep = Sweep([{"epochs": 2}, {"epochs": 10_000, "epoch_s": 0.1}, {"epochs": 2}], stop_at=("0001", 1))
    run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["finished", "interrupted"]
    assert sweep.epochs["0001"] == [0, 1]


def test_an_exception_of_the_sweep_comes_out_unchanged(ray_cluster):
    def fail():
        raise KeyError("no such trial")

    sweep = Sweep([{"epochs": 3}, {"epochs": 3}], at=("0000", 1), do=fail)
    with pytest.raises(KeyError, match="no such trial"):
        run_trials(sweep, count_epochs, LANE, lanes=1)
    assert sweep.outcomes == ["interrupted"]


def test_two_lanes_keep_their_workers(ray_cluster):
    sweep = Sweep([{"epochs": 3, "epoch_s": 0.05}] * 40)
    run_trials(sweep, count_epochs, LANE, lanes=2)
    assert sweep.outcomes == ["finished"] * 40
    assert len(set(sweep.pids)) == 2


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
    end = time.monotonic() + 60
    while psutil.pid_exists(int(pid)):  # the process that trained; on a busy machine it dies a moment later
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_driver_whose_ray_has_died_does_not_wait_for_it(driver):
    (raylet,) = (child for child in psutil.Process(driver.pid).children() if child.name() == "raylet")
    raylet.kill()  # it dies as well with any of its agents
    out, err = driver.communicate(timeout=60)
    assert f"UserError: {RAY_DIED}" in err
    assert driver.returncode != 0
    assert "['interrupted'] True" in out  # Ray, too, has had something to say
