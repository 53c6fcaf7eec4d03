"""Fixtures shared by the tests: a small data set of pictures that a network can learn in seconds."""

import os
from pathlib import Path

# Before torch is imported anywhere: tests share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from trainables.data import Data, prepare
from trainables.splits import Splits, make_splits


def draw_folder(root: Path, per_class: int = 30, size: int = 12, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """ROOT/<part>/<class>/*.png of two kinds of stripes with noise, all different, learnable in a few epochs."""
    rng = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(("across", "down", "grid")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 120, (size, size, 3))
                offset = rng.integers(0, 3)
                if label != 1:
                    pixels[offset::3] += 120
                if label != 0:
                    pixels[:, offset::3] += 120
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with train and test parts of three classes, 30 images of 12x12 each."""
    return draw_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """`pictures`, prepared in a cache of their own."""
    return prepare("folder", pictures, cache_dir=tmp_path_factory.mktemp("pictures-cache"))


@pytest.fixture(scope="session")
def splits(data: Data) -> Splits:
    return make_splits(data.labels, data.fingerprint)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of tests does not go into the user's cache."""
    os.environ["NINEFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
