"""The prepared data set beside a run, for the machines that the images themselves are not on.

    <run>/data/<name>-<fingerprint>/            the files of the cache folder (see data.py), meta.json last
    <cache>/runs/<key>/data/<name>-<fingerprint>/   a copy of it, for that run alone; without the test part where a
                                                    machine only trains

A run may be somebody else's, and a fingerprint is of the source images, so it cannot be checked on the arrays. So what
lies beside a run never becomes part of the cache that sweeps share: planted images would be trained on under the name
of true ones.
"""

import hashlib
import shutil
import uuid
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from upath import UPath

from trainables.data.dataset import Data, Meta, default_cache, open_data, read_meta
from trainables.data.splits import Splits, load_splits
from trainables.errors import UserError
from trainables.run_directory import RunInfo, read_run
from trainables.storage import exists, is_link, is_local, patiently

PIXELS = ("images.npy", "test_images.npy")
PACKED = ("images.pack", "images_index.npy", "test_images.pack", "test_images_index.npy")


def share_data(run: UPath, data: Data) -> None:
    """Copy a prepared data set into a run directory, unless it is there."""
    folder = run / "data" / data.path.name
    if exists(folder / "meta.json"):
        return
    for name in files_of(read_meta(data.path)):
        target = folder / name
        if is_local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(str(folder)) / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            shutil.copyfile(data.path / name, part)
            part.replace(str(target))
        else:
            patiently(target, partial(target.fs.put_file, str(data.path / name), target.path))


def files_of(meta: Meta) -> tuple[str, ...]:
    """The files of a prepared data set that go with it, the one that makes it whole last."""
    return (*(PIXELS if meta.packed is None else PACKED), "labels.npy", "test_labels.npy", "meta.json")


def open_prepared(run: UPath, path: str | Path) -> Data:
    """Return the data set that a trial trains on: from the folder `path`, where the driver has prepared it, from this
    machine's cache, or copied from beside the run, whichever has it first.

    Raises UserError when none has.
    """
    name = Path(path).name
    for folder in (Path(path), default_cache() / "data" / name):
        if (folder / "meta.json").exists():
            return open_data(folder)
    copy = _own_cache(run) / "data" / name
    if (copy / "meta.json").exists() or exists(run / "data" / name / "meta.json"):
        return _copied(run, run / "data" / name, test=False)
    return open_data(path)  # which says what is missing


def open_run_data(run: UPath, info: RunInfo | None = None) -> tuple[Data, Splits]:
    """Return the data set and the splits of a run, for whoever looks at the run: from this machine's cache, or from
    beside the run.

    Raises UserError when neither has it, or it is not what the run was made of.
    """
    info = info or read_run(run)
    name = info.data.folder  # checked: it is a name, and no path
    if not name:
        raise UserError(f"{run / 'run.json'} does not say which prepared data set it was made of (data.folder)")
    cached, shared = default_cache() / "data" / name, run / "data" / name
    if (cached / "meta.json").exists():
        data = open_data(cached)
    elif not exists(shared / "meta.json") or is_link(shared):
        raise UserError(
            f"the images of {run} are neither beside it nor in this machine's cache ({cached}); set NINEFOLD_CACHE to "
            "the cache that they were prepared in, or prepare them again"
        )
    elif is_local(shared):
        data = open_data(str(shared), cache=_own_cache(run))
    else:
        data = _copied(run, shared, test=True)
    if info.data.fingerprint not in ("", data.fingerprint):
        raise UserError(f"{data.path} holds other images than those of {run}; prepare them again")
    splits = load_splits(run)
    images = len(data.labels)
    if any(len(part) and part[-1] >= images for part in (splits.train, splits.tune, splits.select)):
        raise UserError(f"{run / 'splits.npz'} has indices beyond the {images} images of {data.path}")
    return data, splits


def select_images(run: UPath, data: Data, splits: Splits, labels: np.ndarray) -> np.ndarray:
    """Return the rows of `data` that are the select split; raises UserError when their labels are not these."""
    if not np.array_equal(data.labels[splits.select], labels):
        raise UserError(f"the labels in {data.path} are not those of the select split of {run}")
    return splits.select


def _own_cache(run: UPath) -> Path:
    """Where a run's own copy of its images, and results of them, are kept."""
    return default_cache() / "runs" / hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:20]


def _copied(run: UPath, shared: UPath, test: bool) -> Data:
    """The data set beside a run, copied to this machine once, into a folder of that run alone; `test`: its test part,
    too."""
    cache = _own_cache(run)
    folder = cache / "data" / shared.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # else the lanes of a node would copy side by side
        if not (folder / "meta.json").exists() or (test and not (folder / "test_labels.npy").exists()):
            _fetch(shared, folder, test)
    return open_data(folder, cache)


def _fetch(shared: UPath, folder: Path, test: bool) -> None:
    """Copy what is not there yet, file by file, meta.json last; raises UserError when there is no room for it."""
    folder.mkdir(exist_ok=True)
    place = folder.with_name(f"{uuid.uuid4().hex}.tmp")
    place.mkdir()
    try:
        _copy(shared / "meta.json", place)
        names = [n for n in files_of(read_meta(place))[:-1] if test or not n.startswith("test_")]
        missing = [name for name in names if not (folder / name).exists()]
        needed, free = sum((shared / name).stat().st_size for name in missing), shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"the images of {shared.parent.parent} take {needed / 1e9:.1f} GB, and {folder.parent} has "
                f"{free / 1e9:.1f} GB free; set NINEFOLD_CACHE to a folder on a larger disk on this machine"
            )
        for name in missing:
            _copy(shared / name, place)
            (place / name).replace(folder / name)
        (place / "meta.json").replace(folder / "meta.json")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: UPath, folder: Path) -> None:
    if is_link(source):
        raise UserError(f"{source} is a symbolic link, which is not followed")
    target = folder / source.name
    if is_local(source):
        shutil.copyfile(str(source), target)
    else:
        patiently(source, partial(source.fs.get_file, source.path, str(target)))
