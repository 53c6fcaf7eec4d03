"""How images get to the device that trains on them.

A GPU that is handed every batch from ordinary memory waits for it. So where all images take less than SHARE of its
free memory, they lie there, as bytes, and a batch is gathered on the device. Otherwise a thread reads the next batches
ahead, into pinned memory, and copies them on a stream of its own while the GPU trains. On a CPU a batch is read when it
is needed: there is nowhere to bring it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from trainables.data.packed import ImageRows
from trainables.training.memory import free_memory

SHARE = 0.3  # of the free memory of a GPU, for images; the rest is for training
AHEAD = 2  # batches that are read before they are needed
CHUNK = 1024  # images that are brought to a GPU at a time

_resident: dict[str, Tensor] = {}  # of the data set that this process has used last: a lane trains trial after trial


def rows_on(images: ImageRows | Tensor, indices: np.ndarray, device: torch.device) -> Tensor:
    """`images[indices]` on a device, uint8 (N, H, W, 3), wherever they lie."""
    if isinstance(images, Tensor):
        return images[torch.from_numpy(indices).to(images.device, non_blocking=True)].to(device)
    there = torch.from_numpy(np.ascontiguousarray(images[indices]))
    if device.type == "cuda":
        there = there.pin_memory()  # else the copy would wait for the device; PyTorch keeps it until it is over
    return there.to(device, non_blocking=True)


def resident(images: ImageRows, key: str, device: torch.device, free: int | None = None) -> Tensor | None:
    """All images on a GPU, uint8 (N, H, W, 3), the same for every trial of this process; None where they stay.

    key: names them. free: bytes of memory that the device has; None: asked of it, and a CPU keeps nothing.
    """
    key = f"{key} {device}"
    if key in _resident and _resident[key].shape == images.shape:
        return _resident[key]
    _resident.clear()
    if free is None:
        free = free_memory(device)
    if int(np.prod(images.shape)) >= SHARE * free:
        return None
    there = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), CHUNK):
        there[start : start + CHUNK] = torch.from_numpy(np.array(images[start : start + CHUNK]))
    _resident[key] = there
    return there


class Feed:
    """The batches of an epoch, each on the device when it is asked for.

    Args:
        images: of the data set, M.
        more: images without labels, which are counted on from M; None where there are none.
        device: where they go.
        key: names the images, see `resident`.
        ahead: read the next batches while the device is at work; None: on a GPU, where the images do not fit there.

    Attributes:
        images: of the data set, wherever they lie now.
    """

    def __init__(
        self, images: ImageRows, more: ImageRows | None, device: torch.device, key: str, ahead: bool | None = None
    ) -> None:
        self.images: ImageRows | Tensor = images
        self.more, self.device, self.key, self.ahead, self.known = more, device, key, ahead, len(images)
        self.thread: ThreadPoolExecutor | None = None
        self.stream: torch.cuda.Stream | None = None
        self.left: Iterator[np.ndarray] = iter(())
        self.coming: deque[tuple[np.ndarray, Future[Batch]]] = deque()

    def begin(self, batches: Sequence[np.ndarray]) -> None:
        """Name the batches that will be asked for, in order. The first call decides where the images lie: a trial that
        only trains a head on stored features needs none of them."""
        if isinstance(self.images, Tensor) or self.thread is not None:
            pass
        elif (there := resident(self.images, self.key, self.device)) is not None and self.more is None:
            self.images = there
        elif self.device.type == "cuda" if self.ahead is None else self.ahead:
            self.thread = ThreadPoolExecutor(1, "images")
            self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        while self.coming:  # of an epoch that was ended early
            self.coming.popleft()[1].cancel()
        self.left = iter(batches)
        self._go_ahead()

    def __call__(self, indices: np.ndarray) -> Tensor:
        """The images, uint8 (N, H, W, 3), on the device; any others than the next of `begin` are read now."""
        if not self.coming or not np.array_equal(self.coming[0][0], indices):
            return self._read(indices)
        images, copied = self.coming.popleft()[1].result()
        self._go_ahead()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            images.record_stream(current)  # its memory is not another batch's before this one has been used
        return images

    def _go_ahead(self) -> None:
        while self.thread is not None and len(self.coming) < AHEAD and (batch := next(self.left, None)) is not None:
            self.coming.append((batch, self.thread.submit(self._bring, batch)))

    def _read(self, indices: np.ndarray) -> Tensor:
        """The images now: on the device where they lie there, or where nothing is read ahead."""
        if self.more is None or int(indices.max()) < self.known:
            return rows_on(self.images, indices, self.device)
        known = indices < self.known
        images = torch.empty((len(indices), *self.images.shape[1:]), dtype=torch.uint8, device=self.device)
        images[torch.from_numpy(known)] = rows_on(self.images, indices[known], self.device)
        images[torch.from_numpy(~known)] = rows_on(self.more, indices[~known] - self.known, self.device)
        return images

    def _bring(self, indices: np.ndarray) -> "Batch":
        if self.stream is None:
            return self._read(indices), None
        with torch.cuda.stream(self.stream):
            there = self._read(indices)
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return there, copied


Batch = tuple[Tensor, torch.cuda.Event | None]
"""Images on the device, and what says that they have arrived; None: they have."""
