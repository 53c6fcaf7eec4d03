"""Candidates whose network has learned from all labelled images, while their scores are of images not seen before.

cross_fit(): few images are predicted in turn, each by a network that was trained without it; a last one, trained on
all, is kept. Its scores are those of the folds' networks, which had a fifth fewer images to learn from, so they are
rather too low than too high.

with_last_epochs(): of many images some are held out and predicted once. Then the network learns from them, too, at a
lower rate. It is the one that is kept; the one that made the predictions is kept beside it, for whoever needs
predictions that nobody has learned from (soups, a teacher).
"""

import dataclasses
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.inference import scores
from trainables.job import Metrics, Outcome
from trainables.storage import exists
from trainables.train import Diverged, Report, Trained, train
from trainables.training.checkpoint import copied, read_checkpoint, write_checkpoint
from trainables.training.ranks import from_first

RATE = 0.4  # of the learning rates, in the last epochs: at all of them, much of what was learned is learned anew


def cross_fit(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    report: Report = lambda metrics: False,
    **options: Any,
) -> Trained:
    """As train(), with splits that have `folds`: its predictions of tune and select are those of all images.

    What a fold's network predicted is kept beside the checkpoint until the trial is over. Reported are epochs of the
    whole, without scores (they would be of one fold), and the scores at the end. Time that is short is shared out
    evenly among the trainings. Raises as train() does.
    """
    checkpoint, deadline = options.pop("checkpoint", None), options.pop("deadline", None)
    trainings, is_first = splits.trainings, not dist.is_initialized() or dist.get_rank() == 0
    probs = np.zeros((len(splits.train), len(data.classes)), np.float32)
    seconds, cut, told, stopped = 0.0, False, 0, False
    resumed: list[float] = []

    def run(number: int, part: Splits) -> Trained:
        def progress(metrics: Metrics) -> bool:
            nonlocal told, stopped
            done = (number * config.all_epochs + int(metrics["epoch"])) // trainings
            if not told < done < config.all_epochs:
                return False
            told, stopped = done, report({**_unscored(metrics), "epoch": done})
            return stopped

        state = None if checkpoint is None else checkpoint.with_name(f"state-{number}.safetensors")
        share = 1 / (trainings - number)
        trained = train(config, data, part, progress, checkpoint=state, deadline=deadline, share=share, **options)
        resumed.extend((number * config.all_epochs + epoch) // trainings for epoch in trained.resumed)
        return dataclasses.replace(trained, outcome=Outcome.PRUNED) if stopped else trained

    for number, held in enumerate(splits.folds):
        rows = np.searchsorted(splits.train, held)
        path = None if checkpoint is None else checkpoint.with_name(f"fold-{number}.safetensors")
        known = None if path is None else from_first(partial(read_checkpoint, path, torch.device("cpu")))
        if known is None:
            trained = run(number, splits.without(number))
            if trained.outcome is Outcome.PRUNED:
                return trained
            known = {
                "probs": torch.from_numpy(trained.probs["select"]), "seconds": trained.seconds,
                "cut": trained.outcome is Outcome.TIME,
            }  # fmt: skip
            if path is not None and is_first:
                write_checkpoint(path, copied(known))
        elif path is not None and not from_first(partial(exists, path.with_name(f"fold-{number + 1}.safetensors"))):
            resumed.append((number + 1) * config.all_epochs // trainings)
        probs[rows] = known["probs"].numpy()
        seconds, cut = seconds + known["seconds"], cut or known["cut"]
    kept = run(len(splits.folds), splits.undivided())
    if kept.outcome is Outcome.PRUNED:
        return kept
    seconds += kept.seconds
    labels, slower = data.labels[splits.train], seconds / max(kept.seconds, 1e-3)
    tune, select = scores(probs, labels, "tune"), scores(probs, labels, "select")
    curve = [{**row, "seconds": round(slower * row["seconds"], 3)} for row in kept.curve]
    curve[-1] |= tune
    report(curve[-1])
    return dataclasses.replace(
        kept, probs={"tune": probs, "select": probs}, metrics={**tune, **select}, curve=curve, seconds=seconds,
        outcome=Outcome.TIME if cut or kept.outcome is Outcome.TIME else kept.outcome, resumed=resumed, refitted=True,
    )  # fmt: skip


def _unscored(metrics: Metrics) -> Metrics:
    """An epoch's row without scores: they would be of a part of the images."""
    return {name: value for name, value in metrics.items() if not name.startswith("tune")}


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
    among both parts. Where they diverge, or `report` says stop meanwhile, the network stays as it was before. What the
    trial is scored by is complete by then, so the deadline that cuts them short does not make its outcome "time".
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

    goes_on, everything = _further(config, last, trained), splits.undivided()
    try:
        further = train(goes_on, data, everything, told, start=before, deadline=deadline, **options)
    except Diverged:
        return trained
    if further.outcome is Outcome.PRUNED:
        return trained
    seconds = trained.seconds + further.seconds
    curve = [*trained.curve[:-1], {**trained.curve[-1], "seconds": round(seconds, 3)}]
    return dataclasses.replace(trained, model=further.model, before=before, refitted=True, curve=curve, seconds=seconds)


def _further(config: TrialConfig, last: int, trained: Trained) -> TrialConfig:
    """What the last epochs are trained with."""
    return dataclasses.replace(
        config, epochs=last, freeze_epochs=0, lr=RATE * config.lr, image_size=trained.image_size, progressive=(),
        patience=0, schedule="cosine" if config.schedule == "plateau" else config.schedule, refit=0.0,
        accumulate=trained.accumulate, seed=config.seed + 1_000_003,
    )  # fmt: skip
