"""The learning-rate range test (Smith, 2015, arXiv:1506.01186): one short training with an ever larger lr.

    python -m trainables.lr_find --data cifar10 --data-dir data/cifar10 --backbone speednet --optimizer muon

prints a suggestion and writes lr_find.html, the train loss over the lr. It takes the hyperparameters of a trial, and
the very step that trials are trained with; the schedule and the number of epochs play no part.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.decode import Fit
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, split_data
from trainables.errors import UserError, exit_on_user_error
from trainables.job import WeightSource
from trainables.models.backbones import plain_name
from trainables.models.weights import find_weights
from trainables.storage import write_bytes
from trainables.training.learner import Learner

SMOOTHING = 0.9  # of the running mean over steps
DIVERGED = 4.0  # the test is over when the smoothed loss is that many times its lowest
SKIPPED = 5  # first steps, of which the running mean knows too little to tell a slope


@dataclass(frozen=True)
class LrFind:
    """The learning-rate range test: a suggestion, and a plot of the train loss over the lr."""

    data: str | None = None
    """Data set, as in search.run; default: folder with --data-dir or --labels, else digits. The test trains on
    its train split."""
    data_dir: Path | None = None
    """Where the images lie."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Table of the images, as for search.run."""
    group_by: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Which images stay on one side of a split, as for search.run."""
    ignore_twins: bool = False
    """Split without regard to twins, as for search.run."""
    stored_size: int | None = None
    """Side in pixels at which images are kept; default: their own, or the median one up to 256."""
    fit: Fit = "squash"
    """How images of other proportions are brought to that size, as for search.run."""
    split_seed: int = 0
    """Of the splits, as for search.run."""
    weights_dir: Path | None = None
    """Folder with pretrained weights as <timm name>.safetensors or .pth."""
    low: float = 1e-5
    """First lr."""
    high: float = 10.0
    """Last lr, if the loss does not diverge before."""
    steps: int = 100
    """Most optimiser steps, at least 20."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("lr_find.html")
    """File for the plot."""
    config: Annotated[TrialConfig, tyro.conf.arg(name="")] = field(default_factory=TrialConfig)

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 100:
            raise UserError(f"--low is {self.low} and --high {self.high}, expected 0 < low < high <= 100")
        if self.steps < 20:
            raise UserError(f"--steps is {self.steps}, expected at least 20")


def range_test(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    low: float,
    high: float,
    steps: int,
    weights: WeightSource | None = None,
    device: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Train with an lr that rises geometrically from `low` to `high` over `steps`; stop where the loss diverges.

    Returns the head's lr of each step and the mean train loss of its batch, float64 (S,) both, S <= steps. With
    config.freeze_epochs and no other epochs the body stays frozen. Raises UserError as train() does.
    """
    only_head = config.freeze_epochs > 0 and config.epochs == 0
    config = dataclasses.replace(  # an epoch has at least one step
        config, schedule="constant", warmup=0.0, epochs=0 if only_head else steps,
        freeze_epochs=steps if only_head else 0, progressive=(),
    )  # fmt: skip
    learner = Learner(config, data, splits, weights, device)
    learner.may_compile = False  # for a hundred steps
    lrs: list[float] = []
    losses: list[float] = []
    batches = itertools.chain.from_iterable(learner.begin_epoch(epoch) for epoch in range(steps))
    for lr, batch in zip(np.geomspace(low, high, steps), batches, strict=False):
        tick()
        learner.set_lr(0.0, lr / config.lr)
        loss = float(learner.step(batch, 0.0)) / len(batch)
        if not math.isfinite(loss):
            break
        lrs.append(float(lr))
        losses.append(loss)
        smoothed = smooth(losses)
        if smoothed[-1] > DIVERGED * smoothed.min():
            break
    return np.array(lrs), np.array(losses)


def smooth(losses: list[float] | np.ndarray) -> np.ndarray:
    """Exponential running mean, float64 (S,), without the usual bias towards its start."""
    weights = SMOOTHING ** np.arange(len(losses))
    return np.convolve(losses, weights)[: len(losses)] / np.cumsum(weights)


def suggest(lrs: np.ndarray, losses: np.ndarray) -> float | None:
    """The lr at which the smoothed loss falls most steeply over log(lr); None where it never falls."""
    smoothed = smooth(losses)
    end = int(smoothed.argmin()) + 1
    if end < SKIPPED + 2:
        return None
    slopes = np.gradient(smoothed[:end], np.log(lrs[:end]))
    return float(lrs[SKIPPED + int(slopes[SKIPPED:].argmin())])


def plot(lrs: np.ndarray, losses: np.ndarray, suggestion: float | None, title: str) -> str:
    """One self-contained HTML page."""
    import plotly.graph_objects as go

    figure = go.Figure(
        [
            go.Scatter(x=lrs, y=losses, mode="markers", name="train loss of a batch", opacity=0.5),
            go.Scatter(x=lrs, y=smooth(losses), mode="lines", name="smoothed"),
        ]
    )
    if suggestion is not None:
        figure.add_vline(x=suggestion, line_dash="dash", annotation_text=f"lr {suggestion:.2g}")
    lowest, first = float(smooth(losses).min()), float(losses[0])
    margin = 0.1 * (first - lowest) + 0.05
    figure.update_xaxes(type="log", title="lr of the head")
    figure.update_yaxes(title="train loss", range=[lowest - margin, first + 5 * margin])
    figure.update_layout(title=title, template="plotly_white")
    return figure.to_html(include_plotlyjs=True)


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(LrFind, description=LrFind.__doc__, prog="python -m trainables.lr_find")
        config = replace(args.config, backbone=plain_name(args.config.backbone))
        weights = find_weights(config.backbone, args.weights_dir) if config.pretrained else None
        name = args.data or ("folder" if args.data_dir or args.labels else "digits")
        data = prepare(
            name, args.data_dir, size=args.stored_size, fit=args.fit, group_by=args.group_by,
            twins=not args.ignore_twins, labels=args.labels,
        )  # fmt: skip
        splits = split_data(data, args.split_seed)
        lrs, losses = range_test(config, data, splits, args.low, args.high, args.steps, weights)
        if len(lrs) == 0:
            raise UserError(f"the loss is not a number at lr {args.low:g}; lower --low")
        suggestion = suggest(lrs, losses)
        title = (
            f"{config.backbone}, {config.optimizer}, {len(splits.train)} train images in batches of {config.batch_size}"
        )
        write_bytes(UPath(args.out), plot(lrs, losses, suggestion, title).encode())
        lowest = lrs[int(smooth(losses).argmin())]
        end = "diverged" if len(lrs) < args.steps else "ended"
        print(f"{title}: lowest train loss at lr {lowest:.2g}, {end} at {lrs[-1]:.2g} after {len(lrs)} steps")
        if suggestion is None:
            raise UserError(f"the train loss does not fall at any lr tried; lower --low, or look at {args.out}")
        print(f"lr {suggestion:.2g}: there the train loss falls most steeply; plot in {args.out}")


if __name__ == "__main__":
    main()
