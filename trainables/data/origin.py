"""Where the images of a prepared data set come from: the files' names, and those that could not be read."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from upath import UPath

from trainables.data.dataset import Data, read_meta
from trainables.data.decode import Fit
from trainables.data.prepare import find_source, listing_of, note_on_pages, prepare
from trainables.data.sources import Contents, Part
from trainables.errors import UserError
from trainables.storage import read_array, read_json


@dataclass(frozen=True)
class Origin:
    """Where the images of a data set come from.

    Attributes:
        train, test: of each image of the two parts, in the order of their rows: its path relative to the data folder,
            or "train 17" where images are no files of their own.
        unreadable: images that were left out, each as "path (reason)".
        notes: what else was found and is not used, a line each.
        root: what the paths are relative to; None where images are no files of this machine.
    """

    train: list[str]
    test: list[str]
    unreadable: list[str]
    notes: tuple[str, ...] = ()
    root: Path | None = None


def find_origin(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    fit: Fit = "squash",
    group_by: str | None = None,
    twins: bool = True,
    labels: str | None = None,
) -> Origin:
    """Where the images come from that `prepare`, called with the same arguments, gives. Prepares them if need be."""
    data = prepare(name, data_dir, cache_dir, size, fit, group_by=group_by, twins=twins, labels=labels)
    root = data.path.parent
    folder = None if data_dir is None else Path(data_dir).expanduser()
    source = find_source(name, folder, root / "downloads", labels, group_by)
    listed = read_json(UPath(listing_of(root, name, size, fit, source, group_by, twins)))
    skipped = [str(entry) for entry in listed.get("skipped", read_meta(data.path).skipped)]
    left_out = {entry[: end.start()] for entry in skipped for end in re.finditer(r" \(", entry)}
    contents = source.load()
    train = _names(contents.train, "train", left_out)
    if contents.held_out is not None:
        train += _names(contents.held_out, "val", left_out)
    test = [] if contents.test is None else _names(contents.test, "test", left_out)
    if (data.path / "cut.npy").exists():
        cut = np.zeros(len(train), bool)
        cut[read_array(UPath(data.path / "cut.npy"), "i", 1)] = True
        test = [name for name, is_test in zip(train, cut, strict=True) if is_test]
        train = [name for name, is_test in zip(train, cut, strict=True) if not is_test]
    if (len(train), len(test)) != (len(data.labels), data.test_images):
        raise UserError(f"{data_dir} changed while it was read; do it again")
    paged = [str(entry) for entry in listed.get("paged", ())]
    notes = (*source.notes, *([note_on_pages(paged)] if paged else []))
    return Origin(train, test, skipped, notes, _root(contents))


def _names(part: Part, kind: str, left_out: set[str]) -> list[str]:
    """The names of a part's readable images."""
    if part.names is None:
        return [f"{kind} {i}" for i in range(len(part))]
    return [name for name, item in zip(part.names, part.items, strict=True) if str(item) not in left_out]


def _root(contents: Contents) -> Path | None:
    """The folder that the names are relative to, where all images are files below it."""
    root: Path | None = None
    for part in (contents.train, contents.held_out, contents.test):
        if part is None or not len(part):
            continue
        first = part.items[0]
        if part.names is None or not isinstance(first, Path) or not str(first).endswith(part.names[0]):
            return None
        root = Path(str(first)[: -len(part.names[0])] or "/")
    return root


def unnamed(data: Data, test: int) -> Origin:
    """The origin of a prepared data set of which only the images are at hand; `test`: size of its test part."""
    train = [f"train {i}" for i in range(len(data.labels))]
    return Origin(train, [f"test {i}" for i in range(test)], list(read_meta(data.path).skipped))
