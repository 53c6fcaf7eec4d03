"""Augmentation of whole batches on the device.

What is random is drawn on the CPU from the trial's seed and the epoch, whatever the device, so that a resumed run sees
the same images as an uninterrupted one. Every image of a batch gets its own draw.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from trainables.config import TrialConfig
from trainables.models.views import Pixels

LUMA = (0.299, 0.587, 0.114)
RATIO = (3 / 4, 4 / 3)  # proportions of a random resized crop, against those of the stored image
ERASED = (0.02, 0.25)  # share of the area that is erased
MIX_UNTIL = 0.8  # of the training: the last part sees images as they will be


def augmented(
    images: Tensor, indices: np.ndarray, config: TrialConfig, size: int, epoch: int, generator: torch.Generator,
    pixels: Pixels,
) -> Tensor:  # fmt: skip
    """uint8 (N, H, W, 3) on the device -> normalised float32 (N, 3, size, size) for training.

    `indices` (N,) are the images' places in the data set; the alternating flip decides by them and the epoch, so that
    an image is seen mirrored exactly every second epoch (Jordan, 2024, section 3.6). `generator` is a CPU one.
    """
    flip = flips(indices, config, epoch, generator)
    if config.scale < 1:
        height, width = images.shape[1:3]
        x = resized_crops(images, random_boxes(len(images), height, width, config.scale, generator), size)
        if flip is not None:
            x = torch.where(flip[:, None, None, None].to(x.device), x.flip(3), x)
    else:
        images = shifted(images, config.crop, flip, generator)
        if not (config.jitter or config.trivial or config.randaugment):
            return erased(pixels(images, size), config.erase, generator)
        x = resized(images, size)
    if config.trivial or config.randaugment:
        x = altered(x, config.randaugment, generator)
    return erased(recoloured(x, config.jitter, pixels, generator), config.erase, generator)


# --- where from -------------------------------------------------------------------------------------------------------


def flips(indices: np.ndarray, config: TrialConfig, epoch: int, generator: torch.Generator) -> Tensor | None:
    """Which images are mirrored, bool (N,); None when none ever is."""
    if config.flip == "random":
        return torch.rand(len(indices), generator=generator) < 0.5
    if config.flip == "alternating":
        first = np.random.default_rng(config.seed).integers(0, 2, size=int(indices.max()) + 1)[indices]
        return torch.from_numpy((first + epoch) % 2 == 1)
    return None


def shifted(images: Tensor, shift: int, flip: Tensor | None, generator: torch.Generator) -> Tensor:
    """uint8 (N, H, W, 3) shifted by up to `shift` pixels, reflected at the border, and mirrored where asked."""
    n, height, width, _ = images.shape
    if not shift and flip is None:
        return images
    rows = torch.arange(height).expand(n, height)
    columns = torch.arange(width).expand(n, width)
    if shift:
        shifts = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator)
        rows = _reflect(rows + shifts[0], height)
        columns = _reflect(columns + shifts[1], width)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    device = images.device
    rows, columns = rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)
    return images[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside 0..size-1 mirrored back at the border, without repeating the border pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


def random_boxes(n: int, height: int, width: int, scale: float, generator: torch.Generator) -> Tensor:
    """Boxes of random resized crops, int64 (N, 4): top, left, height, width (Szegedy et al., 2015).

    Areas are drawn evenly from `scale` to 1 of the image's, proportions from RATIO times the image's own: the stored
    image may be squashed already. A box that would not fit is cut to the image.
    """
    draws = torch.rand(4, n, generator=generator)
    area = scale + (1 - scale) * draws[0]
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * draws[1])
    heights = (height * (area / ratio).sqrt()).round().clamp(1, height)
    widths = (width * (area * ratio).sqrt()).round().clamp(1, width)
    tops = (draws[2] * (height - heights + 1)).floor().clamp_max(height - heights)
    lefts = (draws[3] * (width - widths + 1)).floor().clamp_max(width - widths)
    return torch.stack([tops, lefts, heights, widths], dim=1).long()


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The boxes of uint8 (N, H, W, 3), each resized with antialiasing: (N, 3, size, size), 0 to 255.

    On a CPU image by image, because PyTorch resizes bytes three times as fast as a batch of floats; elsewhere all at
    once, by averaging what falls into each pixel.
    """
    if images.device.type == "cpu":
        x = torch.empty(len(images), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            crop = images[i, top : top + height, left : left + width].permute(2, 0, 1)[None]
            x[i] = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        return x
    top, left, height, width = boxes.to(images.device).float().unbind(1)
    number = torch.arange(len(images), device=images.device, dtype=torch.float32)
    corners = torch.stack([number, left, top, left + width, top + height], dim=1)
    return roi_align(images.permute(0, 3, 1, 2).float(), corners, (size, size), sampling_ratio=-1, aligned=True)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (N, H, W, 3) as a whole: (N, 3, size, size), 0 to 255."""
    x = images.permute(0, 3, 1, 2)
    if tuple(x.shape[2:]) == (size, size):
        return x
    x = x if x.device.type == "cpu" else x.float()
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


# --- what it looks like -----------------------------------------------------------------------------------------------


def altered(x: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """TrivialAugment (Müller and Hutter, 2021), or with a magnitude RandAugment (Cubuk et al., 2020), of each image."""
    from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

    operation = RandAugment(2, round(magnitude), 11) if magnitude else TrivialAugmentWide()
    bytes_ = x.round().clamp(0, 255).to(torch.uint8)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
        return torch.stack([operation(image) for image in bytes_])


def recoloured(x: Tensor, jitter: float, pixels: Pixels, generator: torch.Generator) -> Tensor:
    """(N, 3, S, S) of 0 to 255, normalised; with brightness, contrast and saturation changed at random.

    All of it is affine in the colour of a pixel, and contrast in the image's mean grey, so each image is multiplied by
    one 3x3 matrix.
    """
    n, device = len(x), x.device
    x = x.float()
    luma = torch.tensor(LUMA, device=device)
    scale, shift = 1 / (255 * pixels.std.flatten()), -(pixels.mean / pixels.std).flatten()
    if not jitter:
        return x * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
    factors = (1 + jitter * (2 * torch.rand(3, n, generator=generator) - 1)).to(device)
    bright, contrast, saturation = factors.unbind(0)
    grey = bright * (x.mean((2, 3)) @ luma)  # of the whole image, which contrast leaves as it is
    identity, to_grey = torch.eye(3, device=device), luma.expand(3, 3)
    colour = saturation.view(n, 1, 1) * identity + (1 - saturation).view(n, 1, 1) * to_grey
    matrix = scale.view(1, 3, 1) * (bright * contrast).view(n, 1, 1) * colour
    offset = scale.view(1, 3) * ((1 - contrast) * grey).view(n, 1) + shift
    points = x.permute(0, 2, 3, 1).reshape(n, -1, 3)
    changed = torch.baddbmm(offset.view(n, 1, 3), points, matrix.transpose(1, 2))
    return changed.view(n, *x.shape[2:], 3).permute(0, 3, 1, 2)


def erased(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., 2017): a rectangle of some normalised images (N, 3, S, S) becomes noise."""
    if not probability:
        return x
    n, _, height, width = x.shape
    draws = torch.rand(5, n, generator=generator)
    area = ERASED[0] + (ERASED[1] - ERASED[0]) * draws[1]
    ratio = torch.exp(2 * draws[2] - 1)
    heights, widths = (height * (area / ratio).sqrt()).round(), (width * (area * ratio).sqrt()).round()
    top = (draws[3] * (height - heights).clamp_min(0)).floor()[:, None]
    left = (draws[4] * (width - widths).clamp_min(0)).floor()[:, None]
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + heights[:, None]))[:, :, None]
    inside = inside & ((columns >= left) & (columns < left + widths[:, None]))[:, None]
    inside &= (draws[0] < probability)[:, None, None]
    seed = int(torch.randint(0, 2**31, (), generator=generator))
    noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    return torch.where(inside[:, None].to(x.device), noise, x)


def mix(
    x: Tensor, targets: Tensor, config: TrialConfig, progress: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of a batch with itself reversed, until MIX_UNTIL.

    `x` float (N, 3, H, W), `targets` float (N, C); both are mixed by the same share.
    """
    if not (config.mixup or config.cutmix) or progress >= MIX_UNTIL:
        return x, targets
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or torch.rand((), generator=generator) < 0.5)
    alpha = config.cutmix if use_cutmix else config.mixup
    # numpy's Beta, seeded from the generator, because torch's takes no generator
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
