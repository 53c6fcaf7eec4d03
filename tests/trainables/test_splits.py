"""The splits: stratified, disjoint, the same for the same data and seed, and back from a run directory."""

import hashlib

import numpy as np
import pytest
from upath import UPath

from tests.trainables.test_data import Attack
from trainables.data.prepare import prepare
from trainables.data.splits import load_splits, make_splits, save_splits
from trainables.errors import UserError


@pytest.mark.parametrize("counts", [(9000, 5000, 1000), (1000, 500, 100)])
def test_splits_are_stratified_disjoint_and_whole(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    splits = make_splits(labels, "abc")
    assert splits.shared == (sum(counts) < 10_000)
    parts = [splits.train, splits.tune] + ([] if splits.shared else [splits.select])
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(splits.tune, splits.select) == splits.shared
    share = 0.2 if splits.shared else 0.1
    assert np.bincount(labels[splits.tune]).tolist() == [round(share * count) for count in counts]
    assert np.bincount(labels[splits.select]).tolist() == [round(share * count) for count in counts]


def test_splits_share_below_two_thousand_validation_images():
    assert make_splits(np.arange(9_990) % 10, "abc").shared
    assert not make_splits(np.arange(10_000) % 10, "abc").shared
    assert not make_splits(np.arange(4_000) % 10, "abc", tune=0.3, select=0.2).shared


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
    splits = make_splits(found.labels, found.fingerprint)
    content = b"".join(part.tobytes() for part in (splits.train, splits.tune, splits.select))
    assert hashlib.sha256(content).hexdigest()[:16] == "38b90890b7b2ef60"


@pytest.mark.parametrize("images", [300, 12_000])
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
        (np.array([0, 0, 0, 1, 1]), (0.1, 0.1), "fewer than two classes can be held out"),
        (np.array([0, 0, 0, 2, 2, 2]), (0.1, 0.1), "class 1 has 0 images"),
        (np.arange(60) % 2, (0.0, 0.1), "expected fractions above 0"),
        (np.arange(60) % 2, (0.5, 0.5), "together below 1"),
        (np.arange(6) % 2, (0.45, 0.45), "without train images"),
    ],
)
def test_impossible_splits(labels, fractions, message):
    with pytest.raises(UserError, match=message):
        make_splits(labels, "abc", 0, *fractions)
