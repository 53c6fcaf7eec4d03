"""The selector that fits weights by optimisation instead of counting: convex in the log-loss."""

import numpy as np

from ensemble.file import Probs
from ensemble.selection.limits import Limits
from ensemble.selection.scorers import true_probs
from ensemble.selection.selectors import NINE, not_worse, trim


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
