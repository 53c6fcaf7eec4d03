"""The whole road for real: `python -m search.run` in a process of its own, with its own Ray, and kill -9."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
from joblib import cpu_count  # of a container, too

from tests.tiny_space import write_space
from trainables.run_directory import list_candidates, open_run

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds that a step of a sweep may take on a busy machine before the test gives up


class SearchProcess:
    """`python -m search.run` as a user would start it; `kill` ends it and only what it started."""

    def __init__(self, *args: str, log: Path):
        self.log = open(log, "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.run", *args], cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.time() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"the sweep ended early:\n{Path(self.log.name).read_text()[-3000:]}"
            assert time.time() < end, f"nothing happened:\n{Path(self.log.name).read_text()[-3000:]}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL the driver alone, then end what is left of its own children (Ray's processes)."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=30)

    def finish(self) -> str:
        assert self.process.wait(timeout=PATIENCE) == 0, Path(self.log.name).read_text()[-3000:]
        return Path(self.log.name).read_text()


@pytest.fixture(scope="session")
def pictures(pictures_with_val: Path) -> Path:
    return pictures_with_val


def arguments(run: Path, pictures: Path, space: Path) -> list[str]:
    return [
        "--data", "folder", "--data-dir", str(pictures), "--space", str(space), "--run", str(run),
        "--pruner", "none", "--cpus-per-trial", str(cpu_count()),  # one lane: trials come one after the other
    ]  # fmt: skip


def in_training(run: Path) -> bool:
    """Whether some trial has a checkpoint and is no candidate yet: the moment to kill it."""
    ids = [path.parent.name for path in run.glob("checkpoints/*/state.safetensors")]  # listed first: it goes last
    return any(not (run / "candidates" / id / "candidate.json").exists() for id in ids)


@pytest.mark.parametrize(
    "hits",
    [
        pytest.param(("in training",), id="killed"),
        pytest.param(("at the start", "in training", "ctrl-c"), id="hit three times", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_or_repeated(hits: tuple[str, ...], tmp_path: Path, pictures: Path) -> None:
    run, space, log = tmp_path / "run", tmp_path / "tiny.py", tmp_path / "log"
    write_space(space, trials=3, epochs=30, batch_size=16)
    args = arguments(run, pictures, space)
    candidate_times: dict[str, float] = {}

    def remember() -> dict[str, float]:
        return {p.parent.name: p.stat().st_mtime for p in run.glob("candidates/*/candidate.json")}

    moments: dict[str, Callable[[], bool]] = {
        "at the start": lambda: (run / "run.json").exists() and (run / "study.db").exists(),
        "in training": lambda: len(remember()) >= 1 and in_training(run),
        "ctrl-c": lambda: len(remember()) >= 2 and in_training(run),
    }
    for hit in hits:
        search = SearchProcess(*args, log=log)
        search.wait_until(moments[hit])
        if hit == "ctrl-c":
            search.process.send_signal(signal.SIGINT)
            assert "the same command goes on" in search.finish()
        else:
            search.kill()
        for id, when in candidate_times.items():
            assert remember()[id] == when, f"{id} was trained again"
        candidate_times = remember()
    output = SearchProcess(*args, log=log).finish()

    candidates = list_candidates(open_run(run))
    assert [c.id for c in candidates] == ["0000", "0001", "0002"]
    for candidate in candidates:
        if candidate.id in candidate_times:
            assert candidate_times[candidate.id] == (candidate.path / "candidate.json").stat().st_mtime
        assert [row["epoch"] for row in candidate.info.curve] == list(range(1, 31))
    resumed = [epoch for c in candidates for epoch in c.info.resumed_after_epochs]
    interruptions = sum(hit != "at the start" for hit in hits)
    assert len(resumed) >= interruptions, "interrupted trials went on from their last epoch"
    assert min(resumed) >= 1
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run}/study.db")
    values = {trial.user_attrs["id"]: trial.value for trial in study.trials}
    assert values == {candidate.id: candidate.info.metrics["tune_accuracy"] for candidate in candidates}
    assert not list(run.glob("checkpoints/*/*"))

    # and what a person gets
    assert "ensemble     test accuracy" in output
    chosen = json.loads(next(run.glob("ensembles/*.json")).read_text())
    assert sum(m["weight"] for m in chosen["members"]) == pytest.approx(1)
    assert len(chosen["members"]) <= 9
    report = json.loads((run / "report.json").read_text())
    assert report["test"]["ensemble"]["images"] == 90
    assert report["test"]["ensemble"]["accuracy"] > 0.6
    for candidate in candidates:
        np.testing.assert_allclose(candidate.probs("select").sum(1), 1, atol=1e-4)

    # the same command again has nothing left to do
    before = remember()
    looks = json.loads((run / "looks.json").read_text())
    again = SearchProcess(*args, log=tmp_path / "again").finish()
    assert "trials at a time" not in again
    assert "nothing was left to do" in again
    assert json.loads((run / "looks.json").read_text()) == looks, "nor were the test labels read again"
    assert json.loads(next(run.glob("ensembles/*.json")).read_text())["created"] == chosen["created"]
    assert remember() == before
