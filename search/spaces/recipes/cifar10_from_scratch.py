"""A small CNN from scratch, which may wait for plateaus, against a fine-tuned VGG16 and others.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space cifar10_from_scratch

Source: CIFAR-10 test 83 % with the small CNN, whose lr fell on plateaus and which stopped early; VGG16 and others
beside it. Ours, by the first trial alone, on two CPU cores: select 85.1 % of 5,000 images (results/seeds).

Without the hub's weights the from-scratch networks run alone.
"""

from dataclasses import replace

import optuna

from search.config import Task
from search.spaces.auto import growing, largest_batch, small_net
from trainables.config import TrialConfig

TRIALS = 16
BACKBONES = {"simple_norm_dropout": "scratch", "vgg16": "if found", "mobilenetv2_100": "if found"}
FIRST = [
    {"backbone": "simple_norm_dropout", "plateau": False, "epochs": 8, "scratch_batch_size": 250,
     "scratch_lr": 0.4, "scratch_dropout": 0.1, "scratch_label_smoothing": 0.05, "width": 0.25},
]  # fmt: skip


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        waits = trial.suggest_categorical("plateau", [False, True])
        net = small_net(trial, task, backbone, largest=32, widths=(0.25, 0.25), epochs=(8, 30))
        return replace(
            net, progressive=growing(net.image_size), schedule="plateau" if waits else "triangular", patience=6
        )
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=224 if task.device == "cuda" else 64,
        epochs=trial.suggest_int("tuned_epochs", 4, 10),
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3),
        batch_size=min(trial.suggest_categorical("batch_size", [32, 64, 128]), largest_batch(task)),
        lr=trial.suggest_float("tuned_lr", 1e-4, 1e-3, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.1, 0.5),
        schedule="plateau",
        warmup=0.02,
        patience=6,
        flip="random",
        crop=max(1, task.stored_size // 10),
        tta="mirror",
        seed=trial.number,
    )
