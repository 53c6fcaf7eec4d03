"""An ensemble as one torch module, with its preprocessing and how it answers: what every export is made of.

An exported folder carries this file, and those of package.COPIED, as the package `ninefold_model`, which needs torch,
timm, Pillow and what timm itself needs:

    from ninefold_model import EnsembleModule
    model = EnsembleModule.from_pretrained(FOLDER)
    answers = model.answer(["cat.jpg"])
    answers.labels, answers.probabilities
"""

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn

from trainables.data.decode import Canvas, decode, open_image
from trainables.models.architecture import assemble
from trainables.models.views import Pixels, view_logits

FLOOR = 1e-7  # of ensemble.selection.metrics
LOG_FLOOR = float(torch.tensor(FLOOR).log())
PIXELS = 2_000_000  # of the stored images that are computed at a time

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray
"""An image: a file's path or its bytes, a Pillow image, or pixels uint8 (H, W, 3), RGB."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What an ensemble says about N images.

    Attributes:
        labels: its answers, names of classes.
        probabilities: float32 (N, C).
        sets: names of the classes among which the right one is, at the risk that the ensemble was selected for; and
        unsure: bool (N,), whether the answer may be wrong. Both None for an ensemble that does not know its risk.
    """

    labels: list[str]
    probabilities: np.ndarray
    sets: list[list[str]] | None
    unsure: np.ndarray | None


class MemberModule(nn.Module):
    """One member with its preprocessing: uint8 (N, H, W, 3) to log-probabilities, float32 (N, C)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, num_classes: int, architecture: dict[str, Any], size: int, mean: Sequence[float], std: Sequence[float],
        views: Any, temperature: float,
    ) -> None:  # fmt: skip
        """architecture: what `assemble` takes; size: side in pixels of what the network sees; views: of view_logits."""
        super().__init__()
        self.network = assemble(num_classes=num_classes, **architecture)
        self.size, self.views, self.temperature = size, views, temperature
        pixels = Pixels.of(mean, std, torch.device("cpu"))
        self.register_buffer("mean", pixels.mean, persistent=False)
        self.register_buffer("std", pixels.std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = view_logits(self.network, images, Pixels(self.mean, self.std), self.size, self.views)
        return scale_logs(F.log_softmax(logits, dim=1), self.temperature)


class EnsembleModule(nn.Module, PyTorchModelHubMixin):
    """All members of an ensemble and how they combine: uint8 (N, H, W, 3) to probabilities, float32 (N, C).

    (H, W) is the size to which the run's data set was decoded; `read` brings pictures there.
    """

    intercept: Tensor

    def __init__(
        self, classes: list[str], members: list[dict[str, Any]], image: dict[str, Any], temperature: float = 1.0,
        stacked: bool = False, decision: dict[str, Any] | None = None, risk: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """The arguments are what config.json holds.

        members: `weight` of each, and what MemberModule takes. image: what Canvas takes. temperature: by which the
        log-probabilities of the average are divided. stacked: a linear layer on the members' log-probabilities
        replaces the average. decision: `factors` (C) or `cost` (C, C), see `answers`; else the most probable class is
        the answer. risk: `level`, `in_set` and `sure`, thresholds on probabilities.
        """
        super().__init__()
        size = len(classes)
        self.classes = classes
        self.canvas = Canvas(**image)
        self.weights = [member["weight"] for member in members]
        self.members = nn.ModuleList(
            MemberModule(size, **{key: value for key, value in member.items() if key != "weight"}) for member in members
        )
        self.temperature, self.stacked = temperature, stacked
        self.decision, self.risk = decision or {}, risk
        if stacked:
            for number in range(len(members)):  # one each: int8.py knows them by name
                self.register_buffer(f"coefficients_{number}", torch.zeros(size, size))
            self.register_buffer("intercept", torch.zeros(size))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logs = [member(images) for member in self.members]
        if self.stacked:
            votes = [log.clamp(min=LOG_FLOOR) @ getattr(self, f"coefficients_{k}") for k, log in enumerate(logs)]
            together = F.log_softmax(torch.stack(votes).sum(0) + self.intercept, dim=1)
        else:
            shares = [weight * log.exp() for weight, log in zip(self.weights, logs, strict=True)]
            together = torch.stack(shares).sum(0).log()
        return scale_logs(together, self.temperature).exp()

    def read(self, pictures: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """The pictures as the ensemble takes them, uint8 (N, H, W, 3): upright, on white where they are transparent.

        Raises ValueError or OSError for what cannot be read.
        """
        return np.stack([self._read(picture) for picture in pictures])

    @torch.no_grad()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (N, C), of images uint8 (N, H, W, 3) as `read` leaves them, a few at a time."""
        device = next(self.parameters()).device
        step = max(1, PIXELS // (self.canvas.height * self.canvas.width))
        parts = [np.ascontiguousarray(images[start : start + step]) for start in range(0, len(images), step)]
        return np.concatenate([self(torch.from_numpy(part).to(device)).cpu().numpy() for part in parts])

    def answer(self, pictures: Sequence[Picture] | np.ndarray) -> Answers:
        """What the ensemble says about pictures; see `read`."""
        probs = self.probabilities(self.read(pictures))
        chosen, classes = self.answers(probs), np.array(self.classes)
        labels = classes[chosen].tolist()
        if self.risk is None:
            return Answers(labels, probs, None, None)
        rows = np.arange(len(probs))
        inside = probs >= self.risk["in_set"]
        inside[rows, chosen] = True
        return Answers(
            labels, probs, [classes[row].tolist() for row in inside], probs[rows, chosen] < self.risk["sure"]
        )

    def answers(self, probs: np.ndarray) -> np.ndarray:
        """The answer for each image, int64 (N,), from probabilities (N, C): that of least expected cost, or of the
        largest probability times its class's factor."""
        if "cost" in self.decision:
            return np.argmin(probs.astype(np.float64) @ np.array(self.decision["cost"]), axis=1)
        return np.argmax(probs * np.array(self.decision.get("factors", 1.0)), axis=1)

    def _read(self, picture: Picture) -> np.ndarray:
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(f"pixels are {picture.dtype} {picture.shape}, expected uint8 (H, W, 3)")
            if picture.shape == self.canvas.shape:
                return picture
            return decode(Image.fromarray(picture), self.canvas)
        if isinstance(picture, Image.Image):
            return decode(picture.copy(), self.canvas)
        content = bytes(picture) if isinstance(picture, bytes | bytearray) else Path(picture).read_bytes()
        return decode(open_image(io.BytesIO(content)), self.canvas)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **rest: Any) -> Any:
        """huggingface_hub's own, but strict, because a tensor that is missing would stay random; and silent."""
        with contextlib.redirect_stdout(None):
            return super()._from_pretrained(strict=strict, **rest)


def scale_logs(logs: Tensor, temperature: float) -> Tensor:
    """What `ensemble.blend.scale` does to probabilities, on their logarithms (N, C)."""
    return logs if temperature == 1 else F.log_softmax(logs.clamp(min=LOG_FLOOR) / temperature, dim=1)
