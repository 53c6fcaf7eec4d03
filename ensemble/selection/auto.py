"""The selector that chooses how to select, by cross-validation inside the select split.

It averages in the one way that was found to be best on held-out halves. Every candidate gets its own temperature, so
that none has more say than it has earned, only because it is surer than the others. Greedy selection on the log-loss
finds members and weights. The average gets a temperature of its own, for an average of calibrated members is always too
unsure (pool first, then calibrate: Rahaman and Thiery 2021, "Uncertainty Quantification and Deep Ensembles").

Cross-validation decides whether fewer members or equal weights are better by more than noise, and whether an ensemble
is worth it at all.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ensemble.selection.blend import Blend, Probs, fit_temperature, scale
from ensemble.selection.folds import deal
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, brier, brier_scores, correct, log_loss, log_losses, true_class
from ensemble.selection.scorers import LogLoss
from ensemble.selection.selectors import NINE, best_single, greedy, grow, uniform_from

FOLDS = 5
REPEATS = 3  # times that the rows are dealt anew into folds
MANY_ROWS = 5000  # from here on once is enough: how the folds fall no longer matters, and each costs more
SIZES = (5, 3)  # member counts tried below limits.k
FEWEST_ROWS = 40  # below that nothing can be told from cross-validation
POOL = 100  # most accurate candidates that are looked at
SINGLE = ("best_single", 1)


@dataclass(frozen=True)
class Option:
    """One way to select. loss: mean held-out log-loss; error: standard error of its distance to the chosen one's."""

    selector: str
    k: int
    loss: float
    error: float


@dataclass(frozen=True, eq=False)
class Choice:
    """What auto chose, and why.

    Attributes:
        blend: of all M candidates: weights, temperatures, and the average's temperature.
        selector, k: the option that won, "best_single" when no ensemble was worth it.
        cross_validated: accuracy, log_loss and brier of that option on rows that it was not fitted on; {} when there
            were too few rows to cross-validate.
        fitted: the same on the rows that it was fitted on. The difference is the optimism.
        options: all that was compared.
    """

    blend: Blend
    selector: str
    k: int
    cross_validated: dict[str, float]
    fitted: dict[str, float]
    options: tuple[Option, ...]

    def report(self) -> dict[str, Any]:
        """Everything but the blend as plain JSON."""
        return {
            "selector": self.selector,
            "k": self.k,
            "cross_validated": self.cross_validated,
            "fitted": self.fitted,
            "options": [asdict(option) for option in self.options],
        }


def auto(probs: Probs, labels: np.ndarray, limits: Limits = NINE, seed: int = 0) -> Blend:
    """The blend of `choose_selector`, for whoever wants a selector like the others."""
    return choose_selector(probs, labels, limits, seed).blend


def choose_selector(probs: Probs, labels: np.ndarray, limits: Limits = NINE, seed: int = 0) -> Choice:
    """Choose selector and size by repeated cross-validation on these rows, then fit it on all of them.

    Greedy with up to limits.k members is the default. Fewer members (SIZES) or equal weights replace it only where
    their held-out log-loss is lower by more than one standard error; and where the winner is not better by that much
    than the most accurate single candidate, the single one is the answer (unless limits.min_per_group forbids it).
    To prefer fewer members already when they are *not worse* by a standard error cost 0.1 to 0.3 points of accuracy on
    the pools of benchmarks/selection_quality.py.

    Neither weights nor temperatures are ever scored on rows that they were fitted on. Deterministic for a seed, which
    deals the rows into folds. Rows below FEWEST_ROWS: the best single candidate.
    """
    if len(labels) < FEWEST_ROWS or len(probs) == 1:
        if limits.min_per_group:
            return _chosen(Blend(greedy(probs, labels, limits)), ("greedy", limits.k), {}, probs, labels, ())
        return _chosen(Blend(best_single(probs, labels, limits, "accuracy")), SINGLE, {}, probs, labels, ())

    right = np.stack([correct(np.asarray(p), labels) for p in probs])
    some = _pool(right.mean(axis=1), limits)
    part, inner = [probs[m] for m in some.tolist()], limits.subset(some)
    whole = _Tempered(part, labels, right[some], inner, np.arange(len(labels)))
    default, *others = _options(inner)
    held_out = _cross_validate(whole, [default, *others, SINGLE], seed)
    losses = {option: scores[1] for option, scores in held_out.items()}

    better = [option for option in others if _better(losses[option], losses[default])]
    best = min(better, key=lambda option: losses[option].mean(), default=default)
    blend = whole.fit(*best)
    alone = np.count_nonzero(blend.weights) == 1  # then it had better be the most accurate one
    if not inner.min_per_group and (alone or not _better(losses[best], losses[SINGLE])):
        best = SINGLE
        blend = whole.fit(*best)

    options = [Option(*option, float(x.mean()), _standard_error(x - losses[best])) for option, x in losses.items()]
    cross_validated = dict(zip(("accuracy", "log_loss", "brier"), held_out[best].mean(axis=1).tolist(), strict=True))
    weights, temperatures = np.zeros(len(probs)), np.ones(len(probs))
    weights[some], temperatures[some] = blend.weights, blend.temperatures
    blend = replace(blend, weights=weights, temperatures=temperatures)
    return _chosen(blend, best, cross_validated, probs, labels, tuple(options))


