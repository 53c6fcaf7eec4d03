"""What thousands of trials cost the driver: its memory and the seconds per trial, early in a sweep and at its end.

    python -m benchmarks.scale [--trials 5000] [--sampler random] [--json FILE]
    python -m benchmarks.scale --trials 20000 --lanes 1000 --simulated

A sweep of no-op trials on the real path: search.sweep on a SQLite study, cluster.tuner, and two lanes of real Ray.
Every trial reports three epochs and leaves a candidate of predictions alone (100 images, 10 classes), which the
ensemble so far takes in; nothing is trained. Prints, for the hundred trials before number 1,000 and for the last
hundred of those after whose end another one began: the driver's proportional memory (PSS), the mean seconds from one
trial's end to the next, and what part of them the driver spent on proposals, the sampler's own work told apart, and on
the other calls of the sweep. What is left is Ray's, and the lanes' writing.

--simulated leaves Ray away: one other process writes the candidates of all lanes and sends their reports. Then many
lanes cost nothing but what they cost the driver.

The sampler is random by default: it measures this project. What TPE adds is Optuna's work on the trials that it is
told of (search.study.values.MOST); --sampler tpe shows it.
"""

import json
import multiprocessing
import os
import queue
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import tyro
from rich.table import Table
from upath import UPath

from cluster.connect import connect, disconnect
from cluster.lane import LaneSpec
from cluster.tuner import TICK_S, JobSource, run_trials
from ensemble.running import EnsembleSoFar
from ensemble.show import make_console
from search.board import WatchedSweep
from search.budget import Budget
from search.config import Sampler
from search.study.mirror import open_mirror
from search.sweep import Sweep
from trainables.config import TrialConfig
from trainables.errors import UserError, exit_on_user_error
from trainables.job import DataSource, Job, Outcome, Reporter, Result
from trainables.run.records import Records
from trainables.run_directory import CandidateInfo, write_candidate
from trainables.storage import write_array, write_json

EPOCHS = 3
IMAGES, CLASSES = 100, 10
EARLY, WINDOW = 1000, 100  # the early trials that the last ones are compared with, and how many of each
BAR = 1.2  # how much more the end may cost


@dataclass(frozen=True)
class Scale:
    """A sweep of many no-op trials: does the last one cost more than the thousandth?"""

    trials: int = 5000
    """In all; with fewer than two thousand, "early" is half of them."""
    lanes: int = 2
    """Trials at a time."""
    simulated: bool = False
    """No Ray: one process stands for all lanes."""
    sampler: Sampler = "random"
    """Optuna sampler."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


@dataclass(frozen=True)
class Row:
    """Means over the trials before number `trial`: seconds per trial, and of them in the driver's parts."""

    trial: int
    memory_mib: float
    seconds: float
    proposals: float
    sampler: float
    rest: float


class Meter:
    """A `search.board.Board` that notes the time whenever a trial ends, and memory at two of them."""

    def __init__(self, marks: tuple[int, int]) -> None:
        self.marks = marks  # the trials that rows are about
        self.spent: Counter[str] = Counter()  # seconds, by part of the driver
        self.ends: list[tuple[float, Counter[str]]] = []  # time, spent by then
        self.memory: dict[int, float] = {}  # trials ended -> MiB

    def started(self, id: str, config: TrialConfig) -> None: ...
    def epoch(self, id: str, metrics: dict[str, Any]) -> None: ...
    def refresh(self) -> None: ...

    def ended(self, id: str, outcome: str, result: dict[str, Any]) -> None:
        if outcome != "finished":
            raise RuntimeError(f"trial {id} ended as {outcome}: {result}")
        self.ends.append((time.perf_counter(), Counter(self.spent)))
        if len(self.ends) in self.marks:  # every time would cost more than the trial does
            self.memory[len(self.ends)] = memory_mib()

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its seconds added to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += time.perf_counter() - begin

        return call

    def row(self, trial: int) -> Row:
        window = min(WINDOW, trial // 2)
        (begin, before), (end, after) = self.ends[trial - window - 1], self.ends[trial - 1]
        spent = {part: (after[part] - before[part]) / window for part in ("next", "sampler", "rest")}
        proposals = spent["next"] - spent["sampler"]
        return Row(trial, self.memory[trial], (end - begin) / window, proposals, spent["sampler"], spent["rest"])


def memory_mib() -> float:
    """Proportional set size of this process in MiB: shared pages count by their share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def noop(job: Job, report: Reporter) -> Result:
    """A trial without training: three epochs' reports and a candidate."""
    random = np.random.default_rng(int(job.id))
    probs = random.dirichlet(np.ones(CLASSES), IMAGES).astype(np.float32)
    metrics = {"tune_accuracy": float(random.random()), "tune_log_loss": float(random.random())}
    curve = []
    for epoch in range(1, EPOCHS + 1):
        curve.append({"epoch": epoch, **metrics, "seconds": 0.001 * epoch})
        report(curve[-1])
    seconds = 0.001 * EPOCHS
    info = CandidateInfo(
        job.id, job.config, metrics, tuple(curve), "finished", seconds=seconds, split_fingerprint="none"
    )
    write_candidate(UPath(job.run), info, probs)
    return Result(Outcome.FINISHED, metrics, seconds)


def simulated(job: Job) -> tuple[list[dict[str, Any]], Result]:
    """`noop` and what it reported."""
    reports: list[dict[str, Any]] = []
    result = noop(job, reports.append)  # type: ignore[arg-type]  # which nobody stops
    return reports, result


def run_simulated(source: JobSource, lanes: int) -> None:
    """What cluster.tuner.run_trials does with a source, without Ray and its faults."""
    ended: queue.SimpleQueue[tuple[Job, Future[Any]]] = queue.SimpleQueue()
    running, ticked = 0, 0.0
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        while source.has_more() or running:
            while running < lanes and (job := source.next()) is not None:
                running += 1
                pool.submit(simulated, job).add_done_callback(lambda done, job=job: ended.put((job, done)))  # type: ignore[misc]
            job, done = ended.get()
            running -= 1
            reports, result = done.result()
            for metrics in reports:
                source.report(job.id, metrics)
            source.finish(job.id, result)
            if time.monotonic() - ticked > TICK_S:
                ticked = time.monotonic()
                source.tick()


def suggest(trial: optuna.Trial, left: float) -> TrialConfig:
    """Six parameters, as a space of ordinary size has."""
    return TrialConfig(
        backbone=trial.suggest_categorical("backbone", ["speednet", "keras_cnn", "vit_scratch"]),
        lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
        width=trial.suggest_float("width", 0.125, 1.0),
        batch_size=trial.suggest_int("batch_size", 32, 512, log=True),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.3),
        epochs=EPOCHS,
        seed=trial.number,
    )


