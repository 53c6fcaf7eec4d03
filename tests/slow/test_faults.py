"""A sweep on digits that is hit by SIGKILL twenty times: its driver, the process that trains, and Ray's own workers.

Takes about eight minutes on two cores. The moments are random in the sweep's progress rather than in time, so that all
of them come before its end on any machine; NINEFOLD_FAULT_SEED chooses others.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
import torch
from upath import UPath

from cluster.capacity import RAY_DIED
from tests.tiny_space import write_space
from trainables.models.weights import load_model
from trainables.run.records import read_records
from trainables.run_directory import list_candidates, open_run
from trainables.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
TRIALS, EPOCHS, KILLS = 8, 20, 20
MOST_BETWEEN = 5  # epochs between two kills
SEED = int(os.environ.get("NINEFOLD_FAULT_SEED", "0"))
PATIENCE = 400  # seconds without an epoch, or until the last process has gone, before the test gives up
SLOW_START = "The current node timed out during startup"  # Ray's words
LONGEST_PAUSE = 0.3  # seconds between the moment's epoch and the kill


class Drivers:
    """The command, started again as often as it dies; knows every process that it has started."""

    def __init__(self, args: list[str], log: Path) -> None:
        self.args, self.log = args, log
        self.started: set[psutil.Process] = set()
        self.starts = self.slow_starts = self.lost_rays = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "search.run", *self.args], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def workers(self) -> dict[str, list[psutil.Process]]:
        """Ray's worker processes by what they are: those that train are RayTrainWorkers."""
        found: dict[str, list[psutil.Process]] = {"trial": [], "ray": []}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.started.add(child)
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    name = child.cmdline()[0]
                    if name.startswith("ray::"):
                        found["trial" if "RayTrainWorker" in name else "ray"].append(child)
        return found

    def mind(self) -> None:
        """The driver lives; or has told why not, and the command is repeated.

        Ray dies with any of its agents, and gives up on starting after 30 s on a busy machine.
        """
        if self.process.poll() is not None:
            slow, lost = SLOW_START in self.tail(), RAY_DIED in self.tail()
            assert slow or lost, f"the driver ended with {self.process.returncode}:\n{self.tail()}"
            self.slow_starts += slow
            self.lost_rays += lost
            self.start()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def reports(run: Path) -> int:
    """Epochs that are done: as the records know those of trials that have ended, and checkpoints those of others."""
    epochs = {record.id: len(record.scores) for record in read_records(UPath(run))}
    for path in run.glob("checkpoints/*/state.safetensors"):
        with contextlib.suppress(OSError):  # the trial has just ended
            state = read_checkpoint(UPath(path), torch.device("cpu"))
            if state is not None:
                epochs[path.parent.name] = max(epochs.get(path.parent.name, 0), state["progress"]["epoch"])
    return sum(epochs.values())


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Drivers]:
    space = tmp_path / "space.py"
    write_space(space, TRIALS, EPOCHS, batch_size=64, first=[{"lr": 0.01}])
    args = ["--space", str(space), "--run", str(tmp_path / "run"), "--pruner", "none", "--cpus-per-trial", "2"]
    drivers = Drivers(args, tmp_path / "log")
    try:
        yield drivers
    finally:
        drivers.workers()
        drivers.process.kill()
        for process in drivers.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def hit(drivers: Drivers, victim: str, choice: random.Random) -> str:
    """Kill the driver, or one of the workers of that kind as soon as there is one; returns what was killed."""
    if victim == "driver":
        drivers.workers()
        drivers.process.send_signal(signal.SIGKILL)
        drivers.process.wait()
        drivers.start()
        return victim
    end = time.time() + PATIENCE
    while True:
        found = sorted(drivers.workers()[victim], key=lambda process: process.pid)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            names = {process: process.cmdline()[0] for process in found}
            busy = [process for process in found if "IDLE" not in names[process]]
            process = choice.choice(busy)
            process.kill()
            return names[process]
        drivers.mind()
        assert time.time() < end, f"no {victim} appears:\n{drivers.tail()}"
        time.sleep(0.05)


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_repeat_nothing(drivers: Drivers, tmp_path: Path) -> None:
    run = tmp_path / "run"
    choice = random.Random(SEED)
    victims = choice.sample(["driver"] * 6 + ["trial"] * 7 + ["ray"] * 7, KILLS)
    killed: list[str] = []
    for victim in victims:
        # after the last kill something is trained first: on a fast machine all would fall on processes that start
        moment = reports(run) + choice.randint(1, MOST_BETWEEN)
        last, since = -1, time.time()
        while (done := reports(run)) < moment:
            drivers.mind()
            last, since = (done, time.time()) if done != last else (last, since)
            assert time.time() - since < PATIENCE, f"nothing happens after {killed}:\n{drivers.tail()}"
            time.sleep(0.02)
        time.sleep(choice.uniform(0, LONGEST_PAUSE))
        drivers.mind()
        killed.append(hit(drivers, victim, choice))
        print(f"{moment:4} {killed[-1]}", flush=True)
    while drivers.process.wait(timeout=2 * PATIENCE) != 0:
        drivers.mind()
    assert len(killed) == KILLS
    assert drivers.starts - drivers.slow_starts - drivers.lost_rays == 1 + killed.count("driver") == 7

    records = read_records(UPath(run))
    assert [record.outcome for record in records] == ["finished"] * TRIALS
    finished = {record.id: record for record in records}
    assert [record.id for record in records if record.params == {"lr": 0.01}] == ["0000"]  # it was to be the first
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run}/study.db")
    assert {t.user_attrs["id"]: t.value for t in study.trials} == {id: record.value for id, record in finished.items()}
    candidates = list_candidates(open_run(run))
    assert [candidate.id for candidate in candidates] == sorted(finished)
    for candidate in candidates:
        trial = finished[candidate.id]
        assert [row["epoch"] for row in candidate.info.curve] == list(range(1, EPOCHS + 1))
        assert [epoch for epoch, _ in trial.scores] == list(range(1, EPOCHS + 1))
        assert trial.value == pytest.approx(candidate.info.metrics["tune_accuracy"])
        load_model(candidate)
        for split in ("tune", "select"):
            np.testing.assert_allclose(candidate.probs(split).sum(1), 1, atol=1e-4)
    assert sum(bool(candidate.info.resumed_after_epochs) for candidate in candidates) >= TRIALS // 2
    left = [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.parent.parent.name == "checkpoints"]
    assert not left
    assert "ensemble     test accuracy" in drivers.tail()

    _, alive = psutil.wait_procs(drivers.started, timeout=PATIENCE)  # some of Ray's linger for two minutes
    assert [process.name() for process in alive] == []
