"""Greedy ensemble selection against the peers' own released code, in one run and on the same matrices.

    python -m benchmarks.selection [--json FILE]

Seconds and CPU seconds (of all its processes) of the fit alone, and accuracy and log-loss on as many held-out rows. The
matrices are simulated: models share what is hard about a row and differ in noise and sharpness. Peers have no limit on
members, so what to compare them with is "ours"; "ours, k = 9" is what `ensemble.select --top-k 9 --selector greedy`
does. Then how seconds grow with the number of models, the seconds of `auto` with its claim among 2,000 models x 1,000
rows x 10 classes, which should be below 10, and the seconds and memory of 1,000 models x 10,000 rows x 100
classes in memory-mapped files (needs 4 GB of disk). On a busy machine the CPU seconds are the ones to trust.

Takes about ten minutes on two idle cores, nearly all of them the peers'; `--no-peers` takes one.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.selectors.peers import Job, run_peers
from ensemble.selection.auto import choose_selector
from ensemble.selection.blend import Probs, combine
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.selectors import Score, greedy
from trainables.errors import UserError, exit_on_user_error

LARGE = (1000, 10_000, 100)
MANY = (2000, 1000, 10)
PEERS = ("phem", "phem, all cores", "autogluon.core")
WIDTH = 110  # of the table, also where there is no terminal
REPEATS = 3  # of our own fits, of which the median is told


@dataclass(frozen=True)
class Selection:
    """Seconds and held-out scores of greedy selection, ours and the peers'.

    Attributes:
        models, rows, classes: size of the simulated predictions; as many rows again are held out.
        steps: greedy additions.
        peers: run them, too; the first time installs them under the cache folder.
        large: measure 1,000 models x 10,000 rows x 100 classes.
        json: file for the same figures.
    """

    models: int = 200
    rows: int = 10_000
    classes: int = 10
    steps: int = 50
    peers: bool = True
    large: bool = True
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclass(frozen=True)
class Row:
    """One selector: what it optimised, seconds and CPU seconds of its fit, and its scores on held-out rows."""

    name: str
    score: str
    seconds: float
    cpu_seconds: float
    members: int = 0
    accuracy: float = math.nan
    log_loss: float = math.nan
    error: str = ""


def simulate(model: int, labels: np.ndarray, classes: int) -> np.ndarray:
    """Predictions of one model, float32 (N, C): shared difficulty, own noise, own sharpness. The same for a number."""
    shared = np.random.default_rng(0).normal(size=(len(labels), classes)).astype(np.float32)
    shared[np.arange(len(labels)), labels] += 2
    rng = np.random.default_rng(1 + model)
    noise = rng.normal(size=shared.shape).astype(np.float32)
    logits = (shared + noise * np.float32(rng.uniform(0.5, 2))) * np.float32(rng.uniform(0.5, 1.5))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw_labels(rows: int, classes: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, classes, rows)


def timed(
    probs: Probs, labels: np.ndarray, limits: Limits, score: Score, steps: int
) -> tuple[np.ndarray, float, float]:
    """Weights, and the median seconds and CPU seconds of REPEATS fits."""
    taken = []
    for _ in range(REPEATS):
        start, cpu = time.perf_counter(), time.process_time()
        weights = greedy(probs, labels, limits, score, steps)
        taken.append((time.perf_counter() - start, time.process_time() - cpu))
    seconds, cpu_seconds = np.median(taken, axis=0)
    return weights, float(seconds), float(cpu_seconds)


def compare(args: Selection) -> list[Row]:
    """Ours and the peers' on the same matrices."""
    labels = draw_labels(2 * args.rows, args.classes)
    everything = np.stack([simulate(m, labels, args.classes) for m in range(args.models)])
    probs, held = everything[:, : args.rows], everything[:, args.rows :]
    fit_labels, held_labels = labels[: args.rows], labels[args.rows :]

    def row(name: str, score: str, weights: np.ndarray, seconds: float, cpu_seconds: float) -> Row:
        together = combine(held, weights)
        scores = accuracy(together, held_labels), log_loss(together, held_labels)
        return Row(name, score, seconds, cpu_seconds, int((weights > 0).sum()), *scores)

    rows = []
    scores: tuple[Score, ...] = ("log_loss", "accuracy")
    for score in scores:
        for name, limits in (("ours", Limits(args.models)), ("ours, k = 9", Limits(9))):
            rows.append(row(name, score, *timed(probs, fit_labels, limits, score, args.steps)))
    if args.peers:
        jobs = [Job(peer, score, args.steps) for score in scores for peer in PEERS]
        for job, fit in zip(jobs, run_peers(probs, fit_labels, jobs), strict=True):
            if fit.error:
                rows.append(Row(job.peer, job.score, math.nan, math.nan, error=fit.error))
            else:
                rows.append(row(job.peer, job.score, fit.weights, fit.seconds, fit.cpu_seconds))
    return sorted(rows, key=lambda r: (r.score != "log_loss", not r.name.startswith("ours"), r.name))


