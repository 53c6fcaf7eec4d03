"""Which search needs the least device time: ours, random, Optuna's and Ray's standard pairings, on recorded curves.

    python -m benchmarks.search [--seeds 30] [--json FILE]

Replays the table of benchmarks/recorded/curves.npz (336 configurations x 9 epochs, really trained with this project by
`python -m benchmarks.record_curves`) for every seed and method, see benchmarks/recorded/replay.py. Two questions:

- device-seconds until one of the best 1 % of all configurations (by tune log-loss after the last epoch) has been
  trained to its end; a search that has not got there after --cap full trainings counts with the cap;
- test log-loss of the ensemble of at most nine of the candidates finished within --budget full trainings, chosen
  greedily on the select part. The test part is the recording's own: images that neither trained, tuned nor selected.

A full training is the mean device-seconds of a configuration. Intervals are 95 %, bootstrapped over seeds. All methods
sample by TPE (but random) and minimise the tune log-loss where their name does not say otherwise. The defaults of
search.run are promote and objective accuracy.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from benchmarks.recorded.curves import TABLE, Curves, load_curves
from benchmarks.recorded.replay import Method, Optuna, Ours, RandomSearch, RayTune, replay
from ensemble.selection.limits import Limits
from ensemble.selection.selectors import greedy
from ensemble.show import make_console
from search.study.objective import log_losses
from trainables.errors import UserError, exit_on_user_error

METHODS: dict[str, Callable[[Curves, int], Method]] = {
    "ours: promote": lambda curves, seed: Ours(curves, seed, "promote"),
    "ours: promote, objective accuracy": lambda curves, seed: Ours(curves, seed, "promote", "accuracy"),
    "ours: promote, objective ensemble": lambda curves, seed: Ours(curves, seed, "promote", "ensemble"),
    "ours: asha": lambda curves, seed: Ours(curves, seed, "asha"),
    "random": RandomSearch,
    "Optuna: TPE + SuccessiveHalvingPruner": Optuna,
    "Ray: OptunaSearch + ASHAScheduler": RayTune,
}
BASE = "random"
TOP = 0.01
MEMBERS = 9
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class SearchBenchmark:
    """Searches compared on recorded learning curves."""

    seeds: int = 30
    """Repetitions of every method."""
    devices: int = 4
    """Trials at a time."""
    cap: int = 120
    """Full trainings after which a search is given up."""
    budget: int = 30
    """Full trainings before the ensembles are compared."""
    methods: tuple[str, ...] = ()
    """Only those whose name contains one of these."""
    table: Path = TABLE
    """The recorded curves."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def run_once(method: Method, curves: Curves, devices: int, cap: float, budget: float) -> dict[str, Any]:
    """`seconds` until a configuration of the best TOP (None: not within `cap`), and the `log_loss` of the ensemble of
    what was trained within `budget` device-seconds, of how many `candidates`."""
    final = np.nan_to_num(curves.log_loss[:, -1], nan=np.inf)
    good_enough = np.sort(final)[max(1, round(TOP * len(final))) - 1]
    seconds, pool = None, []
    for now, index in replay(method, curves, devices):
        if now <= budget:
            pool.append(index)
        if seconds is None and final[index] <= good_enough and now <= cap:
            seconds = now
        if now > cap or (now > budget and seconds is not None):
            break
    return {"seconds": seconds, "log_loss": ensemble_loss(sorted(set(pool)), curves), "candidates": len(pool)}


def ensemble_loss(pool: list[int], curves: Curves) -> float:
    """Test log-loss of the greedy ensemble chosen among these points on the select part."""
    select, test = curves.true_probs["select"][pool], curves.true_probs["test"][pool]
    two = np.stack([select, 1 - select], axis=2)  # the true class or not: for the log-loss that is all
    weights = greedy(two, np.zeros(select.shape[1], int), Limits(k=MEMBERS))
    return float(log_losses(weights @ test))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(SearchBenchmark, description=__doc__, prog="python -m benchmarks.search")
        if not args.table.exists():
            raise UserError(f"{args.table} is missing; make it with python -m benchmarks.record_curves")
        curves = load_curves(args.table)
        full = float(np.nansum(curves.seconds, axis=1).mean())
        chosen = {m: make for m, make in METHODS.items() if not args.methods or any(part in m for part in args.methods)}
        rows = []
        for name, make in chosen.items():
            runs = [
                run_once(make(curves, seed), curves, args.devices, args.cap * full, args.budget * full)
                for seed in range(args.seeds)
            ]
            reached = [run["seconds"] for run in runs if run["seconds"] is not None]
            seconds = np.array([run["seconds"] or args.cap * full for run in runs])
            losses = np.array([run["log_loss"] for run in runs])
            rows.append(
                {
                    "method": name, "seconds": float(seconds.mean()), "seconds_interval": interval(seconds),
                    "median_seconds": float(np.median(seconds)), "reached": len(reached), "seeds": args.seeds,
                    "log_loss": float(losses.mean()), "log_loss_interval": interval(losses),
                    "candidates": float(np.mean([run["candidates"] for run in runs])), "runs": runs,
                }
            )  # fmt: skip
            print(f"{name}: {seconds.mean():.0f} device-seconds, log-loss {losses.mean():.4f}", flush=True)
        show(rows, args, full)
        if args.json:
            args.json.write_text(json.dumps({"full_training": full, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]], args: SearchBenchmark, full: float) -> None:
    base = next((row["seconds"] for row in rows if row["method"] == BASE), None)
    table = Table(
        title=f"{args.seeds} seeds, {args.devices} devices; a full training takes {full:.2f} device-seconds; "
        f"ensembles after {args.budget} of them"
    )
    table.add_column("search")
    for heading in (
        "s to best 1 %", "95 %", "median", "of random", "reached", "ensemble log-loss", "95 %", "candidates",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        (low, high), (below, above) = row["seconds_interval"], row["log_loss_interval"]
        table.add_row(
            row["method"], f"{row['seconds']:.0f}", f"{low:.0f} to {high:.0f}", f"{row['median_seconds']:.0f}",
            f"{row['seconds'] / base:.2f}" if base else "", f"{row['reached']}/{row['seeds']}",
            f"{row['log_loss']:.4f}", f"{below:.4f} to {above:.4f}", f"{row['candidates']:.1f}",
        )  # fmt: skip
    make_console().print(table)


if __name__ == "__main__":
    main()
