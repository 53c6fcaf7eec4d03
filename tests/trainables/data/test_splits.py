"""The splits: stratified, disjoint, the same for the same data and seed, and back from a run directory."""

import hashlib

import numpy as np
import pytest
from upath import UPath

from tests.trainables.data.test_data import Attack
from trainables.data.prepare import prepare
from trainables.data.splits import load_splits, make_splits, save_splits, split_data
from trainables.errors import UserError


@pytest.mark.parametrize("counts", [(9000, 5000, 1000), (1000, 500, 100), (400, 190, 10)])
def test_splits_are_stratified_disjoint_and_whole(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    splits = make_splits(labels, "abc")
    assert not splits.shared
    assert not splits.folds
    assert splits.trainings == 1
    parts = [splits.train, splits.tune, splits.select]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.bincount(labels[splits.tune]).tolist() == [round(0.1 * count) for count in counts]
    assert np.bincount(labels[splits.select]).tolist() == [round(0.1 * count) for count in counts]


def test_too_few_images_to_set_aside_are_cross_fitted():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (400, 180, 2)))
    splits = make_splits(labels, "abc")
    everything = np.arange(582)
    assert all(np.array_equal(part, everything) for part in (splits.train, splits.tune, splits.select))
    assert splits.shared
    assert splits.trainings == 6
    assert np.array_equal(np.sort(np.concatenate(splits.folds)), everything)
    for number, held in enumerate(splits.folds):
        assert abs(np.bincount(labels[held], minlength=3) - np.array([80, 36, 0.4])).max() <= 1
        part = splits.without(number)
        assert np.array_equal(np.sort(np.concatenate([part.train, part.select])), everything)
        assert len(np.unique(labels[part.train])) == 3  # even of two images one is there to learn from
        assert not len(part.tune)
        assert np.array_equal(part.select, held)
    assert np.array_equal(splits.undivided().train, everything)
    assert not splits.undivided().folds


def test_splits_depend_on_seed_and_data_alone():
    labels = np.arange(12_000) % 7
    first, again, other = make_splits(labels, "abc"), make_splits(labels, "abc"), make_splits(labels, "abc", seed=1)
    for name in ("train", "tune", "select"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.tune, other.tune)
    fingerprints = [s.fingerprint for s in (first, again, other, make_splits(labels, "abd"))]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_the_default_splits_of_digits_never_move():
    """Published scores refer to them: whatever changes them must be noticed."""
    found = prepare("digits")
    splits = split_data(found)
    content = b"".join(part.tobytes() for part in (splits.train, splits.tune, splits.select))
    assert hashlib.sha256(content).hexdigest()[:16] == "044924e14a3b94db"


@pytest.mark.parametrize("images", [300, 2_000, 12_000])
def test_splits_come_back_from_a_run_directory(images, tmp_path):
    run = UPath(tmp_path)
    with pytest.raises(UserError, match="missing or damaged"):
        load_splits(run)
    made = make_splits(np.arange(images) % 3, "abc")
    save_splits(run, made)
    loaded = load_splits(run)
    for name in ("train", "tune", "select"):
        assert np.array_equal(getattr(loaded, name), getattr(made, name))
        assert getattr(loaded, name).dtype == np.int64
    assert (loaded.shared, loaded.fingerprint) == (made.shared, made.fingerprint)
    assert len(loaded.folds) == len(made.folds) == (5 if images == 300 else 0)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.folds, made.folds, strict=True))
    np.savez(tmp_path / "splits.npz", train=np.array([Attack()], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        load_splits(run)


def test_tiny_classes_are_in_every_split():
    labels = np.concatenate([np.zeros(20_000, np.int64), np.ones(3, np.int64)])
    splits = make_splits(labels, "abc")
    assert [int((labels[part] == 1).sum()) for part in (splits.train, splits.tune, splits.select)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "fractions", "message"),
    [
        (np.arange(8) % 2, (0.1, 0.1), "8 labelled images are too few .* at least 10"),
        (np.arange(900) // 898, (0.1, 0.1), "fewer than two classes can be held out"),
        (np.repeat([0, 2], 450), (0.1, 0.1), "class 1 has 0 images"),
        (np.arange(60) % 2, (0.0, 0.1), "expected fractions above 0"),
        (np.arange(60) % 2, (0.5, 0.5), "together below 1"),
        (np.arange(1200) // 1197, (0.6, 0.3), "without train images"),
    ],
)
def test_impossible_splits(labels, fractions, message):
    with pytest.raises(UserError, match=message):
        make_splits(labels, "abc", 0, *fractions)
