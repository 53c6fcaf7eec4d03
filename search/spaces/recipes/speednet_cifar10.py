"""speednet's default recipe on CIFAR-10, three seeds of it. A fixed recipe, so that its numbers can be reproduced.

python -m search.run --data cifar10 --data-dir data/cifar10 --space speednet_cifar10 --pruner none --cpus-per-trial 2

The recipe is the published airbench94_muon (Jordan, 2024: 94.0 % on CIFAR-10's test images after 8 epochs of 50,000
images) in terms of the mean loss: as many steps, 200 of 2,000 images, as 10 epochs of 40,000. For scale: airbench94,
with 40,000 training images, reached 93.4 %.
"""

import optuna

from search.config import Task
from trainables.config import TrialConfig

TRIALS = 3
BACKBONES = {"speednet": "scratch"}


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    return TrialConfig(
        backbone="speednet",
        image_size=32,
        epochs=10,
        batch_size=2000,
        optimizer="muon",
        lr=1.75,
        body_lr=0.137,  # Muon's lr, 0.24
        momentum=0.6,
        weight_decay=0.0023,
        schedule="triangular",
        warmup=0.0,
        label_smoothing=0.2,
        flip="alternating",
        crop=2,
        tta="mirror_shift",
        seed=trial.number,
    )
