"""Whether what was written computes what PyTorch does: on images of the select split where they are within reach."""

import itertools
from collections.abc import Callable

import numpy as np
from upath import UPath

from trainables.data.decode import Canvas
from trainables.data.share import open_run_data
from trainables.errors import UserError

TOLERANCE = 1e-4  # largest difference of a probability
CHECKED = 1000  # images of the select split that a file is compared on
CHECK_BATCH = 64

Runtime = Callable[[np.ndarray], np.ndarray]
"""A file opened by the runtime that it is for: uint8 (N, H, W, 3) to float32 (N, C)."""


def largest_difference(
    runtime: Runtime, predict: Runtime, images: np.ndarray, advance: Callable[[int], None] = lambda images: None
) -> float:
    """How far the two are apart at most, over all images and classes, in batches of 1, 2, 64 and what is left."""
    starts = [0, 1, 3, *range(3 + CHECK_BATCH, len(images), CHECK_BATCH), len(images)]
    parts = [images[a:b] for a, b in itertools.pairwise(starts) if b > a]
    worst = 0.0
    for part in parts:
        worst = float(np.maximum(worst, np.abs(runtime(part) - predict(part)).max()))  # NaN stays NaN
        advance(len(part))
    return worst


def images_to_check(run: UPath, canvas: Canvas) -> tuple[np.ndarray, bool]:
    """Images of the select split, or random ones (and False) when it is empty or the data set not within reach."""
    try:
        data, splits = open_run_data(run)
        images = np.asarray(data.images[splits.select[:CHECKED]])
    except (UserError, OSError):  # nowhere, damaged, or there is no room for a copy of it
        images = np.empty(0, np.uint8)
    if len(images) == 0:  # a refit was trained on its select split, too
        return np.random.default_rng(0).integers(0, 256, (CHECKED, *canvas.shape), np.uint8), False
    return images, True
