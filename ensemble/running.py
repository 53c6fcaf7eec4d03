"""The ensemble so far: what a sweep chooses again after every candidate."""

from dataclasses import dataclass

import numpy as np
from upath import UPath

from ensemble.pool import load_pool
from ensemble.selection.blend import Blend, scale
from ensemble.selection.goal import Goal, Judge
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, clearly_lower, log_loss, true_class
from ensemble.selection.options import SPREADS, temperature_of
from ensemble.selection.scorers import LogLoss
from ensemble.selection.selectors import grow
from trainables.run_directory import Candidate, list_candidates, select_labels

LIVE_POOL = 60  # the ensemble so far is chosen among that many best candidates, to keep a step cheap
SPREAD = SPREADS["wide"]  # as in the default option of the final rule


@dataclass(frozen=True, eq=False)
class _Known:
    """A candidate: what it is ranked by (see goal.Judge), its predictions (N, C), their temperature, and at that the
    probability of each label, (N,)."""

    id: str
    accuracy: float
    credit: float
    loss: float
    probs: np.ndarray
    temperature: float
    true: np.ndarray


class EnsembleSoFar:
    """The ensemble over the candidates seen so far, on the select split; and its curve.

    It follows the final rule (ensemble/selection/auto.py) in a cheap form: the same screening and temperatures, but one
    greedy selection instead of bags of them, and nothing is cross-validated. So its scores are fitted, and therefore a
    single candidate stays one until an ensemble is better by more than noise. `curve` holds a (candidates, accuracy,
    log-loss) triple for every candidate added, `members` the weights by id.
    """

    def __init__(self, run: UPath, top_k: int, goal: Goal | None = None) -> None:
        self.run, self.limits = run, Limits(k=top_k)
        self.labels, self.goal = np.asarray(select_labels(run)), goal or Goal()
        self.judge: Judge | None = None  # known with the first candidate
        self.pool: list[_Known] = []  # the most accurate first
        self.best_single: tuple[str, float] | None = None
        self.members: dict[str, float] = {}
        self.curve: list[tuple[int, float, float]] = []
        if list_candidates(run):
            pool = load_pool([run])  # checked: other tools may have added candidates
            for candidate in pool.candidates:
                self.add(candidate, choose=candidate is pool.candidates[-1])

    def add(self, candidate: Candidate, choose: bool = True) -> None:
        probs = np.asarray(candidate.probs("select"), np.float32)
        heat = temperature_of(probs, self.labels, SPREAD)
        if self.judge is None:
            self.judge = Judge(self.goal, self.labels, probs.shape[1])
        known = _Known(
            candidate.id,
            accuracy(probs, self.labels),
            float(self.judge.credit(probs).mean()),
            float(self.judge.losses(probs).mean()),
            probs,
            heat,
            true_class(scale(probs, heat), self.labels),
        )
        self.pool = sorted([*self.pool, known], key=lambda c: (-c.credit, c.loss, c.id))[:LIVE_POOL]
        self.best_single = (self.pool[0].id, self.pool[0].accuracy)
        if choose:
            blend = self._choose()
            together = blend([c.probs for c in self.pool])
            self.members = {c.id: float(w) for c, w in zip(self.pool, blend.weights, strict=True) if w > 0}
            seen = self.curve[-1][0] + 1 if self.curve else 1
            self.curve.append((seen, accuracy(together, self.labels), log_loss(together, self.labels)))

    def _choose(self) -> Blend:
        weights = grow(LogLoss(np.stack([c.true for c in self.pool])), self.limits)
        probs, heat = [c.probs for c in self.pool], np.array([c.temperature for c in self.pool])
        mixed = Blend(weights, heat)(probs)
        blend = Blend(weights, heat, temperature=temperature_of(mixed, self.labels, SPREAD))
        single = Blend(np.eye(1, len(self.pool))[0])
        alone = np.count_nonzero(weights) == 1
        assert self.judge is not None
        if alone or not clearly_lower(self.judge.losses(blend(probs)), self.judge.losses(probs[0])):
            return single
        return blend
