"""Images that are the same, or almost: they make a score on one split flatter than it is when their twin is in another.

Exact: the same stored pixels. Near: the same picture again after another JPEG, a resize, a change of brightness or
contrast, some noise or a mirror. Two pictures are near when their 8x8 luminances correlate by COARSE and the changes
between neighbouring cells of their 16x16 luminances, on a logarithmic scale, by DETAIL: without that, scenes would pair
that share nothing but a sky above a ground, or a black frame.

(On CIFAR-10, a 64-bit difference hash at most 8 bits apart finds 93 % of images saved again as JPEG of quality 50, this
more than 99 %: a hash's bits flip where a picture is flat.)
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainables.data.packed import ImageRows

SIDE = 16  # cells of a signature a side; smaller images are compared exactly only
COARSE, DETAIL = 0.97, 0.8
NOISE = 4.0  # grey levels of change between cells that noise and compression may make
FLATTEST = 2.0  # grey levels of spread below which a picture has nothing to be compared by
BATCH = 1024
MOST_PER_IMAGE = 20  # near twins looked at per image: enough to connect a group, however large
ALL_BELOW = 100_000  # images, of which every one is compared with every other
NEAREST = 4  # cells that an image is looked for in, when there are more

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, eq=False)
class Signatures:
    """What is kept of N images to compare them by.

    Attributes:
        digests: uint64 (N,), of the pixels.
        grey: float32 (N, S, S), mean luminance 0..255 of the cells; S is 16, or less for smaller images.
    """

    digests: np.ndarray
    grey: np.ndarray

    @property
    def brightness(self) -> np.ndarray:
        """Mean luminance, float32 (N,), 0..255."""
        return self.grey.mean(axis=(1, 2))

    @property
    def contrast(self) -> np.ndarray:
        """Standard deviation of luminance between cells, float32 (N,)."""
        return self.grey.std(axis=(1, 2))

    def __add__(self, other: "Signatures") -> "Signatures":
        return Signatures(np.concatenate([self.digests, other.digests]), np.concatenate([self.grey, other.grey]))


@dataclass(frozen=True)
class Group:
    """Images that are one picture: sorted row indices, and "exact", "near" or "mirrored", the loosest link in it."""

    rows: tuple[int, ...]
    kind: str


def sign(images: ImageRows, tick: Callable[[int], None] = lambda done: None) -> Signatures:
    """Signatures of uint8 images (N, H, W, 3), read in batches; `tick` hears how many each was."""
    n, height, width = images.shape[:3]
    side = min(SIDE, height, width)
    rows, columns = height // side, width // side
    digests, grey = np.empty(n, np.uint64), np.empty((n, side, side), np.float32)
    for start in range(0, n, BATCH):
        batch = np.ascontiguousarray(images[start : start + BATCH])
        end = start + len(batch)
        digests[start:end] = [
            int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") for image in batch
        ]
        middle = batch[:, (height % side) // 2 :, (width % side) // 2 :][:, : side * rows, : side * columns]
        cells = middle.reshape(len(batch), side, rows, side, columns, 3)
        # over the pixels of a cell first: an image in float would take four times its memory
        grey[start:end] = cells.mean(axis=(2, 4), dtype=np.float32) @ LUMA
        tick(len(batch))
    return Signatures(digests, grey)


def find_groups(
    signatures: Signatures, tick: Callable[[int], None] = lambda done: None, all_below: int = ALL_BELOW
) -> list[Group]:
    """All groups of two or more images that are one picture, the largest first.

    Up to `all_below` images every one is compared with every other: 60,000 take half a minute on two cores. More are
    compared within cells, see `_cells`, which takes ten times as many images 32 times as long, and not a hundred times;
    of pairs that only just count as twins it may miss a few in a thousand. `tick` hears how many images are done.
    """
    first = _first_of_equals(signatures.digests)
    links = [(np.stack([first, np.arange(len(first))])[:, first != np.arange(len(first))], 0)]
    if signatures.grey.shape[1] == SIDE:
        links += _near(signatures.grey, np.flatnonzero(first == np.arange(len(first))), tick, all_below)
    a, b = np.concatenate([pairs for pairs, _ in links], axis=1)
    looseness = np.concatenate([np.full(pairs.shape[1], level) for pairs, level in links])
    _, group = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(first),) * 2), directed=False)
    loosest = np.zeros(group.max(initial=-1) + 1, np.int64)
    np.maximum.at(loosest, group[a], looseness)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    kinds = ("exact", "near", "mirrored")
    groups = [Group(tuple(part.tolist()), kinds[loosest[group[part[0]]]]) for part in parts if len(part) > 1]
    return sorted(groups, key=lambda found: (-len(found.rows), found.rows))


def twins_across(groups: Sequence[Group], splits: np.ndarray, names: Sequence[str]) -> dict[tuple[str, str], int]:
    """How many images of one split have a twin in an earlier one: {("select", "train"): 12, ...}, zeros left out.

    splits: int (N,), the split of every image as an index into `names`, which begins with what is learned.
    """
    counts: dict[tuple[str, str], int] = {}
    for group in groups:
        where = splits[list(group.rows)]
        for later in np.unique(where).tolist():
            for earlier in (e for e in np.unique(where).tolist() if e < later):
                key = (names[later], names[earlier])
                counts[key] = counts.get(key, 0) + int((where == later).sum())
    return counts


def _first_of_equals(digests: np.ndarray) -> np.ndarray:
    """For each image the first one with the same digest, int64 (N,)."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def _near(
    grey: np.ndarray, rows: np.ndarray, tick: Callable[[int], None], all_below: int
) -> list[tuple[np.ndarray, int]]:
    """Pairs (2, P) among these rows that are near, level 1, and those that are so after mirroring one, level 2."""
    rows = rows[grey[rows].std(axis=(1, 2)) >= FLATTEST]
    cells = grey[rows].reshape(len(rows), 8, 2, 8, 2).mean(axis=(2, 4))
    coarse = _standardised(cells.reshape(len(rows), 64))
    mirrored = _standardised(cells[:, :, ::-1].reshape(len(rows), 64))
    found: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for level, left in ((1, coarse), (2, mirrored)):
        for some, others, done in _blocks(left, coarse, all_below):
            a, b = _alike(left[some] @ coarse[others].T, some, others)
            a, b = rows[a], rows[b]
            one = grey[a][:, :, ::-1] if level == 2 else grey[a]
            detailed = _detail(one, grey[b]) >= DETAIL
            found[level].append(np.stack([a[detailed], b[detailed]]))
            tick(done if level == 2 else 0)
    return [(np.concatenate(pairs, axis=1), level) for level, pairs in found.items() if pairs]


