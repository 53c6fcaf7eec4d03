"""A pretrained backbone fine-tuned without a GPU: EfficientNet-lite0 on 96-pixel photographs. A fixed recipe.

python -m search.run --data folder --data-dir data/intel96 --space lite0_intel --pruner none --cpus-per-trial 2

Three epochs train the head on stored features, then seven the whole network: 93.0 % on Intel's 3,000 test images, in 18
minutes on two cores. For scale: a linear probe on its frozen features reaches 89.6 %.
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 1
BACKBONES = {"tf_efficientnet_lite0": "pretrained"}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    return TrialConfig(
        backbone="tf_efficientnet_lite0",
        pretrained=True,
        image_size=112,  # larger than stored: ImageNet's objects were larger still
        epochs=7,
        freeze_epochs=3,
        batch_size=64,
        lr=5e-3,
        body_lr=0.05,
        weight_decay=0.05,
        schedule="onecycle",
        warmup=0.2,
        label_smoothing=0.1,
        dropout=0.1,
        drop_path=0.1,
        flip="random",
        crop=6,
        ema=0.05,
        tta="mirror",
        seed=trial.number,
    )
