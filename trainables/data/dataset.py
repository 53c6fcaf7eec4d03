"""A prepared data set, as every trial opens it: memory-mapped uint8 arrays.

<cache>/data/<name>-<fingerprint>/
  images.npy         uint8 (N, H, W, 3), the train part: everything a sweep may see; images.pack and
                     images_index.npy, and the same for test_images, where that would not fit (see packed.py)
  labels.npy         int64 (N,)
  test_images.npy    the test part, in files of its own
  test_labels.npy    which only `open_test` opens
  units.npy          int64 (N,), equal for images of the train part that stay on one side of a split (see groups.py);
                     absent when every image is alone
  cut.npy            int64, where the test part was cut out of the train part: the rows that it had there
  meta.json          a folder without it does not exist
"""

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from upath import UPath

from trainables.data.decode import Canvas, Fit
from trainables.data.packed import ImageRows, PackedImages
from trainables.errors import UserError
from trainables.storage import Damaged, parse, read_array, read_json

LARGEST_SIDE = 4096  # pixels of the shorter side of stored images
MOST_OBLONG = 2.0  # longer side of a canvas, in shorter ones
FORMAT = 2  # of the cache folder; raise it when decoding changes


@dataclass(frozen=True, eq=False)
class Data:
    """The train part of a prepared data set.

    Attributes:
        name: as in --data, but in letters, digits and _.
        classes: C class names; a label is an index into them.
        images: uint8 (N, H, W, 3), RGB, a read-only memory map; or packed, which is read by rows in the same way.
        labels: int64 (N,).
        fingerprint: 16 hex digits of the content: source bytes, labels, class names, stored size, both parts.
        path: the folder of its arrays.
        cache: where what is computed from its images is kept: never with what other data sets share.
        test_images: number of images of the test part; 0 when there is none.
        mean, std: of the three channels of `images` scaled to 0..1.
        fit: how images of other proportions were brought to the size of the stored ones; see `Canvas`.
        white: of 16-bit and float images, see `Canvas`.
        held_out: number of images, at the end, that are the held-out part that the data set came with (`val`).
    """

    name: str
    classes: tuple[str, ...]
    images: ImageRows
    labels: np.ndarray
    fingerprint: str
    path: Path
    cache: Path
    test_images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "squash"
    white: float | None = None
    held_out: int = 0

    @property
    def canvas(self) -> Canvas:
        """The form of its images."""
        return Canvas(self.images.shape[1], self.images.shape[2], self.fit, self.white)


@dataclass(frozen=True)
class Meta:
    """meta.json of a prepared data set.

    Attributes, beyond those of `Data`:
        content: the fingerprint that the same images had before units and held-out parts were kept; runs of that time
            have it.
        twins: images of the train part that have a twin in it; test_twins: of a test part that the data set came with,
            images with a twin in the train part.
        grouped_by: the column or regular expression that made groups.
        skipped: images that could not be read.
        packed: height and width of images that are kept as JPEG; None where they are raw.
    """

    format: int
    name: str
    classes: tuple[str, ...]
    fingerprint: str
    test_images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "squash"
    skipped: tuple[str, ...] = ()
    white: float | None = None
    held_out: int = 0
    content: str = ""
    twins: int = 0
    test_twins: int = 0
    grouped_by: str = ""
    packed: tuple[int, int] | None = None


