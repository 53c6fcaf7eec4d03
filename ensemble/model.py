"""An ensemble as a model in Python: pictures in, labels and probabilities out, nothing written.

    model = open_model("runs/flowers-auto")
    answers = model.predict("new/")
    answers.labels, answers.probs

A folder's answers do not differ from the rows that `python -m ensemble.predict` writes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from upath import UPath

from ensemble.file import Ensemble, read_ensemble
from ensemble.predict import Voters, find_images, images_at_a_time
from trainables.command import progress
from trainables.data.decode import Item, Picture, read_items
from trainables.errors import UserError
from trainables.run_directory import open_runs

Source = str | os.PathLike | Image.Image | np.ndarray
"""One image: a file, a Pillow image, or pixels uint8 (H, W, 3), RGB."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an ensemble says about N images.

    Attributes:
        ids: of a folder's images the path below it without the ending, as `ensemble.predict` names them; else the path
            as it was given, or the number in the sequence.
        labels: class names; "" for an image that cannot be read.
        probs: float32 (N, C), rows sum to 1; NaN for an image that cannot be read.
        sets: names of the classes among which the right one is, at the risk that was selected for; and
        unsure: bool (N,), see ensemble/risk.py. Both are None for an ensemble of an older version; an image that
            cannot be read has no class and is unsure.
        classes: C names.
        unreadable: the reason by id.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    probs: np.ndarray
    classes: tuple[str, ...]
    unreadable: dict[str, str] = field(default_factory=dict)
    sets: tuple[tuple[str, ...], ...] | None = None
    unsure: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Model:
    """An ensemble with its networks loaded, of the run `run`."""

    run: UPath
    voters: Voters

    @property
    def ensemble(self) -> Ensemble:
        return self.voters.ensemble

    @property
    def classes(self) -> tuple[str, ...]:
        return self.voters.classes

    def predict(self, images: Source | Sequence[Source]) -> Predictions:
        """Return the ensemble's label and probabilities for every image, in order.

        images: a folder, with its subfolders; one image, see `Source`; or any number of them, also as uint8
        (N, H, W, 3). Files are turned upright, and all are brought to the form of the run's data set. Raises UserError
        when there are no images, or one is of another type.
        """
        ids, items = _items(images)
        step = images_at_a_time(self.voters.canvas)
        probs = np.full((len(ids), len(self.classes)), np.nan, np.float32)
        unreadable: dict[str, str] = {}
        with progress("predicting", len(ids)) as advance:
            for start in range(0, len(ids), step):
                read = list(read_items(items[start : start + step], self.voters.canvas))
                readable = [place for place, one in enumerate(read) if one.pixels is not None]
                unreadable |= {ids[start + p]: one.note for p, one in enumerate(read) if one.pixels is None}
                if readable:
                    pixels = np.stack([one.pixels for one in read if one.pixels is not None])
                    probs[start + np.array(readable)] = self.voters(pixels)
                advance(len(read))
        risk, decision, names = self.ensemble.risk, self.ensemble.decision, np.array(self.classes)
        known = ~np.isnan(probs[:, 0])
        labels = [
            "" if not is_known else self.classes[a] for a, is_known in zip(decision.answers(probs), known, strict=True)
        ]
        if risk is None:
            return Predictions(tuple(ids), tuple(labels), probs, self.classes, unreadable)
        sets = risk.sets(probs, decision) & known[:, None]
        return Predictions(
            tuple(ids), tuple(labels), probs, self.classes, unreadable,
            tuple(tuple(names[row].tolist()) for row in sets), risk.unsure(probs, decision) | ~known,
        )  # fmt: skip


def open_model(runs: Sequence[str | os.PathLike] = (), ensemble: str | None = None, device: str | None = None) -> Model:
    """Load an ensemble of a run: the one written last of the newest run under runs/, unless they are named.

    Where the ensemble merges runs, all of them are named, its own first. Raises UserError when there is no such run or
    ensemble, or a member has no weights.
    """
    homes = open_runs(runs)
    return Model(homes[0], Voters.load(homes, read_ensemble(homes[0], ensemble), device))


def _items(images: Source | Sequence[Source]) -> tuple[list[str], list[Item]]:
    """The images and their ids, of which one may be there twice."""
    if isinstance(images, str | os.PathLike) and Path(images).is_dir():
        found = find_images(Path(images))
        return list(found), list(found.values())
    one = isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    sources: list = [images] if one else list(images)  # type: ignore[arg-type]
    if not sources:
        raise UserError("there are no images to predict; expected a folder, or at least one image")
    ids = [str(source) if isinstance(source, str | os.PathLike) else str(n) for n, source in enumerate(sources)]
    return ids, [_item(number, source) for number, source in enumerate(sources)]


def _item(number: int, source: object) -> Item:
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise UserError(f"image {source} does not exist; expected a file or a folder")
        return Path(source)
    if isinstance(source, Image.Image):
        return Picture(f"image {number}", source.copy)  # decoding turns it upright in place
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
        return source
    what = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    raise UserError(f"image {number} is {what}; expected a file, a Pillow image, or uint8 pixels (H, W, 3)")
