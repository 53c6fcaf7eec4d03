"""The loss of a growing average, and of every average that is one member larger, without recomputing what is known.

Three scorers of one shape (see Scorer). Each keeps the running sum of the chosen members' predictions and answers "what
would the loss be with one more of candidate m" for many m at once:

- LogLoss sees only each model's probability of the true class, so a step costs O(M N) instead of O(M N C).
- Brier is a quadratic form: it needs one product <p_m, p_j> per candidate and chosen member, computed once per member.
- Accuracy skips the rows that a candidate cannot change, which after a few members are most of them.
"""

from functools import cache
from typing import Protocol

import numpy as np

from ensemble.selection.blend import Probs, chunks
from ensemble.selection.metrics import true_class

FACTORS = 32  # of one product, of which a logarithm is taken
FEW = 16  # candidates that are cheaper to look at than to rule out


class Scorer(Protocol):
    """Loss of the average of the members added so far; members may be added again."""

    singles: np.ndarray  # (M,) the loss of each candidate alone
    order: np.ndarray  # (M,) candidates from best to worst single

    def losses(self, candidates: np.ndarray, best_only: bool = False) -> np.ndarray:
        """The loss after adding each of these candidates (indices), float64, same shape.

        best_only: infinity will do for candidates that are certainly not the best.
        """

    def ties(self, candidates: np.ndarray) -> np.ndarray:
        """A second loss after adding each of them, to choose among those that `losses` cannot tell apart."""

    def add(self, candidate: int) -> None:
        """Take one more copy of a candidate in."""


def true_probs(probs: Probs, labels: np.ndarray) -> np.ndarray:
    """Each model's floored probability of the true class, float64 (M, N): all that a mixture's log-loss depends on."""
    return np.stack([true_class(p, labels) for p in probs])


def log_sums(positive: np.ndarray) -> np.ndarray:
    """Sums of the logarithms along the last axis, whose length FACTORS divides.

    The sum is taken as the logarithm of products of 32 factors: each lies between 1e-7 and the number of members, so a
    product stays far inside float64, and 31 of 32 logarithms are saved.
    """
    products = np.multiply.reduce(positive.reshape(*positive.shape[:-1], FACTORS, -1), axis=-2)
    sums: np.ndarray = np.log(products).sum(axis=-1)
    return sums