def growth(args: Selection) -> list[dict[str, float]]:
    """Seconds of greedy on log-loss, with no limit on members, for 1, 2, 4 and 8 times a quarter of the models."""
    labels = draw_labels(args.rows, args.classes)
    sizes = [max(1, args.models // 4) * factor for factor in (1, 2, 4, 8)]
    probs = [simulate(m, labels, args.classes) for m in range(sizes[-1])]
    points = []
    for size in sizes:
        _, seconds, cpu_seconds = timed(probs[:size], labels, Limits(size), "log_loss", args.steps)
        points.append({"models": size, "seconds": seconds, "cpu_seconds": cpu_seconds})
    return points


def whole() -> dict[str, float]:
    """Seconds and CPU seconds of `auto` among MANY candidates: options, cross-validation and claim."""
    labels = draw_labels(*MANY[1:])
    probs = [simulate(m, labels, MANY[2]) for m in range(MANY[0])]
    start, cpu = time.perf_counter(), time.process_time()
    choose_selector(probs, labels)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def large(args: Selection) -> dict[str, float]:
    """Seconds and peak memory of selecting among LARGE predictions in files, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        labels = draw_labels(*LARGE[1:])
        np.save(f"{folder}/labels.npy", labels)
        for m in range(LARGE[0]):
            np.save(f"{folder}/{m:04d}.npy", simulate(m, labels, LARGE[2]))
        script = (
            "import resource, sys, time, numpy as np, json\n"
            "from ensemble.selection.limits import Limits\n"
            "from ensemble.selection.selectors import greedy\n"
            "folder, models, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
            "start = time.perf_counter()\n"
            "probs = [np.load(f'{folder}/{m:04d}.npy', mmap_mode='r') for m in range(models)]\n"
            "weights = greedy(probs, np.load(f'{folder}/labels.npy'), Limits(models), 'log_loss', steps)\n"
            "seconds = time.perf_counter() - start\n"
            "kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(json.dumps({'seconds': seconds, 'peak_gib': kib / 2**20, 'members': int((weights > 0).sum())}))\n"
        )
        command = [sys.executable, "-c", script, folder, str(LARGE[0]), str(args.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(args: Selection, figures: dict[str, Any]) -> None:
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    size = f"{args.models} models x {args.rows:,} rows x {args.classes} classes, {args.steps} steps"
    title = f"greedy selection: {size}\nscores on {args.rows:,} held-out rows; ratios: this peer's time to ours"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("selector", "on", "seconds", "faster", "CPU s", "less CPU", "members", "accuracy", "log-loss"):
        table.add_column(heading, justify="left" if heading in ("selector", "on") else "right", no_wrap=True)
    ours = {row["score"]: row for row in figures["rows"] if row["name"] == "ours"}
    for row in figures["rows"]:
        if row["error"]:
            table.add_row(row["name"], row["score"], row["error"])
            continue
        times = []
        for key in ("seconds", "cpu_seconds"):
            ratio = "" if row["name"].startswith("ours") else f"{row[key] / ours[row['score']][key]:.0f} x"
            times += [f"{row[key]:.3f}", ratio]
        table.add_row(
            row["name"], row["score"], *times, str(row["members"]),
            f"{row['accuracy']:.2%}", f"{row['log_loss']:.4f}",
        )  # fmt: skip
    console.print(table)
    grown = [
        f"{point['models']:.0f}: {point['seconds']:.3f} ({point['cpu_seconds']:.3f})" for point in figures["growth"]
    ]
    console.print(f"ours on log-loss, seconds (CPU seconds) by number of models: {', '.join(grown)}")
    console.print(
        f"auto with its claim, {MANY[0]:,} models x {MANY[1]:,} rows x {MANY[2]} classes: "
        f"{figures['auto']['seconds']:.1f} s ({figures['auto']['cpu_seconds']:.1f} CPU s)"
    )
    if figures["large"]:
        told = figures["large"]
        console.print(
            f"{LARGE[0]:,} models x {LARGE[1]:,} rows x {LARGE[2]} classes from memory-mapped files: "
            f"{told['seconds']:.1f} s, peak {told['peak_gib']:.1f} GiB (mapped pages included)"
        )


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Selection, description=Selection.__doc__, prog="python -m benchmarks.selection")
        if min(args.models, args.rows, args.steps) < 1 or args.classes < 2:
            raise UserError("--models, --rows and --steps are at least 1, --classes at least 2")
        figures: dict[str, Any] = {"growth": growth(args), "rows": [], "auto": whole(), "large": {}}
        figures["rows"] = [_plain(row) for row in compare(args)]
        if args.large:
            figures["large"] = large(args)
        show(args, figures)
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


def _plain(row: Row) -> dict[str, Any]:
    """JSON has no NaN: what a failed peer did not measure is null."""
    return {key: None if value != value else value for key, value in asdict(row).items()}


if __name__ == "__main__":
    main()
