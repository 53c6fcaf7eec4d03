"""A sweep on digits that is hit again and again: its driver, the process that trains, Ray's workers and its raylet are
killed, and where its run and study lie in stores, these go away for some seconds.

The moments are random in the sweep's progress rather than in time, so that all of them come before its end on any
machine. NINEFOLD_FAULT_SEED chooses others, NINEFOLD_FAULTS how many (20; about ten minutes on two cores).
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from trainables.run_directory import list_candidates, open_run, study_name
from trainables.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
HITS = int(os.environ.get("NINEFOLD_FAULTS", "20"))
TRIALS, EPOCHS = max(4, HITS * 8 // 20), 20
MOST_BETWEEN = 5  # epochs between two kills
SEED = int(os.environ.get("NINEFOLD_FAULT_SEED", "0"))
PATIENCE = 400  # seconds without an epoch, or until the last process has gone, before the test gives up
SLOW_START = "The current node timed out during startup"  # Ray's words
NOT_REACHED = "cannot be reached ("  # ours, of a run in a store
LONGEST_AWAY = 8.0  # seconds that a store is away
LONGEST_PAUSE = 0.3  # seconds between the moment's epoch and the kill


class Drivers:
    """The command, started again as often as it dies; knows every process that it has started."""

    def __init__(self, args: list[str], log: Path) -> None:
        self.args, self.log = args, log
        self.started: set[psutil.Process] = set()
        self.starts = self.slow_starts = self.lost_rays = self.away = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "search.run", *self.args], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def workers(self) -> dict[str, list[psutil.Process]]:
        """Ray's worker processes by what they are: those that train are RayTrainWorkers."""
        found: dict[str, list[psutil.Process]] = {"trial": [], "ray": [], "raylet": []}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.started.add(child)
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    name = child.cmdline()[0]
                    if child.name() == "raylet":
                        found["raylet"].append(child)
                    if name.startswith("ray::"):
                        found["trial" if "RayTrainWorker" in name else "ray"].append(child)
        return found

    def mind(self) -> None:
        """The driver lives; or has told why not, and the command is repeated.

        Ray dies with any of its agents, and gives up on starting after 30 s on a busy machine; and a command whose
        run cannot be reached when it starts says so and ends.
        """
        if self.process.poll() is not None:
            slow, lost = SLOW_START in self.tail(), RAY_DIED in self.tail()
            away = NOT_REACHED in self.tail()
            assert slow or lost or away, f"the driver ended with {self.process.returncode}:\n{self.tail()}"
            self.slow_starts += slow
            self.lost_rays += lost
            self.away += away
            self.start()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def reports(run: UPath) -> int:
    """Epochs that are done: as the records know those of trials that have ended, and checkpoints those of others."""
    epochs = {record.id: len(record.scores) for record in read_records(run)}
    checkpoints: list[UPath] = []
    with contextlib.suppress(FileNotFoundError):  # the last one went away while s3fs listed them
        checkpoints = list(run.glob("checkpoints/*/state.safetensors"))
    for path in checkpoints:
        with contextlib.suppress(OSError):  # the trial has just ended
            state = read_checkpoint(path, torch.device("cpu"))
            if state is not None:
                epochs[path.parent.name] = max(epochs.get(path.parent.name, 0), state["progress"]["epoch"])
    return sum(epochs.values())


@contextlib.contextmanager
def drivers_of(run: UPath, folder: Path, *args: str) -> Iterator[Drivers]:
    """The drivers of a sweep whose files are in `folder`; in the end nothing that they started is left."""
    space = folder / "space.py"
    write_space(space, TRIALS, EPOCHS, batch_size=8, first=[{"lr": 0.01}])  # epochs of half a second
    options = ["--space", str(space), "--run", str(run), "--pruner", "none", "--cpus-per-trial", "2", *args]
    drivers = Drivers(options, folder / "log")
    try:
        yield drivers
    finally:
        drivers.workers()
        drivers.process.kill()
        for process in drivers.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def hit(drivers: Drivers, victim: str, choice: random.Random) -> str:
    """Kill the driver, or one of the processes of that kind as soon as there is one; returns what was killed."""
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
            return names[process].rpartition("/")[2]
        drivers.mind()
        assert time.time() < end, f"no {victim} appears:\n{drivers.tail()}"
        time.sleep(0.05)


def storm(drivers: Drivers, run: UPath, away: dict[str, Callable[[float], threading.Thread]]) -> list[str]:
    """Hit the sweep HITS times, and wait for its end; returns what was hit. away: sends a store away for seconds."""
    choice = random.Random(SEED)
    kinds = ["driver", "trial", "ray", "raylet", *away]
    # each kind comes, the rest at random
    victims = choice.sample(kinds + choice.choices(kinds, [5, 6, 6, 2, *(3 for _ in away)], k=HITS - len(kinds)), HITS)
    struck: list[str] = []
    for victim in victims:
        # after the last one something is trained first: on a fast machine all would fall on processes that start
        moment = reports(run) + choice.randint(1, MOST_BETWEEN)
        last, since = -1, time.time()
        while (done := reports(run)) < moment:
            drivers.mind()
            last, since = (done, time.time()) if done != last else (last, since)
            assert time.time() - since < PATIENCE, f"nothing happens after {struck}:\n{drivers.tail()}"
            time.sleep(0.02 if not away else 0.3)
        time.sleep(choice.uniform(0, LONGEST_PAUSE))
        drivers.mind()
        if victim in away:
            away[victim](
                choice.uniform(1, LONGEST_AWAY)
            ).join()  # the sweep goes on meanwhile, this test could not look
            struck.append(victim)
        else:
            struck.append(hit(drivers, victim, choice))
        print(f"{moment:4} {struck[-1]}", flush=True)
    while drivers.process.wait(timeout=4 * PATIENCE) != 0:
        drivers.mind()
    assert len(struck) == HITS
    return struck


def check(drivers: Drivers, run: UPath, struck: list[str], storage: str) -> None:
    """No finished trial was lost or repeated, none is left running, and the study says what is on disk."""
    assert drivers.starts - drivers.slow_starts - drivers.lost_rays - drivers.away == 1 + struck.count("driver")
    records = read_records(run)
    assert [record.outcome for record in records] == ["finished"] * TRIALS
    finished = {record.id: record for record in records}
    assert [record.id for record in records if record.params == {"lr": 0.01}] == ["0000"]  # it was to be the first
    study = optuna.load_study(study_name=study_name(run), storage=storage)
    assert {t.user_attrs["id"]: t.value for t in study.trials} == {id: record.value for id, record in finished.items()}
    candidates = list_candidates(open_run(str(run)))
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
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith(".tmp") or path.parent.parent.name == "checkpoints"]
    assert "ensemble     test accuracy" in drivers.tail()

    # psutil.wait_procs fails on a process that goes away between two of its steps
    end = time.time() + PATIENCE  # some of Ray's linger for two minutes
    while (alive := [process for process in drivers.started if process.is_running()]) and time.time() < end:
        time.sleep(0.5)
    assert alive == []
