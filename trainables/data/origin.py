"""Where the images of a prepared data set come from: the files' names, and those that could not be read."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from upath import UPath

from trainables.data.dataset import Data, read_meta
from trainables.data.decode import Fit
from trainables.data.prepare import find_source, listing_of, prepare, train_and_test
from trainables.errors import UserError
from trainables.storage import read_json


@dataclass(frozen=True)
class Origin:
    """Where the images of a data set come from.

    Attributes:
        train, test: of each image of the two parts, in the order of their rows: its path relative to the data folder,
            or "train 17" where images are no files of their own.
        unreadable: images that were left out, each as "path (reason)".
    """

    train: list[str]
    test: list[str]
    unreadable: list[str]


def find_origin(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    fit: Fit = "squash",
) -> Origin:
    """Where the images come from that `prepare`, called with the same arguments, gives. Prepares them if need be."""
    data = prepare(name, data_dir, cache_dir, size, fit)
    root = data.path.parent
    folder = None if data_dir is None else Path(data_dir).expanduser()
    source = find_source(name, folder, root / "downloads")
    listed = read_json(UPath(listing_of(root, name, size, fit, source)))
    skipped = [str(entry) for entry in listed.get("skipped", read_meta(data.path).skipped)]
    left_out = {entry[: end.start()] for entry in skipped for end in re.finditer(r" \(", entry)}
    names: list[list[str]] = []
    for part, kind in zip(train_and_test(source.load()), ("train", "test"), strict=True):
        if isinstance(part.items, np.ndarray):
            names.append([f"{kind} {i}" for i in range(len(part.labels))])
        else:
            assert folder is not None
            names.append([item.relative_to(folder).as_posix() for item in part.items if str(item) not in left_out])
    if (len(names[0]), len(names[1])) != (len(data.labels), data.test_images):
        raise UserError(f"{data_dir} changed while it was read; do it again")
    return Origin(names[0], names[1], skipped)


def unnamed(data: Data, test: int) -> Origin:
    """The origin of a prepared data set of which only the images are at hand; `test`: size of its test part."""
    train = [f"train {i}" for i in range(len(data.labels))]
    return Origin(train, [f"test {i}" for i in range(test)], list(read_meta(data.path).skipped))
