"""Augmentation of whole batches on the device.

What is random is drawn on the CPU from the trial's seed and the epoch, whatever the device, so that a resumed run sees
the same images as an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config import TrialConfig

RANDAUGMENT_SLICE = 16  # images that share one pair of operations


@dataclass(frozen=True)
class Pixels:
    """Uint8 pixels to normalised float: the channel mean and deviation (for pixels in 0..1) that a network expects."""

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], device: torch.device) -> "Pixels":
        return cls(
            torch.tensor(mean, device=device).view(1, 3, 1, 1), torch.tensor(std, device=device).view(1, 3, 1, 1)
        )

    def __call__(self, images: Tensor, size: int) -> Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, size, size), channels-last in memory, bilinear with antialiasing."""
        x = images.float()
        if tuple(x.shape[1:3]) != (size, size):
            shrinks = x.shape[2] > size
            x = F.interpolate(x.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=shrinks)
            x = x.permute(0, 2, 3, 1)
        # whole rows of pixels at a time: over a last dimension of three alone it would take thirty times as long
        scale, offset = 1 / (255 * self.std.flatten()), -(self.mean / self.std).flatten()
        # -1 and not len(x), which torch.export would take for a constant
        rows = torch.addcmul(offset.repeat(size), x.reshape(-1, size, 3 * size), scale.repeat(size))
        return rows.view(-1, size, size, 3).permute(0, 3, 1, 2)


def augment(images: Tensor, indices: np.ndarray, config: TrialConfig, epoch: int, generator: torch.Generator) -> Tensor:
    """Shifted crop, mirror and RandAugment of a batch: uint8 (N, H, W, 3) in and out.

    `indices` (N,) are the images' places in the data set; the alternating flip decides by them and the epoch, so that
    an image is seen mirrored exactly every second epoch (Jordan, 2024, section 3.6). `generator` is a CPU one.
    """
    n, height, width, _ = images.shape
    device = images.device
    flip = flips(indices, config, epoch, generator)
    if config.crop or flip is not None:
        rows = torch.arange(height).expand(n, height)
        columns = torch.arange(width).expand(n, width)
        if config.crop:
            shift = torch.randint(-config.crop, config.crop + 1, (2, n, 1), generator=generator)
            rows = _reflect(rows + shift[0], height)
            columns = _reflect(columns + shift[1], width)
        if flip is not None:
            columns = torch.where(flip[:, None], columns.flip(1), columns)
        rows, columns = rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)
        images = images[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if config.randaugment:
        images = _randaugment(images, config.randaugment, generator)
    return images


def cutout(x: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Set one square of each normalised image (N, C, H, W) to the mean (DeVries and Taylor, 2017)."""
    n, _, height, width = x.shape
    side = max(1, round(fraction * height))
    top = torch.randint(0, height, (n, 1), generator=generator) - side // 2
    left = torch.randint(0, width, (n, 1), generator=generator) - side // 2
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None]
    return x.masked_fill(inside[:, None].to(x.device), 0.0)


def mix(x: Tensor, targets: Tensor, config: TrialConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of a batch with itself reversed.

    `x` float (N, 3, H, W), `targets` float (N, C); both are mixed by the same share.
    """
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or torch.rand((), generator=generator) < 0.5)
    alpha = config.cutmix if use_cutmix else config.mixup
    # numpy's Beta, seeded from the generator, for torch's takes no generator
    seed = int(torch.randint(0, 2**31, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = x.flip(0)
    if not use_cutmix:
        return share * x + (1 - share) * other, share * targets + (1 - share) * targets.flip(0)
    height, width = x.shape[-2:]
    box_h, box_w = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
    top = int(torch.randint(0, height - box_h + 1, (), generator=generator))
    left = int(torch.randint(0, width - box_w + 1, (), generator=generator))
    x = x.clone()
    x[:, :, top : top + box_h, left : left + box_w] = other[:, :, top : top + box_h, left : left + box_w]
    kept = 1 - box_h * box_w / (height * width)
    return x, kept * targets + (1 - kept) * targets.flip(0)


def flips(indices: np.ndarray, config: TrialConfig, epoch: int, generator: torch.Generator) -> Tensor | None:
    if config.flip == "random":
        return torch.rand(len(indices), generator=generator) < 0.5
    if config.flip == "alternating":
        first = np.random.default_rng(config.seed).integers(0, 2, size=int(indices.max()) + 1)[indices]
        return torch.from_numpy((first + epoch) % 2 == 1)
    return None


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside 0..size-1 mirrored back at the border, without repeating the border pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


def _randaugment(images: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Two random operations (Cubuk et al., 2020) on every slice of the batch, by torchvision."""
    from torchvision.transforms.v2 import RandAugment

    operation = RandAugment(num_ops=2, magnitude=round(magnitude), num_magnitude_bins=11)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
        parts = [operation(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for part in images.split(RANDAUGMENT_SLICE)]
    return torch.cat(parts)