def default_cache() -> Path:
    """$NINEFOLD_CACHE, or ~/.cache/ninefold; where HOME cannot be written to, a folder of this user's in /tmp.

    Raises UserError when that folder is somebody else's, who could plant images in it.
    """
    if named := os.environ.get("NINEFOLD_CACHE"):
        return Path(named)
    home = Path.home() / ".cache" / "ninefold"
    if _can_be_made(home):
        return home
    own = Path(tempfile.gettempdir()) / f"ninefold-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode) or status.st_mode & 0o077:
        raise UserError(f"{own} is not this user's alone; set NINEFOLD_CACHE to a folder that is")
    return own


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there and can be written to, or could be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def open_data(path: str | Path, cache: Path | None = None) -> Data:
    """Return the data set in a folder, memory-mapped. Raises UserError when it is missing, damaged or outdated.

    `cache` is where results of its images are kept; default: the cache that the folder lies in.
    """
    path = Path(path)
    meta = read_meta(path)
    images = _images(path, "images", meta)
    labels = _labels(path, "labels", len(images), len(meta.classes))
    if not 0 <= meta.held_out < max(1, len(images)):
        raise UserError(f"{path} is damaged (held_out is {meta.held_out}); remove it and prepare it again")
    return Data(
        name=meta.name,
        classes=meta.classes,
        images=images,
        labels=labels,
        fingerprint=meta.fingerprint,
        path=path,
        cache=cache or path.parent.parent,
        test_images=meta.test_images,
        mean=meta.mean,
        std=meta.std,
        fit=meta.fit,
        white=meta.white,
        held_out=meta.held_out,
    )


def open_units(data: Data) -> np.ndarray | None:
    """Return the unit of each image of the train part, int64 (N,); None when every image is alone."""
    if not (data.path / "units.npy").exists():
        return None
    units = np.asarray(_array(data.path, "units", "i", 1), np.int64)
    if len(units) != len(data.labels):
        raise UserError(f"{data.path} is damaged (units do not fit its images); remove it and prepare it again")
    return units


def open_test(path: str | Path) -> tuple[ImageRows, np.ndarray]:
    """Return images uint8 (N, H, W, 3) and labels int64 (N,) of the test part. Only ensemble.report calls this.

    Raises UserError when the folder is missing, damaged or outdated, or the data set has no test part.
    """
    images = open_test_images(path)
    labels = _labels(Path(path), "test_labels", len(images), len(read_meta(Path(path)).classes))
    if len(images) == 0:
        raise UserError("the data set has no test part; put labelled images that no sweep saw into ROOT/test/<class>")
    return images, labels


def open_test_images(path: str | Path) -> ImageRows:
    """Return images uint8 (N, H, W, 3) of the test part, without their labels; N is 0 when there is no test part.

    Raises UserError when the folder is missing, damaged or outdated.
    """
    return _images(Path(path), "test_images", read_meta(Path(path)))


def read_meta(path: Path) -> Meta:
    """Return meta.json of a prepared data set."""
    if not (path / "meta.json").exists():
        raise UserError(f"{path} holds no prepared data set; prepare it again")
    values = read_json(UPath(path / "meta.json"))
    if values.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of Ninefold; prepare it again")
    return parse(values, Meta, path / "meta.json")


def _images(path: Path, name: str, meta: Meta) -> ImageRows:
    """uint8 (N, H, W, 3), memory-mapped or packed; (0, ...) where there are none."""
    if meta.packed is not None:
        height, width = meta.packed
        if not (0 < height <= LARGEST_SIDE and 0 < width <= MOST_OBLONG * LARGEST_SIDE):
            raise UserError(f"{path} is damaged (images of {height} x {width}); remove it and prepare it again")
        try:
            return PackedImages(path / f"{name}.pack", height, width)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and prepare it again") from None
    images = _array(path, name, "u", 4)
    if images.dtype != np.uint8 or images.shape[3] != 3:
        raise UserError(f"{path} is damaged ({name} are {images.dtype} {images.shape}); remove it and prepare it again")
    return images


def _labels(path: Path, name: str, images: int, classes: int) -> np.ndarray:
    """int64 (images,), each below `classes`."""
    labels = np.asarray(_array(path, name, "i", 1), np.int64)
    if len(labels) != images or (images and not 0 <= labels.min() <= labels.max() < classes):
        raise UserError(f"{path} is damaged ({name} do not fit its images); remove it and prepare it again")
    return labels


def _array(path: Path, name: str, kinds: str, dimensions: int) -> np.ndarray:
    try:
        return read_array(UPath(path / f"{name}.npy"), kinds, dimensions)
    except (OSError, Damaged) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and prepare it again") from None
