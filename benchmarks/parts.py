"""A part of a data set, drawn at random: for benchmarks on as few images as people have."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainables.data.dataset import Data, open_units
from trainables.data.splits import draw


def draw_part(data: Data, sizes: Sequence[int], seed: int, cache: Path) -> tuple[Data, list[np.ndarray]]:
    """Draw disjoint parts of about these sizes: a data set of all their images, and the indices of each part in it.

    Every class keeps its share, and near-copies stay together. What is computed from the images is kept in `cache`.
    """
    drawn = draw(data.labels, [size / len(data.labels) for size in sizes], seed, open_units(data))
    chosen = np.sort(np.concatenate(drawn))
    digest = hashlib.sha256(chosen.tobytes() + data.fingerprint.encode()).hexdigest()[:16]
    part = replace(
        data, images=data.images[chosen], labels=data.labels[chosen], fingerprint=digest, cache=cache, held_out=0
    )
    return part, [np.searchsorted(chosen, rows) for rows in drawn]
