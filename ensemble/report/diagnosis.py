"""Where an ensemble is right, where it errs, and how it came to be: what a report tells. Pure functions, numpy only.

Everywhere: probs is float (N, C), rows sum to 1; labels is int (N,) in 0..C-1. What is returned is plain JSON, but for
`confusion`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemble.selection.blend import Probs
from ensemble.selection.claim import accuracy_interval, deal_folds
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, correct, log_loss, log_losses, wilson
from ensemble.selection.options import GREEDY, Option, Table, screen

STEPS = 20  # points of the growth curve


def confusion(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class were called what, int64 (C, C): row the label, column the answer."""
    return np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)


def per_class(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every class of a `confusion`, 0 to 1; None where nothing was called so or is one."""
    rows = []
    for c, name in enumerate(classes):
        right, is_one, called = (int(x) for x in (matrix[c, c], matrix[c].sum(), matrix[:, c].sum()))
        rows.append(
            {
                "class": name,
                "images": is_one,
                "precision": right / called if called else None,
                "recall": right / is_one if is_one else None,
                "f1": 2 * right / (is_one + called) if is_one + called else None,
            }
        )
    return rows


def confused_pairs(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """(label, answer, images) of every mistake that was made in a `confusion`, the most frequent first."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return [(int(a), int(b), int(wrong[a, b])) for a, b in zip(*np.unravel_index(order, wrong.shape), strict=True)]


def confused_classes(matrix: np.ndarray, most: int) -> list[int]:
    """The classes of a `confusion`, at most so many, in their own order: those of the most frequent mistakes."""
    if len(matrix) <= most:
        return list(range(len(matrix)))
    chosen: list[int] = []
    for label, answer, _ in confused_pairs(matrix):
        added = [c for c in (label, answer) if c not in chosen]
        if len(chosen) + len(added) > most:
            break
        chosen += added
    return sorted(chosen) or list(range(most))


def worst(probs: np.ndarray, answers: np.ndarray, labels: np.ndarray, most: int) -> list[dict[str, Any]]:
    """The rows of the highest log-loss: index, label, answer, its confidence, the label's probability, the loss."""
    losses = log_losses(probs, labels)
    return [
        {
            "index": int(i),
            "label": int(labels[i]),
            "answer": int(answers[i]),
            "confidence": float(probs[i, answers[i]]),
            "of_label": float(probs[i, labels[i]]),
            "loss": float(losses[i]),
        }
        for i in np.argsort(-losses, kind="stable")[:most]
    ]


def calibration(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict[str, Any]]:
    """Accuracy by confidence in bins of equal width, those with images only: what `metrics.ece` sums up.

    Each: low and high end, images, mean confidence, accuracy with its 95 % interval.
    """
    confidence, right = probs.max(axis=1).astype(np.float64), correct(probs, labels)
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    rows = []
    for b in np.unique(bin_of).tolist():
        here = bin_of == b
        n, hits = int(here.sum()), int(right[here].sum())
        rows.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "images": n,
                "confidence": float(confidence[here].mean()),
                "accuracy": hits / n,
                "interval": list(wilson(hits, n)),
            }
        )
    return rows


def growth(
    probs: Probs, labels: np.ndarray, limits: Limits, option: Option = GREEDY, steps: int = STEPS
) -> list[dict[str, Any]]:
    """The ensemble as it grew: for each number of candidates so far, what an option (see options.py) makes of them.

    probs: M candidates in the order in which they came. Each fold of the rows is scored by what was chosen and fitted
    on the others, so the curve is not flattered by being fitted to what it is scored on. At most `steps` points, the
    first and the last among them: candidates, members (mean over folds), accuracy with its 95 % interval, log_loss.
    """
    if len(labels) < 2:
        return []
    table, everybody = Table(probs, labels, limits), np.arange(len(probs))
    held = deal_folds(labels)[0]
    folds = [table.on(np.setdiff1d(np.arange(len(labels)), rows), everybody) for rows in held]
    for fold in folds:
        fold.scorer(option.temperatures)  # once for all points
    points = []
    for count in np.unique(np.linspace(1, len(probs), min(steps, len(probs))).round().astype(int)).tolist():
        together = np.empty(probs[0].shape, np.float32)
        members = []
        for fold, rows in zip(folds, held, strict=True):
            known = fold.ranking[fold.ranking < count]
            blend = fold.among(screen(known, limits)).fit(option)
            members.append(np.count_nonzero(blend.weights))
            together[rows] = table.predict(blend, rows)
        points.append(
            {
                "candidates": count,
                "members": float(np.mean(members)),
                "accuracy": accuracy(together, labels),
                "interval": list(accuracy_interval(correct(together, labels))),
                "log_loss": log_loss(together, labels),
            }
        )
    return points


def fixed_classes(
    together: np.ndarray,
    alone: np.ndarray,
    member: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    most: int = 3,
) -> list[dict[str, Any]]:
    """The classes in which a member is right where the ensemble fixes an error of the best single model, most first."""
    fixed = correct(together, labels) & ~correct(alone, labels) & correct(member, labels)
    counts = np.bincount(labels[fixed], minlength=len(classes))
    order = np.argsort(-counts, kind="stable")[:most]
    return [{"class": classes[c], "images": int(counts[c])} for c in order.tolist() if counts[c]]
