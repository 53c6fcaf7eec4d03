"""--objective ensemble: a candidate is worth what it adds to the ensemble of the others, on the tune split.

A sampler that is told each candidate's own score searches for more of the same. Here it is told by how much the
log-loss of the current ensemble changes when the candidate is averaged in: a weaker but different one can lower it
further. That is smooth and defined for every candidate, the ensemble's members among them (each is held against the
ensemble without it). As the ensemble changes, so do the values of all earlier candidates, which is why samplers get
them through values.py.

Source: Levesque et al., 2016, "Bayesian Hyperparameter Optimization for Ensemble Learning"; see also Shen et al., 2022,
"DivBO: Diversity-aware CASH for Ensemble Learning".
"""

from typing import Literal

import numpy as np

from ensemble.selection.goal import Goal, Judge
from ensemble.selection.limits import Limits
from ensemble.selection.selectors import greedy
from search.config import Objective

Valued = Literal["accuracy", "log_loss", "ensemble"]
"""What trials are valued by: a score that is to be high, one that is to be low, or what they add to an ensemble. Scores
other than a candidate's own accuracy and log-loss come from OwnScores or a Contribution."""

POOL = 60  # the ensemble is chosen among so many best candidates, to keep a step cheap
BLOCK = 256  # candidates that are valued at a time, to keep memory small


class Contribution:
    """The value of every candidate seen so far, in nats: below 0 it makes the ensemble better.

    Args:
        labels: of the tune split, int (N,).
        top_k: most members of the ensemble.
        judge: of balanced metrics, for whose log-loss every class counts the same; None: every image does.
    """

    def __init__(self, labels: np.ndarray, top_k: int, judge: Judge | None = None) -> None:
        self.labels, self.limits, self.judge = labels, Limits(k=top_k), judge
        self.ids: list[str] = []
        self._true = np.empty((0, len(labels)), np.float32)  # probability of the true class, by id; more rows than ids
        self._losses: list[float] = []  # of each candidate alone
        self._weights: dict[int, float] = {}  # the ensemble, by index of ids
        self._values: list[float] = []  # of the first ids, as the ensemble was then

    def add(self, id: str, probs: np.ndarray) -> None:
        """A new candidate with its probabilities on the tune split, (N, C)."""
        if len(self.ids) == len(self._true):  # twice as many rows at a time: a copy for each would cost more and more
            more = np.empty((max(POOL, len(self.ids)), len(self.labels)), np.float32)
            self._true = np.concatenate([self._true, more])
        true = self._true[len(self.ids)]
        shifted = probs if self.judge is None else self.judge.shifted(probs)
        true[:] = shifted[np.arange(len(self.labels)), self.labels]
        self.ids.append(id)
        self._losses.append(float(self._log_losses(true)))

    def values(self) -> dict[str, float]:
        """id -> log-loss of the ensemble with the candidate as one more member, minus that of the ensemble without it.

        An ensemble of none is held to guess.
        """
        if len(self._values) < len(self.ids):
            weights = self._ensemble()
            if weights != self._weights:  # else the values of earlier candidates stand
                self._weights, self._values = weights, []
            members = np.array(list(weights))
            shares = np.array(list(weights.values()))
            together = shares @ self._true[members]
            new = len(self._values)
            self._values += self._gains(together, len(members), new)
            for index, share in weights.items():
                if index >= new:
                    self._values[index] = self._gain_of_member(index, share, together, len(members))
        return dict(zip(self.ids, self._values, strict=True))

    def _gains(self, ensemble: np.ndarray, members: int, first: int) -> list[float]:
        """Of every candidate from index `first` on, if it is added to an ensemble of so many members."""
        gains: list[float] = []
        for start in range(first, len(self.ids), BLOCK):
            true = self._true[start : min(start + BLOCK, len(self.ids))]
            gains += (
                self._log_losses((members * ensemble + true) / (members + 1)) - self._log_losses(ensemble)
            ).tolist()
        return gains

    def _gain_of_member(self, index: int, share: float, ensemble: np.ndarray, members: int) -> float:
        """Of a member, to the ensemble without it."""
        true = self._true[index]
        if members == 1:
            return float(self._log_losses(true) - np.log(max(2, len(np.unique(self.labels)))))
        others = (ensemble - share * true) / (1 - share)
        return float(self._log_losses(((members - 1) * others + true) / members) - self._log_losses(others))

    def _log_losses(self, true: np.ndarray) -> np.ndarray:
        return log_losses(true, None if self.judge is None else self.judge.weights)

    def _ensemble(self) -> dict[int, float]:
        """Greedy weights by index, over the best candidates."""
        best = np.sort(np.argsort(self._losses, kind="stable")[:POOL])
        true = self._true[best]
        two = np.stack([true, 1 - true], axis=2)  # true class or not: for the log-loss that is all
        weights = greedy(two, np.zeros(true.shape[1], int), self.limits)
        return {int(index): float(weight) for index, weight in zip(best, weights, strict=True) if weight > 0}


class OwnScores:
    """The value of every candidate by a metric that is not among those that training reports."""

    def __init__(self, goal: Goal, labels: np.ndarray) -> None:
        """labels: of the tune split, int (N,)."""
        self.goal, self.labels = goal, labels
        self._values: dict[str, float] = {}

    def add(self, id: str, probs: np.ndarray) -> None:
        """A new candidate with its probabilities on the tune split, (N, C)."""
        decision = self.goal.decide(probs[None], self.labels)
        self._values[id] = self.goal.value(probs, self.labels, decision)

    def values(self) -> dict[str, float]:
        """id -> the metric, on the tune split."""
        return dict(self._values)


def log_losses(true: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Log-loss of each row of true-class probabilities (..., N); weights: (N,), of mean 1."""
    losses = -np.log(np.maximum(true, 1e-12))
    return (losses if weights is None else losses * weights).mean(axis=-1)


def value_by(
    goal: Goal, objective: Objective, labels: np.ndarray, top_k: int
) -> tuple[Valued, Contribution | OwnScores | None]:
    """How trials are valued for a metric and --objective, and where their values come from (None: from training)."""
    if objective == "ensemble":
        judge = Judge(goal, labels, int(labels.max()) + 1)
        return "ensemble", Contribution(labels, top_k, judge if judge.weights is not None else None)
    if objective == "log_loss" or goal.name == "log_loss":
        return "log_loss", None
    if goal.name == "accuracy":
        return "accuracy", None
    return "accuracy" if goal.higher_is_better else "log_loss", OwnScores(goal, labels)
