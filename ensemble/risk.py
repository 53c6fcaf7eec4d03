"""When an ensemble is unsure: sets of classes that hold the right one, and the confidence below which it may be wrong.

Both are set at a chosen risk on images that took no part in what predicts them (the held-out predictions of
ensemble/selection/claim.py), so they are about new images of the same kind.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.selection.goal import MOST_PROBABLE, Decision
from ensemble.selection.metrics import wilson

POINTS = 50  # of a curve
USUAL_RISK = 0.05


@dataclass(frozen=True)
class Risk:
    """Thresholds on an ensemble's probabilities.

    Attributes:
        level: the risk that they are set for, 0 to 1.
        in_set: classes of at least this probability make up an image's set, and the answer is always in it. The
            right class is outside the sets of at most `level` of new images (Sadinle, Lei and Wasserman 2019, "Least
            Ambiguous Set-Valued Classifiers with Bounded Error Levels"; split-conformal).
        sure: an answer of at least this confidence is sure. At most `level` of new images get an answer that is sure
            and wrong (Angelopoulos et al. 2022, "Conformal Risk Control"). Above 1 where nothing can be sure.
    """

    level: float
    in_set: float
    sure: float

    def __post_init__(self) -> None:
        for name in ("level", "in_set", "sure"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(f"risk has {name} {getattr(self, name)}")

    def sets(self, probs: np.ndarray, decision: Decision = MOST_PROBABLE) -> np.ndarray:
        """Which classes are in each image's set, bool (N, C), for probabilities (N, C) and how they become answers."""
        chosen: np.ndarray = probs >= self.in_set
        chosen[np.arange(len(probs)), decision.answers(probs)] = True
        return chosen

    def unsure(self, probs: np.ndarray, decision: Decision = MOST_PROBABLE) -> np.ndarray:
        """Which answers are unsure, bool (N,), for probabilities (N, C) and how they become answers."""
        unsure: np.ndarray = confidence(probs, decision) < self.sure
        return unsure


def confidence(probs: np.ndarray, decision: Decision = MOST_PROBABLE) -> np.ndarray:
    """The probability of each answer, (N,), for probabilities (N, C) and how they become answers."""
    return probs[np.arange(len(probs)), decision.answers(probs)]


def calibrate(
    probs: np.ndarray, labels: np.ndarray, level: float = USUAL_RISK, decision: Decision = MOST_PROBABLE
) -> Risk:
    """Thresholds for a risk, from held-out probs (R, N, C) of the same N images, R times over, and labels (N,).

    The extra image is the new one, taken to be a bad one: on a hundred images and less that matters. Choosing the
    threshold by the errors among the answers that are given instead breaks its promise: the lowest one that holds here
    holds by luck (9 % wrong for 5 % promised, on 200 images).
    """
    repeats, n, _ = probs.shape
    rank = math.ceil((n + 1) * (1 - level)) * repeats
    true = np.sort(probs[:, np.arange(n), labels].ravel())[::-1]
    in_set = float(true[rank - 1]) if rank <= len(true) else 0.0
    levels, wrong, _ = _by_confidence(probs, labels, decision)
    good = np.flatnonzero(wrong + 1 <= level * (n + 1))
    sure = float(levels[good[-1]]) if len(good) else 2.0
    return Risk(level, in_set, sure)


def measure(risk: Risk, probs: np.ndarray, labels: np.ndarray, decision: Decision = MOST_PROBABLE) -> dict[str, Any]:
    """How well the thresholds do on probs (R, N, C) of N images, as plain JSON; all but `set_size` are shares.

    `covered`: images whose set holds the label, with its 95 % `interval`; `set_size`: mean number of classes in a set;
    `answered`: images with a sure answer; `error`: wrong ones among these (None when there are none), and
    `curve`: (confidence, answered, error) triples for thresholds from the highest to the lowest.
    """
    flat, told = probs.reshape(-1, probs.shape[2]), np.tile(labels, len(probs))
    sets, sure = risk.sets(flat, decision), ~risk.unsure(flat, decision)
    covered = float(sets[np.arange(len(told)), told].mean())
    levels, wrong, answered = _by_confidence(probs, labels, decision)
    places = np.unique(np.linspace(0, len(levels) - 1, POINTS).round().astype(int))
    return {
        "covered": covered,
        "interval": list(wilson(round(covered * len(labels)), len(labels))),
        "set_size": float(sets.sum(axis=1).mean()),
        "answered": float(sure.mean()),
        "error": float((decision.answers(flat) != told)[sure].mean()) if sure.any() else None,
        "curve": [[float(levels[p]), float(answered[p] / len(labels)), float(wrong[p] / answered[p])] for p in places],
    }


def _by_confidence(
    probs: np.ndarray, labels: np.ndarray, decision: Decision
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each confidence that occurs, from the highest on; wrong images and images of at least it, as means of repeats."""
    repeats = len(probs)
    flat = probs.reshape(-1, probs.shape[2])
    levels = confidence(flat, decision)
    order = np.argsort(-levels, kind="stable")
    levels = levels[order]
    wrong = np.cumsum((decision.answers(flat) != np.tile(labels, repeats))[order]) / repeats
    last = np.append(np.diff(levels) != 0, True)  # of equal confidences: a threshold takes all of them or none
    return levels[last], wrong[last], (np.flatnonzero(last) + 1) / repeats
