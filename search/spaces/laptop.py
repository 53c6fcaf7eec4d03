"""The space for machines without a GPU.

    python -m search.run --data cifar10 --data-dir data/cifar10 --minutes 20
    python -m search.run --data folder --data-dir data/intel96 --minutes 60

Fine-tuning a large backbone would take the whole budget for a trial or two. Here a pretrained one only trains a head on
features that all trials share, and small fast nets learn from scratch beside it.
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 40
BACKBONES = {"speednet": "scratch", "tf_efficientnet_lite0": "if found"}
FIRST = [  # the best of each backbone in a sweep over CIFAR-10
    {"backbone": "speednet", "width": 0.4, "epochs": 4, "scratch_batch_size": 500, "scratch_lr": 0.45, "dropout": 0.05,
     "label_smoothing": 0.05},
    {"backbone": "tf_efficientnet_lite0", "head_batch_size": 64, "head_lr": 0.006, "head_weight_decay": 0.002,
     "dropout": 0.1, "label_smoothing": 0.05},
]  # fmt: skip


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        return small_net(trial, task, backbone, largest=32, widths=(0.25, 0.6), epochs=(3, 5))
    return _head(trial, task, backbone)


def largest_batch(task: Task) -> int:
    """The largest sensible batch: small data sets still get ten steps an epoch."""
    return max(8, task.train_images // 10)


def growing(size: int) -> tuple[int, ...]:
    """Image sizes over the epochs, from half of `size` to `size`: the first epochs, which only have to get near, cost a
    quarter of the last (Howard, 2018; Tan and Le, 2021)."""
    return (size // 2, size * 5 // 8, size * 3 // 4, size * 7 // 8, size, size)


def small_net(
    trial: optuna.Trial, task: Task, backbone: str, largest: int, widths: tuple[float, float], epochs: tuple[int, int]
) -> TrialConfig:
    """The published recipe of small fast nets, with its main settings free; `largest` is a side in pixels."""
    return TrialConfig(
        backbone=backbone,
        image_size=min(task.stored_size, largest),
        width=trial.suggest_float("width", *widths),
        epochs=trial.suggest_int("epochs", *epochs),
        batch_size=min(trial.suggest_categorical("scratch_batch_size", [250, 500, 1000]), largest_batch(task)),
        optimizer="muon",
        lr=trial.suggest_float("scratch_lr", 0.4, 1.5, log=True),
        body_lr=0.32,
        momentum=0.6,
        weight_decay=0.0,  # Muon keeps the filters at their scale
        schedule="triangular",
        warmup=0.05,
        dropout=trial.suggest_float("dropout", 0.0, 0.2),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        lookahead=5,
        flip="alternating",
        crop=max(1, task.stored_size // 16),
        tta="mirror_shift",
        seed=trial.number,
    )


def _head(trial: optuna.Trial, task: Task, backbone: str) -> TrialConfig:
    epochs = 10
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=max(64, min(task.stored_size, 128)),
        epochs=epochs,
        freeze_epochs=epochs,
        batch_size=min(trial.suggest_categorical("head_batch_size", [64, 128, 256]), largest_batch(task)),
        lr=trial.suggest_float("head_lr", 1e-3, 1e-2, log=True),
        weight_decay=trial.suggest_float("head_weight_decay", 1e-3, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.2),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        seed=trial.number,
    )
