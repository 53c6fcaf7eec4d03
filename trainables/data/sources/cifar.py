"""CIFAR-10 and CIFAR-100: class folders, torchvision's files, or the binary files, which are downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainables.data.sources import Contents, Part, Source, folder
from trainables.errors import UserError

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

    return Source(source.key, load, source.notes)


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
