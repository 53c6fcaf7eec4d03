"""How rows are dealt into parts, so that something can be fitted on some and scored on the others."""

import numpy as np


def deal(labels: np.ndarray, parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random row indices in `parts` parts of equal size (but for one row) and equal shares of every class."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [by_class[part::parts] for part in range(parts)]
