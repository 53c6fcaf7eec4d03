"""train(config, data, splits, report): THE training loop. Plain PyTorch; Ray is nowhere in it.

Every epoch's randomness is a function of (seed, epoch), so a run that was cut and resumed from its checkpoint ends in
the same weights as one that was not (on a CPU, to the bit). Under torch.distributed every rank calls train() with the
same arguments and takes its share of each batch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.inference import scores
from trainables.job import Outcome, WeightSource
from trainables.storage import Damaged
from trainables.training.augment import Pixels
from trainables.training.averaging import WeightAverage
from trainables.training.checkpoint import read_checkpoint, write_checkpoint
from trainables.training.learner import Learner

PLATEAU_EPOCHS = 2
EXPLODED = 10.0  # an epoch's mean loss of that many times ln(classes) is not going to come back

Report = Callable[[dict[str, Any]], bool]


class Diverged(RuntimeError):
    """The loss became NaN, infinite, or far worse than guessing."""


@dataclass
class Trained:
    """What train() leaves: the network, how it came about, and its predictions.

    Attributes:
        model: in eval mode, with the weights that are evaluated (averaged or best ones when the config asks).
        probs: split name ("tune", "select") -> float32 (N, C), with the config's test-time augmentation.
        metrics: accuracy, log-loss and size by split, as in `scores`.
        curve: one dict per epoch, as reported.
        pixels: mean and std the inputs are normalised with.
        precision, accumulate: what was really used.
        seconds: spent in training steps and evaluation, over all resumptions.
        resumed: after which epochs it was continued from a checkpoint.
        image_size: side in pixels at which the predictions were made.
        outcome: finished, pruned (report() said stop: then without probs), or time (cut at the deadline).
    """

    model: nn.Module
    probs: dict[str, np.ndarray]
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]
    pixels: Pixels
    precision: str
    accumulate: int
    seconds: float
    resumed: list[int]
    image_size: int
    outcome: Outcome


@dataclass
class _Progress:
    """Where a trial stands; with the tensors, this is its checkpoint."""

    epoch: int = 0  # epochs done
    seconds: float = 0.0
    plateau_factor: float = 1.0
    since_best: int = 0
    best_log_loss: float = math.inf
    curve: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)


def train(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    report: Report = lambda metrics: False,
    *,
    weights: WeightSource | None = None,
    checkpoint: UPath | None = None,
    deadline: float | None = None,
    device: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Trained:
    """Train one network and predict the tune and select splits with it.

    Args:
        config: the hyperparameters.
        data, splits: uint8 images (N, H, W, 3), labels (N,), and indices of the splits. Test images are not in them.
        report: called on every rank after each epoch with tune scores; returns True to abandon the trial.
        weights: source of pretrained weights; needed when config.pretrained.
        checkpoint: file that is written after each epoch but the last, and continued from when it exists.
        deadline: time.time() after which the running epoch is ended early and the trial finishes with what it has.
        tick: called at every step, as a sign of life.

    Raises Diverged; torch.OutOfMemoryError when memory runs out (trial.py then halves the micro-batch); Damaged for a
    checkpoint that cannot be continued from; UserError, before anything is trained, for weights, a batch or an image
    size that do not fit.
    """
    learner = Learner(config, data, splits, weights, device, deadline, tick)
    model, world = learner.model, learner.world
    average = WeightAverage.of(model, config)
    best = None  # weights of the best epoch, when config.patience asks for them
    progress = _Progress()
    state = None if checkpoint is None else read_checkpoint(checkpoint, learner.device)
    if state is not None:
        try:
            learner.load_state_dict(state["learner"])
            average.load_state_dict(state["average"])
            best = state["best"]
            progress = _Progress(**state["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Damaged(f"{checkpoint} is not this trial's checkpoint ({error})") from error
        progress.resumed.append(progress.epoch)
    else:
        learner.choose_layout()

    outcome = Outcome.FINISHED
    while progress.epoch < config.epochs:
        epoch, started = progress.epoch, time.perf_counter()
        batches = learner.begin_epoch(epoch)
        total_loss, seen = torch.zeros((), device=learner.device), 0
        for step, batch in enumerate(batches):
            tick()
            at = (epoch + step / len(batches)) / config.epochs
            learner.set_lr(at, progress.plateau_factor)
            loss_sum = learner.step(batch)
            average.update(model, at)
            total_loss, seen = total_loss + loss_sum, seen + len(batch)
            # elsewhere looking at every loss would cost a synchronisation
            if learner.device.type == "cpu" and world == 1 and not math.isfinite(float(loss_sum)):
                raise Diverged(f"loss is {float(loss_sum)} in epoch {epoch + 1}, step {step + 1}")
            if deadline is not None and (world == 1 or step % 20 == 0):
                (past,) = learner.over_ranks([float(time.time() > deadline)])
                if past:
                    outcome = Outcome.TIME
                    break

        train_loss = learner.over_ranks([float(total_loss)])[0] / seen
        if not math.isfinite(train_loss) or train_loss > EXPLODED * math.log(max(3, len(data.classes))):
            raise Diverged(f"mean training loss {train_loss:.3g} after epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        tune: dict[str, Any] = {}
        if len(splits.tune):  # a refit holds nothing out
            with average.applied(model):
                tune = scores(learner.predict(splits.tune), data.labels[splits.tune], "tune")
            if not math.isfinite(float(tune["tune_log_loss"])):
                raise Diverged(f"predictions are not numbers after epoch {epoch + 1}")
        progress.epoch += 1
        progress.seconds += time.perf_counter() - started
        progress.curve.append(
            {"epoch": progress.epoch, "train_loss": train_loss, **tune, "lr": learner.lr,
             "seconds": round(progress.seconds, 3), "images_per_second": round(seen / seconds, 1)}
        )  # fmt: skip
        if tune and tune["tune_log_loss"] < progress.best_log_loss:
            progress.best_log_loss, progress.since_best = float(tune["tune_log_loss"]), 0
            if config.patience:
                with average.applied(model):
                    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        elif tune:
            progress.since_best += 1
            if config.schedule == "plateau" and progress.since_best % PLATEAU_EPOCHS == 0:
                progress.plateau_factor /= 2
        last = outcome is Outcome.TIME or progress.epoch == config.epochs
        last = last or bool(config.patience and progress.since_best >= config.patience)
        if checkpoint is not None and not last and learner.rank == 0:
            write_checkpoint(
                checkpoint,
                {"learner": learner.state_dict(), "average": average.state_dict(), "best": best,
                 "progress": vars(progress)},
            )  # fmt: skip
        if report(progress.curve[-1]) and not last:
            outcome = Outcome.PRUNED
            break
        if last:
            break

    average.apply(model)
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    probs: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {}
    if outcome is not Outcome.PRUNED:
        for split, indices in (("tune", splits.tune), ("select", splits.select)):
            if not len(indices):
                continue
            if split == "select" and splits.shared:
                probs["select"] = probs["tune"]
            else:
                probs[split] = learner.predict(indices, config.tta)
            metrics.update(scores(probs[split], data.labels[indices], split))
    return Trained(
        model, probs, metrics, progress.curve, learner.pixels, learner.precision, learner.accumulate,
        progress.seconds, progress.resumed, learner.image_size, outcome,
    )  # fmt: skip
