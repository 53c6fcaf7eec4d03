"""Data sets, found and decoded: once per machine, into the arrays that dataset.py opens.

    <cache>/data/listings/<key>.json   which folder a listing of source files (paths, sizes, times) was decoded to, and
                                       which of them could not be read

Only the listing is looked at a second time, so an unchanged data set opens at once.

All images are decoded into one array first; then it is known which of them are twins, and only then is a test part cut
out of it, where the data set has none of its own.
"""

import contextlib
import difflib
import hashlib
import json
import math
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from upath import UPath

from trainables.command import progress as show_progress
from trainables.data.arrays import Log, Written, channel_statistics, cut_test, is_abandoned, open_images, write_parts
from trainables.data.dataset import FORMAT, LARGEST_SIDE, MOST_OBLONG, Data, default_cache, open_data
from trainables.data.decode import FORMATS, Canvas, Fit, Item, find_white, measure
from trainables.data.duplicates import Group, find_groups, sign
from trainables.data.groups import group_numbers, number_groups, unit_of_each
from trainables.data.packed import QUALITY, is_too_large
from trainables.data.sources import Contents, Part, Source, digits, folder
from trainables.data.sources.cifar import cifar
from trainables.data.sources.named import KINDS, named
from trainables.data.sources.tables import table
from trainables.data.splits import draw
from trainables.errors import UserError
from trainables.storage import read_json, write_json

DATASETS = ("digits", "cifar10", "cifar100", "folder")
LISTING = 3  # raise it when a source is to be decoded again, although what that gives may be the same
QUIET_S = 3.0  # of waiting for another process
LARGEST_DEFAULT_SIDE = 256
MEASURED_IMAGES = 1000  # that decide the stored size
LEAST_SKIP_LIMIT = 10


def prepare(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    fit: Fit = "squash",
    progress: bool = True,
    group_by: str | None = None,
    twins: bool = True,
    labels: str | None = None,
) -> Data:
    """Find a data set, decode it unless that was done before, and open it.

    Args:
        name: "digits", "cifar10", "cifar100", "folder", or a name of a library's: "torchvision:...", "hf:...".
        data_dir: where its images lie; see `folder` in sources.py and `cifar` in cifar.py. "digits" takes none.
        cache_dir: where the arrays go; default `default_cache()`.
        size: shorter side of the stored images in pixels. None keeps the size that all images share, up to 256 pixels a
            side; otherwise the median shorter side, at most 256. The other side follows from the images' median
            proportions. (Judged by 1,000 images spread over the data set.)
        fit: how images of other proportions get there; see `Canvas`.
        progress: tell on stderr how far it is, see `trainables.command.progress`.
        group_by: which images stay on one side of a split: a column of `labels`, or a regular expression on the images'
            paths, see `group_numbers`.
        twins: look for images that are there twice, or almost, and keep them on one side, too.
        labels: a table of the images of "folder", path or URL, see tables.py.

    Images that cannot be read are named on stderr and left out, up to 1 % of them (or 10). Raises UserError beyond
    that, and on whatever else a user can fix. Any number of processes may prepare the same data set at once.
    """
    root = Path(cache_dir or default_cache()).expanduser().resolve() / "data"
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise UserError(f"size is {size}, expected 1 to {LARGEST_SIDE} pixels")
    source = find_source(
        name, None if data_dir is None else Path(data_dir).expanduser(), root / "downloads", labels, group_by
    )
    listing = listing_of(root, name, size, fit, source, group_by, twins)
    path = _decoded(listing)
    if path is None:
        try:
            listing.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {root} ({error}); set NINEFOLD_CACHE to another folder"
            ) from None
        with _alone(listing.with_suffix(".lock")):  # else the workers of a machine would decode side by side
            path = _decoded(listing)
            if path is None:
                path, skipped, paged = _decode(name, source, root, size, fit, progress, group_by, twins, listing.stem)
                write_json(UPath(listing), {"folder": path.name, "skipped": skipped, "paged": paged})
    return open_data(path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for a lock, with a word where that takes long."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=QUIET_S)
    except Timeout:
        print("another process prepares these images; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def listing_of(
    root: Path, name: str, size: int | None, fit: Fit, source: Source, group_by: str | None = None, twins: bool = True
) -> Path:
    """The file that says what a source was decoded to."""
    text = f"{LISTING} {name} {size} {fit} {group_by!r} {twins} {source.key}"
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]
    return root / "listings" / f"{key}.json"


