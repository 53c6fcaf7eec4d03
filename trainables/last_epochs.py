"""The last epochs: once a network has predicted the images that were held out, it learns from them, too.

A candidate is scored on images that it has not seen, and so are ensembles of such: a fifth of all that are labelled. A
few more epochs over all of them, at a lower rate, make the network better than its scores say. It is the one that is
kept; the one that made the predictions is kept beside it, for whoever needs predictions that nobody has learned from
(soups, a teacher).
"""

import dataclasses
import time
from typing import Any

from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.job import Metrics, Outcome
from trainables.train import Report, Trained, train

RATE = 0.4  # of the learning rates before: at all of them, much of what was learned is learned anew


def last_epochs(config: TrialConfig, splits: Splits) -> int:
    """How many there are: none where nothing is held out, or where all images were trained on in turn."""
    if not config.epochs or not config.refit or splits.folds or not len(splits.select):
        return 0
    return max(1, round(config.refit * config.epochs))


def with_last_epochs(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    report: Report = lambda metrics: False,
    *,
    checkpoint: UPath | None = None,
    deadline: float | None = None,
    **options: Any,
) -> Trained:
    """As train(), and then the last epochs where `config.refit` asks for them. Scores and predictions are from before.

    They are not continued from a checkpoint: one of the last epoch before them is. Where time is short it is shared out
    among both parts. When `report` says stop meanwhile, the network stays as it was before.
    """
    last = last_epochs(config, splits)
    if not last:
        return train(config, data, splits, report, checkpoint=checkpoint, deadline=deadline, **options)
    share = config.epochs / (config.epochs + last)
    trained = train(config, data, splits, report, checkpoint=checkpoint, deadline=deadline, share=share, **options)
    if not trained.outcome.leaves_candidate or (deadline is not None and time.time() >= deadline):
        return trained
    before = {name: tensor.detach().cpu().clone() for name, tensor in trained.model.state_dict().items()}

    def told(metrics: Metrics) -> bool:
        return report({"epoch": config.all_epochs})

    further = train(
        _further(config, last, trained), data, splits.undivided(), told, start=before, deadline=deadline, **options
    )
    if further.outcome is Outcome.PRUNED:
        return trained
    seconds = trained.seconds + further.seconds
    curve = [*trained.curve[:-1], {**trained.curve[-1], "seconds": round(seconds, 3)}]
    outcome = Outcome.TIME if Outcome.TIME in (trained.outcome, further.outcome) else trained.outcome
    return dataclasses.replace(
        trained, model=further.model, before=before, refitted=True, curve=curve, seconds=seconds, outcome=outcome
    )


def _further(config: TrialConfig, last: int, trained: Trained) -> TrialConfig:
    """What the last epochs are trained with."""
    return dataclasses.replace(
        config, epochs=last, freeze_epochs=0, lr=RATE * config.lr, image_size=trained.image_size, progressive=(),
        patience=0, schedule="cosine" if config.schedule == "plateau" else config.schedule, refit=0.0,
        accumulate=trained.accumulate, seed=config.seed + 1_000_003,
    )  # fmt: skip
