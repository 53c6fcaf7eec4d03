"""ImageRows kept as JPEG, for data sets that would not fit as raw pixels: decoded in threads whenever they are needed.

<name>.pack         JPEG files, one behind the other
<name>_index.npy    int64 (N + 1,), where each begins; the last is the length of the file
"""

import functools
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from trainables.errors import UserError

QUALITY = 92  # about 20 kB for a photograph of 341 x 256 pixels, off by 1.1 of 255 on average
SHARE = 0.5  # of the memory, and of the free disk, that raw pixels may take
STARTS = {0xC0, 0xC1, 0xC2}  # markers of a JPEG's size: baseline, extended, progressive


class PackedImages:
    """ImageRows of one size that are read as from an array, uint8 (N, H, W, 3).

    Args:
        path: `<folder>/<name>.pack`.
        height, width: of every image, in pixels.

    Raises UserError when the index does not fit the file.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path = path
        index = np.load(index_of(path), allow_pickle=False)
        length = path.stat().st_size
        if index.dtype != np.int64 or index.ndim != 1 or not len(index) or index[0] != 0 or index[-1] != length:
            raise UserError(f"{path} is damaged (its index does not fit); remove its folder and prepare it again")
        if (np.diff(index) <= 0).any():
            raise UserError(f"{path} is damaged (its index is not in order); remove its folder and prepare it again")
        self.index = index
        self.bytes = np.memmap(path, np.uint8, "r") if length else np.empty(0, np.uint8)  # an empty file has no map
        self.shape = (len(index) - 1, height, width, 3)
        self.nbytes = length

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """ImageRows, uint8: (H, W, 3) for a number, (K, H, W, 3) for a slice, an array of numbers or one of bools."""
        rows = np.arange(len(self))[key]
        if rows.ndim == 0:
            return self._decoded(int(rows))
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def decode(part: np.ndarray) -> None:
            for place in part.tolist():
                images[place] = self._decoded(int(rows[place]))

        import torch  # whose number of threads is that of the trial

        threads = min(torch.get_num_threads(), len(rows))
        if threads <= 1:
            decode(np.arange(len(rows)))
        else:
            list(_pool(threads).map(decode, np.array_split(np.arange(len(rows)), threads)))
        return images

    def jpeg(self, row: int) -> bytes:
        return self.bytes[self.index[row] : self.index[row + 1]].tobytes()

    def _decoded(self, row: int) -> np.ndarray:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        content = self.jpeg(row)
        try:
            if size_of(content) != self.shape[1:3]:  # before memory is spent on what a stranger's header says
                raise RuntimeError("another size")
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"image {row} of {self.path} is damaged ({reason}); prepare the data set again") from None
        return pixels.permute(1, 2, 0).numpy()


ImageRows: TypeAlias = np.ndarray | PackedImages
"""uint8 (N, H, W, 3), read by rows: memory-mapped, or packed."""


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def encode(pixels: np.ndarray) -> bytes:
    """The JPEG of uint8 (H, W, 3). Lets other threads run meanwhile."""
    import torch
    from torchvision.io import encode_jpeg

    return encode_jpeg(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), quality=QUALITY).numpy().tobytes()


def size_of(content: bytes) -> tuple[int, int]:
    """(height, width) by a JPEG's header; (0, 0) when it has none."""
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        if content[at + 1] in STARTS:
            return int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return 0, 0


def index_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_index.npy")


def write_index(path: Path, lengths: Sequence[int]) -> None:
    """Write the index of a pack; `lengths` are the bytes of each of its images."""
    np.save(index_of(path), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))


def divide(path: Path, is_cut: np.ndarray, target: Path) -> None:
    """Move the images that are cut out, bool (N,), to the pack `target`; both are written anew."""
    index, content = np.load(index_of(path), allow_pickle=False), np.memmap(path, np.uint8, "r")
    kept = path.with_suffix(".kept")
    for file, rows in ((target, np.flatnonzero(is_cut)), (kept, np.flatnonzero(~is_cut))):
        with open(file, "wb") as out:
            for row in rows.tolist():
                out.write(content[index[row] : index[row + 1]].tobytes())
    del content
    lengths = np.diff(index)
    kept.replace(path)
    write_index(path, lengths[~is_cut])
    write_index(target, lengths[is_cut])


def is_too_large(images: int, shape: tuple[int, ...], folder: Path) -> bool:
    """Whether raw pixels of these images would take more than SHARE of the memory, or of the free disk."""
    raw = images * math.prod(shape)
    return raw > SHARE * min(_memory(), shutil.disk_usage(folder).free)


def _memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return total
    return min(total, limit)
