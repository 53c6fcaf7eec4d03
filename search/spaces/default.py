"""The default space: pretrained backbones fine-tuned on GPUs, and a fast net from scratch beside them.

python -m search.run --data folder --data-dir PHOTOS --minutes 120
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 40
BACKBONES = {
    "speednet": "scratch",
    "resnet50": "if found",
    "efficientnet_b0": "if found",
    "convnext_tiny": "if found",
    "vit_small_patch16_224": "if found",
    "tf_efficientnet_lite0": "if found",
}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    return _from_scratch(trial, task, backbone) if task.backbones[backbone] is None else _tuned(trial, task, backbone)


def _from_scratch(trial: optuna.Trial, task: Task, backbone: str) -> TrialConfig:
    """The published recipe of small fast nets, with its main settings free."""
    return TrialConfig(
        backbone=backbone,
        image_size=min(task.stored_size, 64),
        width=trial.suggest_float("width", 0.75, 2.0),
        epochs=trial.suggest_int("scratch_epochs", 8, 24),
        batch_size=trial.suggest_categorical("scratch_batch_size", [250, 500, 1000]),
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


def _tuned(trial: optuna.Trial, task: Task, backbone: str) -> TrialConfig:
    epochs = trial.suggest_int("tuned_epochs", 5, 12)
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=224,
        epochs=epochs,
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3),
        batch_size=trial.suggest_categorical("tuned_batch_size", [32, 64, 128]),
        lr=trial.suggest_float("tuned_lr", 1e-4, 3e-3, log=True),
        body_lr=trial.suggest_float("body_lr", 0.03, 1.0, log=True),
        weight_decay=trial.suggest_float("tuned_weight_decay", 1e-3, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.2),
        drop_path=trial.suggest_float("drop_path", 0.0, 0.2),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        mixup=trial.suggest_categorical("mixup", [0.0, 0.2]),
        flip="random",
        crop=max(1, task.stored_size // 16),
        tta="mirror",
        seed=trial.number,
    )
