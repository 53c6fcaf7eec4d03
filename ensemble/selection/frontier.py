"""Accuracy against latency: the best ensemble that a budget of milliseconds buys, for several budgets at once."""

from dataclasses import replace
from typing import Any

import numpy as np

from ensemble.selection.blend import Blend, Probs
from ensemble.selection.claim import deal_folds
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.options import GREEDY, Fold, Option, Table, screen
from trainables.errors import UserError

LOOKED_AT = 30  # most accurate candidates of each budget that are looked at


def frontier(
    probs: Probs,
    labels: np.ndarray,
    limits: Limits,
    latency: np.ndarray,
    option: Option = GREEDY,
    chosen: tuple[Blend, dict[str, Any]] | None = None,
    points: int = 6,
) -> list[dict[str, float | int]]:
    """What an option (see options.py) makes of budgets from the fastest candidate's latency to no budget's.

    latency: float64 (M,), milliseconds per image, NaN where unknown: such candidates take no part. Budgets are spaced
    evenly in their logarithm. chosen: the ensemble that was selected without a budget, and its claim: the last point.
    Returned from fast to slow: `latency_ms` and `members` of the ensemble that all rows choose, `accuracy` and
    `log_loss` of those that are chosen without each fold, on that fold. An ensemble that is not better than a faster
    one is left out, the one that was selected is not. Empty when no latency is known.
    """
    known = np.flatnonzero(np.isfinite(latency))
    if not len(known) or latency[known].min() <= 0 or len(labels) < 2:
        return []
    table, everything = Table(probs, labels, limits), np.arange(len(labels))
    spent = np.nan if chosen is None else float(latency[chosen[0].weights > 0].sum())
    if not np.isfinite(spent):
        ranking = table.ranking(everything)
        most = table.on(everything, screen(ranking[np.isin(ranking, known)], limits)).fit(option)
        spent = float(latency[most.weights > 0].sum())
    low = float(latency[known].min())
    budgets = np.geomspace(low, max(spent, low), points)
    whole, held = _fold(table, everything, latency, budgets), deal_folds(labels)[0]
    folds = [_fold(table, np.setdiff1d(everything, rows), latency, budgets) for rows in held]
    kept: list[dict[str, float | int]] = []
    for budget in budgets.tolist():
        tight = _with_budget(limits, latency, budget)
        together = np.empty(probs[0].shape, np.float32)
        try:
            weights = whole.within(tight).fit(option).weights
            for fold, rows in zip(folds, held, strict=True):
                together[rows] = table.predict(fold.within(tight).fit(option), rows)
        except UserError:  # a quota or another budget cannot be met within this one
            continue
        point = _point(weights, latency, accuracy(together, labels), log_loss(together, labels))
        if not kept or point["log_loss"] < kept[-1]["log_loss"]:
            kept = [faster for faster in kept if faster["latency_ms"] < point["latency_ms"]]
            kept.append(point)
    if chosen is not None and np.isfinite(latency[chosen[0].weights > 0]).all():
        last = _point(chosen[0].weights, latency, chosen[1]["accuracy"], chosen[1]["log_loss"])
        kept = [p for p in kept if p["latency_ms"] < last["latency_ms"] and p["log_loss"] > last["log_loss"]]
        kept.append(last)
    return kept


def _point(weights: np.ndarray, latency: np.ndarray, right: float, loss: float) -> dict[str, float | int]:
    cost, members = float(latency[weights > 0].sum()), int(np.count_nonzero(weights))
    return {"latency_ms": cost, "members": members, "accuracy": right, "log_loss": loss}


def _fold(table: Table, rows: np.ndarray, latency: np.ndarray, budgets: np.ndarray) -> Fold:
    """What may be known from these rows: of the candidates that fit a budget, the most accurate, for each of them."""
    ranking = table.ranking(rows)
    most = LOOKED_AT if table.limits.costs is None and table.limits.min_per_group == 0 else len(ranking)
    cheap = [ranking[latency[ranking] <= budget * (1 + 1e-9)][:most] for budget in budgets]
    return table.on(rows, np.unique(np.concatenate(cheap)))


def _with_budget(limits: Limits, cost: np.ndarray, budget: float) -> Limits:
    costs = cost[None] if limits.costs is None else np.concatenate([limits.costs, cost[None]])
    budgets = np.array([budget]) if limits.budgets is None else np.append(limits.budgets, budget)
    return replace(limits, costs=costs, budgets=budgets)