class LogLoss:
    """Mean negative log-likelihood of the average."""

    def __init__(self, true: np.ndarray) -> None:
        """true: (M, N) as `true_probs` gives it."""
        models, self._n = true.shape
        width = -(-self._n // FACTORS) * FACTORS
        self._true = np.zeros((models, width))
        self._true[:, : self._n] = true
        self._sum = np.zeros(width)
        self._sum[self._n :] = 1.0  # the padding's factor is 1 at every step
        self._count = 0
        self._log_sum = 0.0
        self._rounded = true.astype(np.float32)
        self.singles = self.losses(np.arange(models))
        self.order = np.argsort(self.singles, kind="stable")

    @property
    def true(self) -> np.ndarray:
        """What it was made from, (M, N)."""
        return self._true[:, : self._n]

    def losses(self, candidates: np.ndarray, best_only: bool = False) -> np.ndarray:
        if not best_only or self._count == 0 or len(candidates) <= FEW:
            return self._exact(candidates)
        bounds = self._bounds(candidates)
        losses = np.full(len(candidates), np.inf)
        first = np.argpartition(bounds, FEW)[:FEW]
        losses[first] = self._exact(candidates[first])
        rest = np.flatnonzero((bounds <= losses.min()) & np.isinf(losses))
        losses[rest] = self._exact(candidates[rest])
        return losses

    def _bounds(self, candidates: np.ndarray) -> np.ndarray:
        """What the losses cannot fall below, by one matrix-vector product.

        log is concave, so it lies below its tangent. The tangent is taken where a candidate is as good as the average
        is now, which nearly all of them nearly are: after a few steps one in twenty is left to be looked at exactly.
        """
        # 1e-5 is the slack for float32, which halves what the product has to read.
        scale = self._count / (self._count + 1)
        slope = (scale / self._sum[: self._n]).astype(np.float32)
        gain = self._rounded @ slope if len(candidates) == len(self._rounded) else self._rounded[candidates] @ slope
        logs = self._log_sum - self._n * np.log(scale) + gain.astype(np.float64) * (1 + 1e-5) - self._n * (1 - scale)
        return np.log(self._count + 1) - logs / self._n

    def _exact(self, candidates: np.ndarray) -> np.ndarray:
        logs = np.empty(len(candidates))
        block = max(1, 2**17 // len(self._sum))  # about 1 MiB, so that a block stays in the cache
        for start in range(0, len(candidates), block):
            some = candidates[start : start + block]
            logs[start : start + block] = log_sums(self._true[some] + self._sum)
        return np.log(self._count + 1) - logs / self._n

    def ties(self, candidates: np.ndarray) -> np.ndarray:
        return np.zeros(len(candidates))

    def add(self, candidate: int) -> None:
        self._sum = self._sum + self._true[candidate]  # not in place: a copy of this scorer goes its own way
        self._count += 1
        self._log_sum = float(np.log(self._sum).sum())


class Brier:
    """Mean squared distance of the average to the one-hot label.

    It is a quadratic form in the weights, so products of predictions are all that is needed.
    """

    def __init__(self, probs: Probs, labels: np.ndarray) -> None:
        at = np.arange(len(labels)), labels
        self._n = len(labels)
        self._norms = np.array([_dot(p, p) for p in probs])  # (M,) sums of squares
        self._true = np.array([p[at].sum(dtype=np.float64) for p in probs])  # (M,) sums over the labels' probabilities
        # (M,) products of a member with everybody, computed when it first comes in
        self._products = cache(lambda m: np.array([_dot(p, probs[m]) for p in probs]))
        self._cross = np.zeros(len(probs))  # of the running sum with every candidate
        self._norm = self._label = 0.0  # of the running sum: squared length, and mass on the labels
        self._count = 0
        self.singles = self.losses(np.arange(len(probs)))
        self.order = np.argsort(self.singles, kind="stable")

    def losses(self, candidates: np.ndarray, best_only: bool = False) -> np.ndarray:
        size = self._count + 1
        norm = self._norm + 2 * self._cross[candidates] + self._norms[candidates]
        return (norm / size**2 - 2 * (self._label + self._true[candidates]) / size) / self._n + 1

    def ties(self, candidates: np.ndarray) -> np.ndarray:
        return np.zeros(len(candidates))

    def add(self, candidate: int) -> None:
        self._norm += 2 * self._cross[candidate] + self._norms[candidate]
        self._cross = self._cross + self._products(candidate)
        self._label += self._true[candidate]
        self._count += 1


class Accuracy:
    """Minus the accuracy of the average.

    A row that is right stays so unless a candidate puts some class above the label by as much as the label leads; one
    that is wrong stays so unless the candidate's label outweighs what the label lacks. Two numbers per candidate and
    row settle that for nearly all of them, and only for the rest are the C classes looked at.
    """

    def __init__(self, probs: Probs, labels: np.ndarray) -> None:
        self._probs, self._labels = [np.ascontiguousarray(p) for p in probs], labels  # take() would copy others
        n = len(labels)
        self._smooth = LogLoss(true_probs(self._probs, labels))
        at = np.arange(n), labels
        self._help = np.stack([p[at] for p in self._probs]).astype(np.float32)  # (M, N), what each can add to a label
        self._harm = np.empty_like(self._help)  # (M, N), by how much it puts its best class above the label
        right = np.zeros(len(probs), np.int64)
        for m, p in enumerate(self._probs):
            for rows in chunks(n):
                answers = p[rows].argmax(axis=1)
                right[m] += np.count_nonzero(answers == labels[rows])
                self._harm[m, rows] = p[rows][np.arange(len(answers)), answers] - self._help[m, rows]
        self.singles = -right / n
        self.order = np.lexsort((self._smooth.singles, self.singles))
        self._most_help, self._most_harm = self._help.max(axis=0), self._harm.max(axis=0)
        self._sum = np.zeros((n, probs[0].shape[1]))
        self._count = 0

    def losses(self, candidates: np.ndarray, best_only: bool = False) -> np.ndarray:
        if self._count == 0:
            return self.singles[candidates]
        is_right, margin = self._margins()
        right = np.full(len(candidates), np.count_nonzero(is_right))
        at_risk = np.flatnonzero(is_right & (self._most_harm >= margin))
        in_reach = np.flatnonzero(~is_right & (self._most_help >= margin))
        risk, reach = margin[at_risk], margin[in_reach]
        for i, m in enumerate(candidates.tolist()):
            lost = at_risk[self._harm[m].take(at_risk) >= risk]
            won = in_reach[self._help[m].take(in_reach) >= reach]
            right[i] += self._right_with(m, won) - (len(lost) - self._right_with(m, lost))
        return -right / len(self._labels)

    def _right_with(self, candidate: int, rows: np.ndarray) -> int:
        """How many of these rows are right after adding a candidate."""
        grown = self._sum.take(rows, axis=0) + self._probs[candidate].take(rows, axis=0)  # faster than indexing
        return int(np.count_nonzero(grown.argmax(axis=1) == self._labels[rows]))

    def ties(self, candidates: np.ndarray) -> np.ndarray:
        return self._smooth.losses(candidates)

    def add(self, candidate: int) -> None:
        self._smooth.add(candidate)
        self._sum += self._probs[candidate]
        self._count += 1

    def _margins(self) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are right now, and how far each is from changing: its label against the best other class.

        A little is taken off the distance, so that rounding and exact ties are left to argmax itself.
        """
        is_right, margin = np.empty(len(self._sum), bool), np.empty(len(self._sum), np.float32)
        for rows in chunks(len(self._sum)):
            part = self._sum[rows].copy()
            is_right[rows] = part.argmax(axis=1) == self._labels[rows]
            at = np.arange(len(part)), self._labels[rows]
            label = part[at]
            part[at] = -np.inf
            margin[rows] = np.abs(label - part.max(axis=1)) - 1e-5
        return is_right, margin


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """<a, b> of two (N, C), in float64 but for the products inside a chunk of rows."""
    return float(sum(np.vdot(a[rows], b[rows]) for rows in chunks(len(a))))
