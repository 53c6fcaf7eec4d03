"""Accuracy against latency: the best ensemble that a budget of milliseconds buys, for several budgets at once."""

from copy import copy
from dataclasses import replace

import numpy as np

from ensemble.selection.blend import Blend, Probs, fit_temperature, scale
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss, true_class
from ensemble.selection.scorers import LogLoss
from ensemble.selection.selectors import grow
from trainables.errors import UserError


def frontier(
    probs: Probs,
    labels: np.ndarray,
    limits: Limits,
    latency: np.ndarray,
    temperatures: np.ndarray | None = None,
    points: int = 6,
) -> list[dict[str, float | int]]:
    """Greedy ensembles within budgets from the fastest candidate's latency to the unlimited ensemble's.

    latency: float64 (M,), milliseconds per image, NaN where unknown: such candidates take no part. Budgets are spaced
    evenly in their logarithm. temperatures: float64 (M,), of candidates that are scaled before they are averaged; every
    average then gets one of its own, too. None: nothing is scaled. Returned from fast to slow: `latency_ms`, `members`,
    `accuracy`, `log_loss`, all on these rows; an ensemble that is not better than a faster one is left out. Empty when
    no latency is known.
    """
    known = np.flatnonzero(np.isfinite(latency))
    if not len(known) or latency[known].min() <= 0:
        return []
    part, cost = [probs[m] for m in known.tolist()], latency[known]
    heat = np.ones(len(part)) if temperatures is None else temperatures[known]
    true = [true_class(scale(np.asarray(p), t), labels) for p, t in zip(part, heat.tolist(), strict=True)]
    limits, scorer = limits.subset(known), LogLoss(np.stack(true))
    most = grow(copy(scorer), limits)
    low, high = float(cost.min()), float(cost[most > 0].sum())
    kept: list[dict[str, float | int]] = []
    for budget in np.geomspace(low, max(high, low), points):
        try:
            weights = grow(copy(scorer), _with_budget(limits, cost, float(budget)))
        except UserError:  # a quota or another budget cannot be met within this one
            continue
        together = Blend(weights, heat)(part)
        if temperatures is not None:
            together = scale(together, fit_temperature(together, labels))
        point = {
            "latency_ms": float(cost[weights > 0].sum()),
            "members": int((weights > 0).sum()),
            "accuracy": accuracy(together, labels),
            "log_loss": log_loss(together, labels),
        }
        if not kept or point["log_loss"] < kept[-1]["log_loss"]:
            kept.append(point)
    return kept


def _with_budget(limits: Limits, cost: np.ndarray, budget: float) -> Limits:
    costs = cost[None] if limits.costs is None else np.concatenate([limits.costs, cost[None]])
    budgets = np.array([budget]) if limits.budgets is None else np.append(limits.budgets, budget)
    return replace(limits, costs=costs, budgets=budgets)
