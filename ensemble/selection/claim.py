"""What an ensemble is worth on images that nobody has looked at, and how sure that is.

A score on the rows that an ensemble was chosen on flatters it: it is the best of many, and the more candidates and the
fewer rows, the more so. What is claimed is the score of the *whole procedure* instead (screening, temperatures, the
choice among options, weights), run again without each fold and scored on it: nested cross-validation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.selection.blend import Blend
from ensemble.selection.goal import Decision, Goal
from ensemble.selection.metrics import Z95, brier_scores, ece, log_losses
from ensemble.selection.options import SPREADS, Table, temperature_of

FOLDS, REPEATS = 5, 3
MANY_ROWS = 5000  # from here on the rows are dealt once: how the folds fall no longer matters, and each costs more
FEW_ROWS, MORE_FOLDS, FEWER_REPEATS = 200, 10, 2  # below that a fifth of the rows is missed
VARIANCE = 1.15
"""By how much cross-validation varies more than as many independent rows would: what is fitted without a fold differs
from what is fitted on all rows, and each fold took part in fitting for the others (Bates et al. 2023, "Cross-
validation: what does it estimate"). 0.9 to 1.15 in most cells of benchmarks/coverage.py."""
LEARNING = 0.5
"""The error falls with the number of images to learn from, to the power of minus 0.3 to 0.5 on most data (Hestness et
al. 2017, arXiv:1712.00409; Viering and Loog 2022)."""
Folds = list[list[np.ndarray]]
"""The rows (indices) of each fold, for each repeat."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Predictions for rows by what was fitted without them; R repeats of cross-validation.

    Attributes:
        labels: int64 (N,).
        ensemble: float32 (R, N, C), by the whole procedure.
        single: the same by the candidate that is most accurate on the other rows, or was named without any of these.
        calibrated: the same at a temperature that the other rows give it.
    """

    labels: np.ndarray
    ensemble: np.ndarray
    single: np.ndarray
    calibrated: np.ndarray


def deal(labels: np.ndarray, parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random row indices in `parts` parts of equal size (but for one row) and equal shares of every class."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [by_class[part::parts] for part in range(parts)]


def deal_folds(labels: np.ndarray, seed: int = 0) -> Folds:
    """The rows dealt into folds, repeatedly where there are few of them; empty for a single row."""
    n = len(labels)
    if n < 2:
        return []
    if n < FEW_ROWS:
        parts, repeats = min(MORE_FOLDS, n), FEWER_REPEATS
    else:
        parts, repeats = FOLDS, REPEATS if n < MANY_ROWS else 1
    return [deal(labels, parts, np.random.default_rng([seed, repeat])) for repeat in range(repeats)]


def leave_out(
    table: Table, folds: Folds, fit: Callable[[int, int], Blend], single: int | None = None
) -> HeldOut | None:
    """What a procedure predicts for every row without having seen it; None when nothing can be left out.

    fit: the blend that the procedure makes without folds[repeat][fold], from the two numbers. single: the candidate
    that was named best without these rows; None: the one that the other rows name.
    """
    if not folds:
        return None
    shape = (len(folds), len(table.labels), table.probs[0].shape[1])
    held_out = HeldOut(table.labels, *(np.empty(shape, np.float32) for _ in range(3)))
    for repeat, parts in enumerate(folds):
        for f, held in enumerate(parts):
            rows = np.setdiff1d(np.arange(len(table.labels)), held)
            alone = Blend(np.eye(1, len(table.probs), table.ranking(rows)[0] if single is None else single)[0])
            temperature = temperature_of(table.predict(alone, rows), table.labels[rows], SPREADS["wide"])
            calibrated = Blend(alone.weights, temperature=temperature)
            held_out.ensemble[repeat, held] = table.predict(fit(repeat, f), held)
            held_out.single[repeat, held] = table.predict(alone, held)
            held_out.calibrated[repeat, held] = table.predict(calibrated, held)
    return held_out


def score(
    probs: np.ndarray, labels: np.ndarray, goal: Goal | None = None, learned_from: float = 1.0,
    units: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy with its 95 % interval, log-loss, Brier score and calibration error of held-out probs (R, N, C).

    learned_from: share of its images, above 0 to 1, that each predicting network had of those that the final one has
    learned from. Below 1, for cross-fitted candidates, the accuracy is rather too low, and the interval reaches as much
    higher as the final network may be better. units: int (N,), the same for images that belong together, such as those
    of one patient: they are no independent looks, and so the interval is wider.

    Answers are those that the goal asks for, and where it is neither accuracy nor log-loss, `metric` is its score.
    """
    repeats, goal = len(probs), goal or Goal()
    decision = goal.decide(probs, labels)
    right = _right(probs, labels, decision)
    wider = VARIANCE * design_effect(right, units)
    more = {} if goal.is_scored else {"metric": goal.measure(probs, labels, decision, wider)}
    return more | {
        "accuracy": float(right.mean()),
        "interval": list(accuracy_interval(right, learned_from=learned_from, units=units)),
        "log_loss": float(np.mean([log_losses(p, labels).mean() for p in probs])),
        "brier": float(np.mean([brier_scores(p, labels).mean() for p in probs])),
        "ece": ece(probs.reshape(-1, probs.shape[2]), np.tile(labels, repeats)),
    }


def claim(
    held: HeldOut, goal: Goal | None = None, learned_from: float = 1.0, units: np.ndarray | None = None
) -> dict[str, Any]:
    """`score` of the ensemble, and `gain`: its accuracy (and metric) minus the best single candidate's."""
    goal = goal or Goal()
    own, alone = (goal.decide(probs, held.labels) for probs in (held.ensemble, held.single))
    difference = _right(held.ensemble, held.labels, own) - _right(held.single, held.labels, alone)
    gain: dict[str, Any] = {
        "accuracy": float(difference.mean()),
        "interval": list(paired_interval(difference, units=units)),
    }
    if not goal.is_scored:
        wider = VARIANCE * design_effect(difference, units)
        gain["metric"] = goal.measure(held.ensemble, held.labels, own, wider, minus=(held.single, alone))
    return score(held.ensemble, held.labels, goal, learned_from, units) | {"gain": gain}


def accuracy_interval(
    right: np.ndarray, z: float = Z95, learned_from: float = 1.0, units: np.ndarray | None = None
) -> tuple[float, float]:
    """Interval of the accuracy from how often each row is right, held out: (N,) in 0 to 1.

    Wilson's (1927) for a number of rows that is lower by VARIANCE, and by the design effect of units. learned_from,
    units: see `score`.
    """
    n, p = len(right) / VARIANCE / design_effect(right, units), float(right.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    high = min(1.0, centre + half)
    return max(0.0, centre - half), 1 - (1 - high) * learned_from**LEARNING


def paired_interval(difference: np.ndarray, z: float = Z95, units: np.ndarray | None = None) -> tuple[float, float]:
    """Interval of the mean of differences of being right, (N,) in -1 to 1. units: see `score`.

    One row is added to those that only the one and to those that only the other gets right, because without it few
    differences look like certainty. Source: Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference
    of Binomial Proportions Based on Paired Data".
    """
    n = len(difference) + 2
    won, lost = (np.maximum(difference, 0).sum() + 1) / n, (np.maximum(-difference, 0).sum() + 1) / n
    half = z * math.sqrt(VARIANCE * design_effect(difference, units) * (won + lost - (won - lost) ** 2) / n)
    return max(-1.0, float(won - lost) - half), min(1.0, float(won - lost) + half)


def design_effect(values: np.ndarray, units: np.ndarray | None) -> float:
    """By how much more the mean of these values, (N,), varies than that of as many independent rows; at least 1.

    units: int (N,), the same for rows that belong together; None: every row is alone. Where the values are all alike,
    rows of a unit count as one. Source: Kish 1965, "Survey Sampling"; the variance is that of a ratio estimator, over
    units (Cochran 1977, 6.3).
    """
    if units is None or len(values) < 2:
        return 1.0
    _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
    largest = float((sizes**2).sum() / len(values))  # that of rows which are equal within every unit
    off = np.asarray(values, np.float64) - np.mean(values)
    if not off.any() or len(sizes) < 2:
        return largest
    sums = np.bincount(unit, weights=off)
    found = (sums @ sums) * len(sizes) / (len(sizes) - 1) / (off @ off)
    return float(min(max(1.0, found), largest))


def _right(probs: np.ndarray, labels: np.ndarray, decision: Decision) -> np.ndarray:
    """How often each row is right over the repeats, float64 (N,)."""
    return np.mean([decision.answers(p) == labels for p in probs], axis=0)
