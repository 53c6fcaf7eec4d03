"""Train every configuration of the grid in recorded/curves.py once, and keep the learning curves in curves.npz.

    python -m benchmarks.record_curves --data-dir data/cifar10

336 configurations of 9 epochs on 1,000 CIFAR-10 images of 12 pixels: about ten minutes of one core. Going on after a
stop is running it again. `seconds` are CPU seconds of one thread, so other work on the machine hardly disturbs them.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.recorded.curves import EPOCHS, POINTS, QUANTUM, SELECT, TABLE, TEST, TRAIN, TUNE, Point, config_of
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, draw
from trainables.errors import exit_on_user_error
from trainables.train import Diverged, train


@dataclass(frozen=True)
class RecordCurves:
    """Record the learning curves that benchmarks.search replays."""

    data_dir: Path | None = None
    """Where CIFAR-10 lies; downloaded when not given."""
    parts: Path = Path("runs/curves")
    """Folder for what is recorded so far, one file per configuration."""
    out: Path = TABLE
    """The table, written when all configurations are there."""


def splits_of(data: Data) -> tuple[Splits, np.ndarray]:
    """Splits whose select part is followed by a test part of its own, and the labels by split."""
    sizes = [TRAIN, TUNE, SELECT + TEST]
    train_part, tune, rest = draw(data.labels, [size / len(data.labels) for size in sizes], seed=0)
    return Splits(train_part, tune, rest, False, data.fingerprint), data.labels


def record(point: Point, data: Data, splits: Splits) -> dict[str, np.ndarray]:
    """Train the configuration at `point`: arrays as in Curves, for one configuration."""
    scores = np.full((2, EPOCHS), np.nan, np.float32)
    clock = np.full(EPOCHS + 1, np.nan)
    clock[0] = time.process_time()

    def report(metrics: dict) -> bool:
        epoch = metrics["epoch"]
        scores[:, epoch - 1] = metrics["tune_accuracy"], metrics["tune_log_loss"]
        clock[epoch] = time.process_time()
        return False

    try:
        probs = train(config_of(point), data, splits, report, device="cpu").probs
    except Diverged:
        last = int(np.isfinite(scores[0]).sum())
        clock[last + 1] = time.process_time()  # what it cost to find out
        probs = {name: np.full((size, len(data.classes)), 1e-9) for name, size in (("tune", TUNE), ("select", 2000))}
    codes = {}
    for name, indices in (("tune", splits.tune), ("select", splits.select)):
        true = probs[name][np.arange(len(indices)), data.labels[indices]]
        codes[name] = np.clip(np.round(-np.log(np.maximum(true, 1e-9)) / QUANTUM), 0, 255).astype(np.uint8)
    order = np.random.default_rng(0).permutation(SELECT + TEST)  # `draw` sorts by index, not at random
    return {
        "accuracy": scores[0], "log_loss": scores[1], "seconds": np.diff(clock).astype(np.float32),
        "tune": codes["tune"], "select": codes["select"][order[:SELECT]], "test": codes["select"][order[SELECT:]],
    }  # fmt: skip


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(RecordCurves, description=__doc__, prog="python -m benchmarks.record_curves")
        torch.set_num_threads(1)
        data = prepare("cifar10", args.data_dir)
        splits, _ = splits_of(data)
        args.parts.mkdir(parents=True, exist_ok=True)
        files = [args.parts / f"{index:04d}.npz" for index in range(len(POINTS))]
        # in random order, so that a part of the table already says something about all of it
        for index in np.random.default_rng(0).permutation(len(POINTS)):
            if not files[index].exists():
                part = record(POINTS[index], data, splits)
                temporary = files[index].with_suffix(".tmp.npz")
                np.savez(temporary, **part)
                os.replace(temporary, files[index])
                done = sum(file.exists() for file in files)
                took = part["seconds"].sum()
                print(f"{done}/{len(files)} tune log-loss {part['log_loss'][-1]:.3f}, {took:.1f} s", flush=True)
        parts = [dict(np.load(file, allow_pickle=False)) for file in files]
        np.savez_compressed(args.out, **{name: np.stack([part[name] for part in parts]) for name in parts[0]})
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
