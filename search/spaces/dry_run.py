"""The dry run: every part of the road in minutes on two cores.

python -m search.run            24 trials over four backbones on scikit-learn's digits
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 24
BACKBONES = {
    "speednet": "scratch",
    "resnet10t": "scratch",
    "keras_cnn": "scratch",
    "tf_efficientnet_lite0": "pretrained",
}
LR_SCALE = {"speednet": 5.0}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    pretrained = task.backbones[backbone] is not None
    freeze_epochs = trial.suggest_int("freeze_epochs", 0, 2) if pretrained else 0
    return TrialConfig(
        backbone=backbone,
        pretrained=pretrained,
        image_size=48 if pretrained else 32,
        width=0.25,
        epochs=4 if pretrained else 12,
        freeze_epochs=freeze_epochs,
        batch_size=trial.suggest_categorical("batch_size", [32, 64]),
        # every backbone has its own scale: one range for all would waste most trials
        lr=LR_SCALE.get(backbone, 1.0) * trial.suggest_float("lr", 5e-4, 4e-3, log=True),
        body_lr=0.1 if pretrained else 1.0,
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.1),
        crop=1,
        seed=trial.number,
    )
