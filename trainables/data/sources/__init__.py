"""Where a data set's images lie: found by listing, not yet read."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from trainables.data.decode import HEIF_SUFFIXES, Item, suffixes
from trainables.errors import UserError

HELD_OUT = ("val", "valid", "validation")  # names of the part that is held out of training
PARTS = ("train", *HELD_OUT, "test")
NAMED = 6  # endings and siblings that are named; more are counted


@dataclass(frozen=True)
class Part:
    """The images of one part of a data set, unread.

    Attributes:
        items: the images.
        labels: int64 (N,), indices into the classes.
        names: of each image, as a person knows it: the path relative to the data folder; None: they have none.
        groups: of each image, the group that it is of, "" for none; None: the source knows of none.
    """

    items: Sequence[Item] | np.ndarray
    labels: np.ndarray
    names: list[str] | None = None
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Part":
        """Only these images, by sorted index."""
        if isinstance(self.items, np.ndarray):
            return Part(self.items[rows], self.labels[rows])
        chosen = rows.tolist()
        return Part(
            [self.items[i] for i in chosen],
            self.labels[rows],
            None if self.names is None else [self.names[i] for i in chosen],
            None if self.groups is None else [self.groups[i] for i in chosen],
        )


@dataclass(frozen=True)
class Contents:
    """What a data set consists of; without a `test` part, a `test_fraction` of the train part becomes one.

    `held_out` is the part that tune and select are made of; None: they are drawn from `train`.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    test_fraction: float = 0.0
    held_out: Part | None = None


@dataclass(frozen=True)
class Source:
    """A data set that was found. `key` changes whenever one of its files does; `load` may read them.

    `notes` say in a line each what was found and is not used.
    """

    key: str
    load: Callable[[], Contents]
    notes: tuple[str, ...] = ()


