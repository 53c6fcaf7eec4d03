"""Features of a frozen backbone, computed once per node and shared by all trials of all sweeps.

While the body is frozen its output does not change, so a probe and freeze epochs train the head on stored features:
those of the plain and of the mirrored view, both from one pass over the images. Crops, jitter and mixing are not
applied meanwhile.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainables.command import progress
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.inference import autocast, eval_batch
from trainables.models.backbones import head_of
from trainables.training.augment import Pixels, flips
from trainables.training.memory import halved

FORMAT = 3  # of what is stored
AGREES = 1e-2  # largest difference of a feature, relative to the largest one, at which two networks are the same


class OutOfTime(RuntimeError):
    """The sweep's time was over before the features were complete."""


class Features:
    """The features of a body as it stands when this is made; nothing is computed before the first use.

    `usable` is False where the head cannot be fed from stored vectors (SqueezeNet's convolutional head): such trials
    train their head through the whole network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrialConfig,
        data: Data,
        pixels: Pixels,
        precision: str,
        deadline: float | None,
        tick: Callable[[], None],
    ) -> None:
        self.config, self.data, self.pixels, self.precision = config, data, pixels, precision
        self.deadline, self.tick = deadline, tick
        self.body = model
        self.views: dict[bool, np.ndarray] = {}
        self.question = {
            "backbone": config.backbone, "weights": fingerprint(model), "size": config.image_size,
            "data": data.fingerprint, "format": FORMAT, "precision": precision,
        }  # fmt: skip
        paths = self._paths()
        stored = all(path.exists() for path in paths.values())
        self.usable = stored or _takes_vectors(model, self._sample())  # stored by a trial that had tried it
        if stored:
            self.views = _mapped(paths)
        elif self.usable:
            self.body = folded(model, self._sample())  # a copy, which stays as the body is now

    def rows(self, indices: np.ndarray) -> list[Tensor]:
        """The plain and the mirrored view of these images, float32 (N, F) each; only the plain one without flips."""
        return [self.take(indices, mirrored) for mirrored in ((False, True) if self.is_flipped else (False,))]

    @property
    def is_flipped(self) -> bool:
        """Whether mirrored views are trained on, too."""
        return self.config.flip != "none" or self.config.tta != "none"

    def batch(self, indices: np.ndarray, epoch: int, generator: torch.Generator) -> Tensor:
        """Features (N, F) for training on `indices`, each of its plain or mirrored view; dropout applied."""
        flip = flips(indices, self.config, epoch, generator)
        x = self.take(indices, mirrored=False)
        if flip is not None and bool(flip.any()):
            x = torch.where(flip[:, None].to(x.device), self.take(indices, mirrored=True), x)
        return F.dropout(x, self.config.dropout)

    @torch.no_grad()
    def probs(self, indices: np.ndarray, head: Callable[[Tensor], Tensor], mirrored: bool) -> np.ndarray:
        """Class probabilities, float32 (N, C), by a head; of the mean of both views' logits if `mirrored`."""
        parts = np.array_split(indices, max(1, len(indices) // 4096))
        views = (False, True) if mirrored else (False,)
        logits = [torch.stack([head(self.take(part, view)) for view in views]).mean(0) for part in parts]
        return F.softmax(torch.cat(logits).cpu().double(), dim=1).float().numpy()

    def take(self, indices: np.ndarray, mirrored: bool) -> Tensor:
        """The stored features of one view of these images, float32 (N, F) on the device."""
        if mirrored not in self.views:
            self.views |= self._load_or_compute()
        rows = torch.from_numpy(self.views[mirrored][indices])
        return rows.to(self.pixels.mean.device).float()  # which numpy would take ten times as long for

    def _paths(self) -> dict[bool, Path]:
        """Where the views that are needed lie, or will."""
        name = hashlib.sha256(json.dumps(self.question, sort_keys=True).encode()).hexdigest()[:20]
        views = (False, True) if self.is_flipped else (False,)
        return {view: self.data.cache / "features" / f"{name}{'-mirrored' if view else ''}.npy" for view in views}

    def _load_or_compute(self) -> dict[bool, np.ndarray]:
        """float16 (N, F) of all images by view, memory-mapped; computed once when two trials ask at the same time."""
        paths = self._paths()
        paths[False].parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(paths[False].with_suffix(".lock"))
        while missing := {view: path for view, path in paths.items() if not path.exists()}:
            try:
                with lock.acquire(timeout=1):
                    missing = {view: path for view, path in paths.items() if not path.exists()}
                    if missing:
                        self._compute(missing)
            except Timeout:
                self.tick()  # another trial is computing them
        return _mapped(paths)

    @torch.inference_mode()
    def _compute(self, paths: dict[bool, Path]) -> None:
        temporary = {view: path.with_suffix(f".{os.getpid()}.tmp") for view, path in paths.items()}
        files: dict[bool, np.memmap] = {}
        images = self.data.images
        start, size = 0, eval_batch(self.pixels.mean.device, self.config.image_size)
        told = progress(f"features of {self.config.backbone}", len(images))
        with told as advance, evaluating(self.body):
            while start < len(images):
                if self.deadline is not None and time.time() > self.deadline:
                    for path in temporary.values():
                        path.unlink(missing_ok=True)
                    raise OutOfTime("the deadline passed while features were computed")
                try:
                    x = self._pixels(images[start : start + size])
                    vectors = {view: self._vectors(x.flip(3) if view else x).cpu().numpy() for view in paths}
                except RuntimeError as error:
                    size = halved(self.pixels.mean.device, self.config.image_size, size, error)
                    continue
                for view, part in vectors.items():
                    if view not in files:
                        shape = (len(images), part.shape[1])
                        files[view] = np.lib.format.open_memmap(
                            temporary[view], mode="w+", dtype=np.float16, shape=shape
                        )
                    files[view][start : start + len(part)] = part
                start += len(x)
                self.tick()
                advance(len(x))
        for view, path in paths.items():
            files[view].flush()
            temporary[view].replace(path)

    def _pixels(self, images: np.ndarray) -> Tensor:
        return self.pixels(torch.from_numpy(np.array(images)).to(self.pixels.mean.device), self.config.image_size)

    def _vectors(self, x: Tensor) -> Tensor:
        with autocast(x.device, self.precision):
            return vectors_of(self.body, x)

    def _sample(self) -> Tensor:
        return self._pixels(self.data.images[:2])


def _mapped(paths: dict[bool, Path]) -> dict[bool, np.ndarray]:
    return {view: np.load(path, mmap_mode="r", allow_pickle=False) for view, path in paths.items()}


def vectors_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the head is given for normalised images (N, 3, S, S): float32 (N, F)."""
    return model.forward_head(model.forward_features(x), pre_logits=True).float()  # type: ignore[operator]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time of a `with`, every module then as it was."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training


def fingerprint(model: nn.Module) -> str:
    """20 hex digits that tell the tensors of a body apart, whatever their source: the head is not part of it."""
    in_head = {id(tensor) for tensor in head_of(model).state_dict(keep_vars=True).values()}
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in in_head and not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]


@torch.inference_mode()
def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a network in evaluation mode with every BatchNorm folded into the convolution before it, on a CPU.

    There it is a third faster. Only convolutions and BatchNorms that follow each other in their module are folded,
    and where the result does not agree on the images `x` (N, 3, S, S), the network itself is returned.
    """
    if x.device.type != "cpu":
        return model
    with evaluating(model):
        copied = copy.deepcopy(model).eval()
        for module in list(copied.modules()):
            children = list(module.named_children())
            for (first, convolution), (second, norm) in itertools.pairwise(children):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                    setattr(module, second, getattr(norm, "act", None) or nn.Identity())
        expected = vectors_of(model, x)
        agrees = (vectors_of(copied, x) - expected).abs().max() <= AGREES * expected.abs().max()
    return copied if bool(agrees) else model


@torch.no_grad()
def _takes_vectors(model: nn.Module, x: Tensor) -> bool:
    """Whether head(pre-logits) is what the network computes, found by trying it on two images."""
    with evaluating(model):
        try:
            vectors, head = vectors_of(model, x), head_of(model)
            return (
                isinstance(head, nn.Linear)
                and vectors.ndim == 2
                and torch.allclose(head(vectors), model(x), rtol=1e-3, atol=1e-3)
            )
        except (RuntimeError, TypeError, AttributeError, NotImplementedError):
            return False
