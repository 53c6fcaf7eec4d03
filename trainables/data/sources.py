"""Where a data set's images lie: found by listing, not yet read."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from trainables.data.decode import suffixes
from trainables.errors import UserError


@dataclass(frozen=True)
class Part:
    """The images of one part of a data set, unread, with labels int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Contents:
    """What a data set consists of; without a `test` part, a `test_fraction` of the train part becomes one."""

    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    test_fraction: float = 0.0


@dataclass(frozen=True)
class Source:
    """A data set that was found. `key` changes whenever one of its files does; `load` may read them."""

    key: str
    load: Callable[[], Contents]


CIFAR_URL = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class CifarFiles:
    """Where one of the two keeps its images; a record of the binary files is `label_bytes` and 3 x 32 x 32 pixels."""

    classes: int
    archive: str
    md5: str  # of the archive, as published beside it
    binary: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last one is the label; CIFAR-100 has the superclass before it
    pickles: str


CIFAR = {
    "cifar10": CifarFiles(
        classes=10,
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        binary="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
        pickles="cifar-10-batches-py",
    ),
    "cifar100": CifarFiles(
        classes=100,
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        binary="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        label_bytes=2,
        pickles="cifar-100-python",
    ),
}


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
    """Class folders: ROOT/train/<class>/* with or without ROOT/test/<class>/*, or ROOT/<class>/* alone.

    The first form without a test folder has no test part; of the second, 10 % become it. Images may lie deeper in
    a class folder. Raises UserError on a class folder without images, and on different classes in train and test.
    """
    if not (root / "train").is_dir():
        classes, files, labels = _list_classes(root)
        key = f"{root.resolve()!r} {classes} {files}"
        return Source(key, lambda: Contents(classes, _part(root, files, labels), test_fraction=0.1))
    classes, files, labels = _list_classes(root / "train")
    key = f"{root.resolve()!r} train {classes} {files}"
    if not (root / "test").is_dir():
        return Source(key, lambda: Contents(classes, _part(root / "train", files, labels)))
    test_classes, test_files, test_labels = _list_classes(root / "test")
    if test_classes != classes:
        only = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"train and test of {root} have different classes ({', '.join(only[:5])} only in one of them); "
            "expected the same class folders in both"
        )

    def load() -> Contents:
        return Contents(classes, _part(root / "train", files, labels), _part(root / "test", test_files, test_labels))

    return Source(f"{key} test {test_files}", load)


Listed = list[tuple[str, int, int]]  # path relative to the root, bytes, modification time in ns


def _list_classes(root: Path) -> tuple[tuple[str, ...], Listed, list[int]]:
    """Class names (sorted), the image files of all classes in a fixed order, and their labels."""
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith((".", "__")))
    if len(names) < 2:
        raise UserError(
            f"{root} has {len(names)} class folder{'' if names else 's'}, expected at least 2: "
            "one folder of images per class, in ROOT/train or in ROOT itself"
        )
    files: Listed = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        found = list_images(root / name, f"{name}/")
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if len(files) < len(names):
        raise UserError(f"{root} has {len(files)} images for {len(names)} classes; expected at least 3 of each")
    if empty:
        raise UserError(
            f"no images in class folder {root / empty[0]}"
            f"{f' and {len(empty) - 1} others' if len(empty) > 1 else ''} (looked for "
            f"{', '.join(sorted(suffixes())[:8])}, ...); add images or remove the folder"
        )
    return tuple(names), files, labels


def list_images(folder: Path, prefix: str = "") -> Listed:
    """Every image file (by suffix) in `folder` and below, sorted; hidden files and folders are passed over.

    Paths are relative to `folder`, with `/` between their parts, behind `prefix`.
    """
    found: Listed = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += list_images(Path(entry), f"{prefix}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in suffixes():
            stat = entry.stat() if entry.is_file() else entry.stat(follow_symlinks=False)  # a broken link
            found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _part(root: Path, files: Listed, labels: list[int]) -> Part:
    return Part([root / path for path, _, _ in files], np.array(labels, np.int64))


def cifar(name: str, data_dir: Path | None, downloads: Path) -> Source:
    """`name` "cifar10" or "cifar100" in `data_dir`; None downloads the binary files, which hold no pickles.

    Raises UserError when the folder holds neither class folders nor one of the two downloads, or is damaged; from
    `load`, when the network is needed and not there.
    """
    files = CIFAR[name]
    if data_dir is None:
        return Source(f"{name} {files.md5}", lambda: _read_binary(files, _download(name, files, downloads)))
    if data_dir.name in (files.binary, files.pickles):
        data_dir = data_dir.parent
    if (data_dir / files.binary).is_dir():
        return _found(data_dir / files.binary, lambda: _read_binary(files, data_dir / files.binary))
    if (data_dir / files.pickles).is_dir():
        return _found(data_dir / files.pickles, lambda: _read_pickles(name, files, data_dir))
    if not (data_dir / "train").is_dir():
        raise UserError(
            f"{data_dir} holds no {name}; expected train/<class>/*, {files.binary} or {files.pickles} in it"
        )
    source = folder(data_dir)

    def load() -> Contents:
        contents = source.load()
        if len(contents.classes) != files.classes:
            raise UserError(
                f"{data_dir} has {len(contents.classes)} class folders, {name} has {files.classes}; "
                "use --data folder for images of your own"
            )
        return contents

    return Source(source.key, load)


def _found(folder: Path, load: Callable[[], Contents]) -> Source:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return Source(f"{folder.resolve()} {stats}", load)


def _read_binary(files: CifarFiles, folder: Path) -> Contents:
    def read(names: tuple[str, ...]) -> Part:
        raw = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names])
        records = raw.reshape(-1, files.label_bytes + 3 * 32 * 32)
        images = records[:, files.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Part(images, records[:, files.label_bytes - 1].astype(np.int64))

    try:
        classes = tuple((folder / files.names).read_text().split())
        train, test = read(files.train), read((files.test,))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is incomplete or damaged ({error}); download it again") from None
    if len(classes) != files.classes or any(set(part.labels) != set(range(files.classes)) for part in (train, test)):
        raise UserError(f"{folder} is damaged: expected {files.classes} classes; download it again")
    return Contents(classes, train, test)


def _read_pickles(name: str, files: CifarFiles, root: Path) -> Contents:
    """torchvision's files. It unpickles them, but only once every file has the MD5 that torchvision knows."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, test = kind(root, train=True), kind(root, train=False)
    except RuntimeError:
        raise UserError(
            f"{root / files.pickles} is not what torchvision downloads (its MD5 sums differ), so its pickles were not "
            "opened; download it again"
        ) from None
    parts = [Part(part.data, np.array(part.targets, np.int64)) for part in (train, test)]
    return Contents(tuple(train.classes), parts[0], parts[1])


def _download(name: str, files: CifarFiles, downloads: Path) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(f"{CIFAR_URL}/{files.archive}", str(downloads), md5=files.md5)
    except Exception as error:  # no network, another file than expected: urllib, ssl and tarfile raise a dozen kinds
        raise UserError(
            f"{name} could not be downloaded from {CIFAR_URL} ({str(error) or type(error).__name__}); "
            f"name a folder that holds train/<class>/*, {files.binary} or {files.pickles} with --data-dir"
        ) from None
    return downloads / files.binary
