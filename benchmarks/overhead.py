"""What a trial costs before it trains anything: seconds per no-op trial, one trial at a time.

    python -m benchmarks.overhead [--trials 100] [--peer-trials 10] [--documented-trials 3] [--json FILE]

Every trial reports three epochs and does nothing else; every row has a process and a Ray of its own. `start` is the
time from the call to the end of the first trial (processes, imports: paid once per sweep, Ray itself already running);
`a trial` is the median gap between the ends of the trials after the warm-up, with the range of the middle 80 %. Rows:

- the bare function: called in a loop in this process; what Ray has nothing to do with.
- ours: cluster.tuner.run_trials with one lane (Ray Tune over one Ray Train run that stays).
- Ray's documented pattern: a Tune function that starts a TorchTrainer of one worker per trial, actors not reused.
- OptunaSearch + ASHA: plain function trainables, without Ray Train; and the same with reuse_actors=True, which is
  Tune's floor.

Peers run with Ray's default environment and loggers. Takes about three minutes on two idle cores; other work on the
machine shows in every row.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import optuna
import tyro
from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.table import Table

from cluster.connect import connect, disconnect
from cluster.lane import LaneSpec
from cluster.tuner import run_trials
from trainables.errors import UserError, exit_on_user_error
from trainables.job import HANG_S, Metrics, Outcome, Reporter, Result

Name = Literal["bare", "ours", "documented", "plain", "reused"]
NAMES: tuple[Name, ...] = get_args(Name)

EPOCHS = 3
WARM_UP = 3  # trials left out of `a trial`, where a row has enough of them


@dataclass(frozen=True)
class Overhead:
    """Seconds per no-op trial of ours, of plain functions and of Ray's own patterns.

    Attributes:
        trials: no-op trials for the bare function and for ours, at least 10.
        peer_trials: for OptunaSearch + ASHA, at least 5.
        documented_trials: for Ray's documented pattern, of 12 to 19 s each on two cores; at least 2.
        row: only this one, in this process; its figures, the seconds of each trial's end, go to `json`.
        json: file for the same figures.
    """

    trials: int = 100
    peer_trials: int = 10
    documented_trials: int = 3
    row: Name | None = None
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclass(frozen=True)
class Row:
    """`ends`: seconds from the call to each trial's end, ascending."""

    name: str
    ends: list[float]

    def figures(self) -> dict[str, Any]:
        gaps = np.diff(self.ends)
        gaps = gaps[WARM_UP:] if len(gaps) > 2 * WARM_UP else gaps
        low, high = np.quantile(gaps, [0.1, 0.9])
        return {
            "name": self.name,
            "start_s": self.ends[0],
            "trial_s": statistics.median(gaps.tolist()),
            "range_s": [float(low), float(high)],
            "gaps": len(gaps),
        }


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Overhead, description=Overhead.__doc__, prog="python -m benchmarks.overhead")
        if options.trials < 10 or options.peer_trials < 5 or options.documented_trials < 2:
            raise UserError("too few trials to tell a median; use --trials 10, --peer-trials 5, --documented-trials 2")
        if options.row is None:
            report(measure(options), options.json)
        elif options.json is None:
            raise UserError("--row needs --json FILE, to which its figures go")
        else:
            options.json.write_text(json.dumps(asdict(measure_alone(options.row, options))))


def measure(options: Overhead) -> list[Row]:
    """Every row in a process of its own, with a Ray of its own: what ran before it would slow it."""
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "row.json"
            counts = ("--trials", options.trials, "--peer-trials", options.peer_trials,
                      "--documented-trials", options.documented_trials)  # fmt: skip
            module = [sys.executable, "-m", "benchmarks.overhead"]
            subprocess.run([*module, "--row", name, *map(str, counts), "--json", str(path)], check=True)
            rows.append(Row(**json.loads(path.read_text())))
    return rows


