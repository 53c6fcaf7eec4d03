"""The prepared data set beside a run, for the machines that the images themselves are not on.

    <run>/data/<name>-<fingerprint>/    the files of the cache folder (see data.py), meta.json last

Every node copies it into its own cache, once.
"""

import shutil
import uuid
from functools import partial
from pathlib import Path

from filelock import FileLock
from upath import UPath

from trainables.candidate import exists, is_local, patiently
from trainables.data import Data, default_cache, open_data

FILES = ("images.npy", "labels.npy", "test_images.npy", "test_labels.npy", "meta.json")


def share_data(run: UPath, data: Data) -> None:
    """Copy a prepared data set into a run directory, unless it is there."""
    folder = run / "data" / data.path.name
    if exists(folder / "meta.json"):
        return
    for name in FILES:
        target = folder / name
        if is_local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(str(folder)) / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            shutil.copyfile(data.path / name, part)
            part.replace(str(target))
        else:
            patiently(target, partial(target.fs.put_file, str(data.path / name), target.path))


def open_shared(run: UPath, path: str | Path) -> Data:
    """The data set prepared in the cache folder `path`, perhaps on another machine: from there, from this machine's
    cache, or from beside the run, whichever has it first.

    Raises UserError when none has.
    """
    cached = default_cache() / "data" / Path(path).name
    for folder in (Path(path), cached):
        if (folder / "meta.json").exists():
            return open_data(folder)
    shared = run / "data" / cached.name
    if not exists(shared / "meta.json"):
        return open_data(path)  # which says what is missing
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):  # else the lanes of a node would copy side by side
        if not (cached / "meta.json").exists():
            _fetch(shared, cached)
    return open_data(cached)


def _fetch(shared: UPath, cached: Path) -> None:
    """Copy into the cache; the folder appears whole or not at all."""
    temporary = cached.with_name(f"{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        for name in FILES:
            source, target = shared / name, temporary / name
            if is_local(source):
                shutil.copyfile(str(source), target)
            else:
                patiently(source, partial(source.fs.get_file, source.path, str(target)))
        shutil.rmtree(cached, ignore_errors=True)
        temporary.rename(cached)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
