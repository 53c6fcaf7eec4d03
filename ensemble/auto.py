"""The selector that chooses the selector, by cross-validation inside the select split.

Measured on held-out halves, greedy selection on the Brier score is the best of the selectors that answer with weights,
so that is where `auto` starts. Cross-validation decides whether fewer members or another selector are better by more
than noise, and whether an ensemble is worth it at all.

The Brier score is a quadratic form in the weights, and what it needs (see Moments) adds up over rows. Once known for
twenty blocks of rows, it is known for every training part of every fold, and selecting and scoring there needs no
predictions: cross-validating a greedy selection costs less than reading the files.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemble.blend import Probs, combine
from ensemble.limits import Limits
from ensemble.metrics import accuracy, brier, log_loss
from ensemble.scorers import Brier, LogLoss, true_probs
from ensemble.selection import NINE, best_single, greedy, grow, uniform_from

BLOCKS = 20  # parts of the rows that are kept apart; their spread gives the standard errors
FOLDS = 5
REPEATS = 2  # times that the blocks are dealt anew into folds
SIZES = (3, 5)  # member counts tried below limits.k
FEWEST_ROWS = 2 * BLOCKS  # below that nothing can be told from cross-validation
CELLS = 2**24  # predictions that are worked on at once: 64 MiB
SINGLE = ("best_single", 1)
POOL = 400  # best candidates that cross-validation looks at; more only cost memory (M^2 per block)


@dataclass(frozen=True)
class Option:
    """One way to select. Losses are mean held-out Brier scores, `error` the standard error of loss minus the best's."""

    selector: str
    k: int
    loss: float
    error: float


@dataclass(frozen=True, eq=False)
class Choice:
    """What auto chose, and why.

    Attributes:
        weights: float64 (M,), as any selector's.
        selector, k: the option that won, "best_single" when no ensemble was worth it.
        cross_validated: accuracy, log_loss and brier of that option on rows that it was not fitted on; {} when there
            were too few rows to cross-validate.
        fitted: the same on the rows that it was fitted on. The difference is the optimism.
        options: all that was compared.
    """

    weights: np.ndarray
    selector: str
    k: int
    cross_validated: dict[str, float]
    fitted: dict[str, float]
    options: tuple[Option, ...]

    def report(self) -> dict[str, Any]:
        """Everything but the weights as plain JSON."""
        return {
            "selector": self.selector,
            "k": self.k,
            "cross_validated": self.cross_validated,
            "fitted": self.fitted,
            "options": [asdict(option) for option in self.options],
        }


@dataclass(frozen=True, eq=False)
class Moments:
    """All that the Brier score of any average of M models depends on; of two sets of rows they add up.

    Attributes:
        gram: float64 (M, M), inner products of the models' predictions.
        true: float64 (M,), sums of the probabilities of the labels.
        right: float64 (M,), rows that each model gets right.
        rows: their number.
    """

    gram: np.ndarray
    true: np.ndarray
    right: np.ndarray
    rows: float

    @classmethod
    def of(cls, probs: Probs, labels: np.ndarray, rows: np.ndarray) -> "Moments":
        """Of some rows (indices) of the predictions."""
        models, classes = len(probs), probs[0].shape[1]
        gram, true, right = np.zeros((models, models)), np.zeros(models), np.zeros(models)
        step = max(1, CELLS // (models * classes))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            part = np.stack([np.asarray(p[some], np.float32) for p in probs])
            flat = part.reshape(models, -1)
            gram += flat @ flat.T
            true += part[:, np.arange(len(some)), labels[some]].sum(axis=1, dtype=np.float64)
            right += (part.argmax(axis=2) == labels[some]).sum(axis=1)
        return cls(gram, true, right, len(rows))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram + other.gram, self.true + other.true, self.right + other.right, self.rows + other.rows)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.gram - other.gram, self.true - other.true, self.right - other.right, self.rows - other.rows)

    def first(self, count: int) -> "Moments":
        """Of the first so many models alone."""
        return Moments(self.gram[:count, :count], self.true[:count], self.right[:count], self.rows)

    def scorer(self) -> Brier:
        """A fresh scorer for the greedy selector."""
        return Brier(self.gram.diagonal(), self.true, self.rows, lambda m: self.gram[m])

    def loss(self, weights: np.ndarray) -> float:
        """Brier score of the average with these weights (M,)."""
        members = np.flatnonzero(weights)
        w = weights[members]
        return float((w @ self.gram[np.ix_(members, members)] @ w - 2 * w @ self.true[members]) / self.rows + 1)