def measure_alone(name: str, options: Overhead) -> Row:
    """One row, in this process."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name == "bare":
        return Row("bare function", bare(options.trials))
    connect(cpus=2)
    try:
        if name == "ours":
            return Row("ours: lanes", ours(options.trials))
        if name == "documented":
            return Row("Ray's documented Tune -> TorchTrainer", documented(options.documented_trials))
        if name == "plain":
            ends = optuna_asha(options.peer_trials, reuse_actors=False)
            return Row("OptunaSearch + ASHA, plain functions", ends)
        return Row("OptunaSearch + ASHA, reuse_actors=True", optuna_asha(options.trials, reuse_actors=True))
    finally:
        disconnect()


def bare(trials: int) -> list[float]:
    begin = time.perf_counter()
    ends = []
    for _ in range(trials):
        noop({}, lambda metrics: False)
        ends.append(time.perf_counter() - begin)
    return ends


def ours(trials: int) -> list[float]:
    sweep = NoopSweep(trials)
    begin = time.perf_counter()
    run_trials(sweep, noop, LaneSpec(workers=1, cpus=1), lanes=1)
    if sweep.reports != EPOCHS * trials or sweep.outcomes != {"finished"}:
        raise RuntimeError(f"{sweep.reports} reports of {EPOCHS * trials}, outcomes {sweep.outcomes}")
    return [end - begin for end in sweep.ends]


def documented(trials: int) -> list[float]:
    return _tune(tune_over_train, tune.TuneConfig(num_samples=trials, max_concurrent_trials=1), {}, trials)


def optuna_asha(trials: int, reuse_actors: bool) -> list[float]:
    config = tune.TuneConfig(
        metric="score",
        mode="max",
        search_alg=OptunaSearch(),
        scheduler=ASHAScheduler(max_t=EPOCHS + 1),
        num_samples=trials,
        max_concurrent_trials=1,
        reuse_actors=reuse_actors,
    )
    return _tune(noop_trainable, config, {"x": tune.uniform(0, 1)}, trials)


@dataclass(frozen=True)
class Noop:
    """A trial without content."""

    id: str
    hang_s: float = HANG_S
    stops_at: tuple[int, ...] = ()
    gpus: float = 0.0
    node: str = ""


def noop(job: Noop, report: Reporter) -> Result:
    for epoch in range(EPOCHS):
        report({"epoch": epoch, "score": 0.5})
    return Result(Outcome.FINISHED)


def noop_trainable(config: dict[str, Any]) -> None:
    for _ in range(EPOCHS):
        tune.report({"score": 0.5})


def tune_over_train(config: dict[str, Any]) -> None:
    """As in Ray's guide "Hyperparameter Tuning with Ray Tune" (of Ray Train)."""
    TorchTrainer(
        noop_worker,
        scaling_config=train.ScalingConfig(num_workers=1),
        run_config=train.RunConfig(
            storage_path=config["folder"],
            name=tune.get_context().get_trial_id(),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # type checkers see Train V1's
        ),
    ).fit()


def noop_worker() -> None:
    for _ in range(EPOCHS):
        train.report({"score": 0.5})


class NoopSweep:
    """A source (see cluster.tuner.JobSource) of trials without content."""

    stopping = False

    def __init__(self, trials: int):
        self.left = trials
        self.reports = 0
        self.outcomes: set[str] = set()
        self.ends: list[float] = []

    def next(self) -> Noop | None:
        self.left -= 1
        return Noop(str(self.left)) if self.left >= 0 else None

    def has_more(self) -> bool:
        return False

    def report(self, id: str, metrics: Metrics) -> bool:
        self.reports += 1
        return False

    def finish(self, id: str, result: Result) -> None:
        self.outcomes.add(result.outcome)
        self.ends.append(time.perf_counter())

    def tick(self) -> None:
        pass


class _Ends(tune.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ends.append(time.perf_counter())


def _tune(trainable: Any, config: tune.TuneConfig, space: dict[str, Any], trials: int) -> list[float]:
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # no status tables on the terminal
    ends = _Ends()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run_config = tune.RunConfig(storage_path=folder, name="overhead", verbose=0, callbacks=[ends])
        begin = time.perf_counter()
        space = {**space, "folder": folder}
        tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run_config).fit()
    if len(ends.ends) != trials:
        raise RuntimeError(f"{len(ends.ends)} of {trials} trials ended well")
    return [end - begin for end in ends.ends]


def report(rows: list[Row], path: Path | None) -> None:
    figures = [row.figures() for row in rows]
    table = Table(title=f"Seconds per no-op trial of {EPOCHS} epochs, one at a time, {os.cpu_count()} cores")
    table.add_column("")
    for column in ("start", "a trial", "middle 80 %", "trials"):
        table.add_column(column, justify="right")
    for row in figures:
        low, high = row["range_s"]
        seconds = f"{row['trial_s']:.2g}" if row["trial_s"] < 1 else f"{row['trial_s']:.1f}"
        start = f"{row['start_s']:.1f}" if row["start_s"] >= 0.05 else "-"
        table.add_row(row["name"], start, seconds, f"{low:.2g} - {high:.2g}", str(row["gaps"]))
    Console(width=max(100, Console().width)).print(table)
    if path is not None:
        path.write_text(json.dumps({"cores": os.cpu_count(), "epochs": EPOCHS, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
