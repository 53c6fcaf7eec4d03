"""Features of a frozen backbone, computed once per node and shared by all trials of all sweeps.

While the body is frozen its output does not change, so freeze epochs train the head on stored features: those of the
plain and, when the config flips images, of the mirrored view. Crops, cutout and mixing are not applied meanwhile.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.inference import autocast, eval_batch
from trainables.job import WeightSource
from trainables.models.backbones import head_of
from trainables.training.augment import Pixels, flips

FORMAT = 2  # of what is stored; in 1, several GPUs had stored features of networks without their activations


class OutOfTime(RuntimeError):
    """The sweep's time was over before the features were complete."""


@functools.cache
def _identity(weights: WeightSource) -> str:
    """What tells pretrained weights apart: a file's content, or that they are the hub's."""
    return hashlib.sha256(Path(weights.path).read_bytes()).hexdigest() if weights.path else weights.kind


class FrozenFeatures:
    """The features that a trial's freeze epochs need; nothing is computed before the first use.

    `usable` is False where the head cannot be fed from stored vectors (SqueezeNet's convolutional head, a body with
    random weights, which no other trial shares): such trials run their freeze epochs through the whole network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrialConfig,
        data: Data,
        weights: WeightSource | None,
        pixels: Pixels,
        deadline: float | None,
        tick: Callable[[], None],
    ) -> None:
        self.model, self.config, self.data, self.pixels = model, config, data, pixels
        self.deadline, self.tick = deadline, tick
        self.precision = "fp32"  # of the body; set before the first use
        self.head = head_of(model)
        self.views: dict[bool, np.ndarray] = {}
        self.usable = weights is not None and not config.progressive and self._head_takes_vectors()
        self.question = {
            "backbone": config.backbone, "stem": config.stem, "weights": weights and _identity(weights),
            "size": config.image_size, "data": data.fingerprint, "format": FORMAT,
        }  # fmt: skip

    def logits(self, indices: np.ndarray, epoch: int, generator: torch.Generator) -> Tensor:
        """Head outputs (N, C) for training on `indices`, each from its plain or mirrored view; dropout applied."""
        flip = flips(indices, self.config, epoch, generator)
        x = self._take(indices, mirrored=False)
        if flip is not None and bool(flip.any()):
            x = torch.where(flip[:, None].to(x.device), self._take(indices, mirrored=True), x)
        return self.head(F.dropout(x, self.config.dropout))

    @torch.no_grad()
    def probs(self, indices: np.ndarray) -> np.ndarray:
        """Class probabilities, float32 (N, C), from the plain view."""
        logits = torch.cat([self.head(self._take(part, mirrored=False)) for part in np.array_split(indices, 8)])
        return F.softmax(logits.cpu().double(), dim=1).float().numpy()

    def _take(self, indices: np.ndarray, mirrored: bool) -> Tensor:
        if mirrored not in self.views:
            self.views[mirrored] = self._load_or_compute(mirrored)
        rows = torch.from_numpy(self.views[mirrored][indices].astype(np.float32))
        return rows.to(self.pixels.mean.device)

    def _load_or_compute(self, mirrored: bool) -> np.ndarray:
        """float16 (N, F) of all images, memory-mapped. Two trials that ask at the same time compute them once."""
        question = json.dumps({**self.question, "precision": self.precision, "mirrored": mirrored}, sort_keys=True)
        folder = self.data.cache / "features"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:20]}.npy"
        lock = FileLock(f"{path}.lock")
        while not path.exists():
            try:
                with lock.acquire(timeout=1):
                    if not path.exists():
                        self._compute(path, mirrored)
            except Timeout:
                self.tick()  # another trial is computing them
        return np.load(path, mmap_mode="r", allow_pickle=False)

    @torch.no_grad()
    def _compute(self, path: Path, mirrored: bool) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        was_training = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        out: np.memmap | None = None
        images = self.data.images
        start, size = 0, eval_batch(self.pixels.mean.device, self.config.image_size)
        while start < len(images):
            if self.deadline is not None and time.time() > self.deadline:
                temporary.unlink(missing_ok=True)
                raise OutOfTime("the deadline passed while features were computed")
            try:
                vectors = self._vectors(images[start : start + size], mirrored).cpu().numpy()
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                size //= 2
                continue
            if out is None:
                shape = (len(images), vectors.shape[1])
                out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            out[start : start + len(vectors)] = vectors
            start += len(vectors)
            self.tick()
        assert out is not None
        out.flush()
        temporary.replace(path)
        for module, training in was_training:
            module.training = training

    def _vectors(self, images: np.ndarray, mirrored: bool) -> Tensor:
        x = self.pixels(torch.from_numpy(np.array(images)).to(self.pixels.mean.device), self.config.image_size)
        if mirrored:
            x = x.flip(3)
        with autocast(x.device, self.precision):
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True).float()  # type: ignore[operator]

    @torch.no_grad()
    def _head_takes_vectors(self) -> bool:
        """Whether head(pre-logits) is what the network computes, found by trying it on two images."""
        was_training = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            images = self.data.images[:2]
            vectors = self._vectors(images, mirrored=False)
            x = self.pixels(torch.from_numpy(np.array(images)).to(vectors.device), self.config.image_size)
            return vectors.ndim == 2 and torch.allclose(self.head(vectors), self.model(x), rtol=1e-3, atol=1e-3)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError):
            return False
        finally:
            for module, training in was_training:
                module.training = training