def measure(options: Scale) -> list[Row]:
    """Run the sweep in a temporary run directory; an early row and the last one."""
    meter = Meter((min(EARLY, options.trials // 2), options.trials - options.lanes))
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        run = UPath(folder)
        write_array(run / "select_labels.npy", np.random.default_rng(0).integers(0, CLASSES, IMAGES))
        write_json(run / "run.json", {"classes": [str(c) for c in range(CLASSES)], "split_fingerprint": "none"})
        live, records = EnsembleSoFar(run, 9), Records(run)
        sweep = Sweep(
            records, run, DataSource("", "none"), Budget(options.trials), {}, suggest, options.sampler, pruner="asha",
            live=live, mirror=open_mirror(run, None, "scale", True, records),
        )  # fmt: skip
        sampling = sweep.proposals.sampling
        sampling.ask = meter.timed("sampler", sampling.ask)  # type: ignore[method-assign]
        for name, part in {"next": "next", "has_more": "rest", "report": "rest", "finish": "rest"}.items():
            setattr(sweep, name, meter.timed(part, getattr(sweep, name)))
        source = WatchedSweep(sweep, meter)
        if options.simulated:
            run_simulated(source, options.lanes)
        else:
            connect(cpus=options.lanes)
            try:
                run_trials(source, noop, LaneSpec(workers=1, cpus=1), options.lanes)
            finally:
                disconnect()
    if len(meter.ends) != options.trials:
        raise RuntimeError(f"{len(meter.ends)} of {options.trials} trials ended")
    return [meter.row(mark) for mark in meter.marks]


def show(options: Scale, early: Row, last: Row) -> None:
    table = Table(
        title=f"Driver of {options.trials} no-op trials, {options.lanes} at a time, sampler {options.sampler}, "
        f"{os.cpu_count()} cores{', lanes simulated' * options.simulated}"
    )
    headings = ("", "trials/s", "ms a trial", "of these: proposals", "sampler", "reports and ends", "memory, MiB")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in (early, last):
        parts = [f"{1000 * part:.1f}" for part in (row.seconds, row.proposals, row.sampler, row.rest)]
        table.add_row(f"around trial {row.trial}", f"{1 / row.seconds:.1f}", *parts, f"{row.memory_mib:.0f}")
    ratios = [f"{getattr(last, key) / getattr(early, key):.2f} x" for key in ("seconds", "memory_mib")]
    table.add_row(f"the end against the beginning (bar: {BAR} x)", "", ratios[0], "", "", "", ratios[1])
    make_console().print(table)
    if options.json is not None:
        figures = {"options": {**asdict(options), "json": None}, "early": asdict(early), "last": asdict(last)}
        options.json.write_text(json.dumps({"cores": os.cpu_count(), **figures}, indent=1) + "\n")


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Scale, description=Scale.__doc__, prog="python -m benchmarks.scale")
        if options.trials < 40:
            raise UserError(f"--trials is {options.trials}, expected at least 40: a mean over fewer says little")
        show(options, *measure(options))


if __name__ == "__main__":
    main()
