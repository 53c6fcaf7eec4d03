"""A table of recorded learning curves: every configuration of a small grid, really trained once, epoch by epoch.

`python -m benchmarks.record_curves` makes it; `python -m benchmarks.search` replays it. The settings are the train
command's own, on a part of CIFAR-10 small enough for the whole grid to be trained on a core in minutes.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from trainables.config import TrialConfig

TABLE = Path(__file__).parent / "curves.npz"
EPOCHS = 9
TRAIN, TUNE, SELECT, TEST = 1000, 500, 1000, 1000  # images, all drawn from CIFAR-10's train part
SIDE = 12
QUANTUM = 0.03  # nats: the log-probability of the true class is kept as a byte, at most 7.65 below zero

# Every network has its own scale of lr: the middle of the seven levels is about the best.
NETWORKS = {
    "speednet muon": TrialConfig(
        backbone="speednet", optimizer="muon", body_lr=0.32, momentum=0.6, weight_decay=0.0, schedule="triangular",
        warmup=0.1, lookahead=5, lr=0.4,
    ),
    "speednet adamw": TrialConfig(backbone="speednet", optimizer="adamw", weight_decay=0.01, lr=0.016),
    "keras_cnn": TrialConfig(backbone="keras_cnn", optimizer="adamw", weight_decay=0.01, lr=0.006),
}  # fmt: skip
GRID: dict[str, tuple] = {
    "network": tuple(NETWORKS),
    "lr": tuple(float(2.0**step) for step in range(-4, 3)),  # times the network's own
    "width": (0.125, 0.25),
    "batch_size": (50, 100),
    "label_smoothing": (0.0, 0.2),
    "crop": (0, 3),
}
Point = tuple[int, ...]  # a level of each part of the grid
POINTS: list[Point] = list(product(*(range(len(levels)) for levels in GRID.values())))


def config_of(point: Point) -> TrialConfig:
    """The hyperparameters at a point of the grid."""
    values = {name: levels[level] for (name, levels), level in zip(GRID.items(), point, strict=True)}
    base = NETWORKS[values.pop("network")].to_dict()
    return TrialConfig.from_dict(
        {**base, **values, "lr": base["lr"] * values["lr"], "image_size": SIDE, "epochs": EPOCHS, "flip": "alternating",
         "precision": "fp32", "seed": POINTS.index(point)}
    )  # fmt: skip


@dataclass(frozen=True)
class Curves:
    """What was recorded; the first axis is that of POINTS.

    Attributes:
        accuracy, log_loss: tune scores after each epoch, float (P, EPOCHS); NaN from where training diverged.
        seconds: CPU seconds of one core that each epoch took, its tune scores included, float (P, EPOCHS).
        true_probs: split name (tune, select, test) -> probability that the fully trained network gave to the true
            class, float (P, images). The log-loss of any weighted average of networks follows from it.
    """

    accuracy: np.ndarray
    log_loss: np.ndarray
    seconds: np.ndarray
    true_probs: dict[str, np.ndarray]


def load_curves(path: Path = TABLE) -> Curves:
    with np.load(path, allow_pickle=False) as file:
        split = {name: np.exp(-QUANTUM * file[name].astype(np.float64)) for name in ("tune", "select", "test")}
        return Curves(*(file[name].astype(float) for name in ("accuracy", "log_loss", "seconds")), split)
