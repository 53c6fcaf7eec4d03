"""What a report counts, against counting by hand and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from ensemble.report import diagnosis
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, ece, log_losses
from tests.ensemble.test_selection import make_pool


@pytest.fixture(scope="module")
def pool():
    return make_pool(6, 500, 5, 0)


def test_confusion_and_per_class_scores_are_scikit_learns(pool):
    probs, labels = pool[0][0], pool[1]
    answers = probs.argmax(1)
    matrix = diagnosis.confusion(probs.argmax(axis=1), labels, probs.shape[1])
    assert np.array_equal(matrix, confusion_matrix(labels, answers, labels=range(5)))
    rows = diagnosis.per_class(matrix, list("abcde"))
    expected = precision_recall_fscore_support(labels, answers, labels=range(5), zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [row[key] or 0 for row in rows] == pytest.approx(values)


def test_a_class_that_is_never_seen_or_never_called_has_no_precision():
    matrix = np.array([[3, 0, 0], [2, 0, 0], [0, 0, 0]])
    rows = diagnosis.per_class(matrix, list("abc"))
    assert [(row["precision"], row["recall"]) for row in rows] == [(0.6, 1.0), (None, 0.0), (None, None)]
    assert rows[2]["f1"] is None


def test_confused_pairs_come_in_order_and_add_up(pool):
    matrix = diagnosis.confusion(pool[0][0].argmax(axis=1), pool[1], pool[0][0].shape[1])
    pairs = diagnosis.confused_pairs(matrix)
    counts = [count for *_, count in pairs]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == matrix.sum() - np.trace(matrix)
    assert all(a != b and matrix[a, b] == count for a, b, count in pairs)
    assert diagnosis.confused_pairs(np.diag([3, 4])) == []


def test_confused_classes_are_those_of_the_most_frequent_mistakes():
    matrix = np.diag(np.full(50, 20))
    matrix[3, 40], matrix[40, 3], matrix[7, 8] = 9, 5, 7
    assert diagnosis.confused_classes(matrix, 4) == [3, 7, 8, 40]
    assert diagnosis.confused_classes(matrix, 3) == [3, 40]
    assert diagnosis.confused_classes(np.diag(np.full(50, 20)), 4) == [0, 1, 2, 3]
    assert diagnosis.confused_classes(matrix[:4, :4], 4) == [0, 1, 2, 3]


def test_the_worst_have_the_highest_loss(pool):
    probs, labels = pool[0][0], pool[1]
    worst = diagnosis.worst(probs, probs.argmax(axis=1), labels, 10)
    of_label = probs[np.arange(len(labels)), labels]
    assert [row["index"] for row in worst] == np.argsort(of_label, kind="stable")[:10].tolist()
    assert worst[0]["loss"] == pytest.approx(log_losses(probs, labels).max())


def test_calibration_sums_up_to_the_calibration_error(pool):
    probs, labels = pool[0][0], pool[1]
    bins = diagnosis.calibration(probs, labels)
    assert sum(b["images"] for b in bins) == len(labels)
    gaps = sum(b["images"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    assert gaps / len(labels) == pytest.approx(ece(probs, labels))
    assert all(b["low"] <= b["confidence"] <= b["high"] for b in bins)


def test_growth_begins_with_the_first_model_and_is_not_fitted_to_what_it_scores(pool):
    probs, labels = pool
    points = diagnosis.growth(probs, labels, Limits(k=3))
    assert [point["candidates"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert points[0]["accuracy"] == pytest.approx(accuracy(probs[0], labels))
    assert all(point["members"] <= 3 for point in points)
    # models of pure noise: what is fitted to 40 rows of them looks better than it is, this must not
    rng = np.random.default_rng(0)
    noise = rng.dirichlet(np.ones(2), (200, 40)).astype(np.float32)
    coin = rng.integers(0, 2, 40)
    best = max(accuracy(p, coin) for p in noise)
    assert best > 0.7
    assert diagnosis.growth(noise, coin, Limits())[-1]["accuracy"] < 0.7


def test_growth_of_many_candidates_has_few_points(pool):
    probs = np.repeat(np.stack(pool[0]), 20, axis=0)
    points = diagnosis.growth(probs, pool[1], Limits(), steps=7)
    assert len(points) == 7
    assert points[-1]["candidates"] == len(probs)


def test_a_member_is_named_for_the_classes_that_it_fixes():
    labels = np.array([0, 0, 1, 1, 2])
    right = np.eye(3)[labels]
    alone = np.eye(3)[[1, 1, 1, 0, 2]]  # wrong on rows 0, 1 and 3
    member = np.eye(3)[[0, 0, 1, 2, 2]]  # right on rows 0 and 1 of these
    assert diagnosis.fixed_classes(right, alone, member, labels, list("abc")) == [{"class": "a", "images": 2}]
