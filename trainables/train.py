"""train(config, data, splits, report): THE training loop. Plain PyTorch; Ray is nowhere in it.

Randomness is a function of (seed, epoch, tenth of the epoch), so a run that was cut and resumed from a checkpoint ends
in the same weights as one that was not (on a CPU, to the bit). Under torch.distributed every rank calls train() with
the same arguments and takes its share of each batch.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.inference import scores
from trainables.job import Lesson, Metrics, Outcome, WeightSource
from trainables.models.adapters import merge_adapters
from trainables.storage import Damaged
from trainables.training.augment import Pixels
from trainables.training.averaging import WeightAverage
from trainables.training.checkpoint import copied, read_checkpoint, write_checkpoint
from trainables.training.learner import Learner, tenths
from trainables.training.ranks import from_first

PLATEAU_EPOCHS = 2
RARELY = 50  # times what a checkpoint takes lie between two within an epoch, so they cost at most a fiftieth
EXPLODED = 10.0  # an epoch's mean loss of that many times ln(classes) is not going to come back

Report = Callable[[Metrics], bool]


class Diverged(RuntimeError):
    """The loss became NaN, infinite, or far worse than guessing."""


@dataclass
class Trained:
    """What train() leaves: the network, how it came about, and its predictions.

    Attributes:
        model: in eval mode, with the weights that are evaluated (averaged or best ones when the config asks). A
            probe's head is `refitted` on all labelled images after its predictions were made, and so are others by
            their last epochs.
        probs: split name ("tune", "select") -> float32 (N, C), with the config's test-time augmentation.
        metrics: accuracy, log-loss and size by split, as in `scores`.
        curve: one dict per epoch, as reported.
        pixels: mean and std the inputs are normalised with.
        precision, accumulate: what was really used.
        seconds: spent in training steps and evaluation, over all resumptions.
        resumed: after how many epochs it was continued from a checkpoint, each time.
        image_size: side in pixels at which the predictions were made.
        before: state dict, on the CPU, of the network that made the predictions, where `model` has learned from those
            images since.
        outcome: finished, pruned (report() said stop: then without probs), or time (cut at the deadline).
    """

    model: nn.Module
    probs: dict[str, np.ndarray]
    metrics: Metrics
    curve: list[Metrics]
    pixels: Pixels
    precision: str
    accumulate: int
    seconds: float
    resumed: list[float]
    image_size: int
    outcome: Outcome
    refitted: bool = False
    before: dict[str, Tensor] | None = None


@dataclass
class Progress:
    """Where a trial stands; with the tensors, this is its checkpoint."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next one: none, or as many as some tenths of it have
    steps: int = 0  # that it has; 0 while none is done
    loss: float = 0.0  # summed over these steps, by rank 0: on the average the others' is the same
    seen: int = 0  # images in these steps
    training: float = 0.0  # seconds of these steps
    seconds: float = 0.0
    since_best: int = 0
    best_log_loss: float = math.inf
    curve: list[Metrics] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)


