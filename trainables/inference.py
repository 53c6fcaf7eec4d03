"""Predictions of a network: class probabilities of uint8 images, with test-time augmentation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainables.config import TestTimeAugmentation
from trainables.data.packed import ImageRows
from trainables.errors import UserError
from trainables.models.views import Pixels, view_logits
from trainables.training.feed import rows_on
from trainables.training.memory import fitting, halved

EVAL_BATCH = 500
EVAL_PIXELS_CPU = 200_000  # of a batch on a CPU: larger ones leave its caches, and take up to twice as long


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda, else mps, else cpu. Raises UserError when this machine does not have it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    here = [kind for kind, count in devices.items() if count]
    if not name:
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:  # no device of any machine
        device = torch.device("meta")
    if (device.index or 0) >= devices.get(device.type, 0):
        raise UserError(f"this machine has no device {name!r}, expected {' or '.join(here)}")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for "bf16" and "fp16"; nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def eval_batch(device: torch.device, image_size: int) -> int:
    """Images of one forward pass."""
    batch = max(4, min(EVAL_BATCH, EVAL_PIXELS_CPU // image_size**2)) if device.type == "cpu" else EVAL_BATCH
    return fitting(device, image_size, batch)


@torch.no_grad()
def predict_probs(
    model: nn.Module,
    images: ImageRows | torch.Tensor,
    indices: np.ndarray | None,
    pixels: Pixels,
    image_size: int,
    tta: TestTimeAugmentation = "none",
    precision: str = "fp32",
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Class probabilities, float32 (N, C), of `images[indices]` (uint8 (M, H, W, 3)); all of them when None.

    The logits of the views of `tta` are averaged: "mirror" takes the image and its mirror; "mirror_shift" also both
    shifted by one stored pixel to either diagonal, these with half the weight (Jordan, 2024, section 3.7). The batch is
    halved when memory runs out. `tick` is called once a batch. The model is left in the mode it was in.
    """
    device = next(model.parameters()).device
    indices = np.arange(len(images)) if indices is None else indices
    was_training = model.training
    model.eval()
    batch_size = eval_batch(device, image_size)
    probs: list[np.ndarray] = []
    start = 0
    while start < len(indices):
        chunk = indices[start : start + batch_size]
        try:
            batch = rows_on(images, chunk, device)
            with autocast(device, precision):
                logits = view_logits(model, batch, pixels, image_size, tta)
        except RuntimeError as error:
            batch_size = halved(device, image_size, batch_size, error)
            continue
        probs.append(F.softmax(logits.cpu().double(), dim=1).float().numpy())  # mps has no float64
        start += len(chunk)
        tick()
    model.train(was_training)
    return np.concatenate(probs)


def scores(probs: np.ndarray, labels: np.ndarray, split: str) -> dict[str, float]:
    """Accuracy, log-loss and size of a split, each under a name that says which: `tune_accuracy`, ..."""
    true = np.clip(probs[np.arange(len(labels)), labels].astype(np.float64), 1e-12, 1.0)
    return {
        f"{split}_accuracy": float((probs.argmax(1) == labels).mean()),
        f"{split}_log_loss": float(-np.log(true).mean()),
        f"{split}_images": len(labels),
    }
