"""The selectors: which candidates to average, and with what weights. Pure functions: arrays in, weights out.

Every selector is `f(probs, labels, limits, ...) -> weights`:

    probs   (M, N, C) float, rows sum to 1, or a sequence of M arrays (N, C) such as memory maps
    labels  (N,) int, 0..C-1
    limits  how many members, at what cost (ensemble.selection.limits)
    weights (M,) float64, non-negative, sum 1, at most limits.k of them above 0

None of them changes its input; all are deterministic for a seed. Candidates are expected in the order of their ids, for
"the first one" is how the last tie is broken.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ensemble.selection.blend import Probs, combine
from ensemble.selection.limits import NOTHING_FITS, Limits
from ensemble.selection.metrics import SCORES
from ensemble.selection.scorers import FACTORS, Accuracy, Brier, LogLoss, Scorer, log_sums, true_probs
from trainables.errors import UserError

Score = Literal["log_loss", "brier", "accuracy"]
NINE = Limits()
TOGETHER = 2**17  # numbers, about 1 MiB: what stays in the cache


def best_single(probs: Probs, labels: np.ndarray, limits: Limits = NINE, score: Score = "log_loss") -> np.ndarray:
    """All the weight on the candidate with the best score among those that fit the budgets."""
    return _one_hot(len(probs), _first_allowed(scorer(probs, labels, score), limits))


def greedy(
    probs: Probs,
    labels: np.ndarray,
    limits: Limits = NINE,
    score: Score = "log_loss",
    steps: int = 50,
) -> np.ndarray:
    """Add, with replacement, whichever candidate helps the average most; keep the best prefix.

    Args:
        score: what is minimised (accuracy: maximised). log_loss is smooth and overfits least.
        steps: most additions, so weights are multiples of 1 / steps or coarser.

    Ties go to an existing member, then to the lower log-loss, then to the first candidate.
    Source: Caruana et al. 2004, "Ensemble Selection from Libraries of Models".
    """
    return grow(scorer(probs, labels, score), limits, steps)


def grow(scorer: Scorer, limits: Limits = NINE, steps: int = 50) -> np.ndarray:
    """The greedy selector itself, over a scorer that nothing has been added to yet.

    What limits.min_per_group demands is in from the beginning.
    """
    counts = np.zeros(len(scorer.singles), np.int64)
    best_loss, best = np.inf, counts
    for m in limits.quota(scorer.order):
        best_loss = float(scorer.losses(np.array([m]))[0])
        scorer.add(int(m))
        counts[m] += 1
        best = counts.copy()
    allowed = np.flatnonzero(limits.allowed(counts > 0))
    for _ in range(int(counts.sum()), max(steps, 1)):
        losses = scorer.losses(allowed, best_only=True)
        lowest = float(losses.min())
        tied = allowed[losses == lowest]
        if len(tied) > 1:
            tied = tied[np.lexsort((scorer.ties(tied), counts[tied] == 0))]
        scorer.add(int(tied[0]))
        counts[tied[0]] += 1
        if counts[tied[0]] == 1:
            allowed = np.flatnonzero(limits.allowed(counts > 0))
        if lowest < best_loss:
            best_loss, best = lowest, counts.copy()
    return best / best.sum()


def grow_each(true: np.ndarray, draws: Sequence[tuple[np.ndarray, np.ndarray]], k: int, steps: int) -> list[np.ndarray]:
    """The greedy selector by log-loss on several draws, with at most k members each: weights over a draw's candidates.

    true: (M, N) as `true_probs` gives it. draws: candidates and rows (indices, rows may repeat), the same number of
    each in every draw. While they are small, draws grow together, for numpy's calls take longer than their work there.
    """
    models, n = len(draws[0][0]), len(draws[0][1])
    together = TOGETHER // (models * n)
    if together < 2:
        return [grow(LogLoss(true[np.ix_(*draw)]), Limits(k), steps) for draw in draws]
    parts = (draws[start : start + together] for start in range(0, len(draws), together))
    return [weights for part in parts for weights in _grow_together(true, part, k, steps)]


def _grow_together(true: np.ndarray, draws: Sequence[tuple[np.ndarray, np.ndarray]], k: int, steps: int) -> np.ndarray:
    """`grow` with a LogLoss for D draws at once: weights (D, M)."""
    drawn = np.stack([true[np.ix_(*draw)] for draw in draws])
    every, n = np.arange(len(draws)), drawn.shape[2]
    drawn = np.pad(drawn, ((0, 0), (0, 0), (0, -n % FACTORS)))
    total = np.zeros((len(draws), drawn.shape[2]))
    total[:, n:] = 1.0  # the padding's factor is 1 at every step
    counts = np.zeros(drawn.shape[:2], np.int64)
    best_loss, best = np.full(len(draws), np.inf), counts.copy()
    for size in range(1, steps + 1):
        losses = np.log(size) - log_sums(drawn + total[:, None]) / n
        members = counts > 0
        losses[(members.sum(axis=1) >= k)[:, None] & ~members] = np.inf
        lowest = losses.min(axis=1)
        tied = losses == lowest[:, None]
        tied = np.where((tied & members).any(axis=1)[:, None], tied & members, tied)
        chosen = tied.argmax(axis=1)
        total += drawn[every, chosen]
        counts[every, chosen] += 1
        better = lowest < best_loss
        best[better], best_loss[better] = counts[better], lowest[better]
    return best / best.sum(axis=1, keepdims=True)


def uniform(probs: Probs, labels: np.ndarray, limits: Limits = NINE, score: Score = "log_loss") -> np.ndarray:
    """Equal weights on the best n singles, for the n from 1 to limits.k that scores best as an average.

    With a budget, candidates that no longer fit are passed over.
    """
    return uniform_from(scorer(probs, labels, score), limits)


def uniform_from(growing: Scorer, limits: Limits) -> np.ndarray:
    """`uniform` over a scorer that nothing has been added to yet."""
    members = np.zeros(len(growing.singles), bool)
    quota = limits.quota(growing.order)
    best_loss, best = np.inf, members
    for m in [*quota, *growing.order]:
        if members[m] or not limits.allowed(members)[m]:
            continue
        loss = float(growing.losses(np.array([m]))[0])
        growing.add(int(m))
        members[m] = True
        if members.sum() >= len(quota) and loss < best_loss:
            best_loss, best = loss, members.copy()
    return best / best.sum()


def accuracy_weighted(probs: Probs, labels: np.ndarray, limits: Limits = NINE, threshold: float = 0.0) -> np.ndarray:
    """Weights in proportion to accuracy, over the limits.k most accurate candidates that reach the threshold.

    threshold: accuracy, 0 to 1. Members that limits.min_per_group demands are in whatever their accuracy: "at least one
    of each architecture, and everything above 94 %" is min_per_group=1, threshold=0.94. Without such a demand the best
    single candidate takes all where the average is less accurate than it.
    """
    accurate = scorer(probs, labels, "accuracy")
    members = np.zeros(len(probs), bool)
    members[limits.quota(accurate.order)] = True
    for m in accurate.order:
        if -accurate.singles[m] >= threshold and limits.allowed(members)[m]:
            members[m] = True
    if not members.any():
        members[_first_allowed(accurate, limits)] = True
    weights = np.where(members, np.maximum(-accurate.singles, 1e-9), 0.0)
    return not_worse(weights / weights.sum(), probs, labels, limits, "accuracy")


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


def trim(weights: np.ndarray, limits: Limits, order: np.ndarray) -> np.ndarray:
    """The heaviest candidates that the limits admit, scaled to sum 1.

    weights: (M,), non-negative; order: (M,) candidates from best to worst, which breaks ties and meets quotas.
    """
    members = np.zeros(len(weights), bool)
    members[limits.quota(order)] = True
    heaviest = order[np.argsort(-weights[order], kind="stable")]
    for m in heaviest:
        if weights[m] > 0 and limits.allowed(members)[m]:
            members[m] = True
    if not members.any():
        members[heaviest[0]] = True
    smallest = weights[members & (weights > 0)].min(initial=1.0)
    kept = np.where(members, np.maximum(weights, smallest), 0.0)
    return kept / kept.sum()


def not_worse(weights: np.ndarray, probs: Probs, labels: np.ndarray, limits: Limits, score: Score) -> np.ndarray:
    """`weights`, or the best single candidate where that scores better and no quota forbids it."""
    if limits.min_per_group:
        return weights
    single = best_single(probs, labels, limits, score)
    loss = SCORES[score]
    return weights if loss(combine(probs, weights), labels) <= loss(combine(probs, single), labels) else single


def scorer(probs: Probs, labels: np.ndarray, score: Score) -> Scorer:
    """A scorer of that name, with nothing added to it yet; raises UserError for an unknown one."""
    if score == "log_loss":
        return LogLoss(true_probs(probs, labels))
    if score == "brier":
        return Brier(probs, labels)
    if score == "accuracy":
        return Accuracy(probs, labels)
    raise UserError(f"unknown score {score!r}, expected {', '.join(get_args(Score))}")


def _first_allowed(scorer: Scorer, limits: Limits) -> int:
    fits = limits.allowed(np.zeros(len(scorer.singles), bool))
    if not fits.any():
        raise UserError(NOTHING_FITS)
    return int(next(m for m in scorer.order if fits[m]))


def _one_hot(models: int, chosen: int) -> np.ndarray:
    weights = np.zeros(models)
    weights[chosen] = 1.0
    return weights
