"""The splits of a data set: train, tune (for the sampler and the pruner), select (for the ensemble's weights).

The fourth, test, is a part of its own (see data.py) that nothing on the way of a sweep reads.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from upath import UPath

from trainables.data.dataset import Data, open_units, read_meta
from trainables.data.groups import FEWEST_UNITS, count_leaks, draw_units
from trainables.errors import UserError
from trainables.storage import Damaged, read_arrays, write_arrays

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


def split_data(data: Data, seed: int = 0) -> Splits:
    """The splits of a prepared data set: its held-out part, where it has one, and its units are kept."""
    return make_splits(data.labels, data.fingerprint, seed, units=open_units(data), held_out=data.held_out)


def make_splits(
    labels: np.ndarray, fingerprint: str, seed: int = 0, tune: float = 0.1, select: float = 0.1,
    units: np.ndarray | None = None, held_out: int = 0,
) -> Splits:  # fmt: skip
    """Stratified splits of a train part with `labels` int64 (N,): `tune` and `select` are fractions of it.

    With fewer than 2,000 validation images in all, tune and select are the same `tune + select` of it (`shared`). The
    result depends on the arguments alone; `fingerprint` is the data's. `units`, int64 (N,), are kept on one side (see
    groups.py). `held_out`: that many images at the end are the held-out part, which tune and select share in the
    proportion of their fractions; those of them whose unit is also in the rest are trained on. All images of a class
    with fewer than 3 are trained on. Raises UserError on fractions that leave nothing, on a class without images, and
    when fewer than two classes could be validated.
    """
    if not (tune > 0 and select > 0 and tune + select < 1):
        raise UserError(f"tune is {tune} and select {select}; expected fractions above 0, together below 1")
    counts = np.bincount(labels)
    if counts.min() == 0:
        raise UserError(f"class {counts.argmin()} has 0 images to train and validate on, expected at least 1")
    pool = np.arange(len(labels))
    if held_out:
        pool = pool[-held_out:]
        if units is not None:
            pool = pool[~np.isin(units[pool], units[:-held_out])]
    shared = (len(pool) if held_out else round((tune + select) * len(labels))) < SHARED_BELOW
    if held_out and shared:
        drawn = [pool]
    elif held_out:
        part = draw(labels[pool], [tune / (tune + select)], seed, None if units is None else units[pool])[0]
        drawn = [pool[part], np.delete(pool, part)]
    else:
        drawn = draw(labels, [tune + select] if shared else [tune, select], seed, units)
    if len(np.unique(labels[drawn[-1]])) < min(2, len(counts)):
        why = "expected at least 3 images of each, not all of one group"
        if held_out:
            why = f"of the {held_out:,} images held out {held_out - len(pool):,} have a twin or their group in train"
        raise UserError(f"fewer than two classes can be held out to validate on; {why}")
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(drawn))
    if len(np.unique(labels[rest])) < len(counts):
        raise UserError(f"tune {tune} and select {select} leave a class without train images; lower them")
    digest = hashlib.sha256(fingerprint.encode())
    for indices in (rest, *drawn):
        digest.update(len(indices).to_bytes(8, "little") + indices.astype("<i8").tobytes())
    return Splits(rest, drawn[0], drawn[-1], shared, digest.hexdigest()[:16])


def notes_on(data: Data, splits: Splits, seed: int = 0) -> list[str]:
    """What a person should know of the splits of a data set, a line each: what was kept on one side, and why."""
    notes = []
    meta, units = read_meta(data.path), open_units(data)
    held = np.union1d(splits.tune, splits.select)
    if data.held_out:
        moved = data.held_out - len(held)
        notes.append(
            f"tune and select are the {len(held):,} images of the held-out part that the data set came with"
            + (f"; {moved:,} others have a twin or their group in its train part, and are trained on" * (moved > 0))
        )
    if units is not None:
        plain = make_splits(data.labels, data.fingerprint, seed, held_out=data.held_out)
        before = np.union1d(plain.tune, plain.select)
        leaked = count_leaks(units, plain.train, before)
        why = " and ".join(["twins"] * (meta.twins > 0) + [f"groups by {meta.grouped_by}"] * bool(meta.grouped_by))
        alone = int((np.unique(units, return_counts=True)[1] == 1).sum())
        notes.append(
            f"{why or 'groups'} ({len(units) - alone:,} images) stay on one side; otherwise {leaked:,} of "
            f"{len(before):,} images of tune and select would have one like them in train"
        )
    if meta.test_twins:
        notes.append(
            f"{meta.test_twins:,} images of the test part have a twin in the train part: its score is flattered"
        )
    absent = [data.classes[c] for c in np.setdiff1d(np.unique(data.labels), data.labels[splits.select]).tolist()]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        notes.append(
            f"of {len(absent)} classes all images are trained on, because they have fewer than {FEWEST_UNITS} "
            f"or are all of one group, so no score says anything on them: {shown}"
        )
    return notes


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


def draw(
    labels: np.ndarray, fractions: Sequence[float], seed: int, units: np.ndarray | None = None
) -> list[np.ndarray]:
    """Disjoint stratified draws, one per fraction: sorted int64 indices, at least one of every class with 3 or more.

    Given `units`, int64 (N,), whole ones are drawn.
    """
    if units is not None:
        return draw_units(labels, units, fractions, seed)
    # RandomState, because its stream is frozen: a split must be the same under every numpy version
    random = np.random.RandomState(seed)
    drawn: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < FEWEST_UNITS:
            continue
        start = 0
        for chosen, fraction in zip(drawn, fractions, strict=True):
            stop = start + max(1, round(fraction * len(members)))
            chosen.append(members[start:stop])
            start = stop
    return [np.sort(np.concatenate([*chosen, []])).astype(np.int64) for chosen in drawn]
