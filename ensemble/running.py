"""The ensemble so far: what a sweep chooses again after every candidate."""

import numpy as np
from upath import UPath

from ensemble.pool import load_pool
from ensemble.selection.blend import combine
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.selectors import greedy
from trainables.run_directory import Candidate, list_candidates, select_labels

LIVE_POOL = 60  # the ensemble so far is chosen among that many best candidates, to keep a step cheap


class EnsembleSoFar:
    """The greedy ensemble over the candidates seen so far, on the select split; and its curve.

    `curve` holds a (candidates, accuracy, log-loss) triple for every candidate added, `members` the weights by id.
    """

    def __init__(self, run: UPath, top_k: int) -> None:
        self.run, self.limits = run, Limits(k=top_k)
        self.labels = np.asarray(select_labels(run))
        self.pool: list[tuple[float, str, np.ndarray]] = []  # log-loss, id, probs; the best first
        self.best_single: tuple[str, float] | None = None
        self.members: dict[str, float] = {}
        self.curve: list[tuple[int, float, float]] = []
        if list_candidates(run):
            pool = load_pool([run])  # checked: other tools may have added candidates
            for candidate in pool.candidates:
                self.add(candidate, choose=candidate is pool.candidates[-1])

    def add(self, candidate: Candidate, choose: bool = True) -> None:
        probs = np.asarray(candidate.probs("select"))
        own = accuracy(probs, self.labels)
        if self.best_single is None or own > self.best_single[1]:
            self.best_single = (candidate.id, own)
        self.pool = sorted([*self.pool, (log_loss(probs, self.labels), candidate.id, probs)], key=lambda x: x[:2])
        self.pool = self.pool[:LIVE_POOL]
        if choose:
            matrices = [probs for *_, probs in self.pool]
            weights = greedy(matrices, self.labels, self.limits)
            combined = combine(matrices, weights)
            self.members = {id: float(w) for (_, id, _), w in zip(self.pool, weights, strict=True) if w > 0}
            seen = self.curve[-1][0] + 1 if self.curve else 1
            self.curve.append((seen, accuracy(combined, self.labels), log_loss(combined, self.labels)))
