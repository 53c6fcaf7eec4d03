"""All images of a data set, as the page on it needs them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainables.data.dataset import Data
from trainables.data.packed import ImageRows


@dataclass(frozen=True, eq=False)
class Images:
    """All images of a data set, the train part's first and then the test part's.

    Attributes:
        data: the train part.
        test: uint8 (T, H, W, 3).
        names: N + T file names, relative to `root`; or "train 17" where images are no files.
        root: None where images are no files.
        splits: names of the splits, in the order in which they are used.
        split: int64 (N + T,), of each image, as an index into `splits`.
        unreadable: files that were left out, each as "path (reason)".
        notes: what a person should know of the data set and its splits, a line each.
    """

    data: Data
    test: ImageRows
    names: list[str]
    root: Path | None
    splits: list[str]
    split: np.ndarray
    unreadable: list[str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> np.ndarray:
        """Pixels of image i, uint8 (H, W, 3)."""
        n = len(self.data.labels)
        return self.data.images[i] if i < n else self.test[i - n]

    def label(self, i: int) -> str | None:
        """The name of image i's class; None for a test image."""
        return self.data.classes[int(self.data.labels[i])] if i < len(self.data.labels) else None

    def path(self, i: int) -> Path | None:
        return None if self.root is None else self.root / self.names[i]
