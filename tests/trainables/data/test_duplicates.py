"""Planted twins are found, and different pictures are none."""

import io

import numpy as np
import pytest
from PIL import Image

from trainables.data.duplicates import Group, _blocks, find_groups, sign, twins_across


def pictures(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Different pictures with structure at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    images = np.zeros((n, side, side, 3))
    for cells in (2, 4, 8, 16):
        for i in range(n):
            field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            images[i] += np.asarray(field.resize((side, side), Image.Resampling.BICUBIC)) / 4
    return images.clip(0, 255).astype(np.uint8)


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image: np.ndarray, side: int) -> np.ndarray:
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BICUBIC))


CHANGES = {
    "exact": lambda image: image,
    "jpeg 75": lambda image: saved(image, 75),
    "jpeg 40": lambda image: saved(image, 40),
    "half the size": lambda image: resized(image, 16),
    "twice the size": lambda image: resized(image, 64),
    "darker": lambda image: (image * 0.7).astype(np.uint8),
    "brighter": lambda image: (image * 1.2).clip(0, 255).astype(np.uint8),
    "noise": lambda image: (image + np.random.default_rng(1).normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8),
    "mirrored": lambda image: image[:, ::-1],
    "mirrored jpeg": lambda image: saved(np.ascontiguousarray(image[:, ::-1]), 75),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(change):
    images = pictures(300)
    twin = CHANGES[change](images[17])
    groups = find_groups(sign(np.concatenate([images, twin[None]])))
    kind = "exact" if change == "exact" else "mirrored" if change.startswith("mirrored") else "near"
    assert groups == [Group((17, 300), kind)]


def test_scenes_that_share_only_a_horizon_are_not_twins():
    images = pictures(200).astype(np.float32) * 0.25
    images[:, :16] += 170  # a bright sky over a dark ground
    assert find_groups(sign(images.clip(0, 255).astype(np.uint8))) == []


def test_pictures_in_the_same_black_frame_are_not_twins():
    images = pictures(200)
    images[:, :5] = images[:, 27:] = 0
    assert find_groups(sign(images)) == []


def test_flat_pictures_are_compared_exactly_only():
    images = np.full((6, 32, 32, 3), 200, np.uint8)
    images[3:] += np.random.default_rng(0).integers(0, 2, (3, 32, 32, 3), dtype=np.uint8)
    assert find_groups(sign(images)) == [Group((0, 1, 2), "exact")]


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (33, 35), (5, 40)])
def test_any_shape_of_picture(shape):
    images = np.random.default_rng(0).integers(0, 256, (40, *shape, 3), dtype=np.uint8)
    images[30] = images[4]
    assert find_groups(sign(images)) == [Group((4, 30), "exact")]


def test_no_images_and_one_image():
    assert find_groups(sign(np.zeros((0, 32, 32, 3), np.uint8))) == []
    assert find_groups(sign(pictures(1))) == []


def test_a_thousand_copies_are_one_group():
    images = np.repeat(pictures(2), 600, axis=0)
    images[:600] = [(images[0] * factor).astype(np.uint8) for factor in np.linspace(0.6, 1, 600)]
    groups = find_groups(sign(images))
    assert [len(group.rows) for group in groups] == [600, 600]
    assert {group.kind for group in groups} == {"exact", "near"}


def test_signatures_do_not_depend_on_the_batch():
    images = pictures(30, side=40)
    apart = sign(images[:11]) + sign(images[11:])
    whole = sign(images)
    assert np.array_equal(apart.digests, whole.digests)
    np.testing.assert_allclose(apart.grey, whole.grey, rtol=1e-5)
    luminance = (images[:, 4:36, 4:36] @ np.array([0.299, 0.587, 0.114])).mean((1, 2))
    np.testing.assert_allclose(whole.brightness, luminance, rtol=1e-4)


def test_twins_are_counted_from_the_later_split():
    splits = np.array([0, 0, 1, 1, 2, 2])
    groups = [Group((0, 2, 4), "near"), Group((1, 3), "exact"), Group((4, 5), "exact")]
    assert twins_across(groups, splits, ["train", "tune", "select"]) == {
        ("tune", "train"): 2, ("select", "train"): 1, ("select", "tune"): 1,
    }  # fmt: skip


def test_a_large_set_is_searched_in_cells_and_the_same_is_found() -> None:
    """Above 100,000 images comparing all with all would take hours."""
    images = pictures(1500)
    twins = [change(images[50 * i + j]) for i, change in enumerate(CHANGES.values()) for j in range(50)]
    signatures = sign(np.concatenate([images, np.stack(twins)]))
    everything = find_groups(signatures)
    ticks: list[int] = []
    in_cells = find_groups(signatures, ticks.append, all_below=100)
    assert len(everything) == 500
    assert in_cells == everything
    assert sum(ticks) >= 1500


def test_cells_are_compared_far_less_often_than_all_with_all() -> None:
    vectors = np.random.default_rng(0).normal(size=(40_000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    compared = sum(len(some) * len(others) for some, others, _ in _blocks(vectors, vectors, all_below=0))
    assert compared < 0.2 * len(vectors) ** 2