class EarlyStopping:
    """Watches the tune log-loss: keeps the best epoch's weights, halves the lr on plateaus, ends a stalled training."""

    def __init__(self, config: TrialConfig, progress: Progress, best: dict[str, Tensor] | None = None) -> None:
        self.config, self.progress, self.best = config, progress, best

    def see(self, tune: Metrics, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Take note of an epoch's tune scores; `weights` gives those that were scored."""
        if not tune:  # a refit holds nothing out
            return
        if tune["tune_log_loss"] < self.progress.best_log_loss:
            self.progress.best_log_loss, self.progress.since_best = tune["tune_log_loss"], 0
            if self.config.patience:
                self.best = {name: tensor.detach().clone() for name, tensor in weights().items()}
        else:
            self.progress.since_best += 1

    @property
    def lr_factor(self) -> float:
        """What the schedule's learning rates are multiplied by."""
        if self.config.schedule != "plateau":
            return 1.0
        losses = [row["tune_log_loss"] for row in self.progress.curve if "tune_log_loss" in row]
        halvings, best, since = 0, math.inf, 0
        for loss in losses:
            best, since = (loss, 0) if loss < best else (best, since + 1)
            halvings += since > 0 and since % PLATEAU_EPOCHS == 0
        return 0.5**halvings

    @property
    def is_over(self) -> bool:
        return bool(self.config.patience) and self.progress.since_best >= self.config.patience


class Checkpoints:
    """Writes a training's checkpoint: after every epoch, and within one as often as that costs next to nothing.

    So a machine that goes without a word costs seconds, or a tenth of an epoch where that is longer. A GPU goes on
    training while a thread writes what was copied from it; a CPU would only be shared.
    """

    def __init__(
        self, path: UPath | None, learner: Learner, average: WeightAverage, stopping: EarlyStopping, progress: Progress
    ) -> None:
        self.path, self.learner, self.average = path, learner, average
        self.stopping, self.progress = stopping, progress
        self.written, self.took = time.perf_counter(), 0.1  # when the last was, and for how long training stood still
        self.thread = ThreadPoolExecutor(1, "checkpoint") if learner.device.type == "cuda" else None
        self.writing: Future[float] | None = None  # of the seconds that it takes

    def write(self) -> None:
        if self.path is None or self.learner.rank > 0:
            return
        began = time.perf_counter()
        self.finish()
        state = copied(
            {"learner": self.learner.state_dict(), "average": self.average.state_dict(), "best": self.stopping.best,
             "progress": vars(self.progress)},
        )  # fmt: skip
        if self.thread is None:
            write_checkpoint(self.path, state)
        else:
            self.writing = self.thread.submit(_timed, write_checkpoint, self.path, state)
        self.written = time.perf_counter()
        self.took = self.written - began

    def finish(self) -> None:
        """Wait for what is being written; raises what went wrong there."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            self.took += writing.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is written any longer: a trial that has failed is removed, or begins anew from its checkpoint; and
        one that waits at a rung goes on from it."""
        with nullcontext() if kind is None else suppress(Exception):
            self.finish()

    @property
    def are_due(self) -> bool:
        """Whether one within an epoch is."""
        if self.writing is not None and self.writing.done():
            self.finish()
        return self.writing is None and time.perf_counter() - self.written > RARELY * self.took


class Deadline:
    """Brings a training to its end in time.

    Where the epochs asked for would take longer, the schedule runs with the clock instead, so that the learning rate
    has come down by then (Li et al., 2020, "Budgeted Training"); the running epoch is ended early. All ranks see that
    at the same step; their schedules do not hurry.
    """

    def __init__(self, at: float | None, learner: Learner) -> None:
        self.at, self.learner = at, learner
        self.began: tuple[float, float] | None = None  # when the body began to learn here, after how many epochs

    def schedule(self, epochs: float) -> float:
        """Where the schedule stands, in epochs, after so many trained ones."""
        config = self.learner.config
        if self.at is None or self.learner.world > 1 or epochs < config.freeze_epochs:
            return epochs
        now = time.time()
        if self.began is None:
            self.began = (now, epochs)
        since, first = self.began
        share = min(1.0, (now - since) / max(self.at - since, 1e-3))
        return max(epochs, first + share * (config.all_epochs - first))

    def passed(self, step: int) -> bool:
        if self.at is None or (self.learner.world > 1 and step % 20):  # agreeing costs a synchronisation
            return False
        (past,) = self.learner.over_ranks([float(time.time() > self.at)])
        return past > 0


def train(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    report: Report = lambda metrics: False,
    *,
    weights: WeightSource | None = None,
    checkpoint: UPath | None = None,
    deadline: float | None = None,
    share: float = 1.0,
    device: str | None = None,
    tick: Callable[[], None] = lambda: None,
    lesson: Lesson | None = None,
    recompute: bool = False,
    start: dict[str, Tensor] | None = None,
) -> Trained:
    """Train one network and predict the tune and select splits with it.

    Args:
        config: the hyperparameters.
        data, splits: uint8 images (N, H, W, 3), labels (N,), and indices of the splits. Test images are not in them.
        report: called on every rank after each epoch with tune scores; returns True to abandon the trial. A probe
            reports once, as epoch 0, and a training that goes on within an epoch how far it had come, as 2.4.
        weights: source of pretrained weights; needed when config.pretrained.
        checkpoint: file that is written after each epoch but the last, and where a tenth of a long one is over, and
            continued from when it exists.
        deadline: time.time() after which the running epoch is ended early and the trial finishes with what it has.
        share: above 0 to 1, of the time that is left until the deadline when the head's features are there: those serve
            all trainings on the same images, among which the rest of the time is shared out.
        tick: called at every step, as a sign of life.
        lesson: an ensemble to learn from, beside the labels.
        start: weights to go on from, instead of pretrained ones and the head that goes with them.
        recompute: save memory, where the network can, at the cost of time (see backbones.recompute_activations).

    Raises Diverged; torch.OutOfMemoryError when memory runs out (trial.py then halves the micro-batch); Damaged for a
    checkpoint that cannot be continued from; OutOfTime when the deadline passes before the head is fitted; UserError,
    before anything is trained, for weights, a batch or an image size that do not fit.
    """
    started = time.perf_counter()
    state = None if checkpoint is None else from_first(lambda: read_checkpoint(checkpoint, torch.device("cpu")))
    progress = Progress()
    try:
        learner = Learner(
            config, data, splits, weights, device, deadline, tick, state and state["learner"], lesson, recompute, start
        )
        model = learner.model
        average = WeightAverage.of(model, config, steps=_steps(config, splits))
        stopping = EarlyStopping(config, progress)
        if state is not None:
            average.load_state_dict(state["average"], learner.device)
            progress = Progress(**state["progress"])
            stopping = EarlyStopping(config, progress, state["best"])
            progress.resumed.append(round(progress.epoch + progress.step / max(1, progress.steps), 2))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if state is None:
            raise
        raise Damaged(f"{checkpoint} is not this trial's checkpoint ({error})") from error
    now = time.time()
    at = None if deadline is None else now + share * (deadline - now) if deadline > now else deadline
    cut, outcome = Deadline(at, learner), Outcome.FINISHED
    checkpoints = Checkpoints(checkpoint, learner, average, stopping, progress)
    progress.seconds += time.perf_counter() - started
    # it tells a trial that gets on, slower than its machines come and go, from one that brings them down
    if progress.step and report({"epoch": progress.resumed[-1]}):
        outcome = Outcome.PRUNED

    with checkpoints:
        while outcome is Outcome.FINISHED and progress.epoch < config.all_epochs:
            epoch, started, before = progress.epoch, time.perf_counter(), replace(progress)
            batches = learner.begin_epoch(epoch, before.step)
            total_loss, seen = torch.tensor(before.loss, device=learner.device), before.seen
            for step, batch in enumerate(batches[before.step :], before.step):
                if step > before.step and step in tenths(len(batches)):
                    learner.begin_tenth(step)
                    if checkpoints.are_due:
                        spent = time.perf_counter() - started
                        progress.step, progress.steps = step, len(batches)
                        progress.loss, progress.seen = float(total_loss), seen
                        progress.seconds, progress.training = before.seconds + spent, before.training + spent
                        checkpoints.write()
                tick()
                at = cut.schedule(epoch + step / len(batches))
                learner.set_lr(at, stopping.lr_factor)
                loss_sum = learner.step(batch, at / config.all_epochs)
                average.update(model, at / config.all_epochs)
                total_loss, seen = total_loss + loss_sum, seen + len(batch)
                # elsewhere looking at every loss would cost a synchronisation
                if learner.device.type == "cpu" and learner.world == 1 and not math.isfinite(float(loss_sum)):
                    raise Diverged(f"loss is {float(loss_sum)} in epoch {epoch + 1}, step {step + 1}")
                if cut.passed(step):
                    outcome = Outcome.TIME
                    break

            train_loss = learner.over_ranks([float(total_loss)])[0] / seen
            if not math.isfinite(train_loss) or train_loss > EXPLODED * math.log(max(3, len(data.classes))):
                raise Diverged(f"mean training loss {train_loss:.3g} after epoch {epoch + 1}")
            training = before.training + time.perf_counter() - started
            with average.applied(model):
                tune = _tune_scores(learner, splits, data, epoch)
                stopping.see(tune, model.state_dict)
            progress.epoch, progress.step, progress.steps = progress.epoch + 1, 0, 0
            progress.loss, progress.seen, progress.training = 0.0, 0, 0.0
            progress.seconds = before.seconds + time.perf_counter() - started
            progress.curve.append(
                {"epoch": progress.epoch, "train_loss": train_loss, **tune, "lr": learner.lr,
                 "seconds": round(progress.seconds, 3), "images_per_second": round(seen / training, 1)}
            )  # fmt: skip
            last = outcome is Outcome.TIME or progress.epoch == config.all_epochs or stopping.is_over
            if not last:
                checkpoints.write()
            # so that nobody lets a trial wait that is about to become a candidate
            if report(progress.curve[-1] | ({"last": 1.0} if last else {})) and not last:
                outcome = Outcome.PRUNED
                break
            if last:
                break

    average.apply(model)
    if stopping.best is not None:
        model.load_state_dict(stopping.best)
    merge_adapters(model)
    model.eval()
    started = time.perf_counter()
    probs, metrics = ({}, {}) if outcome is Outcome.PRUNED else _predict(learner, config, data, splits)
    refitted = config.is_probe and learner.features is not None
    if refitted:
        learner.refit_head()
    progress.seconds += time.perf_counter() - started
    if config.is_probe:
        tune = {name: value for name, value in metrics.items() if name.startswith("tune")}
        progress.curve.append({"epoch": 0, **tune, "seconds": round(progress.seconds, 3)})
        report(progress.curve[-1])
    return Trained(
        model, probs, metrics, progress.curve, learner.pixels, learner.precision, learner.accumulate,
        progress.seconds, progress.resumed, learner.image_size, outcome, refitted,
    )  # fmt: skip


def _timed(call: Callable[..., None], *arguments: Any) -> float:
    """Seconds that the call took."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def _steps(config: TrialConfig, splits: Splits) -> int:
    """Optimiser steps of the whole training."""
    return config.all_epochs * max(1, round(len(splits.train) / config.batch_size))


def _tune_scores(learner: Learner, splits: Splits, data: Data, epoch: int) -> Metrics:
    """The tune split's scores after an epoch, without test-time augmentation; {} where nothing is held out."""
    if not len(splits.tune):
        return {}
    tune = scores(learner.predict(splits.tune), data.labels[splits.tune], "tune")
    if not math.isfinite(tune["tune_log_loss"]):
        raise Diverged(f"predictions are not numbers after epoch {epoch + 1}")
    return tune


def _predict(
    learner: Learner, config: TrialConfig, data: Data, splits: Splits
) -> tuple[dict[str, np.ndarray], Metrics]:
    """Predictions of the held-out splits, with test-time augmentation, and their scores."""
    probs: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {}
    for split, indices in (("tune", splits.tune), ("select", splits.select)):
        if not len(indices):
            continue
        if split == "select" and splits.shared:
            probs["select"] = probs["tune"]
        else:
            probs[split] = learner.predict(indices, config.tta)
        metrics.update(scores(probs[split], data.labels[indices], split))
    return probs, metrics
