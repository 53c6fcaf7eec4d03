"""The two-by-three CNN from scratch with augmentation and class weights, against fine-tuned classics.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space cifar10_keras_cnn

Source: CIFAR-10 test 91 % with the CNN, against ResNet50, VGG16 and SqueezeNet. Ours, by the first trial alone, on two
CPU cores: select 91.1 % of 5,000 images (results/seeds).

Without the hub's weights the CNN runs alone.
"""

from dataclasses import replace

import optuna

from search.config import Task
from search.spaces.auto import growing, largest_batch, small_net
from trainables.config import TrialConfig

TRIALS = 16
BACKBONES = {"keras_cnn": "scratch", "resnet50": "if found", "vgg16": "if found", "squeezenet1_1": "if found"}
FIRST = [
    {"backbone": "keras_cnn", "epochs": 12, "scratch_batch_size": 250, "scratch_lr": 0.4, "scratch_dropout": 0.1,
     "scratch_label_smoothing": 0.05, "width": 1.0},
]  # fmt: skip


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        net = small_net(trial, task, backbone, largest=32, widths=(1.0, 1.0), epochs=(12, 30))
        return replace(net, progressive=growing(net.image_size), class_weights=True)
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=224 if task.device == "cuda" else 64,
        epochs=trial.suggest_int("tuned_epochs", 4, 10),
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3),
        batch_size=min(trial.suggest_categorical("batch_size", [64, 128, 256]), largest_batch(task)),
        lr=trial.suggest_float("tuned_lr", 1e-4, 1e-3, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
        dropout=0.3,
        schedule="onecycle",
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        class_weights=True,
        flip="random",
        crop=max(1, task.stored_size // 8),
        tta="mirror",
        seed=trial.number,
    )
