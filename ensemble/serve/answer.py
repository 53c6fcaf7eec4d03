"""What an ensemble answers to one uploaded picture: limits, decoding, and batches gathered from parallel requests."""

import asyncio
import heapq
import itertools
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ensemble.file import read_ensemble
from ensemble.predict import Voters
from ensemble.selection.blend import scale
from trainables.data.decode import count_pixels, decode_bytes
from trainables.run_directory import open_runs

LARGEST_BATCH = 32
GATHERING = 0.005  # seconds that the first image of a batch waits for others
DECODERS = 4  # threads that decode, of small pictures and of large ones
SMALL = 2**20  # pixels of a picture that does not wait for large ones, which take seconds
SMALL_AT_A_TIME = 4 * SMALL  # pixels of small pictures that are decoded at a time
WAITING = 256  # pictures that wait to be decoded, small and large
PILLOW_BLOCK = 64 * 2**20  # bytes; see Decoders
BATCH_SIZE = "batch"  # of an answer, for the server's own books: how many images the network took together


@dataclass(frozen=True, eq=False)
class Votes:
    """Of one image.

    Attributes:
        probs: float32 (M, C), one row for each member.
        batch: how many images the network took together, for the first of them; None for the others, so that a batch
            is counted once.
    """

    probs: np.ndarray
    batch: int | None


