"""What a network sees of a stored image: normalised, resized, and from several views whose logits are averaged.

Only torch is imported, because an exported folder carries this file with it (see ensemble/export/package.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
            shrinks = x.shape[1] > size or x.shape[2] > size
            x = F.interpolate(x.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=shrinks)
            x = x.permute(0, 2, 3, 1)
        # whole rows of pixels at a time: over a last dimension of three alone it would take thirty times as long
        scale, offset = 1 / (255 * self.std.flatten()), -(self.mean / self.std).flatten()
        # -1 and not len(x), which torch.export would take for a constant
        rows = torch.addcmul(offset.repeat(size), x.reshape(-1, size, 3 * size), scale.repeat(size))
        return rows.view(-1, size, size, 3).permute(0, 3, 1, 2)


def view_logits(
    model: nn.Module, batch: Tensor, pixels: Pixels, size: int, tta: Literal["none", "mirror", "mirror_shift"]
) -> Tensor:
    """Logits (N, C) of uint8 images (N, H, W, 3), averaged over the views of `tta`."""

    def both(images: Tensor) -> Tensor:
        x = pixels(images, size)
        return 0.5 * model(x).float() + 0.5 * model(x.flip(3)).float()

    if tta == "none":
        return model(pixels(batch, size)).float()
    if tta == "mirror":
        return both(batch)
    height, width = batch.shape[1:3]
    padded = F.pad(batch.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="reflect").permute(0, 2, 3, 1)
    shifted = 0.5 * both(padded[:, :height, :width]) + 0.5 * both(padded[:, 2:, 2:])
    return 0.5 * both(batch) + 0.5 * shifted