@dataclass
class Passed:
    """What a listing passes over: files by their ending, and folders or files that are no part of a data set."""

    endings: Counter[str] = field(default_factory=Counter)
    siblings: list[str] = field(default_factory=list)

    def note(self, root: Path | str) -> tuple[str, ...]:
        """One line, or none."""
        shown = [f"{count:,} {ending}" for ending, count in self.endings.most_common(NAMED)]
        if rest := sum(self.endings.values()) - sum(count for _, count in self.endings.most_common(NAMED)):
            shown.append(f"{rest:,} other files")
        shown += sorted(self.siblings)[:NAMED]
        if len(self.siblings) > NAMED:
            shown.append(f"{len(self.siblings) - NAMED} more")
        if not shown:
            return ()
        heif = any(ending in self.endings for ending in HEIF_SUFFIXES)
        hint = "; .heic needs pillow-heif: pip install 'ninefold[heif]'" if heif else ""
        return (f"passed over in {root}: {', '.join(shown)}{hint}",)


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, of which 40 % become the test part."""

    def load() -> Contents:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        train = Part(np.repeat(grey[..., None], 3, axis=3), bunch.target.astype(np.int64))
        return Contents(tuple(str(name) for name in bunch.target_names), train, test_fraction=0.4)

    return Source(f"digits of scikit-learn {version('scikit-learn')}", load)


def folder(root: Path) -> Source:
    """Class folders: ROOT/<part>/<class>/* with the parts train and, where they are there, val (or valid, validation:
    what is held out of training) and test; or ROOT/<class>/* alone.

    The first form without a test folder has no test part; of the second, 10 % become it. Images may lie deeper in
    a class folder. Raises UserError on a class folder without images, and on classes that a part lacks.
    """
    passed = Passed()
    if not (root / "train").is_dir():
        classes, files, labels = _list_classes(root, passed)
        if set(classes) <= set(PARTS):
            raise UserError(
                f"{root} has {' and '.join(classes)} but no train folder; expected ROOT/train/<class>/*, or class "
                "folders in ROOT itself"
            )
        key = f"{root.resolve()!r} {classes} {files}"
        part = _part(root, "", files, labels)
        return Source(key, lambda: Contents(classes, part, test_fraction=0.1), passed.note(root))
    present = [name for name in HELD_OUT if (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(f"{root} has {' and '.join(present)}, expected one folder of what is held out; merge them")
    for entry in os.scandir(root):
        if entry.name.startswith(".") or entry.name in ("train", "test", *present):
            continue
        if _is_folder(entry):
            passed.siblings.append(f"folder {entry.name}")
        else:
            passed.endings[_ending(entry.name)] += 1
    classes, files, labels = _list_classes(root / "train", passed)
    key = f"{root.resolve()!r} train {classes} {files}"
    parts_found: dict[str, Part] = {}
    for name in (*present, "test"):
        if not (root / name).is_dir():
            continue
        if name == "test" and not any(_is_folder(e) and not e.name.startswith(".") for e in os.scandir(root / name)):
            images = len(list_images(root / name))
            passed.siblings.append(f"test ({images:,} images without class folders)")
            continue
        own_classes, own_files, own_labels = _list_classes(root / name, passed)
        _check_same_classes(root, "train", classes, name, own_classes)
        parts_found[name] = _part(root, name, own_files, own_labels)
        key += f" {name} {own_files}"
    train, test = _part(root, "train", files, labels), parts_found.get("test")
    held_out = next((parts_found[name] for name in present), None)
    return Source(key, lambda: Contents(classes, train, test, held_out=held_out), passed.note(root))


def _check_same_classes(root: Path, one: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    if only := sorted(set(classes) ^ set(others)):
        lacks = [f"{name} is missing in {other if name in classes else one}" for name in only[:5]]
        raise UserError(
            f"{one} and {other} of {root} have different classes ({', '.join(only[:5])} only in one of them: "
            f"{', '.join(lacks)}); expected the same class folders in both"
        )


Listed = list[tuple[str, int, int]]  # path relative to the root, bytes, modification time in ns


def _list_classes(root: Path, passed: Passed) -> tuple[tuple[str, ...], Listed, list[int]]:
    """Class names (sorted), the image files of all classes in a fixed order, and their labels."""
    entries = list(os.scandir(root))
    names = sorted(e.name for e in entries if _is_folder(e) and not e.name.startswith((".", "__")))
    if len(names) < 2:
        raise UserError(
            f"{root} has {len(names)} class folder{'' if names else 's'}, expected at least 2: "
            "one folder of images per class, in ROOT/train or in ROOT itself"
        )
    if unreadable := [name for name in names if not name.isprintable()]:
        raise UserError(f"class folder {unreadable[0]!r} of {root} has a name that cannot be printed; rename it")
    for entry in entries:
        if not _is_folder(entry) and not entry.name.startswith("."):
            passed.endings[_ending(entry.name)] += 1
    files: Listed = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        found = list_images(root / name, f"{name}/", passed)
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if len(files) < len(names):
        raise UserError(f"{root} has {len(files)} images for {len(names)} classes; expected images of each")
    if empty:
        raise UserError(
            f"no images in class folder {root / empty[0]}"
            f"{f' and {len(empty) - 1} others' if len(empty) > 1 else ''} (looked for "
            f"{', '.join(sorted(suffixes())[:8])}, ...); add images or remove the folder"
            f"{''.join(f' ({note})' for note in passed.note(root))}"
        )
    return tuple(names), files, labels


def list_images(folder: Path, prefix: str = "", passed: Passed | None = None) -> Listed:
    """Every image file (by suffix) in `folder` and below, sorted; hidden files and folders are passed over.

    Paths are relative to `folder`, with `/` between their parts, behind `prefix`. Other files are counted in `passed`.
    """
    found: Listed = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if entry.is_symlink() and Path(entry).resolve() in (folder.resolve(), *folder.resolve().parents):
                continue  # a circle
            found += list_images(Path(entry), f"{prefix}{entry.name}/", passed)
        elif os.path.splitext(entry.name)[1].lower() in suffixes():
            is_broken = entry.is_symlink() and not os.path.exists(entry)
            if not is_broken and not entry.is_file():
                continue  # a named pipe would be opened only once somebody writes to it
            stat = entry.stat(follow_symlinks=not is_broken)
            found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
        elif passed is not None:
            passed.endings[_ending(entry.name)] += 1
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()  # a link may lead to itself


def _ending(name: str) -> str:
    """ ".txt", in small letters; of a file without one, "files without ending"."""
    return os.path.splitext(name)[1].lower() or "files without ending"


def _part(root: Path, name: str, files: Listed, labels: list[int]) -> Part:
    folder, prefix = (root / name, f"{name}/") if name else (root, "")
    return Part(
        [folder / path for path, _, _ in files], np.array(labels, np.int64), [prefix + path for path, _, _ in files]
    )
