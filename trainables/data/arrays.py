"""Decoded images on their way into arrays: written as they come, so that a process that was killed is continued.

<folder>/images.npy, test_images.npy    pixels, one image behind the other; or images.pack, test_images.pack
<folder>/log.jsonl                      a line for the form, then one for each image that is in them, or left out
<folder>/owner                          the machine and process that writes here
"""

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainables.data.decode import Canvas, Item, read_items
from trainables.data.packed import ImageRows, PackedImages, divide, encode, write_index
from trainables.data.sources import Part

FLUSHED = 64  # images between two entries into the log


@dataclass(frozen=True, eq=False)
class Written:
    """The readable images of a part: their rows among the listed ones, their labels, and the notes of reading them."""

    rows: np.ndarray
    labels: np.ndarray
    notes: list[str]

    def take(self, where: np.ndarray) -> "Written":
        return Written(self.rows[where], self.labels[where], [self.notes[i] for i in np.flatnonzero(where)])


@dataclass(frozen=True)
class Entry:
    """What became of the image of one row: `note` and `is_paged` as of `decode.Read`; `reason`: it was left out;
    `bytes`: that it takes."""

    row: int
    note: str = ""
    is_paged: bool = False
    reason: str = ""
    bytes: int = 0


class Log:
    """The entries of a folder, those of an earlier process first."""

    def __init__(self, folder: Path, canvas: Canvas, images: int, packed: bool = False) -> None:
        self.folder, self.packed = folder, packed
        form = json.dumps({"canvas": asdict(canvas), "images": images, "packed": packed})
        self.found: dict[str, list[Entry]] = {"": [], "test_": []}
        path = folder / "log.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if lines[0] == form.encode():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # of a line that is none
                for line in lines[1:-1]:  # the last one is empty, or was cut
                    prefix, *values = json.loads(line)
                    self.found[prefix].append(Entry(*values))
        self.file = open(path, "wb")  # noqa: SIM115
        self.file.write(form.encode() + b"\n")
        (folder / "owner").write_text(_this_process())

    def add(self, prefix: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.file.write(json.dumps([prefix, *asdict(entry).values()]).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        for name in ("log.jsonl", "owner"):
            (self.folder / name).unlink()


def _this_process() -> str:
    """This machine, its start, and this process: after a crash of the machine files may hold less than was written."""
    start = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {start.read_text().strip() if start.exists() else ''} {os.getpid()}"


def is_abandoned(folder: Path) -> bool:
    """Whether the process that wrote to a folder was killed, as far as this machine can tell."""
    try:
        place, process = (folder / "owner").read_text().rsplit(" ", 1)
        if place != _this_process().rsplit(" ", 1)[0] or int(process) == os.getpid():
            return False
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def write_parts(
    parts: Sequence[Part], folder: Path, prefix: str, canvas: Canvas, log: Log,
    skip: Callable[[Item, str], None], paged: list[str], tick: Callable[[], None],
) -> Written:  # fmt: skip
    """Write <prefix>images.npy, or .pack where the log says so, of the readable images of the parts, one behind the
    other; go on where `log` ends.

    Files that hold several pictures are added to `paged`.
    """
    entries: list[Entry] = []
    listed = sum(map(len, parts))
    path = folder / f"{prefix}images.{'pack' if log.packed else 'npy'}"
    store = encode if log.packed else np.ndarray.tobytes

    def item(row: int) -> Item:
        for part in parts:
            if row < len(part):
                return part.items[row]
            row -= len(part)
        raise IndexError(row)

    def hear(entry: Entry) -> None:
        entries.append(entry)
        tick()
        if entry.reason:
            skip(item(entry.row), entry.reason)
        elif entry.is_paged:
            paged.append(str(item(entry.row)))

    with open(path, "r+b" if path.exists() else "w+b") as file:
        if not log.packed:
            write_header(file, (listed, *canvas.shape))
        start = file.tell()
        left = os.path.getsize(path) - start
        for entry in log.found[prefix]:
            left -= entry.bytes
            if left < 0:
                break
            hear(entry)
        log.add(prefix, entries)
        file.truncate(file.seek(start + sum(entry.bytes for entry in entries)))
        new: list[Entry] = []
        offset = 0
        for part in parts:
            first = min(len(part), max(0, len(entries) - offset))
            for row, read in enumerate(read_items(part.items[first:], canvas, store), start=offset + first):
                if read.pixels is None:
                    new.append(Entry(row, reason=read.note))
                else:
                    file.write(read.stored)
                    new.append(Entry(row, read.note, read.is_paged, bytes=len(read.stored)))
                hear(new[-1])
                if len(new) == FLUSHED:
                    file.flush()
                    log.add(prefix, new)
                    new = []
            offset += len(part)
        file.flush()
        log.add(prefix, new)
        kept = [entry for entry in entries if not entry.reason]
        if not log.packed:
            file.seek(0)  # the count is known only now; numpy pads the header so that it may change
            write_header(file, (len(kept), *canvas.shape))
    if log.packed:
        write_index(path, [entry.bytes for entry in kept])
    labels = np.concatenate([part.labels for part in parts]) if parts else np.empty(0, np.int64)
    rows = np.array([entry.row for entry in kept], np.int64)
    return Written(rows, labels[rows].astype(np.int64), [entry.note for entry in kept])


def cut_test(folder: Path, written: Written, is_cut: np.ndarray, canvas: Canvas) -> Written:
    """Move the images that are cut out of images.npy to test_images.npy, or of the packs."""
    if (folder / "images.pack").exists():
        divide(folder / "images.pack", is_cut, folder / "test_images.pack")
        return written.take(is_cut)
    cut, kept = np.flatnonzero(is_cut), np.flatnonzero(~is_cut)
    images = np.load(folder / "images.npy", mmap_mode="r+", allow_pickle=False)
    with open(folder / "test_images.npy", "wb") as file:
        write_header(file, (len(cut), *canvas.shape))
        for row in cut.tolist():
            file.write(images[row].tobytes())
    for to, row in enumerate(kept.tolist()):
        if to != row:
            images[to] = images[row]
    images.flush()
    del images
    with open(folder / "images.npy", "r+b") as file:
        write_header(file, (len(kept), *canvas.shape))
        file.truncate(file.tell() + len(kept) * math.prod(canvas.shape))
    return written.take(is_cut)


def write_header(file: BinaryIO | Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def open_images(folder: Path, name: str, canvas: Canvas) -> ImageRows:
    """What was written as <name>.npy, or as <name>.pack."""
    packed = folder / f"{name}.pack"
    if packed.exists():
        return PackedImages(packed, canvas.height, canvas.width)
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def channel_statistics(images: ImageRows) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 (N, H, W, 3), scaled to 0..1; exact, from histograms."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 128):
        pixels = images[start : start + 128].reshape(-1, 3)
        for channel in range(3):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), np.sqrt(variance).clip(1 / 255).tolist()  # training divides by it, so never 0
