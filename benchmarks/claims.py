"""Do claims hold on real photographs? Many draws of a few of them, each claimed for and scored on all others.

    python -m benchmarks.claims --data-dir data/trash/train [--images 219 54] [--draws 100]

What a sweep of a few minutes does on so few images, without the hours that a hundred sweeps would take: the probes of
the three offline backbones are cross-fitted on a draw, an ensemble is selected, and its claim is held against its
accuracy on the photographs that were not drawn. Features are computed once, for all photographs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ensemble.selection.auto import choose_selector
from ensemble.selection.claim import claim
from ensemble.selection.metrics import wilson
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, make_splits
from trainables.errors import UserError, exit_on_user_error
from trainables.features import Features
from trainables.models.speed import native_size
from trainables.models.weights import find_weights
from trainables.training.head import fit_head
from trainables.training.learner import Learner

BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Claims:
    """Hold claims on few photographs against what is true of many."""

    data_dir: Path
    """Folder of photographs, <class>/* below it."""
    images: tuple[int, ...] = (219, 54)
    draws: int = 100
    seed: int = 0


def features_of(data: Data, backbone: str) -> Features:
    """The stored features of all images, plain and mirrored, at the backbone's own size."""
    config = TrialConfig(
        backbone=backbone, pretrained=True, image_size=native_size(backbone), epochs=0, flip="random", tta="mirror"
    )
    some = np.arange(len(data.labels))
    features = Learner(config, data, Splits(some, some[:2], some[2:4], False, ""), find_weights(backbone)).features
    assert features is not None
    return features


def drawn(labels: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Rows of about `images` images, in which each class has its share."""
    random, rows = np.random.RandomState(seed), []
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        rows.append(own[random.permutation(len(own))[: max(3, round(images / len(labels) * len(own)))]])
    return np.sort(np.concatenate(rows))


def claimed_and_true(data: Data, views: list[Features], rows: np.ndarray) -> tuple[float, float, float, float]:
    """The claim of an ensemble of probes for a draw, its interval, and its accuracy on all other images."""
    labels, classes = data.labels[rows], len(data.classes)
    others = np.setdiff1d(np.arange(len(data.labels)), rows)
    folds, probs, after = make_splits(labels, "").folds, [], []
    if not folds:
        raise UserError(f"{len(rows)} images would not be cross-fitted; expected fewer")
    for view in views:
        held_out = np.zeros((len(rows), classes), np.float32)
        for fold in folds:
            seen = rows[np.setdiff1d(np.arange(len(rows)), fold)]
            held_out[fold] = view.probs(rows[fold], fit_head(view.rows, data.labels, seen, NONE, classes)[0], True)
        probs.append(held_out)
        after.append(view.probs(others, fit_head(view.rows, data.labels, rows, NONE, classes)[0], True))
    choice = choose_selector(probs, labels)
    assert choice.held_out is not None
    found = claim(choice.held_out, learned_from=1 - 1 / len(folds))
    true = float((choice.blend(after).argmax(axis=1) == data.labels[others]).mean())
    return found["accuracy"], *found["interval"], true


def main() -> None:
    args, console = tyro.cli(Claims, prog="python -m benchmarks.claims"), Console()
    data = prepare("folder", args.data_dir, twins=False)
    views = [features_of(data, backbone) for backbone in BACKBONES]
    table = Table(title=f"{len(data.labels):,} photographs, {args.draws} draws each: claims and what is true, %")
    for heading in ("images", "claim", "true", "claim minus true", "its spread", "claims that hold", "95 % of that",
                    "true above", "true below"):  # fmt: skip
        table.add_column(heading, justify="right")
    for images in args.images:
        found = np.array([
            claimed_and_true(data, views, drawn(data.labels, images, args.seed + draw)) for draw in range(args.draws)
        ])  # fmt: skip
        claims, low, high, true = found.T
        held = int(((low <= true) & (true <= high)).sum())
        ends = [f"{100 * end:.1f}" for end in wilson(held, args.draws)]
        gap = 100 * (claims - true)
        table.add_row(
            str(images), f"{100 * claims.mean():.2f}", f"{100 * true.mean():.2f}", f"{gap.mean():+.2f}",
            f"{gap.std():.2f}", f"{held} of {args.draws}", f"{ends[0]} to {ends[1]}",
            str(int((true > high).sum())), str(int((true < low).sum())),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