class _Tempered:
    """Candidates at the temperatures that are best for them on some rows, to be selected from on these rows."""

    def __init__(
        self,
        probs: Probs,
        labels: np.ndarray,
        right: np.ndarray,
        limits: Limits,
        rows: np.ndarray,
        start: np.ndarray | None = None,
    ) -> None:
        """probs, labels, and where each candidate is right (M, N): of all rows. rows: indices to fit on.

        start: (M,) temperatures close to the best.
        """
        self.probs, self.labels, self.right, self.limits, self.rows = probs, labels, right, limits, rows
        self.temperatures = np.ones(len(probs)) if start is None else start.copy()
        true, losses = np.empty((len(probs), len(rows))), np.empty(len(probs))
        for m, p in enumerate(probs):
            part, answers = np.take(p, rows, axis=0), labels[rows]
            losses[m] = log_loss(part, answers)
            self.temperatures[m] = fit_temperature(part, answers, self.temperatures[m])
            true[m] = true_class(scale(part, float(self.temperatures[m])), answers)
        self.scorer = LogLoss(true)
        self.most_accurate = np.lexsort((losses, -right[:, rows].mean(axis=1)))

    def on(self, rows: np.ndarray) -> "_Tempered":
        """The same candidates, fitted on these rows."""
        return _Tempered(self.probs, self.labels, self.right, self.limits, rows, self.temperatures)

    def fit(self, selector: str, k: int) -> Blend:
        """What an option finds on these rows."""
        limits = self.limits.at_most(k)
        if selector == "greedy":
            weights = grow(copy(self.scorer), limits)
        elif selector == "uniform":
            weights = uniform_from(copy(self.scorer), limits)
        else:
            fits = limits.allowed(np.zeros(len(self.temperatures), bool))
            weights = np.zeros(len(self.temperatures))
            weights[next(m for m in self.most_accurate if fits[m])] = 1.0
        blend = Blend(weights, self.temperatures)
        if np.count_nonzero(weights) == 1:
            return blend
        together = self.predict(blend, self.rows)
        return replace(blend, temperature=fit_temperature(together, self.labels[self.rows]))

    def predict(self, blend: Blend, rows: np.ndarray) -> np.ndarray:
        """A blend's predictions on any rows (indices), of which only the members' are read."""
        members = np.flatnonzero(blend.weights)
        return blend.only(members)([np.take(self.probs[m], rows, axis=0) for m in members.tolist()])


def _options(limits: Limits) -> list[tuple[str, int]]:
    """The ways to make an ensemble, the default first."""
    least = limits.min_per_group * len(np.unique(limits.groups)) if limits.groups is not None else 1
    smaller = [("greedy", k) for k in SIZES if least <= k < limits.k]
    return [("greedy", limits.k), *smaller, ("uniform", limits.k)]


def _cross_validate(whole: _Tempered, options: list[tuple[str, int]], seed: int) -> dict[tuple[str, int], np.ndarray]:
    """For each option and row whether it is right, its log-loss and its Brier score, as means over repeats: (3, N)."""
    labels = whole.labels
    scores = {option: np.zeros((3, len(labels))) for option in options}
    repeats = REPEATS if len(labels) < MANY_ROWS else 1
    for held in _folds(labels, repeats, seed):
        fold = whole.on(np.setdiff1d(whole.rows, held))
        for option in options:
            together, answers = fold.predict(fold.fit(*option), held), labels[held]
            found = correct(together, answers), log_losses(together, answers), brier_scores(together, answers)
            scores[option][:, held] += np.stack(found) / repeats
    return scores


def _folds(labels: np.ndarray, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """The rows (indices) that are held out, FOLDS times a repeat."""
    for repeat in range(repeats):
        yield from deal(labels, FOLDS, np.random.default_rng([seed, repeat]))


def _pool(accuracies: np.ndarray, limits: Limits) -> np.ndarray:
    """The POOL most accurate candidates and what a quota needs, as sorted indices.

    Accurate, because no temperature changes that. Under a budget everybody stays: a bad candidate may be all it buys.
    """
    if len(accuracies) <= POOL or limits.costs is not None:
        return np.arange(len(accuracies))
    order = np.argsort(-accuracies, kind="stable")
    return np.unique(np.concatenate([order[:POOL], limits.quota(order)]).astype(np.int64))


def _better(losses: np.ndarray, others: np.ndarray) -> bool:
    """Whether losses (N,) are lower than others by more than the standard error of the difference."""
    difference = others - losses
    return bool(difference.mean() > _standard_error(difference))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _chosen(
    blend: Blend,
    option: tuple[str, int],
    cross_validated: dict[str, float],
    probs: Probs,
    labels: np.ndarray,
    options: tuple[Option, ...],
) -> Choice:
    together = blend(probs)
    fitted = {
        "accuracy": accuracy(together, labels),
        "log_loss": log_loss(together, labels),
        "brier": brier(together, labels),
    }
    return Choice(blend, *option, cross_validated, fitted, options)
