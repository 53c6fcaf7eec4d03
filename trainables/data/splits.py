"""The splits of a data set: train, tune (for the sampler and the pruner), select (for the ensemble's weights).

The fourth, test, is a part of its own (see prepare.py) that nothing on the way of a sweep reads.

A few hundred images are too few to set two parts of them aside: 60 of them leave 6 to select on. They are cross-fitted
instead. Every candidate is trained once without each fifth of them, which it then predicts, and once more on all of
them; so all images are there to learn from, and every prediction is by a network that has not seen the image.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from upath import UPath

from trainables.errors import UserError
from trainables.storage import Damaged, read_arrays, write_arrays

FEWEST_PER_CLASS = 3
FEWEST_TO_SELECT = 60  # images that a split of their own must have; with fewer, candidates are cross-fitted
FOLDS = 5
# Of the train part, for tune and for select. Digits are easy: with few to learn from, and many to tell networks apart,
# a dry run shows what an ensemble is for.
HELD_OUT = {"digits": (0.36, 0.36)}
USUAL = (0.1, 0.1)


@dataclass(frozen=True, eq=False)
class Splits:
    """Sorted int64 indices into a Data's train part.

    Attributes:
        train, tune, select: the splits; of cross-fitted candidates each is all images.
        shared: tune and select are the same images.
        fingerprint: of the data and the splits.
        folds: the disjoint parts of all images that cross-fitted candidates predict in turn; () for others.
    """

    train: np.ndarray
    tune: np.ndarray
    select: np.ndarray
    shared: bool
    fingerprint: str
    folds: tuple[np.ndarray, ...] = ()

    @property
    def trainings(self) -> int:
        """Networks that are trained for one candidate."""
        return len(self.folds) + 1

    def without(self, fold: int) -> "Splits":
        """All images but those of a fold to train on, and nothing to tune by; the fold is to be predicted."""
        held = self.folds[fold]
        none = np.empty(0, np.int64)
        return Splits(np.setdiff1d(self.train, held), none, held, False, f"{self.fingerprint}-without-{fold}")

    def undivided(self) -> "Splits":
        """All images to train on and none held out, for retraining what was chosen."""
        everything = np.unique(np.concatenate([self.train, self.tune, self.select]))
        none = np.empty(0, np.int64)
        return Splits(everything, none, none, True, f"{self.fingerprint}-undivided")


def held_out(name: str) -> tuple[float, float]:
    """The fractions of a data set's train part that become tune and select."""
    return HELD_OUT.get(name, USUAL)


def make_splits(
    labels: np.ndarray, fingerprint: str, seed: int = 0, tune: float = USUAL[0], select: float = USUAL[1]
) -> Splits:
    """Stratified splits of a train part with `labels` int64 (N,): `tune` and `select` are fractions of it.

    Where `select` would have fewer than 60 images, the splits are those of cross-fitting. The result depends on the
    arguments alone; `fingerprint` is the data's. Raises UserError on fractions that leave nothing, and on a class with
    fewer than 3 images (cross-fitted: 2).
    """
    if not (tune > 0 and select > 0 and tune + select < 1):
        raise UserError(f"tune is {tune} and select {select}; expected fractions above 0, together below 1")
    counts = np.bincount(labels)
    if len(labels) < 2 * FOLDS:
        raise UserError(f"{len(labels)} labelled images are too few to learn from; expected at least {2 * FOLDS}")
    is_small = round(select * len(labels)) < FEWEST_TO_SELECT
    fewest = 2 if is_small else FEWEST_PER_CLASS
    if counts.min() < fewest:
        raise UserError(
            f"class {counts.argmin()} has {counts.min()} images to train and validate on, expected at least {fewest}"
        )
    everything = np.arange(len(labels))
    if is_small:
        folds = _deal(labels, FOLDS, seed)
        return Splits(everything, everything, everything, True, _fingerprint(fingerprint, folds), tuple(folds))
    drawn = draw(labels, [tune, select], seed)
    rest = np.setdiff1d(everything, np.concatenate(drawn))
    if len(np.unique(labels[rest])) < len(counts):
        raise UserError(f"tune {tune} and select {select} leave a class without train images; lower them")
    return Splits(rest, drawn[0], drawn[1], False, _fingerprint(fingerprint, [rest, *drawn]))


def _fingerprint(data: str, parts: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(data.encode())
    for indices in parts:
        digest.update(len(indices).to_bytes(8, "little") + indices.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def save_splits(run: UPath, splits: Splits) -> None:
    """Write splits.npz into a run directory, atomically: int64 arrays train, tune and select, and the fingerprint.

    Of cross-fitted candidates also fold, int64 (N,): the part of the i-th image of train.
    """
    more = {}
    if splits.folds:
        more["fold"] = np.zeros(len(splits.train), np.int64)
        for number, held in enumerate(splits.folds):
            more["fold"][np.isin(splits.train, held)] = number
    fingerprint = np.array(splits.fingerprint)
    write_arrays(
        run / "splits.npz", train=splits.train, tune=splits.tune, select=splits.select, fingerprint=fingerprint, **more
    )


def load_splits(run: UPath) -> Splits:
    """Return the splits of a run directory. Raises UserError when splits.npz is missing, damaged or holds pickles."""
    path = run / "splits.npz"
    try:
        arrays = read_arrays(path)
        train, tune, select = (_indices(arrays[name]) for name in ("train", "tune", "select"))
        fingerprint = str(arrays["fingerprint"])
        folds = _folds(train, arrays["fold"]) if "fold" in arrays else ()
    except (OSError, KeyError, TypeError, ValueError, Damaged) as error:
        raise UserError(f"{path} is missing or damaged ({error}); start the sweep in a new run directory") from None
    return Splits(train, tune, select, np.array_equal(tune, select), fingerprint, folds)


def _folds(train: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, ...]:
    """The parts of train; raises ValueError or TypeError for anything else."""
    numbers = fold.astype(np.int64, casting="safe")
    if numbers.shape != train.shape or sorted(set(numbers.tolist())) != list(range(FOLDS)):
        raise ValueError(f"expected a fold, 0 to {FOLDS - 1}, of every image")
    return tuple(train[numbers == number] for number in range(FOLDS))


def _indices(array: np.ndarray) -> np.ndarray:
    """Sorted int64 (N,), none below 0; raises ValueError or TypeError for anything else."""
    if array.ndim != 1 or (len(array) and (array.min() < 0 or (np.diff(array) <= 0).any())):
        raise ValueError("expected rising indices")
    return array.astype(np.int64, casting="safe")


def _deal(labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """All indices in so many parts of equal size (but for one) and equal shares of every class, each sorted."""
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(by_class[part::parts]).astype(np.int64) for part in range(parts)]


def draw(labels: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Disjoint stratified draws, one per fraction: sorted int64 indices, at least one of every class."""
    # RandomState, because its stream is frozen: a split must be the same under every numpy version
    random = np.random.RandomState(seed)
    drawn: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        start = 0
        for chosen, fraction in zip(drawn, fractions, strict=True):
            stop = start + max(1, round(fraction * len(members)))
            chosen.append(members[start:stop])
            start = stop
    return [np.sort(np.concatenate(chosen)).astype(np.int64) for chosen in drawn]
