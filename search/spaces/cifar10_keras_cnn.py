"""The two-by-three CNN from scratch with augmentation and class weights, against fine-tuned classics.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space cifar10_keras_cnn

Source: CIFAR-10 test 91 % with the CNN, against ResNet50, VGG16 and SqueezeNet.

Without the hub's weights the CNN runs alone.
"""

import optuna

from search.config import Task
from search.spaces.laptop import largest_batch
from trainables.config import TrialConfig

TRIALS = 16
BACKBONES = {"keras_cnn": "scratch", "resnet50": "if found", "vgg16": "if found", "squeezenet1_1": "if found"}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    pretrained = task.backbones[backbone] is not None
    return TrialConfig(
        backbone=backbone,
        pretrained=pretrained,
        image_size=(224 if task.device == "cuda" else 64) if pretrained else min(32, task.stored_size),
        epochs=trial.suggest_int("tuned_epochs", 4, 10) if pretrained else trial.suggest_int("epochs", 16, 30),
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3) if pretrained else 0,
        batch_size=min(trial.suggest_categorical("batch_size", [64, 128, 256]), largest_batch(task)),
        lr=trial.suggest_float("tuned_lr", 1e-4, 1e-3, log=True)
        if pretrained
        else trial.suggest_float("lr", 1e-3, 6e-3, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
        dropout=0.3,
        schedule="onecycle",
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.1),
        class_weights=True,
        flip="random",
        crop=max(1, task.stored_size // 8),
        tta="mirror",
        seed=trial.number,
    )
