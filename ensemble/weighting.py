"""Selectors that fit weights by optimisation instead of counting: convex log-loss, and CMA-ES with rounding.

The same contract as ensemble.selection: `f(probs, labels, limits, ...) -> weights (M,)`.
"""

import math

import numpy as np

from ensemble.ensemble import Probs, combine
from ensemble.limits import Limits
from ensemble.metrics import SCORES
from ensemble.scorers import true_probs
from ensemble.selection import NINE, Score, not_worse, scorer, trim
from trainables.errors import UserError


def convex(probs: Probs, labels: np.ndarray, limits: Limits = NINE, iterations: int = 300) -> np.ndarray:
    """The weights that minimise the average's log-loss, which is a convex problem.

    When more candidates have weight than the limits admit, the lightest half of the surplus goes and the rest is fitted
    again, until the limits hold: dropping all at once would drop what others replace.
    """
    true = true_probs(probs, labels)
    order = np.argsort(-np.log(true).sum(axis=1), kind="stable")
    weights = mixture_weights(true, iterations=iterations)
    while True:
        kept = trim(weights, limits, order)
        surplus = np.flatnonzero((weights > 0) & (kept == 0))
        if not len(surplus):
            break
        lightest = surplus[np.argsort(weights[surplus], kind="stable")][: -(-len(surplus) // 2)]
        support = np.flatnonzero((weights > 0) | (kept > 0))
        support = np.setdiff1d(support, lightest)
        weights = np.zeros(len(true))
        weights[support] = mixture_weights(true[support], iterations=iterations)
    return not_worse(kept, probs, labels, limits, "log_loss")


def mixture_weights(true: np.ndarray, iterations: int = 300, tolerance: float = 1e-7) -> np.ndarray:
    """Weights (M,) of the mixture with the highest likelihood, by expectation maximisation, for true (M, N).

    Every step multiplies a weight by the mean of p_m / mixture, which is 1 at the optimum and below 1 for what the
    optimum leaves out. The step is over-relaxed (raised to a power that grows while that helps), and candidates on
    their way to 0 are dropped. Stops when max(factor) - 1, which bounds what is left to gain, is below `tolerance`.

    Source: Dempster, Laird and Rubin 1977, section 4.3.
    """
    models, n = true.shape
    alive = np.arange(models)
    weights = np.full(models, 1 / models)
    power = 1.0
    matrix = true
    mixture = weights @ matrix
    loss = -np.log(mixture).mean()
    for step in range(1, iterations + 1):
        factor = matrix @ (1 / mixture) / n
        if factor.max() - 1 < tolerance:
            break
        moved = weights * factor**power
        moved /= moved.sum()
        mixed = moved @ matrix
        moved_loss = -np.log(mixed).mean()
        if moved_loss > loss and power > 1:  # over-relaxed too far; the plain step never makes it worse
            power = 1.0
            continue
        weights, mixture, loss = moved, mixed, moved_loss
        power = min(power * 1.5, 20.0)
        fading = (weights < 1e-3 / models) & (factor < 1)
        if step % 10 == 0 and fading.any():
            alive, weights, matrix = alive[~fading], weights[~fading], matrix[~fading]
            weights /= weights.sum()
            mixture = weights @ matrix
            loss = -np.log(mixture).mean()
    result = np.zeros(models)
    result[alive[weights >= 1e-4 * weights.max()]] = weights[weights >= 1e-4 * weights.max()]
    return result / result.sum()


def cmaes(
    probs: Probs,
    labels: np.ndarray,
    limits: Limits = NINE,
    score: Score = "log_loss",
    pool: int = 25,
    seed: int = 0,
    evaluations: int = 2000,
) -> np.ndarray:
    """Weights found by CMA-ES, evaluated and returned as whole numbers of votes.

    Rounding to 3 x limits.k votes is what keeps CMA-ES from fitting noise: differences too small to be one vote do not
    exist. Searches over the `pool` best singles.

    Source: Purucker and Beel 2023, "CMA-ES for Post Hoc Ensembling in AutoML"; needs the package `cma`.
    """
    try:
        import cma
    except ImportError:
        raise UserError("the selector cmaes needs the package cma; pip install cma") from None
    order = scorer(probs, labels, score).order
    quota = limits.quota(order)
    some = np.array([m for place, m in enumerate(order.tolist()) if place < pool or m in quota])
    inner = limits.subset(some)
    part = [np.asarray(probs[m]) for m in some.tolist()]
    ranking = np.arange(len(some))
    votes = 3 * min(limits.k, len(some))
    loss = SCORES[score]
    seen: dict[bytes, float] = {}

    def rounded(x: np.ndarray) -> np.ndarray:
        weights = np.clip(x, 0, None)
        if not weights.any():
            weights = np.exp(x - x.max())
        return whole_votes(trim(weights / weights.sum(), inner, ranking), votes)

    def objective(x: np.ndarray) -> float:
        weights = rounded(np.asarray(x))
        key = weights.tobytes()
        if key not in seen:
            seen[key] = loss(combine(part, weights), labels)
        return seen[key]

    start = np.zeros(len(some))
    start[0] = 1.0
    best = rounded(start)
    if len(some) > 1:
        options = {"seed": seed + 1, "maxfevals": evaluations, "verbose": -9, "verb_log": 0}
        found = cma.fmin2(objective, np.full(len(some), 1 / len(some)), 0.2, options)[0]
        best = min((best, rounded(np.asarray(found))), key=lambda w: loss(combine(part, w), labels))
    weights = np.zeros(len(probs))
    weights[some] = best
    return not_worse(weights, probs, labels, limits, score)


def whole_votes(weights: np.ndarray, votes: int) -> np.ndarray:
    """The nearest weights that are multiples of 1 / votes, by largest remainder; every member keeps one at least."""
    members = weights > 0
    if members.sum() >= votes:
        return members / members.sum()
    exact = weights * votes
    counts = np.where(members, np.maximum(np.floor(exact), 1), 0)
    while counts.sum() != votes:
        step = 1 if counts.sum() < votes else -1
        gap = np.where(members & ((step > 0) | (counts > 1)), step * (exact - counts), -math.inf)
        counts[np.argmax(gap)] += step
    return counts / votes
