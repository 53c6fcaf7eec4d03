"""Data sets, found and decoded: once per machine, into the arrays that dataset.py opens.

    <cache>/data/listings/<key>.json   which folder a listing of source files (paths, sizes, times) was decoded to, and
                                       which of them could not be read

Only the listing is looked at a second time, so an unchanged data set opens at once.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from upath import UPath

from trainables.data.dataset import FORMAT, Data, default_cache, open_data
from trainables.data.decode import FORMATS, Canvas, Fit, Item, measure, read_items
from trainables.data.sources import Contents, Part, Source, cifar, digits, folder
from trainables.data.splits import FEWEST_PER_CLASS, draw
from trainables.errors import UserError
from trainables.storage import read_json, write_json

DATASETS = ("digits", "cifar10", "cifar100", "folder")
LARGEST_DEFAULT_SIDE = 256
LARGEST_SIDE = 4096
MOST_OBLONG = 2.0  # longer side of a canvas, in shorter ones
MEASURED_IMAGES = 1000  # that decide the stored size
LEAST_SKIP_LIMIT = 10


def prepare(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    fit: Fit = "squash",
    progress: bool = True,
) -> Data:
    """Find a data set, decode it unless that was done before, and open it.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        data_dir: where its images lie; see `folder` and `cifar` in sources.py. "digits" takes none.
        cache_dir: where the arrays go; default `default_cache()`.
        size: shorter side of the stored images in pixels. None keeps the size that all images share, up to 256 pixels a
            side; otherwise the median shorter side, at most 256. The other side follows from the images' median
            proportions. (Judged by 1,000 images spread over the data set.)
        fit: how images of other proportions get there; see `Canvas`.
        progress: show a bar on stderr while decoding, if that is a terminal.

    Images that cannot be read are named on stderr and left out, up to 1 % of them (or 10). Raises UserError beyond
    that, and on whatever else a user can fix. Any number of processes may prepare the same data set at once.
    """
    root = Path(cache_dir or default_cache()).expanduser().resolve() / "data"
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise UserError(f"size is {size}, expected 1 to {LARGEST_SIDE} pixels")
    source = find_source(name, None if data_dir is None else Path(data_dir).expanduser(), root / "downloads")
    listing = listing_of(root, name, size, fit, source)
    path = _decoded(listing)
    if path is None:
        try:
            listing.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {root} ({error}); set NINEFOLD_CACHE to another folder"
            ) from None
        with FileLock(listing.with_suffix(".lock")):  # else the workers of a machine would decode side by side
            path = _decoded(listing)
            if path is None:
                path, skipped = _decode(name, source, root, size, fit, progress)
                write_json(UPath(listing), {"folder": path.name, "skipped": skipped})
    return open_data(path)


def listing_of(root: Path, name: str, size: int | None, fit: Fit, source: Source) -> Path:
    """The file that says what a source was decoded to."""
    key = hashlib.sha256(f"{FORMAT} {name} {size} {fit} {source.key}".encode()).hexdigest()[:24]
    return root / "listings" / f"{key}.json"


def _decoded(listing: Path) -> Path | None:
    if not listing.exists():
        return None
    path = listing.parents[1] / read_json(UPath(listing))["folder"]
    return path if (path / "meta.json").exists() else None


def find_source(name: str, data_dir: Path | None, downloads: Path) -> Source:
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(DATASETS)}"
        raise UserError(f"unknown data set {name!r}; {hint} (images of your own: folder, with --data-dir)")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist; expected a folder with train/<class>/* in it")
    if name == "digits":
        if data_dir is not None:
            raise UserError("digits takes no --data-dir; to read images of your own add --data folder")
        return digits()
    if name != "folder":
        return cifar(name, data_dir, downloads)
    if data_dir is None:
        raise UserError("data set folder needs --data-dir ROOT, with images in ROOT/train/<class>/ or ROOT/<class>/")
    return folder(data_dir)


def _decode(
    name: str, source: Source, root: Path, size: int | None, fit: Fit, progress: bool
) -> tuple[Path, list[str]]:
    """Decode a source into a folder below `root`; returns that and the images that were left out, with the reasons.

    The folder appears whole or not at all.
    """
    contents = source.load()
    classes = contents.classes
    train, test = train_and_test(contents)
    _check_counts(classes, train.labels)
    items = [*train.items, *test.items]
    canvas = _canvas(items, size, fit)
    digest = hashlib.sha256(json.dumps([FORMAT, classes, dataclasses.astuple(canvas)]).encode())
    skipped: list[str] = []

    def skip(item: Item, reason: str) -> None:
        skipped.append(f"{item} ({reason})")
        if len(skipped) > max(LEAST_SKIP_LIMIT, len(items) // 100):
            raise UserError(
                f"{len(skipped)} of {len(items):,} images cannot be read, more than the 1 % that are left out: "
                f"{_few(skipped)}; repair or remove them"
            )

    _remove_stale(root)
    temporary = root / f"{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        with _progress_bar(progress) as bar:
            task = bar.add_task(f"decoding {name}", total=len(items))
            for part, prefix in ((train, ""), (test, "test_")):
                _write_part(part, temporary, prefix, canvas, digest, skip, lambda: bar.advance(task))
        labels = np.load(temporary / "labels.npy", allow_pickle=False)
        _check_counts(classes, labels)  # again, now that unreadable images are out
        mean, std = _channel_statistics(np.load(temporary / "images.npy", mmap_mode="r", allow_pickle=False))
        meta = {
            "format": FORMAT,
            "name": name,
            "classes": list(classes),
            "fit": fit,
            "images": len(labels),
            "test_images": len(np.load(temporary / "test_labels.npy", allow_pickle=False)),
            "mean": mean,
            "std": std,
            "skipped": skipped,
            "fingerprint": digest.hexdigest()[:16],
        }
        write_json(UPath(temporary / "meta.json"), meta)
        path = _publish(temporary, root / f"{name}-{meta['fingerprint']}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if skipped:
        print(f"left out {len(skipped)} of {len(items):,} images: {_few(skipped)}", file=sys.stderr)
    return path, skipped


def train_and_test(contents: Contents) -> tuple[Part, Part]:
    if contents.test is not None:
        return contents.train, contents.test
    train = contents.train
    is_test = np.zeros(len(train.labels), bool)
    if contents.test_fraction > 0:
        is_test[draw(train.labels, [contents.test_fraction], seed=0)[0]] = True
    return _take(train, ~is_test), _take(train, is_test)


def _take(part: Part, where: np.ndarray) -> Part:
    if isinstance(part.items, np.ndarray):
        return Part(part.items[where], part.labels[where])
    return Part([part.items[i] for i in np.flatnonzero(where)], part.labels[where])


def _check_counts(classes: Sequence[str], labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < FEWEST_PER_CLASS:
        raise UserError(
            f"class {classes[int(counts.argmin())]!r} has {counts.min()} readable train images, expected at least "
            f"{FEWEST_PER_CLASS} to train and validate on; add images or remove the class"
        )


def _canvas(items: Sequence[Item], size: int | None, fit: Fit) -> Canvas:
    """The form in which these images are stored; see `prepare`."""
    sample = items[:: math.ceil(len(items) / MEASURED_IMAGES)]
    shapes = [shape for shape in map(measure, sample) if shape is not None]
    if not shapes:
        raise UserError(f"none of the images can be read, the first being {items[0]}; expected {', '.join(FORMATS)}")
    if size is None and len(set(shapes)) == 1 and max(shapes[0]) <= LARGEST_DEFAULT_SIDE:
        return Canvas(*shapes[0], fit)
    shorter = round(float(np.median([min(shape) for shape in shapes])))
    side = min(size or LARGEST_DEFAULT_SIDE, shorter) if size is None or shorter < size else size
    proportion = float(np.exp(np.median([math.log(height / width) for height, width in shapes])))
    proportion = min(max(proportion, 1 / MOST_OBLONG), MOST_OBLONG)
    if proportion >= 1:
        return Canvas(round(side * proportion), side, fit)
    return Canvas(side, round(side / proportion), fit)


def _write_part(
    part: Part,
    folder: Path,
    prefix: str,
    canvas: Canvas,
    digest: "hashlib._Hash",
    skip: Callable[[Item, str], None],
    tick: Callable[[], None],
) -> None:
    """Write <prefix>images.npy and <prefix>labels.npy of the readable images, and add them to the digest."""
    kept = []
    with open(folder / f"{prefix}images.npy", "wb") as file:
        _write_header(file, (len(part.items), *canvas.shape))
        for item, label, (image, note) in zip(part.items, part.labels, read_items(part.items, canvas), strict=True):
            tick()
            if image is None:
                skip(item, note)
                continue
            file.write(image.tobytes())
            digest.update(f"{prefix}{label} {note}\n".encode())
            kept.append(label)
        file.seek(0)  # the count is known only now; numpy pads the header so that it may change
        _write_header(file, (len(kept), *canvas.shape))
    np.save(folder / f"{prefix}labels.npy", np.array(kept, np.int64), allow_pickle=False)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 (N, H, W, 3), scaled to 0..1; exact, from histograms."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 128):
        pixels = images[start : start + 128].reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), np.sqrt(variance).clip(1 / 255).tolist()  # training divides by it, so never 0


def _publish(temporary: Path, path: Path) -> Path:
    """Give a finished folder its name, unless another process was faster with the same content."""
    if not (path / "meta.json").exists():
        shutil.rmtree(path, ignore_errors=True)  # somebody deleted parts of it
    try:
        temporary.rename(path)
    except OSError:
        if not (path / "meta.json").exists():
            raise
    return path


def _remove_stale(root: Path) -> None:
    """Remove what killed processes left behind: temporary folders older than a day."""
    for temporary in root.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > 86_400:
                shutil.rmtree(temporary, ignore_errors=True)


def _progress_bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (shown and console.is_terminal))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