def auto(probs: Probs, labels: np.ndarray, limits: Limits = NINE, seed: int = 0) -> np.ndarray:
    """The weights of `choose_selector`, for whoever wants a selector like the others."""
    return choose_selector(probs, labels, limits, seed).weights


def choose_selector(probs: Probs, labels: np.ndarray, limits: Limits = NINE, seed: int = 0) -> Choice:
    """Choose selector and size by repeated cross-validation on these rows, then fit it on all of them.

    Greedy on the Brier score with up to limits.k members is the default. Fewer members (SIZES) or another selector
    replace it only where their held-out Brier score is lower by more than one standard error; and where the winner is
    not better by that much than the most accurate single candidate, the single one is the answer (unless
    limits.min_per_group forbids it). To prefer fewer members already when they are *not worse* by a standard error cost
    0.1 to 0.3 points of accuracy on the pools of benchmarks/selection_quality.py.

    Deterministic for a seed, which deals the rows into folds. Rows below FEWEST_ROWS: the best single candidate.
    """
    if len(labels) < FEWEST_ROWS or len(probs) == 1:
        if limits.min_per_group:
            return _chosen(greedy(probs, labels, limits, "brier"), "greedy_brier", limits.k, {}, probs, labels, ())
        return _chosen(best_single(probs, labels, limits, "accuracy"), *SINGLE, {}, probs, labels, ())

    some = _pool(probs, labels, limits)
    part, inner = [probs[m] for m in some.tolist()], limits.subset(some)
    blocks = deal(labels, BLOCKS, seed)
    validation = _Validation([Moments.of(part, labels, rows) for rows in blocks], blocks, inner, part, labels)
    least = inner.min_per_group * len(np.unique(inner.groups)) if inner.groups is not None else 1
    default = ("greedy_brier", inner.k)
    others = [("greedy_brier", k) for k in SIZES if least <= k < inner.k] + [("uniform", inner.k), ("greedy", inner.k)]
    losses = {option: validation.losses(*option, seed) for option in (default, *others, SINGLE)}
    best = min(
        (option for option in others if _better(losses[option], losses[default])),
        key=lambda option: losses[option].mean(),
        default=default,
    )
    if not inner.min_per_group and not _better(losses[best], losses[SINGLE]):
        best = SINGLE

    options = []
    for (name, k), loss in losses.items():
        difference = loss - losses[best]
        options.append(Option(name, k, float(loss.mean()), _standard_error(difference)))
    weights = np.zeros(len(probs))
    weights[some] = validation.fit(*best, held=())
    held_out = validation.scores(*best, seed)
    return _chosen(weights, *best, held_out, probs, labels, tuple(options))


