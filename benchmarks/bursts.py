"""What a split claims that tears bursts apart, and what is true.

    python -m benchmarks.bursts [--scenes 120] [--frames 8] [--draws 20] [--json FILE]

Planted bursts: each scene is photographed several times, lit a little differently, every second one from the hand, and
so moved by a pixel of 32, which is more than the search for twins forgives. Half of the scenes are never shown. A
classifier (logistic regression on pixels, which can learn a scene by heart) learns from the train split and claims its
accuracy on the select split, with a 95 % interval; the truth is its accuracy on scenes that it never saw. The interval
counts every image as one look, or is that of a sweep, which knows what it has kept on one side.
"""

import json
import tempfile
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from ensemble.selection.claim import accuracy_interval
from trainables.data.dataset import open_units
from trainables.data.groups import count_leaks, group_numbers
from trainables.data.origin import find_origin
from trainables.data.prepare import prepare
from trainables.data.splits import split_data
from trainables.errors import exit_on_user_error

SIDE = 32
HINT = 14.0  # grey levels by which a scene's label tints it, beside its own structure of about 60
CLASSES = 3
SCENE = r"(class \d/scene_\d+)"


@dataclass(frozen=True)
class Bursts:
    """Claims on planted bursts, with and without keeping them on one side."""

    scenes: int = 120
    """Scenes of each class, half of them never shown."""
    frames: int = 8
    """Pictures of each scene."""
    draws: int = 20
    """Sets drawn."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the rows."""


@dataclass(frozen=True)
class Row:
    """Means over the draws, as `claim` gives them."""

    claim: float
    truth: float
    holds_by_image: float
    holds: float
    leaked: float


def draw_scene(rng: np.random.Generator, label: int) -> np.ndarray:
    """Structure at several scales, tinted by the label: float (S, S, 3), larger than a frame."""
    side = SIDE + 8
    image = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(field.resize((side, side), Image.Resampling.BICUBIC)) / 4
    image[..., label] += HINT
    return image


def draw_frame(rng: np.random.Generator, scene: np.ndarray, moves: bool = True) -> Image.Image:
    """One picture of a scene: moved by at most a pixel, lit by up to a tenth more or less, with noise."""
    top, left = rng.integers(3, 6, 2) if moves else (4, 4)
    frame = scene[top : top + SIDE, left : left + SIDE] * rng.uniform(0.9, 1.1)
    return Image.fromarray((frame + rng.normal(0, 3, frame.shape)).clip(0, 255).astype(np.uint8))


def write_bursts(root: Path, rng: np.random.Generator, scenes: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """ROOT/<class>/scene_007_2.png; returns pictures of as many other scenes, uint8 (N, S, S, 3), and their labels."""
    unseen = []
    for label in range(CLASSES):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for scene in range(scenes // 2):
            picture = draw_scene(rng, label)
            for frame in range(frames):
                draw_frame(rng, picture, moves=scene % 2 == 1).save(folder / f"scene_{scene:03}_{frame}.png")
        unseen += [np.asarray(draw_frame(rng, draw_scene(rng, label))) for _ in range(200)]
    return np.stack(unseen), np.repeat(np.arange(CLASSES), 200)


def claim(
    root: Path, cache: Path, unseen: np.ndarray, truth: np.ndarray, group_by: str | None, twins: bool
) -> tuple[float, float, float, float, float]:
    """Accuracy on select, accuracy on unseen scenes, whether the former's 95 % interval holds the latter when every
    image counts as one, and as a sweep states it; and the share of select images whose scene is in train."""
    data = prepare("folder", root, cache, progress=False, group_by=group_by, twins=twins)
    splits = split_data(data)
    names = find_origin("folder", root, cache, group_by=group_by, twins=twins).train
    scenes = group_numbers(names, SCENE)
    features = data.images.reshape(len(data.images), -1) / 255
    model = LogisticRegression(C=1.0, max_iter=1000)
    parts = [(splits.train, splits.select)]
    if splits.folds:
        parts = [(splits.without(number).train, held) for number, held in enumerate(splits.folds)]
    predicted = [model.fit(features[train], data.labels[train]).predict(features[held]) for train, held in parts]
    right = np.concatenate([found == data.labels[held] for found, (_, held) in zip(predicted, parts, strict=True)])
    units = open_units(data)
    known = None if units is None else units[np.concatenate([held for _, held in parts])]
    model.fit(features[splits.train], data.labels[splits.train])
    true = float((model.predict(unseen.reshape(len(unseen), -1) / 255) == truth).mean())
    leaked = sum(count_leaks(scenes, train, held) for train, held in parts) / len(right)
    intervals = [accuracy_interval(right), accuracy_interval(right, units=known)]
    holds = [float(low <= true <= high) for low, high in intervals]
    return float(right.mean()), true, *holds, leaked


def measure(folder: Path, scenes: int, frames: int, draws: int) -> dict[str, Row]:
    """The rows of the table, by how the images were split."""
    ways: dict[str, tuple[str | None, bool]] = {
        "without regard to bursts": (None, False),
        "twins on one side (default)": (None, True),
        "bursts on one side": (SCENE, True),
    }
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for draw in range(draws):
        root = folder / f"bursts-{draw}"
        unseen, truth = write_bursts(root, np.random.default_rng(draw), scenes, frames)
        for way, (group_by, twins) in ways.items():
            found[way].append(claim(root, folder / "cache", unseen, truth, group_by, twins))
    return {way: Row(*np.mean(rows, axis=0).tolist()) for way, rows in found.items()}


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Bursts, description=Bursts.__doc__, prog="python -m benchmarks.bursts")
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), options.scenes, options.frames, options.draws)
        table = Table(
            title=f"{options.scenes // 2} scenes of each class in {options.frames} frames, {options.draws} draws"
        )
        for heading in (
            "split",
            "claimed",
            "true",
            "interval holds, by image",
            "as a sweep states it",
            "select images seen in train",
        ):
            table.add_column(heading, justify="left" if heading == "split" else "right")
        for way, row in rows.items():
            table.add_row(way, *(f"{value:.1%}" for value in astuple(row)))
        Console().print(table)
        if options.json:
            options.json.write_text(json.dumps({way: asdict(row) for way, row in rows.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