def _decoded(listing: Path) -> Path | None:
    if not listing.exists():
        return None
    path = listing.parents[1] / read_json(UPath(listing))["folder"]
    return path if (path / "meta.json").exists() else None


def find_source(
    name: str, data_dir: Path | None, downloads: Path, labels: str | None = None, group_by: str | None = None
) -> Source:
    """What the arguments name, see `prepare`; raises UserError when it is not there."""
    by_name = name.partition(":")[0] in KINDS
    if name not in DATASETS and not by_name:
        near = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(DATASETS)}"
        own = "images of your own: folder, with --data-dir; sets by name: torchvision:NAME, hf:NAME"
        raise UserError(f"unknown data set {name!r}; {hint} ({own})")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist; expected one with <class>/* or train/<class>/* in it")
    if labels is not None:
        if name != "folder":
            raise UserError(f"--labels is a table of images of your own; add --data folder (it is {name})")
        return table(labels, data_dir, downloads, group_by)
    if by_name:
        return named(name, data_dir, downloads)
    if name == "digits":
        if data_dir is not None:
            raise UserError("digits takes no --data-dir; to read images of your own add --data folder")
        return digits()
    try:
        if name != "folder":
            return cifar(name, data_dir, downloads)
        if data_dir is None:
            raise UserError(
                "data set folder needs --data-dir ROOT, with images in ROOT/train/<class>/ or ROOT/<class>/"
            )
        return folder(data_dir)
    except OSError as error:
        raise UserError(f"{data_dir} cannot be listed ({error}); check what lies there and who may read it") from None


def _decode(
    name: str,
    source: Source,
    root: Path,
    size: int | None,
    fit: Fit,
    progress: bool,
    group_by: str | None = None,
    twins: bool = True,
    listing: str = "images",
) -> tuple[Path, list[str], list[str]]:
    """Decode a source into a folder below `root`, which appears whole or not at all; go on where an earlier process was
    killed over the same `listing`.

    Returns it, the images that were left out, with the reasons, and those that have more pages than the one read.
    """
    contents = source.load()
    classes = contents.classes
    groups = _groups(contents, group_by)
    items = [item for part in _parts(contents) for item in part.items]
    canvas = _canvas(items, size, fit)
    skipped: list[str] = []
    paged: list[str] = []

    def skip(item: Item, reason: str) -> None:
        skipped.append(f"{item} ({reason})")
        if len(skipped) > max(LEAST_SKIP_LIMIT, len(items) // 100):
            raise UserError(
                f"{len(skipped)} of {len(items):,} images cannot be read, more than the 1 % that are left out: "
                f"{_few(skipped)}; repair or remove them"
            )

    _remove_stale(root)
    temporary = _begin(root, listing)
    packed = is_too_large(len(items), canvas.shape, root)
    log = Log(temporary, canvas, len(items), packed)
    try:
        with show_progress(f"decoding {name}", len(items), shown=progress) as advance:
            seen = [part for part in (contents.train, contents.held_out) if part is not None]
            test = contents.test or contents.train.take(np.empty(0, np.int64))
            written, tested = (
                write_parts(parts, temporary, prefix, canvas, log, skip, paged, lambda: advance(1))
                for parts, prefix in ((seen, ""), ([test], "test_"))
            )
        found = _find_twins(temporary, canvas, progress) if twins else []
        held_out = int((written.rows >= len(contents.train)).sum())
        n = len(written.labels)
        units = unit_of_each([own for group in found if (own := _within(group, n))], groups[written.rows], n)
        is_cut, is_plainly_cut = _draw_test(contents, written, units)
        content = _digest(classes, canvas, packed, written, tested, is_plainly_cut, len(contents.train))
        fingerprint = content
        if held_out or units is not None:
            kept = [part.tobytes() for part in (units, is_cut) if part is not None]
            notes = "".join(f"{label} {note}\n" for label, note in zip(written.labels, written.notes, strict=True))
            fingerprint = hashlib.sha256(b"".join([f"{content} {held_out}\n{notes}".encode(), *kept])).hexdigest()
        log.close()
        if is_cut.any():
            tested = cut_test(temporary, written, is_cut, canvas)
            np.save(temporary / "cut.npy", np.flatnonzero(is_cut), allow_pickle=False)
            units = None if units is None else units[~is_cut]
            written = written.take(~is_cut)
        np.save(temporary / "labels.npy", written.labels, allow_pickle=False)
        np.save(temporary / "test_labels.npy", tested.labels, allow_pickle=False)
        if units is not None and len(np.unique(units)) < len(units):
            np.save(temporary / "units.npy", units, allow_pickle=False)
        _check_counts(classes, written.labels)
        mean, std = channel_statistics(open_images(temporary, "images", canvas))
        meta = {
            "format": FORMAT,
            "name": plain_name(name),
            "classes": list(classes),
            "fit": fit,
            "images": len(written.labels),
            "test_images": len(tested.labels),
            "mean": mean,
            "std": std,
            "skipped": skipped,
            "fingerprint": fingerprint[:16],
            "white": canvas.white,
            "held_out": held_out,
            "content": content[:16],
            "twins": sum(len(own.rows) for group in found if (own := _within(group, n))),
            "test_twins": _test_twins(found, n),
            "grouped_by": group_by or "",
            "packed": [canvas.height, canvas.width] if packed else None,
        }
        write_json(UPath(temporary / "meta.json"), meta)
        path = _publish(temporary, root / f"{meta['name']}-{meta['fingerprint']}")
    except Exception:  # not KeyboardInterrupt: what was decoded is there for the next time
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    if packed:
        print(note_on_packing(len(items), canvas, path), file=sys.stderr)
    for note in source.notes:
        print(note, file=sys.stderr)
    if paged:
        print(note_on_pages(paged), file=sys.stderr)
    if skipped:
        print(f"left out {len(skipped)} of {len(items):,} images: {_few(skipped)}", file=sys.stderr)
    return path, skipped, paged


def _begin(root: Path, listing: str) -> Path:
    """A folder to decode into: that of an earlier process that was killed over the same listing, or a new one."""
    for earlier in root.glob(f"{listing}-*.tmp"):
        if is_abandoned(earlier):
            return earlier
    temporary = root / f"{listing}-{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    return temporary


def note_on_packing(images: int, canvas: Canvas, path: Path) -> str:
    raw = images * math.prod(canvas.shape) / 1e9
    kept = sum(file.stat().st_size for file in path.glob("*.pack")) / 1e9
    return (
        f"{images:,} images of {canvas.height} x {canvas.width} pixels would take {raw:.1f} GB, more than half of the "
        f"memory or of the free disk: kept as JPEG of quality {QUALITY}, {kept:.1f} GB, and decoded whenever they are "
        "needed; --stored-size makes them smaller"
    )


def note_on_pages(paged: Sequence[str]) -> str:
    return f"of {len(paged)} files with several pages or frames the first is used: {_few(paged)}"


def plain_name(name: str) -> str:
    """The name of a data set as a part of folder names: "hf:org/name" as "hf_org_name"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())[:40]


def _parts(contents: Contents) -> list[Part]:
    """The parts in the order in which their images are listed."""
    return [part for part in (contents.train, contents.held_out, contents.test) if part is not None]


def _groups(contents: Contents, group_by: str | None) -> np.ndarray:
    """The group of each image of train and held-out part, int64 (N,); -1 for none."""
    seen = [part for part in (contents.train, contents.held_out) if part is not None]
    if any(part.groups is not None for part in seen):
        keys = [key for part in seen for key in part.groups or [""] * len(part)]
        return number_groups(keys, group_by or "group")
    if group_by is None:
        return np.full(sum(map(len, seen)), -1)
    if any(part.names is None for part in seen):
        raise UserError(f"--group-by {group_by!r} looks at paths, and these images are no files of their own")
    return group_numbers([name for part in seen for name in part.names or ()], group_by)


def _draw_test(contents: Contents, written: Written, units: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the readable images become the test part, bool (N,): in whole units, and as if there were none."""
    labels = contents.train.labels
    none = np.zeros(len(written.labels), bool)
    if contents.test is not None or contents.test_fraction == 0:
        return none, none
    plain = np.zeros(len(labels), bool)  # of all that are listed: what cannot be read must not move the others
    plain[draw(labels, [contents.test_fraction], seed=0)[0]] = True
    if units is None:
        return plain[written.rows], plain[written.rows]
    every = np.arange(len(labels)) + len(labels)
    every[written.rows] = units
    whole = np.zeros(len(labels), bool)
    whole[draw(labels, [contents.test_fraction], 0, every)[0]] = True
    return whole[written.rows], plain[written.rows]


def _digest(
    classes: Sequence[str],
    canvas: Canvas,
    packed: bool,
    written: Written,
    tested: Written,
    is_cut: np.ndarray,
    train: int,
) -> str:
    """SHA-256 of the content, without regard to units and to a held-out part, as it was before these were kept."""
    form: list[Any] = [canvas.height, canvas.width, canvas.fit]
    if canvas.white is not None:
        form.append(canvas.white)
    if packed:
        form.append(f"jpeg {QUALITY}")
    digest = hashlib.sha256(json.dumps([FORMAT, classes, form]).encode())
    is_train = written.rows < train
    for part, prefix in ((written.take(is_train & ~is_cut), ""), (written.take(is_cut), "test_"), (tested, "test_")):
        for label, note in zip(part.labels, part.notes, strict=True):
            digest.update(f"{prefix}{label} {note}\n".encode())
    return digest.hexdigest()


def _find_twins(folder: Path, canvas: Canvas, progress: bool) -> list[Group]:
    """Groups of images that are one picture, as rows of the train part's array and behind them the test part's."""
    parts = [open_images(folder, f"{prefix}images", canvas) for prefix in ("", "test_")]
    with show_progress("looking for twins", 2 * sum(map(len, parts)), shown=progress) as advance:
        signatures = [sign(part, advance) for part in parts]
        return find_groups(signatures[0] + signatures[1], advance)


def _within(group: Group, n: int) -> Group | None:
    """What a group has among the first `n` rows; None unless that is two images or more."""
    rows = tuple(row for row in group.rows if row < n)
    return Group(rows, group.kind) if len(rows) > 1 else None


def _test_twins(groups: Sequence[Group], n: int) -> int:
    """Images of a test part, rows `n` and above, that have a twin below."""
    return sum(sum(row >= n for row in group.rows) for group in groups if group.rows[0] < n)


def _check_counts(classes: Sequence[str], labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() == 0:
        raise UserError(
            f"class {classes[int(counts.argmin())]!r} has 0 readable train images, expected at least 1; "
            "add images or remove the class"
        )


def _canvas(items: Sequence[Item], size: int | None, fit: Fit) -> Canvas:
    """The form in which these images are stored; see `prepare`."""
    sample = items[:: math.ceil(len(items) / MEASURED_IMAGES)]
    shapes = [shape for shape in map(measure, sample) if shape is not None]
    if not shapes:
        raise UserError(f"none of the images can be read, the first being {items[0]}; expected {', '.join(FORMATS)}")
    white = find_white(sample)
    if size is None and len(set(shapes)) == 1 and max(shapes[0]) <= LARGEST_DEFAULT_SIDE:
        return Canvas(*shapes[0], fit, white)
    shorter = round(float(np.median([min(shape) for shape in shapes])))
    side = min(size or LARGEST_DEFAULT_SIDE, shorter) if size is None or shorter < size else size
    proportion = float(np.exp(np.median([math.log(height / width) for height, width in shapes])))
    proportion = min(max(proportion, 1 / MOST_OBLONG), MOST_OBLONG)
    if proportion >= 1:
        return Canvas(round(side * proportion), side, fit, white)
    return Canvas(side, round(side / proportion), fit, white)


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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