class _Validation:
    """Fits options on some blocks of rows and scores them on the others."""

    def __init__(
        self, moments: list[Moments], blocks: list[np.ndarray], limits: Limits, probs: Probs, labels: np.ndarray
    ) -> None:
        self.moments, self.blocks, self.limits, self.probs, self.labels = moments, blocks, limits, probs, labels
        self.total = moments[0]
        for other in moments[1:]:
            self.total = self.total + other
        self.true = true_probs(probs, labels)
        self.fitted: dict[tuple[str, int, tuple[int, ...]], np.ndarray] = {}

    def fit(self, selector: str, k: int, held: tuple[int, ...]) -> np.ndarray:
        """Weights (M,) from all blocks but the held ones."""
        key = (selector, k, held)
        if key not in self.fitted:
            self.fitted[key] = self._fit(selector, k, held)
        return self.fitted[key]

    def _fit(self, selector: str, k: int, held: tuple[int, ...]) -> np.ndarray:
        limits = self.limits.at_most(k)
        if selector == "greedy":
            rows = np.concatenate([block for b, block in enumerate(self.blocks) if b not in held])
            return grow(LogLoss(self.true[:, np.sort(rows)]), limits)
        seen = self.total
        for b in held:
            seen = seen - self.moments[b]
        if selector == "greedy_brier":
            return grow(seen.scorer(), limits)
        if selector == "uniform":
            return uniform_from(seen.scorer(), limits)
        order = np.lexsort((seen.scorer().singles, -seen.right))
        fits = limits.allowed(np.zeros(len(order), bool))
        weights = np.zeros(len(order))
        weights[next(m for m in order if fits[m])] = 1.0
        return weights

    def losses(self, selector: str, k: int, seed: int) -> np.ndarray:
        """Held-out Brier score of every block, averaged over the repeats, (BLOCKS,)."""
        total = np.zeros(len(self.blocks))
        for held in _folds(len(self.blocks), seed):
            weights = self.fit(selector, k, held)
            for b in held:
                total[b] += self.moments[b].loss(weights) / REPEATS
        return total

    def scores(self, selector: str, k: int, seed: int) -> dict[str, float]:
        """Held-out accuracy, log-loss and Brier score, averaged over rows and repeats."""
        total = np.zeros(3)
        for held in _folds(len(self.blocks), seed):
            rows = np.concatenate([self.blocks[b] for b in held])
            weights = self.fit(selector, k, held)
            members = np.flatnonzero(weights)
            average = combine([np.asarray(self.probs[m][rows]) for m in members.tolist()], weights[members])
            labels = self.labels[rows]
            scores = accuracy(average, labels), log_loss(average, labels), brier(average, labels)
            total += len(rows) * np.array(scores)
        mean = total / (REPEATS * len(self.labels))
        return {"accuracy": float(mean[0]), "log_loss": float(mean[1]), "brier": float(mean[2])}


def deal(labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """Random row indices in `parts` parts of equal size (but for one row) and equal shares of every class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [by_class[part::parts] for part in range(parts)]


def _folds(blocks: int, seed: int) -> list[tuple[int, ...]]:
    """The held-out blocks of every fold of every repeat."""
    rng = np.random.default_rng(seed + 1)
    dealt = [rng.permutation(blocks) for _ in range(REPEATS)]
    return [tuple(sorted(int(b) for b in order[fold::FOLDS])) for order in dealt for fold in range(FOLDS)]


def _pool(probs: Probs, labels: np.ndarray, limits: Limits) -> np.ndarray:
    """The POOL best candidates on the Brier score, what a quota needs, and the most accurate one, as sorted indices."""
    if len(probs) <= POOL:
        return np.arange(len(probs))
    order = np.argsort([brier(np.asarray(p), labels) for p in probs], kind="stable")
    single = np.flatnonzero(best_single(probs, labels, limits, "accuracy"))
    return np.unique(np.concatenate([order[:POOL], limits.quota(order), single]).astype(np.int64))


def _better(losses: np.ndarray, others: np.ndarray) -> bool:
    """Whether losses (BLOCKS,) are lower than others by more than the standard error of the difference."""
    difference = others - losses
    return bool(difference.mean() > _standard_error(difference))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _chosen(
    weights: np.ndarray,
    selector: str,
    k: int,
    cross_validated: dict[str, float],
    probs: Probs,
    labels: np.ndarray,
    options: tuple[Option, ...],
) -> Choice:
    average = combine(probs, weights)
    fitted = {
        "accuracy": accuracy(average, labels),
        "log_loss": log_loss(average, labels),
        "brier": brier(average, labels),
    }
    return Choice(weights, selector, k, cross_validated, fitted, options)
