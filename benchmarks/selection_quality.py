"""Which selector helps, and does any: all of them on real pools, fitted on half of the rows, scored on the others.

    python -m benchmarks.selection_quality [--run PATH ...] [--cifar10 DIR] [--intel DIR]
                                         [--trash DIR] [--json FILE]

Pools are sweeps of this project (--run) and scikit-learn's classifiers on digits, on a table and on the three image
folders (see selectors/pools.py). For each pool the halves are drawn 20 times. In every draw the selectors are ranked
by accuracy, log-loss and balanced accuracy on the test half, and compared with the candidate that was most accurate on
the select half. The table gives means over pools of means over draws:

- rank: 1 is best, ties share; "tied" when the 95 % interval of the rank's distance to the best one's holds 0, by a
  bootstrap that draws pools first and then draws of each;
- gain: test accuracy minus the best single's in points, and how much lower the log-loss is in nats;
- worse: share of the draws in which the selector's accuracy, or log-loss, is worse than the best single's.

Our selectors have at most --top-k members, the peers as many as they like. Takes about a quarter of an hour on two idle
cores, of which the peers take all but two minutes (--no-peers); the first time some minutes more, to install the peers
and to train scikit-learn's classifiers.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from benchmarks.selectors.peers import Job, run_peers
from benchmarks.selectors.pools import Predictions, of_run, of_scikit_learn
from ensemble.selection.auto import auto
from ensemble.selection.blend import Blend, tempered
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, balanced_accuracy, log_loss
from ensemble.selection.selectors import accuracy_weighted, best_single, convex, greedy, uniform
from ensemble.selection.stacking import stacking
from trainables.errors import UserError, exit_on_user_error

Selector = Callable[[list[np.ndarray], np.ndarray, Limits], np.ndarray | Blend]


SINGLE = "best single"
SELECTORS: dict[str, Selector] = {
    SINGLE: lambda p, y, limits: best_single(p, y, limits, "accuracy"),
    "auto": auto,
    "greedy brier": lambda p, y, limits: greedy(p, y, limits, "brier"),
    "greedy log_loss": greedy,
    "greedy accuracy": lambda p, y, limits: greedy(p, y, limits, "accuracy"),
    "greedy, temperatures": lambda p, y, limits: tempered(lambda p, y: greedy(p, y, limits), p, y),
    "convex": convex,
    "stacking": stacking,
    "uniform": uniform,
    "accuracy weighted": accuracy_weighted,
}
PEERS = {f"{peer} {score}": (peer, score) for peer in ("phem", "autogluon.core") for score in ("log_loss", "accuracy")}
METRICS = {"accuracy": accuracy, "log_loss": log_loss, "balanced_accuracy": balanced_accuracy}
SHORT = ("acc", "ll", "bal")
SIGNS = (1, -1, 1)  # a higher log-loss is worse
SCALES = np.array([100, -1, 100])  # from a difference to a gain: points, nats, points
PEER_STEPS = 50
BOOTSTRAPS = 2000
WIDTH = 130  # of the tables, also where there is no terminal


@dataclass(frozen=True)
class SelectionQuality:
    """Mean rank of every selector, and of the peers, on real pools.

    Attributes:
        run: run directories of sweeps, each a pool.
        cifar10, intel, trash: image folders with train/<class>/*; without one, its pools are left out.
        draws: how often the halves are drawn.
        top_k: most members of our ensembles.
        select_rows: rows to select on, when that is fewer than half.
        peers: fit them, too; the first time installs them under the cache folder.
        json: file for the same figures, with every draw's scores.
    """

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    cifar10: Path | None = Path("data/cifar10")
    intel: Path | None = Path("data/intel96")
    trash: Path | None = Path("data/trash")
    draws: int = 20
    top_k: int = 9
    select_rows: int | None = None
    peers: bool = True
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclass(frozen=True, eq=False)
class Result:
    """One pool: scores (D draws, S selectors, one for each of METRICS) and mean seconds of a fit, (S,)."""

    pool: str
    models: int
    rows: int
    scores: np.ndarray
    seconds: np.ndarray


def halves(pool: Predictions, draw: int, select_rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row indices to select on and to test on."""
    order = np.random.default_rng(draw).permutation(len(pool.labels))
    half = len(order) // 2
    return np.sort(order[: min(half, select_rows or half)]), np.sort(order[half:])


def working_peers() -> dict[str, tuple[str, str]]:
    """The PEERS that answer; the others are told, and left out."""
    probs, labels = np.full((2, 4, 3), 1 / 3), np.array([0, 1, 2, 0])
    fits = run_peers(probs, labels, [Job(*peer, 1) for peer in PEERS.values()])
    working = {}
    for name, fit in zip(PEERS, fits, strict=True):
        if fit.error:
            print(f"{name} is left out: {fit.error}", file=sys.stderr)
        else:
            working[name] = PEERS[name]
    return working


def measure(pool: Predictions, args: SelectionQuality, peers: dict[str, tuple[str, str]]) -> Result:
    """Fit everything on every draw of one pool."""
    names = [*SELECTORS, *peers]
    drawn = [halves(pool, draw, args.select_rows) for draw in range(args.draws)]
    scores = np.full((args.draws, len(names), len(METRICS)), np.nan)
    seconds = np.zeros((args.draws, len(names)))

    def score(d: int, s: int, blend: Blend) -> None:
        test = drawn[d][1]
        together = blend([p[test] for p in pool.probs])
        scores[d, s] = [metric(together, pool.labels[test]) for metric in METRICS.values()]

    for d, (select, _) in enumerate(drawn):
        part = [np.ascontiguousarray(p[select]) for p in pool.probs]
        for s, selector in enumerate(SELECTORS.values()):
            start = time.perf_counter()
            found = selector(part, pool.labels[select], Limits(args.top_k))
            seconds[d, s] = time.perf_counter() - start
            score(d, s, found if isinstance(found, Blend) else Blend(found))
    if peers:
        jobs = [Job(*peer, PEER_STEPS, select) for select, _ in drawn for peer in peers.values()]
        for i, fit in enumerate(run_peers(pool.probs, pool.labels, jobs)):
            d, s = i // len(peers), len(SELECTORS) + i % len(peers)
            if fit.error:
                raise UserError(f"{names[s]} failed: {fit.error}; see selectors/peers.py, or leave it out: --no-peers")
            seconds[d, s] = fit.seconds
            score(d, s, Blend(fit.weights))
    return Result(pool.name, len(pool.probs), len(pool.labels), scores, seconds.mean(axis=0))


def ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks (D, S, len(METRICS)), the best first; ties share the mean."""
    return np.stack([rankdata(-sign * scores[..., i], axis=1) for i, sign in enumerate(SIGNS)], axis=-1)


def tied_with_best(by_pool: list[np.ndarray]) -> np.ndarray:
    """Which selectors' mean rank cannot be told from the best one's, bool (S,). by_pool: ranks (D, S) of each pool."""
    mean = np.mean([pool.mean(axis=0) for pool in by_pool], axis=0)
    best = int(mean.argmin())
    rng = np.random.default_rng(0)
    distances = np.empty((BOOTSTRAPS, len(mean)))
    for b in range(BOOTSTRAPS):
        some = rng.integers(0, len(by_pool), len(by_pool))
        means = [by_pool[i][rng.integers(0, len(by_pool[i]), len(by_pool[i]))].mean(axis=0) for i in some]
        drawn = np.mean(means, axis=0)
        distances[b] = drawn - drawn[best]
    return np.percentile(distances, 2.5, axis=0) <= 0


def summarise(results: list[Result], names: list[str]) -> list[dict[str, Any]]:
    """One row a selector, in the order of the mean of its ranks."""
    ranked = [ranks(result.scores) for result in results]
    rank = np.mean([r.mean(axis=0) for r in ranked], axis=0)
    tied = np.stack([tied_with_best([r[..., i] for r in ranked]) for i in range(len(METRICS))], axis=-1)
    gains = [(result.scores - result.scores[:, [names.index(SINGLE)]]) * SCALES for result in results]
    gain = np.mean([g.mean(axis=0) for g in gains], axis=0)
    worse = np.mean([(g < 0).mean(axis=0) for g in gains], axis=0)
    seconds = np.mean([result.seconds for result in results], axis=0)
    rows = []
    for s in np.argsort(rank.sum(axis=1), kind="stable").tolist():
        row: dict[str, Any] = {"selector": names[s], "seconds": float(seconds[s])}
        for i, metric in enumerate(METRICS):
            row[metric] = {
                "rank": float(rank[s, i]),
                "tied": bool(tied[s, i]),
                "gain": float(gain[s, i]),
                "worse": float(worse[s, i]),
            }
        rows.append(row)
    return rows


def show(results: list[Result], rows: list[dict[str, Any]], names: list[str], args: SelectionQuality) -> None:
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    single, chosen = names.index(SINGLE), names.index("auto")
    pools = Table(
        title=f"pools, {args.draws} draws of halves each: mean test accuracy", title_justify="left", box=SIMPLE
    )
    for heading in ("pool", "models", "rows", SINGLE, "auto"):
        pools.add_column(heading, justify="left" if heading == "pool" else "right", no_wrap=True)
    for result in results:
        mean = result.scores[..., 0].mean(axis=0)
        pools.add_row(
            result.pool, str(result.models), str(result.rows), f"{mean[single]:.2%}", f"{mean[chosen]:.2%}"
        )  # fmt: skip
    console.print(pools)
    table = Table(title="means over pools; * tied with the best", title_justify="left", box=SIMPLE)
    table.add_column("selector", no_wrap=True)
    for heading in (*(f"{what} {short}" for what in ("rank", "gain", "worse") for short in SHORT), "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        scores = [row[metric] for metric in METRICS]
        table.add_row(
            row["selector"],
            *(f"{score['rank']:.2f}{'*' if score['tied'] else ' '}" for score in scores),
            *(f"{score['gain']:+.{digits}f}" for score, digits in zip(scores, (2, 4, 2), strict=True)),
            *(f"{score['worse']:.1%}" for score in scores),
            f"{row['seconds']:.3f}",
        )
    console.print(table)


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(
            SelectionQuality, description=SelectionQuality.__doc__, prog="python -m benchmarks.selection_quality"
        )
        if args.draws < 2:
            raise UserError(f"--draws is {args.draws}, expected at least 2")
        folders = [
            path if path is not None and (path / "train").is_dir() else None
            for path in (args.cifar10, args.intel, args.trash)
        ]
        peers = working_peers() if args.peers else {}
        names = [*SELECTORS, *peers]
        results = []
        for pool in [*(of_run(path) for path in args.run), *of_scikit_learn(*folders)]:
            start = time.perf_counter()
            results.append(measure(pool, args, peers))
            print(f"{pool.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        rows = summarise(results, names)
        show(results, rows, names, args)
        if args.json is not None:
            draws = {r.pool: {"models": r.models, "rows": r.rows, "scores": r.scores.tolist()} for r in results}
            figures = {"selectors": names, "draws": args.draws, "rows": rows, "pools": draws}
            args.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
