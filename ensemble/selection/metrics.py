"""How good predictions are, and how sure one can be of it. numpy only; nothing here is slow to import.

Everywhere: probs is float (N, C), rows sum to 1; labels is int (N,) in 0..C-1; accuracy is better when higher,
log-loss, Brier score and calibration error when lower.
"""

import math
from collections.abc import Callable

import numpy as np

FLOOR = 1e-7
"""Every probability p counts as FLOOR + (1 - FLOOR) p in a log-loss: one confident mistake costs 16, not infinity.

Because this map is linear, flooring members and averaging them is the same as averaging and then flooring.
"""

Z95 = 1.959963984540054


def correct(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which rows are right, bool (N,); the lowest class wins a tie."""
    return np.argmax(probs, axis=1) == labels


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of rows whose most probable class is the label, 0 to 1."""
    return float(correct(probs, labels).mean())


def balanced_accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall of the classes that there are rows of, 0 to 1: a rare class counts as much as a frequent one."""
    return mean_recall(np.argmax(probs, axis=1), labels)


def mean_recall(answers: np.ndarray, labels: np.ndarray) -> float:
    """Of answers int (N,): the mean share of right ones of the classes that there are rows of, 0 to 1."""
    right, rows = np.bincount(labels, weights=answers == labels), np.bincount(labels)
    return float((right[rows > 0] / rows[rows > 0]).mean())


def macro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    """Of answers int (N,): the mean F1 of the classes that occur among answers or labels, 0 to 1."""
    classes = 1 + max(int(answers.max()), int(labels.max()))
    both = np.bincount(labels[answers == labels], minlength=classes)
    either = np.bincount(answers, minlength=classes) + np.bincount(labels, minlength=classes)
    return float((2 * both[either > 0] / either[either > 0]).mean())


def auroc(probs: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, 0 to 1: the mean over classes of each against all others ("one versus rest", macro).

    The share of pairs of a row of the class and one of another in which the first has the higher probability; equal
    ones count half (Mann and Whitney 1947). Classes that all rows or none are of are left out; 0.5 without any other.
    """
    areas = []
    for c in np.unique(labels):
        values, of, counts = np.unique(probs[:, c], return_inverse=True, return_counts=True)
        mine = np.bincount(of[labels == c], minlength=len(values))
        others = counts - mine
        if others.sum():
            below = np.cumsum(others) - others
            areas.append(float((mine * (below + others / 2)).sum() / (mine.sum() * others.sum())))
    return float(np.mean(areas)) if areas else 0.5


def true_class(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The floored probability of each row's label, float64 (N,), FLOOR to 1.

    Rounding may have left it a little below 0, which a pool lets pass: that counts as 0.
    """
    return FLOOR + (1 - FLOOR) * np.maximum(probs[np.arange(len(labels)), labels].astype(np.float64), 0.0)


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every row in nats, float64 (N,)."""
    return -np.log(true_class(probs, labels))


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, 0 to 16.2 (see FLOOR)."""
    return float(log_losses(probs, labels).mean())


def brier_scores(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance of every row to its one-hot label, float64 (N,), 0 to 2."""
    probs = probs.astype(np.float64)
    return np.einsum("nc,nc->n", probs, probs) - 2 * probs[np.arange(len(labels)), labels] + 1


def brier(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `brier_scores` (Brier 1950, the multi-class form), 0 to 2."""
    return float(brier_scores(probs, labels).mean())


def ece(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error, 0 to 1: |accuracy - confidence| averaged over equal-width bins of confidence.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(bin_of, weights=correct(probs, labels) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a fraction `right` of `n`, 95 % by default (Wilson 1927); near 0 and 1 p +- 1.96 s is wrong."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: np.ndarray, z: float = Z95) -> tuple[float, float]:
    """Interval of the mean of values (N,) from its standard error, for scores that are not fractions."""
    half = z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()) - half, float(values.mean()) + half


def clearly_lower(losses: np.ndarray, others: np.ndarray) -> bool:
    """Whether losses (N,) are lower than others of the same rows by more than the standard error of the difference."""
    difference = others - losses
    return bool(difference.mean() > standard_error(difference))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values (N,); 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over the same rows with its 95 % percentile interval: (mean, low, high).

    a, b: one score a row, (N,), e.g. `correct` of two models, or their `log_losses`. Rows are drawn with replacement;
    pairing keeps what both models find hard out of the interval (Efron and Tibshirani 1993, chapter 8).
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    rng = np.random.default_rng(seed)
    n = len(difference)
    values, counts = np.unique(difference, return_counts=True)
    if len(values) <= 3:  # differences of correctness are -1, 0 or 1: draw how often each came, not which rows
        means = rng.multinomial(n, counts / n, size=draws) @ values / n
    else:
        means = np.array([difference[rng.integers(0, n, n)].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> float:
    """Exact two-sided p that two classifiers err equally often, from the rows where one is right (McNemar 1947)."""
    only_a = int((a_right & ~b_right).sum())
    only_b = int((b_right & ~a_right).sum())
    n = only_a + only_b
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(min(only_a, only_b) + 1)]
    return min(1.0, 2 * sum(math.exp(x - n * math.log(2)) for x in logs))


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "log_loss": log_loss,
    "brier": brier,
    "accuracy": lambda probs, labels: -accuracy(probs, labels),
}
"""What a selector may minimise: f(probs, labels) -> loss. Accuracy is negated so that smaller is better throughout."""
