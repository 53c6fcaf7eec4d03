"""--objective ensemble: a candidate is worth what it adds to the ensemble of the others, on the tune split.

A sampler that is told each candidate's own score searches for more of the same. Here it is told by how much the
log-loss of the current ensemble changes when the candidate is averaged in: a weaker but different one can lower it
further. That is smooth and defined for every candidate, the ensemble's members among them (each is held against the
ensemble without it). As the ensemble changes, so do the values of all earlier candidates, which is why samplers get
them through view.py.

Source: Levesque et al., 2016, "Bayesian Hyperparameter Optimization for Ensemble Learning"; see also Shen et al., 2022,
"DivBO: Diversity-aware CASH for Ensemble Learning".
"""

import numpy as np

from ensemble.limits import Limits
from ensemble.selection import greedy

POOL = 60  # the ensemble is chosen among so many best candidates, to keep a step cheap


class Contribution:
    """The value of every candidate seen so far, in nats: below 0 it makes the ensemble better.

    Args:
        labels: of the tune split, int (N,).
        top_k: most members of the ensemble.
    """

    def __init__(self, labels: np.ndarray, top_k: int) -> None:
        self.labels, self.limits = labels, Limits(k=top_k)
        self.ids: list[str] = []
        self.true: list[np.ndarray] = []  # probability of the true class, (N,); log-losses need nothing else
        self._values: dict[str, float] | None = None

    def add(self, id: str, probs: np.ndarray) -> None:
        """A new candidate with its probabilities on the tune split, (N, C)."""
        self.ids.append(id)
        self.true.append(np.asarray(probs[np.arange(len(self.labels)), self.labels], np.float32))
        self._values = None

    def values(self) -> dict[str, float]:
        """id -> log-loss of the ensemble with the candidate as one more member, minus that of the ensemble without it.

        An ensemble of none is held to guess.
        """
        if self._values is None and self.ids:
            true = np.stack(self.true)
            weights = self._ensemble(true)
            together, members = weights @ true, int((weights > 0).sum())
            values = _gains(together, members, true)
            for index in np.flatnonzero(weights):
                if members == 1:
                    values[index] = log_losses(true[index]) - np.log(max(2, len(np.unique(self.labels))))
                else:
                    others = (together - weights[index] * true[index]) / (1 - weights[index])
                    values[index] = _gains(others, members - 1, true[index])
            self._values = dict(zip(self.ids, values.tolist(), strict=True))
        return self._values or {}

    def _ensemble(self, true: np.ndarray) -> np.ndarray:
        """Greedy weights (M,) over the best candidates."""
        best = np.sort(np.argsort(log_losses(true), kind="stable")[:POOL])
        two = np.stack([true[best], 1 - true[best]], axis=2)  # true class or not: for the log-loss that is all
        weights = np.zeros(len(true))
        weights[best] = greedy(two, np.zeros(true.shape[1], int), self.limits)
        return weights


def _gains(ensemble: np.ndarray, members: int, true: np.ndarray) -> np.ndarray:
    return log_losses((members * ensemble + true) / (members + 1)) - log_losses(ensemble)


def log_losses(true: np.ndarray) -> np.ndarray:
    """Log-loss of each row of true-class probabilities (..., N)."""
    return -np.log(np.maximum(true, 1e-12)).mean(axis=-1)
