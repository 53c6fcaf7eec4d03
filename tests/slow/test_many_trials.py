"""Thousands of trials on simulated lanes that die, join and leave, under drivers that are killed: none is lost.

Everything but Ray is real: the sweep, its records and candidates on disk, and what stands between them and Tune.
"""

import random
import time
from pathlib import Path

import psutil
import pytest
from upath import UPath

from cluster.tuner import Lost
from search.sweep import Sweep
from tests.errand import bridge_over
from tests.hand_sweep import LABELS, scores, sweep
from trainables.config import TrialConfig
from trainables.job import Job, Outcome, Result
from trainables.run.records import Stage, read_records
from trainables.run_directory import CandidateInfo, list_candidates, write_candidate
from trainables.storage import StorageLost, exists

TRIALS, SEED = 5000, 11
KILL_EVERY, LANES = 600, 12


class Lanes:
    """Simulated lanes: a step of one is an epoch of its trial, its end, or its death."""

    def __init__(self, s: Sweep, choice: random.Random) -> None:
        self.sweep, self.choice, self.size = s, choice, LANES
        self.bridge = bridge_over(s, lambda: self.size)
        self.busy: dict[str, tuple[Job, int]] = {}
        self.started = 0

    def step(self) -> None:
        choice, bridge = self.choice, self.bridge
        if choice.random() < 0.02:  # machines join and leave
            self.size = choice.randint(1, 2 * LANES)
        bridge.looked = float("-inf")
        lane = f"lane-{self.started}"
        running = bridge.next(lane)
        if running is not None:
            self.started += 1
            self.busy[lane] = (running.job, 0)  # type: ignore[assignment]
        if not self.busy:
            return
        lane = choice.choice(sorted(self.busy))
        job, epoch = self.busy[lane]
        luck = choice.random()
        if luck < 0.05:
            bridge.lose(lane, Lost("the machine is gone"))
            del self.busy[lane]
        elif exists(self.sweep.run / "candidates" / job.id / "candidate.json"):  # as run_trial does
            self._end(lane, Result(Outcome.FINISHED, scores(accuracy(job.config))))
        elif luck < 0.055:
            self._end(lane, Result(choice.choice([Outcome.BUG, Outcome.DIVERGED, Outcome.OUT_OF_MEMORY]), error="x"))
        elif luck < 0.056:
            self._end(lane, Result(Outcome.STORAGE_LOST, error="the store is away"))
        elif epoch < job.config.epochs:
            self.busy[lane] = (job, epoch + 1)
            if bridge.hear(lane, scores(accuracy(job.config) * (epoch + 1) / 6, epoch + 1)):
                del self.busy[lane]
        else:
            write(self.sweep.run, job)
            if luck < 0.1:  # killed between the candidate and its result: the next lane finds it
                bridge.lose(lane, Lost("just now"))
                del self.busy[lane]
                return
            self._end(lane, Result(Outcome.FINISHED, scores(accuracy(job.config))))

    def _end(self, lane: str, result: Result) -> None:
        self.bridge.hear(lane, result)
        del self.busy[lane]


def accuracy(config: TrialConfig) -> float:
    return max(0.0, 1 - abs(config.lr - 0.01)) * 0.9 + 0.1 * (config.seed % 7) / 7


def write(run: UPath, job: Job) -> None:
    right = accuracy(job.config)
    probs = [[right, 1 - right] if label == 0 else [1 - right, right] for label in LABELS]
    metrics = {"tune_accuracy": right, "tune_log_loss": 1 - right, "select_log_loss": 1 - right}
    curve = tuple({**scores(right * (e + 1) / 6, e + 1), "seconds": e + 1.0} for e in range(job.config.epochs))
    write_candidate(
        run, CandidateInfo(job.id, job.config, metrics, curve, "finished", split_fingerprint="f"), probs, probs
    )


def memory() -> float:
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.slow
def test_every_trial_is_accounted_for(tmp_path: Path) -> None:
    choice, drivers, used = random.Random(SEED), 0, {}
    began = time.time()
    while True:
        drivers += 1
        s = sweep(tmp_path, trials=TRIALS, pruner="promote", sampler="tpe")
        lanes, until = Lanes(s, choice), s.counted + choice.randint(KILL_EVERY // 2, KILL_EVERY)
        while (lanes.bridge.has_more() or lanes.busy) and s.counted < max(until, 1):
            lanes.step()
            if lanes.bridge.error is not None:
                assert isinstance(lanes.bridge.error, StorageLost)
                lanes.bridge.interrupt()
                break
        else:
            if not lanes.bridge.has_more() and not lanes.busy:
                break
            # else it is killed here, with all its lanes
        used[s.counted] = memory()
        print(f"{s.counted:5} trials, driver {drivers}, {memory():.0f} MiB, {time.time() - began:.0f} s", flush=True)
    s.close()
    assert drivers > TRIALS / KILL_EVERY

    records = read_records(UPath(tmp_path))
    assert [record.number for record in records] == list(range(len(records)))
    assert sum(record.counts for record in records) == TRIALS
    assert not [record.id for record in records if record.stage is Stage.RUNNING]
    finished = {record.id: record for record in records if record.outcome is Outcome.FINISHED}
    candidates = list_candidates(UPath(tmp_path))
    assert [candidate.id for candidate in candidates] == sorted(finished)
    for candidate in candidates:
        assert finished[candidate.id].value == candidate.info.metrics["tune_accuracy"]
        assert finished[candidate.id].config == candidate.info.config
    assert s.mirror is not None
    there = {trial.user_attrs["id"]: trial.value for trial in s.mirror.study.get_trials(deepcopy=False)}
    assert there == {record.id: record.value for record in records if record.stage is Stage.ENDED}
    marks = sorted(used)
    early = next(mark for mark in marks if mark > TRIALS / 5)
    growth = 1024 * (used[marks[-1]] - used[early]) / (marks[-1] - early)
    assert growth < 25, f"{growth:.0f} KiB a trial"