class Batcher:
    """Gathers images that arrive one by one, for a network takes 32 in little more time than one."""

    def __init__(self, votes: Callable[[np.ndarray], list[np.ndarray]]) -> None:
        """votes: uint8 images (N, H, W, 3) to M arrays (N, C); called from one thread only."""
        self._votes = votes
        self._waiting: queue.SimpleQueue[tuple[np.ndarray, Future[Votes]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="batcher").start()

    def submit(self, image: np.ndarray) -> "Future[Votes]":
        """The members' probabilities of one image; in the future also what predicting raised."""
        answer: Future[Votes] = Future()
        self._waiting.put((image, answer))
        return answer

    def _work(self) -> None:
        while True:
            batch = [(image, answer) for image, answer in self._gather() if answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                votes = np.stack(self._votes(np.stack([image for image, _ in batch])), axis=1)
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
                continue
            for number, ((_, answer), vote) in enumerate(zip(batch, votes, strict=True)):
                answer.set_result(Votes(vote, None if number else len(batch)))

    def _gather(self) -> list[tuple[np.ndarray, "Future[Votes]"]]:
        batch = [self._waiting.get()]
        end = time.monotonic() + GATHERING
        while len(batch) < LARGEST_BATCH:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch


class Busy(Exception):
    """More pictures wait than may wait."""


class Decoders:
    """Decodes pictures in threads, of at most so many pixels at a time, and the smallest first.

    A pixel takes up to 20 bytes while it is decoded, so it is pixels that have to be counted, not pictures.
    """

    def __init__(self, decode: Callable[[bytes], np.ndarray], most_pixels: int) -> None:
        self._decode = decode
        self._most_pixels = most_pixels
        self._pixels = 0  # being decoded
        self._waiting: list[tuple[int, int, bytes, Future[np.ndarray]]] = []  # a heap: the smallest, then the oldest
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # glibc returns blocks above 32 MiB to the system once they are free, and keeps smaller ones for their thread.
        # Pillow's have 16 MiB: after six large pictures 1.4 GiB stayed with the process.
        Image.core.set_block_size(PILLOW_BLOCK)
        for _ in range(min(DECODERS, os.cpu_count() or 1)):
            threading.Thread(target=self._work, daemon=True, name="decoder").start()

    def submit(self, content: bytes, pixels: int) -> "Future[np.ndarray]":
        """What `decode` makes of `content`, or raises; Busy when too many wait, of which the largest has to go."""
        image: Future[np.ndarray] = Future()
        with self._changed:
            heapq.heappush(self._waiting, (min(pixels, self._most_pixels), next(self._numbers), content, image))
            if len(self._waiting) > WAITING:
                self._waiting = [entry for entry in self._waiting if not entry[3].cancelled()]
                heapq.heapify(self._waiting)
            if len(self._waiting) > WAITING:
                largest = max(self._waiting)
                self._waiting.remove(largest)
                heapq.heapify(self._waiting)
                if largest[3].set_running_or_notify_cancel():
                    largest[3].set_exception(Busy())
            self._changed.notify_all()
        return image

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_room)
                pixels, _, content, image = heapq.heappop(self._waiting)
                self._pixels += pixels
            try:
                if image.set_running_or_notify_cancel():
                    try:
                        image.set_result(self._decode(content))
                    except BaseException as error:
                        image.set_exception(error)
            finally:
                del content, image  # or the bytes of the last picture stay
                with self._changed:
                    self._pixels -= pixels
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        return bool(self._waiting) and self._pixels + self._waiting[0][0] <= self._most_pixels


class Answerer:
    """An ensemble that answers pictures, from any number of requests at once. Plain types in and out: Ray carries them.

    Raises UserError when the run, the ensemble or a member's weights are missing.
    """

    def __init__(self, runs: list[str], ensemble: str | None, device: str | None, most_pixels: int) -> None:
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged pictures; a log could fill
        homes = open_runs(runs)
        self.voters = Voters.load(homes, read_ensemble(homes[0], ensemble), device)
        self.architectures = [m.candidate(homes).architecture for m in self.voters.ensemble.members]
        self.most_pixels = most_pixels
        self.voters.votes(np.zeros((1, *self.voters.canvas.shape), np.uint8))  # the first request need not wait longer
        self.batcher = Batcher(self.voters.votes)
        self.headers = ThreadPoolExecutor(1, "header")
        self.small = Decoders(self._decode, SMALL_AT_A_TIME)
        self.large = Decoders(self._decode, most_pixels)

    async def __call__(self, content: bytes) -> dict[str, Any]:
        """The answer to the bytes of an image file, JSON-able.

        `label`, `probability`, `agreement` (weight of the members that say the same), `probs` (by class), `members`
        (each with `id`, `architecture`, `weight`, `label`, `probability`, at the temperature at which it is averaged),
        and where the ensemble knows them `set` (classes among which the right one is) and `unsure`; or, for what is no
        image or too large a one, or when too many wait, `error` in words and an HTTP `status`. Once it is cancelled, a
        waiting picture is not decoded. Of the images that the network took together the first has BATCH_SIZE, too.
        """
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self.headers, count_pixels, content, self.most_pixels)
            decoders = self.small if pixels <= SMALL else self.large
            image = await asyncio.wrap_future(decoders.submit(content, pixels))
        except ValueError as error:
            return {"error": f"this cannot be read as a picture: {error}", "status": 415}
        except Busy:
            return {"error": "the server is busy; try again later", "status": 503}
        votes = await asyncio.wrap_future(self.batcher.submit(image))
        batch = {} if votes.batch is None else {BATCH_SIZE: votes.batch}
        return self._describe(votes.probs) | batch

    def _decode(self, content: bytes) -> np.ndarray:
        return decode_bytes(content, self.voters.canvas, self.most_pixels)

    def _describe(self, votes: np.ndarray) -> dict[str, Any]:
        classes = self.voters.classes
        ensemble = self.voters.ensemble
        probs = ensemble.predict(list(votes[:, None]))[0]
        answer = int(ensemble.decision.answers(probs[None])[0])
        sure: dict[str, Any] = {"agreement": round(float(ensemble.agreement(votes[:, None], probs[None])[0]), 6)}
        if ensemble.risk is not None:
            chosen = ensemble.risk.sets(probs[None], ensemble.decision)[0]
            sure["set"] = [name for name, is_in in zip(classes, chosen, strict=True) if is_in]
            sure["unsure"] = bool(ensemble.risk.unsure(probs[None], ensemble.decision)[0])
        members = [
            {
                "id": member.id,
                "architecture": architecture,
                "weight": round(member.weight, 6),
                "label": classes[int(vote.argmax())],
                "probability": round(float(scale(vote[None], member.temperature).max()), 6),
            }
            for member, architecture, vote in zip(ensemble.members, self.architectures, votes, strict=True)
        ]
        return {
            "label": classes[answer],
            "probability": round(float(probs[answer]), 6),
            **sure,
            "probs": {name: round(float(p), 6) for name, p in zip(classes, probs, strict=True)},
            "members": members,
        }
