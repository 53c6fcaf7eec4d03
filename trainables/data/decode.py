"""Reading images: how a file of any kind becomes uint8 pixels.

Files are decoded in threads, because Pillow's decoders release the GIL and every process would import the whole sweep
again.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow opens more than these, but EPS runs Ghostscript, and others are stubs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
# Their headers do not bound what they take: 24 kB of JPEG 2000 in blocks of 4x4 took 1.1 GiB for 9 megapixels, and an
# AVIF that called itself 64x64 decoded to 268 megapixels.
GREY = (124, 116, 104)  # ImageNet's mean, which networks take for nothing
COSTLY = ("JPEG2000", "AVIF", "HEIF")
PAGED = ("TIFF", "GIF", "WEBP", "PNG", "AVIF", "HEIF")  # formats of files that may hold several pictures
HEIF_SUFFIXES = (".heic", ".heif")  # of phones; read where pillow-heif is installed
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of floats from 0 to 1, and of 8 to 16 bits
MOST_SCANS = 50  # of a progressive JPEG; encoders make about ten
BAND = 2**22  # pixels that transparency is taken from at a time
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` refuses what Pillow would only warn of
Fit = Literal["squash", "crop", "pad"]


@dataclass(frozen=True)
class Picture:
    """An image that is no file of its own, such as a row of a table; `open` reads it, from any thread."""

    name: str
    open: Callable[[], Image.Image]

    def __str__(self) -> str:
        return self.name


Item = Path | Picture | np.ndarray  # a file, something that opens as an image, or pixels: uint8 (H, W, 3)


@dataclass(frozen=True)
class Canvas:
    """The form in which images are stored: uint8 (height, width, 3).

    `fit` says how an image of other proportions gets there: "squash" keeps all of it and stretches it, "crop" cuts the
    middle out, "pad" keeps all of it in its proportions, on grey.

    `white` is the value of 16-bit and float pixels that becomes 255, one for a whole data set (see `find_white`); None:
    65535, and for floats what an image's own values suggest.
    """

    height: int
    width: int
    fit: Fit = "squash"
    white: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, 3


def read_images(
    paths: Iterable[str | Path],
    canvas: Canvas,
    on_error: Callable[[Path, str], None] = lambda path, reason: None,
) -> Iterator[tuple[Path, np.ndarray | None]]:
    """Decode files in parallel, in order, a few hundred ahead of the reader.

    Yields (path, uint8 (H, W, 3)), as `decode` makes them. An unreadable image is yielded as None, after
    `on_error(path, reason)` was called.
    """
    files = [Path(path) for path in paths]
    for path, read in zip(files, read_items(files, canvas), strict=True):
        if read.pixels is None:
            on_error(path, read.note)
        yield path, read.pixels


@dataclass(frozen=True, eq=False)
class Read:
    """What became of one item.

    Attributes:
        pixels: uint8 (H, W, 3); None if it is unreadable.
        note: SHA-256 of the source bytes; of an unreadable item, the reason.
        is_paged: the file holds more pictures, of which this is the first.
        stored: the pixels as they are to be stored.
    """

    pixels: np.ndarray | None
    note: str
    is_paged: bool = False
    stored: bytes = b""


def read_items(
    items: Sequence[Item] | np.ndarray, canvas: Canvas, store: Callable[[np.ndarray], bytes] | None = None
) -> Iterator[Read]:
    """Read every item in order. store: makes what is to be stored, beside the decoding of others."""

    def read(item: Item) -> Read:
        found = _read(item, canvas)
        return found if store is None or found.pixels is None else replace(found, stored=store(found.pixels))

    workers = os.cpu_count() or 1
    step = max(1, min(32, len(items) // workers))  # in chunks: handing over a 32x32 image costs as much as decoding it
    pending: deque[Future[list[Read]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), step):
            chunk = items[start : start + step]
            pending.append(pool.submit(lambda chunk: [read(item) for item in chunk], chunk))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _read(item: Item, canvas: Canvas) -> Read:
    try:
        if isinstance(item, Path):
            content = item.read_bytes()
            with _value_errors():
                image = open_image(io.BytesIO(content))
                is_paged = image.format in PAGED and bool(getattr(image, "is_animated", False))
                pixels = decode(image, canvas)
            return Read(pixels, hashlib.sha256(content).hexdigest(), is_paged)
        with _value_errors():
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else item.open()
            content = item.tobytes() if isinstance(item, np.ndarray) else image.tobytes()
            return Read(decode(image, canvas), hashlib.sha256(content).hexdigest())
    except (OSError, ValueError, MemoryError) as error:
        return Read(None, str(error) or type(error).__name__)


def decode_bytes(content: bytes, canvas: Canvas, most_pixels: int | None = None) -> np.ndarray:
    """The picture in the bytes of a file of one of FORMATS, as `decode` makes it: uint8 (H, W, 3).

    Raises ValueError, saying what is wrong, for bytes that are no image or a damaged one, and for a picture whose
    header announces more than `most_pixels` (default: Pillow's own limit), before anything is decoded.
    """
    with _value_errors():
        return decode(open_image(io.BytesIO(content), most_pixels), canvas)


def count_pixels(content: bytes, most_pixels: int) -> int:
    """Pixels that decoding a stranger's picture takes memory for, by its header; nothing is decoded.

    Raises ValueError as `decode_bytes` does, and for pictures whose header does not say what they cost.
    """
    with _value_errors(), open_image(io.BytesIO(content), most_pixels) as image:
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


def decode(image: Image.Image, canvas: Canvas) -> np.ndarray:
    """Return upright RGB pixels of the first frame, uint8 (H, W, 3), resized (bicubic) as the canvas says.

    Transparency is laid on white; 16-bit and float grey is scaled by `canvas.white`. Raises what Pillow raises on a
    damaged file.
    """
    height, width, fit = canvas.height, canvas.width, canvas.fit
    # JPEG can leave out detail while it decodes: 2 to 4 times faster for photographs, invisible at twice the size.
    image.draft("RGB", (2 * max(height, width), 2 * max(height, width)))
    ImageOps.exif_transpose(image, in_place=True)
    image = _rgb(image, canvas.white)
    if image.size != (width, height):
        if fit == "squash":
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        elif fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color=GREY)
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
        with open_image(item) if isinstance(item, Path) else item.open() as image:
            is_turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
            return image.size if is_turned else image.size[::-1]
    except Exception:
        return None


def find_white(items: Iterable[Item]) -> float | None:
    """The value that is white in the 16-bit and float images among these; None when there are none, or 16 bits full.

    It is the smallest of WHITES that none of their pixels exceeds: 12-bit data in 16-bit files has 4095. Beyond all of
    these it is the largest value found.
    """
    highest, is_float = -1.0, False
    for item in items:
        if isinstance(item, np.ndarray):
            return None
        with contextlib.suppress(Exception), open_image(item) if isinstance(item, Path) else item.open() as image:
            if _is_deep(image):
                highest, is_float = max(highest, _highest(np.asarray(image))), is_float or image.mode == "F"
    white = None if highest < 0 else _white_of(highest)
    return None if white == 65535 and not is_float else white


def _is_deep(image: Image.Image) -> bool:
    """Whether its pixels have more than 8 bits: 16-bit grey, of which convert() would turn all above 255 to white, or
    float, of which it would turn all below 1 to black."""
    return image.mode.startswith("I") or image.mode == "F"


def _highest(values: np.ndarray) -> float:
    """The largest finite value, at least 0."""
    return max(0.0, float(np.max(values, initial=0, where=np.isfinite(values))))


def _white_of(highest: float) -> float:
    return next((white for white in WHITES if highest <= white), highest)


def open_image(file: Any, most_pixels: int | None = None) -> Image.Image:
    """Open one of FORMATS without decoding it. Raises what Pillow raises, and ValueError for too many pixels."""
    image = Image.open(file, formats=_formats())
    most = most_pixels or Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(f"{image.width * image.height:,} pixels, expected at most {most:,}")
    return image


def _rgb(image: Image.Image, white: float | None) -> Image.Image:
    if _is_deep(image):
        values = np.asarray(image)
        if white is None:
            white = _white_of(_highest(values)) if image.mode == "F" else 65535.0
        if white == 65535 and image.mode != "F":
            image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
        else:
            scaled = np.nan_to_num(values.astype(np.float32), nan=0.0).clip(0, white) * np.float32(255 / white)
            image = Image.fromarray(np.rint(scaled).astype(np.uint8))
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
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)
