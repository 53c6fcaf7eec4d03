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

from trainables.data.dataset import Data, open_units, read_meta
from trainables.data.groups import FEWEST_UNITS, count_leaks, draw_units
from trainables.errors import UserError
from trainables.storage import Damaged, read_arrays, write_arrays

FEWEST_TO_SELECT = 60  # images that a split of their own must have; with fewer, candidates are cross-fitted
FOLDS = 5
# Of the train part, for tune and for select. Digits are easy: with few to learn from, and many to tell networks apart,
# a dry run shows what an ensemble is for.
FRACTIONS = {"digits": (0.36, 0.36)}
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


def split_data(data: Data, seed: int = 0) -> Splits:
    """The splits of a prepared data set: its held-out part, where it has one, and its units are kept."""
    tune, select = FRACTIONS.get(data.name, USUAL)
    return make_splits(data.labels, data.fingerprint, seed, tune, select, open_units(data), data.held_out)


def make_splits(
    labels: np.ndarray, fingerprint: str, seed: int = 0, tune: float = USUAL[0], select: float = USUAL[1],
    units: np.ndarray | None = None, held_out: int = 0,
) -> Splits:  # fmt: skip
    """Stratified splits of a train part with `labels` int64 (N,): `tune` and `select` are fractions of it.

    Where `select` would have fewer than 60 images, the splits are those of cross-fitting. The result depends on the
    arguments alone; `fingerprint` is the data's. `units`, int64 (N,), are kept on one side (see groups.py).
    `held_out`: that many images at the end are the held-out part, which tune and select share in the proportion of
    their fractions; those of them whose unit is also in the rest are trained on. All images of a class with fewer than
    3 are trained on. Raises UserError on fractions that leave nothing, on a class without images, on fewer than 10
    images, and when fewer than two classes could be validated.
    """
    if not (tune > 0 and select > 0 and tune + select < 1):
        raise UserError(f"tune is {tune} and select {select}; expected fractions above 0, together below 1")
    counts = np.bincount(labels)
    if counts.min() == 0:
        raise UserError(f"class {counts.argmin()} has 0 images to train and validate on, expected at least 1")
    if len(labels) < 2 * FOLDS:
        raise UserError(f"{len(labels)} labelled images are too few to learn from; expected at least {2 * FOLDS}")
    everything = np.arange(len(labels))
    if not held_out and round(select * len(labels)) < FEWEST_TO_SELECT:
        folds = _deal(labels, everything if units is None else units, FOLDS, seed)
        return Splits(everything, everything, everything, True, _fingerprint(fingerprint, folds), tuple(folds))
    if held_out:
        pool = everything[-held_out:]
        if units is not None:
            pool = pool[~np.isin(units[pool], units[:-held_out])]
        part = draw(labels[pool], [tune / (tune + select)], seed, None if units is None else units[pool])[0]
        drawn = [pool[part], np.delete(pool, part)]
    else:
        pool, drawn = everything, draw(labels, [tune, select], seed, units)
    if len(np.unique(labels[drawn[0]])) < 2:
        why = "expected at least 3 images of each, not all of one group"
        if held_out:
            why = f"of the {held_out:,} images held out {held_out - len(pool):,} have a twin or their group in train"
        raise UserError(f"fewer than two classes can be held out to validate on; {why}")
    rest = np.setdiff1d(everything, np.concatenate(drawn))
    if len(np.unique(labels[rest])) < len(counts):
        raise UserError(f"tune {tune} and select {select} leave a class without train images; lower them")
    return Splits(rest, drawn[0], drawn[1], False, _fingerprint(fingerprint, [rest, *drawn]))


def _fingerprint(data: str, parts: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(data.encode())
    for indices in parts:
        digest.update(len(indices).to_bytes(8, "little") + indices.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """What was kept on one side of every split, because it belongs together.

    Attributes:
        why: "twins", "groups by patient" or both.
        images: those that have another in their unit.
        leaks: of `held_out`, how many would have one like them in train, if images were dealt one by one.
        held_out: images of tune and select in that case.
    """

    why: str
    images: int
    leaks: int
    held_out: int


def kept_together(data: Data, seed: int = 0) -> Kept | None:
    """What twins and groups change about the splits of a data set; None where every image is alone."""
    meta, units = read_meta(data.path), open_units(data)
    if units is None:
        return None
    plain = make_splits(data.labels, data.fingerprint, seed, held_out=data.held_out)
    before = np.union1d(plain.tune, plain.select)
    sides = [(plain.train, before)]
    if plain.folds:
        sides = [(plain.without(fold).train, held_out) for fold, held_out in enumerate(plain.folds)]
    why = " and ".join(["twins"] * (meta.twins > 0) + [f"groups by {meta.grouped_by}"] * bool(meta.grouped_by))
    alone = int((np.unique(units, return_counts=True)[1] == 1).sum())
    leaks = sum(count_leaks(units, train, held_out) for train, held_out in sides)
    return Kept(why or "groups", len(units) - alone, leaks, len(before))


def notes_on(data: Data, splits: Splits, seed: int = 0) -> list[str]:
    """What a person should know of the splits of a data set, a line each: what was kept on one side, and why."""
    notes = []
    meta, kept = read_meta(data.path), kept_together(data, seed)
    held = np.union1d(splits.tune, splits.select)
    if data.held_out:
        moved = data.held_out - len(held)
        notes.append(
            f"tune and select are the {len(held):,} images of the held-out part that the data set came with"
            + (f"; {moved:,} others have a twin or their group in its train part, and are trained on" * (moved > 0))
        )
    if kept is not None:
        notes.append(
            f"{kept.why} ({kept.images:,} images) stay on one side; otherwise {kept.leaks:,} of "
            f"{kept.held_out:,} images of tune and select would have one like them in train"
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


def _deal(labels: np.ndarray, units: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """All indices, dealt into `parts` of equally many units, in all and of every class; each sorted.

    Raises UserError where there are too few units for that.
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    if len(first) < parts:
        raise UserError(f"{len(labels)} images of {len(first)} groups are too few; expected at least {parts} groups")
    shuffled = np.random.RandomState(seed).permutation(len(first))
    by_class = shuffled[np.argsort(labels[first[shuffled]], kind="stable")]
    return [np.flatnonzero(np.isin(unit, by_class[part::parts])).astype(np.int64) for part in range(parts)]


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
