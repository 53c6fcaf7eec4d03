"""What an ensemble answers to one uploaded picture: limits, decoding, and batches gathered from parallel requests."""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ensemble.file import read_ensemble
from ensemble.predict import Voters
from ensemble.selection.blend import scale
from trainables.data.decode import decode_bytes
from trainables.run_directory import open_runs

LARGEST_BATCH = 32
GATHERING = 0.005  # seconds that the first image of a batch waits for others
DECODERS = 4  # pictures decoded at a time: each may need hundreds of MiB


class Batcher:
    """Gathers images that arrive one by one, for a network takes 32 in little more time than one."""

    def __init__(self, votes: Callable[[np.ndarray], list[np.ndarray]]) -> None:
        """votes: uint8 images (N, H, W, 3) to M arrays (N, C); called from one thread only."""
        self._votes = votes
        self._waiting: queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="batcher").start()

    def submit(self, image: np.ndarray) -> "Future[np.ndarray]":
        """The members' probabilities, float32 (M, C), of one image; in the future also what predicting raised."""
        answer: Future[np.ndarray] = Future()
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
            for (_, answer), vote in zip(batch, votes, strict=True):
                answer.set_result(vote)

    def _gather(self) -> list[tuple[np.ndarray, "Future[np.ndarray]"]]:
        batch = [self._waiting.get()]
        end = time.monotonic() + GATHERING
        while len(batch) < LARGEST_BATCH:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch


class Answerer:
    """An ensemble that answers pictures, from any number of requests at once. Plain types in and out: Ray carries them.

    Raises UserError when the run, the ensemble or a member's weights are missing.
    """

    def __init__(self, runs: list[str], ensemble: str | None, device: str | None, most_pixels: int) -> None:
        homes = open_runs(runs)
        self.voters = Voters.load(homes, read_ensemble(homes[0], ensemble), device)
        self.architectures = [m.candidate(homes).architecture for m in self.voters.ensemble.members]
        self.most_pixels = most_pixels
        self.voters.votes(np.zeros((1, *self.voters.size, 3), np.uint8))  # the first request need not wait longer
        self.batcher = Batcher(self.voters.votes)
        self.decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "decoder")

    async def __call__(self, content: bytes) -> dict[str, Any]:
        """The answer to the bytes of an image file, JSON-able.

        `label`, `probability`, `probs` (by class), `members` (each with `id`, `architecture`, `weight`, `label`,
        `probability`, at the temperature at which it is averaged); or, for what is no image or too large a one, `error`
        in words and an HTTP `status`.
        """
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self.decoders, decode_bytes, content, self.voters.size, self.most_pixels)
        except ValueError as error:
            return {"error": f"this cannot be read as a picture: {error}", "status": 415}
        votes = await asyncio.wrap_future(self.batcher.submit(image))
        return self._describe(votes)

    def _describe(self, votes: np.ndarray) -> dict[str, Any]:
        classes = self.voters.classes
        probs = self.voters.ensemble.predict(list(votes[:, None]))[0]
        members = [
            {
                "id": member.id,
                "architecture": architecture,
                "weight": round(member.weight, 6),
                "label": classes[int(vote.argmax())],
                "probability": round(float(scale(vote[None], member.temperature).max()), 6),
            }
            for member, architecture, vote in zip(self.voters.ensemble.members, self.architectures, votes, strict=True)
        ]
        return {
            "label": classes[int(probs.argmax())],
            "probability": round(float(probs.max()), 6),
            "probs": {name: round(float(p), 6) for name, p in zip(classes, probs, strict=True)},
            "members": members,
        }
