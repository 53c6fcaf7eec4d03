"""The splits of a data set: train, tune (for the sampler and the pruner), select (for the ensemble's weights).

The fourth, test, is a part of its own (see data.py) that nothing on the way of a sweep reads.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from upath import UPath

from trainables.errors import UserError
from trainables.storage import Damaged, read_arrays, write_arrays

FEWEST_PER_CLASS = 3
SHARED_BELOW = 2000  # validation images, below which two splits of half the size would each say too little


@dataclass(frozen=True, eq=False)
class Splits:
    """Sorted int64 indices into a Data's train part. With `shared`, tune and select are the same images."""

    train: np.ndarray
    tune: np.ndarray
    select: np.ndarray
    shared: bool
    fingerprint: str

    def undivided(self) -> "Splits":
        """All images to train on and none held out, for retraining what was chosen."""
        everything = np.unique(np.concatenate([self.train, self.tune, self.select]))
        none = np.empty(0, np.int64)
        return Splits(everything, none, none, True, f"{self.fingerprint}-undivided")


def make_splits(labels: np.ndarray, fingerprint: str, seed: int = 0, tune: float = 0.1, select: float = 0.1) -> Splits:
    """Stratified splits of a train part with `labels` int64 (N,): `tune` and `select` are fractions of it.

    With fewer than 2,000 validation images in all, tune and select are the same `tune + select` of it (`shared`). The
    result depends on the arguments alone; `fingerprint` is the data's. Raises UserError on fractions that leave nothing
    and on a class with fewer than 3 images.
    """
    if not (tune > 0 and select > 0 and tune + select < 1):
        raise UserError(f"tune is {tune} and select {select}; expected fractions above 0, together below 1")
    counts = np.bincount(labels)
    if counts.min() < FEWEST_PER_CLASS:
        raise UserError(
            f"class {counts.argmin()} has {counts.min()} images to train and validate on, "
            f"expected at least {FEWEST_PER_CLASS}"
        )
    shared = round((tune + select) * len(labels)) < SHARED_BELOW
    drawn = draw(labels, [tune + select] if shared else [tune, select], seed)
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(drawn))
    if len(np.unique(labels[rest])) < len(counts):
        raise UserError(f"tune {tune} and select {select} leave a class without train images; lower them")
    digest = hashlib.sha256(fingerprint.encode())
    for indices in (rest, *drawn):
        digest.update(len(indices).to_bytes(8, "little") + indices.astype("<i8").tobytes())
    return Splits(rest, drawn[0], drawn[-1], shared, digest.hexdigest()[:16])


def save_splits(run: UPath, splits: Splits) -> None:
    """Write splits.npz into a run directory, atomically: int64 arrays train, tune and select, and the fingerprint."""
    fingerprint = np.array(splits.fingerprint)
    write_arrays(
        run / "splits.npz", train=splits.train, tune=splits.tune, select=splits.select, fingerprint=fingerprint
    )


def load_splits(run: UPath) -> Splits:
    """Return the splits of a run directory. Raises UserError when splits.npz is missing, damaged or holds pickles."""
    path = run / "splits.npz"
    try:
        arrays = read_arrays(path)
        train, tune, select = (_indices(arrays[name]) for name in ("train", "tune", "select"))
        fingerprint = str(arrays["fingerprint"])
    except (OSError, KeyError, TypeError, ValueError, Damaged) as error:
        raise UserError(f"{path} is missing or damaged ({error}); start the sweep in a new run directory") from None
    return Splits(train, tune, select, np.array_equal(tune, select), fingerprint)


def _indices(array: np.ndarray) -> np.ndarray:
    """Sorted int64 (N,), none below 0; raises ValueError or TypeError for anything else."""
    if array.ndim != 1 or (len(array) and (array.min() < 0 or (np.diff(array) <= 0).any())):
        raise ValueError("expected rising indices")
    return array.astype(np.int64, casting="safe")


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
