"""Reading images: where a data set's images lie, and how a file of any kind becomes uint8 pixels.

What is found is not yet read: a `Source` knows its files by listing alone, and `read_items` decodes them in
threads (Pillow's decoders release the GIL; every process would import the whole sweep again).
"""

import contextlib
import functools
import hashlib
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainables.errors import UserError

# Pillow opens more than these, but EPS runs Ghostscript, and others are stubs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# Their headers do not bound what they take: 24 kB of JPEG 2000 in blocks of 4x4 took 1.1 GiB for 9 megapixels, and an
# AVIF that called itself 64x64 decoded to 268 megapixels.
COSTLY = ("JPEG2000", "AVIF")
MOST_SCANS = 50  # of a progressive JPEG; encoders make about ten
BAND = 2**22  # pixels that transparency is taken from at a time
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_open` refuses what Pillow would only warn of
Item = Path | np.ndarray  # a file, or pixels: uint8 (H, W, 3)


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


# --- finding ---------------------------------------------------------------------------------------------------------


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, of which 20 % become the test part."""

    def load() -> Contents:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        train = Part(np.repeat(grey[..., None], 3, axis=3), bunch.target.astype(np.int64))
        return Contents(tuple(str(name) for name in bunch.target_names), train, test_fraction=0.2)

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
            f"{', '.join(sorted(_suffixes())[:8])}, ...); add images or remove the folder"
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
        elif os.path.splitext(entry.name)[1].lower() in _suffixes():
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


# --- decoding --------------------------------------------------------------------------------------------------------


def read_images(
    paths: Iterable[str | Path],
    size: int | tuple[int, int],
    on_error: Callable[[Path, str], None] = lambda path, reason: None,
) -> Iterator[tuple[Path, np.ndarray | None]]:
    """Decode files in parallel, in order, a few hundred ahead of the reader.

    Yields (path, uint8 (H, W, 3)), where (H, W) is `size` (an int is a square), as `decode` makes them. An unreadable
    image is yielded as None, after `on_error(path, reason)` was called.
    """
    shape = (size, size) if isinstance(size, int) else size
    files = [Path(path) for path in paths]
    for path, (image, note) in zip(files, read_items(files, shape), strict=True):
        if image is None:
            on_error(path, note)
        yield path, image


Read = tuple[np.ndarray | None, str]


def read_items(items: Sequence[Path] | np.ndarray, shape: tuple[int, int]) -> Iterator[Read]:
    """(uint8 (*shape, 3), SHA-256 of the source bytes) of every item in order; (None, reason) if unreadable."""

    workers = os.cpu_count() or 1
    step = max(1, min(32, len(items) // workers))  # in chunks: handing over a 32x32 image costs as much as decoding it
    pending: deque[Future[list[Read]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), step):
            chunk = items[start : start + step]
            pending.append(pool.submit(lambda chunk: [_read(item, shape) for item in chunk], chunk))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _read(item: Item, shape: tuple[int, int]) -> Read:
    try:
        if isinstance(item, np.ndarray):
            content, pixels = item.tobytes(), decode(Image.fromarray(item), shape)
        else:
            pixels = decode_bytes(content := item.read_bytes(), shape)
    except (OSError, ValueError, MemoryError) as error:
        return None, str(error) or type(error).__name__
    return pixels, hashlib.sha256(content).hexdigest()


def decode_bytes(content: bytes, shape: tuple[int, int], most_pixels: int | None = None) -> np.ndarray:
    """The picture in the bytes of a file of one of FORMATS, as `decode` makes it: uint8 (*shape, 3).

    Raises ValueError, saying what is wrong, for bytes that are no image or a damaged one, and for a picture whose
    header announces more than `most_pixels` (default: Pillow's own limit), before anything is decoded.
    """
    with _value_errors():
        return decode(_open(io.BytesIO(content), most_pixels), shape)


def count_pixels(content: bytes, most_pixels: int) -> int:
    """Pixels that decoding a stranger's picture takes memory for, by its header; nothing is decoded.

    Raises ValueError as `decode_bytes` does, and for pictures whose header does not say what they cost.
    """
    with _value_errors(), _open(io.BytesIO(content), most_pixels) as image:
        pixels = image.width * image.height
        if image.format in COSTLY:
            raise ValueError(f"{image.format} is not accepted, because it may hide any size; send JPEG, PNG or WEBP")
        if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MOST_SCANS:
            raise ValueError(f"more than {MOST_SCANS} scans, each of which takes as long as a whole picture")
        if image.format == "TIFF":  # whole tiles are decoded, however small the picture that is cut out of them
            tags = image.tag_v2  # type: ignore[attr-defined]
            pixels = max(pixels, int(tags.get(322, 0)) * int(tags.get(323, 0)))
            if pixels > most_pixels:
                raise ValueError(f"tiles of {pixels:,} pixels, expected at most {most_pixels:,}")
        return pixels


def decode(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """Upright RGB pixels of the first frame, uint8 (*shape, 3): shorter side resized (bicubic), centre cut out.

    Transparency is laid on white; 16-bit grey is scaled to 8. Raises what Pillow raises on a damaged file.
    """
    height, width = shape
    # JPEG can leave out detail while it decodes: 2 to 4 times faster for photographs, invisible at twice the size.
    image.draft("RGB", (2 * max(shape), 2 * max(shape)))
    ImageOps.exif_transpose(image, in_place=True)
    image = _rgb(image)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """Turn what Pillow raises on bytes that are no image, or a damaged one, into a ValueError of one line."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from None


def measure(item: Item) -> tuple[int, int] | None:
    """(height, width) of an upright image from its header alone; None when that is unreadable."""
    if isinstance(item, np.ndarray):
        return item.shape[0], item.shape[1]
    try:
        with _open(item) as image:
            is_turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
            return image.size if is_turned else image.size[::-1]
    except Exception:
        return None


def _open(file: Any, most_pixels: int | None = None) -> Image.Image:
    image = Image.open(file, formats=_formats())
    most = most_pixels or Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(f"{image.width * image.height:,} pixels, expected at most {most:,}")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, of which convert() would turn all above 255 to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        return _lay_on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _lay_on_white(image: Image.Image) -> Image.Image:
    """RGB, band by band: whole, a picture of 50 megapixels would be in memory four times, in 800 MB."""
    result = Image.new("RGB", image.size)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def _suffixes() -> frozenset[str]:
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)
