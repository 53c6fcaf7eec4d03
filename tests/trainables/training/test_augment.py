"""Augmentation in training and at prediction: what happens to the pixels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.inference import predict_probs
from trainables.training.augment import Pixels, augmented, erased, mix, random_boxes, resized_crops

BYTES = Pixels.of([0.0] * 3, [1 / 255] * 3, torch.device("cpu"))  # leaves pixels as they are, 0 to 255


def grid(n: int = 6, size: int = 8) -> Tensor:
    return torch.arange(n * size * size * 3).reshape(n, size, size, 3).remainder(251).to(torch.uint8)


def shown(images: Tensor, seed: int = 0, epoch: int = 0, size: int | None = None, **config: Any) -> Tensor:
    """What training sees of uint8 images (N, H, W, 3): float (N, S, S, 3), 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    side = size or images.shape[1]
    x = augmented(images, np.arange(len(images)), TrialConfig(**config), side, epoch, generator, BYTES)
    return x.permute(0, 2, 3, 1)


def test_alternating_flip_mirrors_every_image_exactly_every_second_epoch() -> None:
    images = grid()
    epochs = [shown(images, epoch=epoch, flip="alternating") for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0], epochs[1].flip(2))
    assert not torch.equal(epochs[0], images.float())
    assert not torch.equal(epochs[0], images.flip(2).float())


@pytest.mark.parametrize("scale", [1.0, 0.999])
def test_random_flip_mirrors_about_half(scale: float) -> None:
    images = grid(200)
    out = shown(images, flip="random", scale=scale).round()
    mirrored = (out == images.flip(2)).flatten(1).float().mean(1) > 0.9
    plain = (out == images).flatten(1).float().mean(1) > 0.9
    if scale == 1:
        assert (mirrored | plain).all()
        assert 70 < int(mirrored.sum()) < 130
    else:  # a crop of nearly everything, in proportions of its own
        ramp = torch.arange(0, 240, 30, dtype=torch.uint8).expand(200, 8, 8)[..., None].expand(200, 8, 8, 3)
        rising = shown(ramp, flip="random", scale=scale)[:, 4, -1, 0] > 120
        assert 70 < int(rising.sum()) < 130


def test_crop_shifts_and_reflects() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 8, 8)[..., None].expand(64, 8, 8, 3)
    out = shown(ramp, crop=2)
    rows = {tuple(row.tolist()) for row in out[:, 0, :, 0]}
    assert rows == {
        (2, 1, 0, 1, 2, 3, 4, 5), (1, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)),
        (1, 2, 3, 4, 5, 6, 7, 6), (2, 3, 4, 5, 6, 7, 6, 5),
    }  # fmt: skip


def test_random_resized_crops_have_the_areas_and_proportions_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(4000, 300, 200, 0.35, generator).float()
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 200).all()
    area = height * width / 60_000
    assert 0.33 < float(area.min()) < 0.37
    assert float(area.max()) > 0.97
    assert float(area.mean()) == pytest.approx((0.35 + 1) / 2, abs=0.04)  # the largest that do not fit are cut
    ratio = (width / 200) / (height / 300)
    assert 0.7 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.4
    whole = random_boxes(50, 300, 200, 1.0, generator)
    assert float((whole[:, 2] * whole[:, 3] / 60_000).float().min()) > 0.7


def test_a_box_is_shown_where_it_lies_and_every_image_has_its_own() -> None:
    ramp = torch.arange(0, 240, dtype=torch.uint8)[None, :, None].expand(2, 240, 240)
    images = torch.stack([ramp[0], ramp[0].T, torch.zeros(240, 240, dtype=torch.uint8)], dim=-1).expand(2, 240, 240, 3)
    boxes = torch.tensor([[0, 0, 240, 240], [60, 120, 120, 60]])
    x = resized_crops(images, boxes, 24).float()
    assert x[0, 0, 0, 12] == pytest.approx(4.5, abs=2)  # rows of red, columns of green
    assert x[0, 0, -1, 12] == pytest.approx(234.5, abs=2)
    assert x[1, 0, 0, 12] == pytest.approx(62, abs=2)
    assert x[1, 0, -1, 12] == pytest.approx(177, abs=2)
    assert x[1, 1, 12, 0] == pytest.approx(121, abs=2)
    assert x[1, 1, 12, -1] == pytest.approx(178, abs=2)


def test_jitter_is_what_brightness_contrast_and_saturation_do_one_after_the_other() -> None:
    from torchvision.transforms.v2 import functional

    images = torch.randint(60, 190, (5, 9, 9, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    out = shown(images, seed=4, jitter=0.2)
    factors = 1 + 0.2 * (2 * torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) - 1)
    for i in range(5):
        x = images[i].permute(2, 0, 1).float() / 255
        x = functional.adjust_brightness(x, float(factors[0, i]))
        x = functional.adjust_contrast(x, float(factors[1, i]))
        x = functional.adjust_saturation(x, float(factors[2, i]))
        torch.testing.assert_close(out[i].permute(2, 0, 1) / 255, x, atol=0.01, rtol=0)


def test_erasing_replaces_rectangles_of_some_images_by_noise() -> None:
    x = erased(torch.zeros(400, 3, 20, 20), 0.5, torch.Generator().manual_seed(0))
    share = (x[:, 0] != 0).float().mean((1, 2))
    hit = share > 0
    assert 150 < int(hit.sum()) < 250
    assert 0.01 < float(share[hit].min()) < 0.05
    assert 0.2 < float(share[hit].max()) < 0.3
    box = (x[hit][0, 0] != 0).nonzero()
    (top, left), (bottom, right) = box.min(0).values, box.max(0).values
    assert len(box) == (bottom - top + 1) * (right - left + 1)
    assert float(x[hit].std(dim=(1, 2, 3)).max()) > 0.2


@pytest.mark.parametrize("config", [{"trivial": True}, {"randaugment": 9.0}])
def test_every_image_gets_operations_of_its_own(config: dict[str, Any]) -> None:
    """Before: sixteen images shared one pair of operations."""
    images = torch.randint(0, 256, (1, 12, 12, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    out = shown(images.expand(16, 12, 12, 3), **config)
    assert len({tuple(image.flatten().tolist()) for image in out}) > 8


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_images_and_targets_by_the_same_share(kind: str) -> None:
    x = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    mixed, targets = mix(x, torch.eye(2), TrialConfig(**{kind: 1.0}), 0.5, torch.Generator().manual_seed(1))
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
    boxes = [set(mix(x, torch.eye(2), config, 0.5, generator)[0].unique().tolist()) <= {0.0, 1.0} for _ in range(40)]
    assert 10 < sum(boxes) < 30


def test_mixing_ends_before_the_training_does() -> None:
    x = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    for progress, same in ((0.79, False), (0.8, True), (1.0, True)):
        mixed, _ = mix(x, torch.eye(2), TrialConfig(mixup=1.0), progress, torch.Generator().manual_seed(1))
        assert torch.equal(mixed, x) == same


def test_randaugment_changes_more_with_a_larger_magnitude() -> None:
    images = torch.randint(0, 256, (64, 12, 12, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)

    def change(magnitude: float) -> float:
        return float((shown(images, randaugment=magnitude) - images.float()).abs().mean())

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