def _blocks(left: np.ndarray, right: np.ndarray, all_below: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Rows of `left` and of `right`, both float32 (N, 64) of length 1, that are to be compared with each other, and how
    many more images are done with that."""
    n = len(left)
    if n <= all_below:
        for start in range(0, n, BATCH):
            some = np.arange(start, min(start + BATCH, n))
            yield some, np.arange(start, n), len(some)
        return
    rows, others = _cells(left, right)
    for cell, (some, close) in enumerate(zip(rows, others, strict=True)):
        for start in range(0, len(some), BATCH):
            yield some[start : start + BATCH], close, 0
        yield some[:0], close, (cell + 1) * n // len(rows) - cell * n // len(rows)


def _cells(left: np.ndarray, right: np.ndarray) -> list[list[np.ndarray]]:
    """For each of sqrt(N) random rows of `right` the rows of `left`, and of `right`, that it is among the NEAREST to.

    Near twins are so near that they share at least one of these cells, all but always.
    """
    centres = right[np.random.default_rng(0).choice(len(right), math.isqrt(len(right)), replace=False)]
    cells = []
    for vectors in (left, right):
        nearest = np.empty((len(vectors), NEAREST), np.int64)
        for start in range(0, len(vectors), BATCH):
            scores = vectors[start : start + BATCH] @ centres.T
            nearest[start : start + BATCH] = np.argpartition(-scores, NEAREST, axis=1)[:, :NEAREST]
        order = np.argsort(nearest.ravel(), kind="stable")
        bounds = np.searchsorted(nearest.ravel()[order], np.arange(len(centres) + 1))
        cells.append([order[bounds[c] : bounds[c + 1]] // NEAREST for c in range(len(centres))])
    return cells


def _alike(correlations: np.ndarray, some: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and later rows whose correlation, in a block (R, N) of these rows, reaches COARSE.

    Of one row at most MOST_PER_IMAGE.
    """
    i, j = np.nonzero(correlations >= COARSE)
    keep = others[j] > some[i]
    i, j = i[keep], j[keep]
    rank = np.arange(len(i)) - np.searchsorted(i, i)  # nonzero() goes row by row
    few = rank < MOST_PER_IMAGE
    return some[i[few]], others[j[few]]


def _detail(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation of the changes between neighbouring cells of two stacks of luminances (P, S, S), float (P,).

    Changes count by the logarithm of their size: one edge that both have must not outweigh all that differs.
    """
    if not len(one):
        return np.empty(0)
    a, b = _changes(one), _changes(other)
    norm = np.sqrt(np.einsum("pi,pi->p", a, a) * np.einsum("pi,pi->p", b, b))
    return np.einsum("pi,pi->p", a, b) / np.maximum(norm, 1e-6)


def _changes(grey: np.ndarray) -> np.ndarray:
    down, across = np.diff(grey, axis=1).reshape(len(grey), -1), np.diff(grey, axis=2).reshape(len(grey), -1)
    change = np.concatenate([down, across], axis=1)
    return np.sign(change) * np.log1p(np.abs(change) / NOISE)


def _standardised(vectors: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and length 1, so that their product is their correlation."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
