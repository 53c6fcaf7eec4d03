"""cross_fit(): a candidate of few images, every one of which is predicted by a network that has not seen it.

Trained once without each fold, to predict it, and once on all images: that is the network that is kept. Its scores are
those of the folds' networks, which had a fifth fewer images to learn from, so they are rather too low than too high.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.inference import scores
from trainables.job import Metrics, Outcome
from trainables.storage import exists
from trainables.train import Report, Trained, train
from trainables.training.checkpoint import copied, read_checkpoint, write_checkpoint
from trainables.training.ranks import from_first


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
