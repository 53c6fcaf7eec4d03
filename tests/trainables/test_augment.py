"""Augmentation in training and at prediction: what happens to the pixels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.inference import predict_probs
from trainables.training.augment import Pixels, augment, cutout, mix


def grid(n: int = 6, size: int = 8) -> Tensor:
    return torch.arange(n * size * size * 3).reshape(n, size, size, 3).remainder(251).to(torch.uint8)


def test_alternating_flip_mirrors_every_image_exactly_every_second_epoch() -> None:
    images, indices = grid(), np.arange(6)
    config = TrialConfig(flip="alternating")
    epochs = [augment(images, indices, config, epoch, torch.Generator()) for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0], epochs[1].flip(2))
    assert not torch.equal(epochs[0], images)
    assert not torch.equal(epochs[0], images.flip(2))


def test_random_flip_mirrors_about_half() -> None:
    images = grid(200)
    out = augment(images, np.arange(200), TrialConfig(flip="random"), 0, torch.Generator().manual_seed(0))
    mirrored = (out == images.flip(2)).flatten(1).all(1)
    assert (mirrored | (out == images).flatten(1).all(1)).all()
    assert 70 < int(mirrored.sum()) < 130


def test_crop_shifts_and_reflects() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 8, 8)[..., None].expand(64, 8, 8, 3)
    out = augment(ramp, np.arange(64), TrialConfig(crop=2), 0, torch.Generator().manual_seed(0))
    rows = {tuple(row.tolist()) for row in out[:, 0, :, 0]}
    assert rows == {
        (2, 1, 0, 1, 2, 3, 4, 5), (1, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)),
        (1, 2, 3, 4, 5, 6, 7, 6), (2, 3, 4, 5, 6, 7, 6, 5),
    }  # fmt: skip


def test_cutout_clears_a_square() -> None:
    x = cutout(torch.ones(50, 3, 10, 10), 0.4, torch.Generator().manual_seed(0))
    cleared = (x[:, 0] == 0).sum((1, 2))
    assert cleared.max() == 16
    assert cleared.min() >= 4  # a corner may cut the square


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_images_and_targets_by_the_same_share(kind: str) -> None:
    x = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    mixed, targets = mix(x, torch.eye(2), TrialConfig(**{kind: 1.0}), torch.Generator().manual_seed(1))
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed[0].mean(), torch.tensor(1 - share))
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    values = mixed.unique()
    assert len(values) == 2
    assert (set(values.tolist()) == {0.0, 1.0}) == (kind == "cutmix")  # a box of the other image, or a blend


def test_with_both_mixings_batches_take_either() -> None:
    x = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    generator = torch.Generator().manual_seed(0)
    config = TrialConfig(mixup=1.0, cutmix=1.0)
    boxes = [set(mix(x, torch.eye(2), config, generator)[0].unique().tolist()) <= {0.0, 1.0} for _ in range(40)]
    assert 10 < sum(boxes) < 30


def test_randaugment_changes_more_with_a_larger_magnitude() -> None:
    images = torch.randint(0, 256, (64, 12, 12, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)

    def change(magnitude: float) -> float:
        config = TrialConfig(randaugment=magnitude)
        out = augment(images, np.arange(64), config, 0, torch.Generator().manual_seed(0))
        assert (out.dtype, out.shape) == (images.dtype, images.shape)
        return float((out.float() - images.float()).abs().mean())

    assert change(0.0) == 0
    assert 0 < change(2.0) < change(10.0)


class LeftColumn(nn.Module):
    """Two logits: the mean of the leftmost column of the first channel, and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, 0, :, 0].mean(1) * self.one
        return torch.stack([left, torch.zeros_like(left)], 1)


@pytest.mark.parametrize(("tta", "left"), [("none", 0.0), ("mirror", 3.5), ("mirror_shift", 3.5)])
def test_test_time_augmentation_averages_the_views_logits(tta: Any, left: float) -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(3, 8, 8)[..., None].expand(3, 8, 8, 3).numpy()
    pixels = Pixels.of([0.0] * 3, [1 / 255] * 3, torch.device("cpu"))  # logits in grey levels
    probs = predict_probs(LeftColumn(), ramp, None, pixels, 8, tta)
    # the ramp shifted right begins with its reflected 1, shifted left with 1; mirrored they begin with 6 and 6
    views = {"none": 0.0, "mirror": (0 + 7) / 2, "mirror_shift": 0.5 * (0 + 7) / 2 + 0.5 * (1 + 6 + 1 + 6) / 4}
    assert views[tta] == left
    np.testing.assert_allclose(probs[:, 0], 1 / (1 + np.exp(-left)), rtol=1e-5)


def test_shifted_views_have_half_the_weight() -> None:
    spike = np.zeros((1, 8, 8, 3), np.uint8)
    spike[:, :, 1] = 8  # only the views shifted to the left by one see it in their first column, and those reflected
    pixels = Pixels.of([0.0] * 3, [1 / 255] * 3, torch.device("cpu"))
    plain, shifted = (
        predict_probs(LeftColumn(), spike, None, pixels, 8, tta)[0, 0] for tta in ("mirror", "mirror_shift")
    )
    assert plain == pytest.approx(0.5)
    # 8 in both unmirrored shifted views, 0 in the mirrored ones: half of half of 8
    assert math.log(shifted / (1 - shifted)) == pytest.approx(2.0, rel=1e-4)


def test_pixels_are_normalised_and_resized() -> None:
    x = Pixels.of([0.5] * 3, [0.25] * 3, torch.device("cpu"))(torch.full((2, 8, 8, 3), 255, dtype=torch.uint8), 16)
    assert x.shape == (2, 3, 16, 16)
    torch.testing.assert_close(x, torch.full_like(x, 2.0))
