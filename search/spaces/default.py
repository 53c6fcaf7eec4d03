"""The default space: pretrained backbones fine-tuned on GPUs, and a fast net from scratch beside them.

python -m search.run --data folder --data-dir PHOTOS --minutes 120
"""

import optuna

from search.config import Task
from search.spaces.laptop import largest_batch, small_net
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
# Usual settings of fine-tuning: a new head at 1e-3, the body ten times slower, more so for a transformer.
_TUNED = {
    "tuned_epochs": 8, "freeze_epochs": 1, "tuned_batch_size": 64, "tuned_lr": 1e-3, "body_lr": 0.1,
    "tuned_weight_decay": 0.02, "dropout": 0.1, "drop_path": 0.1, "label_smoothing": 0.1, "mixup": 0.0,
}  # fmt: skip
FIRST = [
    {"backbone": "speednet", "width": 1.0, "epochs": 12, "scratch_batch_size": 500, "scratch_lr": 0.6, "dropout": 0.05,
     "label_smoothing": 0.1},
    {"backbone": "convnext_tiny", **_TUNED},
    {"backbone": "efficientnet_b0", **_TUNED},
    {"backbone": "vit_small_patch16_224", **_TUNED, "body_lr": 0.05},
    {"backbone": "resnet50", **_TUNED},
]  # fmt: skip


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        return small_net(trial, task, backbone, largest=64, widths=(0.75, 2.0), epochs=(8, 24))
    return _tuned(trial, task, backbone)


def _tuned(trial: optuna.Trial, task: Task, backbone: str) -> TrialConfig:
    epochs = trial.suggest_int("tuned_epochs", 5, 12)
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=224,
        epochs=epochs,
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3),
        batch_size=min(trial.suggest_categorical("tuned_batch_size", [32, 64, 128]), largest_batch(task)),
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
