"""Successive halving that pauses and promotes: no trial is ended by a rung, only postponed behind better ones.

Stop-only halving hardly stops anything on few devices, for the first trials to reach a rung have nobody to lose
against. Here a trial goes on from a rung only while it is among the best 1 / FACTOR of all that have reached it; the
others wait with their checkpoint, and the best of them go on when later arrivals have made the rung larger. A device
that is free takes such a trial if there is one, else a new configuration, so it never waits.

Source: Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning" (ASHA), algorithm 2.
"""

import math

FACTOR = 4  # of those that reach a rung, one in so many goes on
# Rungs lie at shares of a trial's own epochs: a schedule that ends at zero makes an early score pessimistic, and
# comparable only between trials that are equally far along theirs. One early rung is enough: in the middle of a
# schedule, where the learning rate is highest, scores say less about the end than after the first ninth. On recorded
# curves (benchmarks/search.py) further rungs at a third or two thirds found the best no sooner, and left an ensemble
# half of the candidates to choose from.
SHARES = (1 / 9,)


def rung_epochs(epochs: int) -> list[int]:
    """The epochs after which a trial of so many epochs is at a rung; short ones have fewer rungs than SHARES."""
    return sorted({math.ceil(share * epochs) for share in SHARES} - {epochs})


class Rungs:
    """Who has reached which rung with what score, and who may go on.

    Rungs are counted from the top, so that trials with fewer of them share the upper ones: 1 is the last before the
    end. All scores are to be maximised.
    """

    def __init__(self) -> None:
        self.scores: dict[int, dict[str, float]] = {}  # rung -> id -> score
        self.waiting: dict[str, int] = {}  # id -> the rung it waits at

    def at(self, epoch: int, epochs: int) -> int | None:
        """The rung that a trial of so many epochs is at after `epoch`, or None."""
        rungs = rung_epochs(epochs)
        return len(rungs) - rungs.index(epoch) if epoch in rungs else None

    def reach(self, id: str, rung: int, score: float) -> bool:
        """Note the score; whether the trial may go on at once. If not, it waits.

        One that has been there before goes on: it was promoted, but its checkpoint was lost.
        """
        scores = self.scores.setdefault(rung, {})
        if id in scores:
            return True
        scores[id] = score
        if id in self._best(rung):
            return True
        self.waiting[id] = rung
        return False

    def promotable(self) -> str | None:
        """The waiting trial that goes on next by the rule, highest rung first; None when nobody may."""
        for rung in sorted(self.scores):
            best = [id for id in self._best(rung) if self.waiting.get(id) == rung]
            if best:
                return best[0]
        return None

    def ranked(self) -> list[str]:
        """All waiting trials, the most promising first: by rung, then by score."""
        return sorted(self.waiting, key=lambda id: (self.waiting[id], -self.scores[self.waiting[id]][id]))

    def go_on(self, id: str) -> None:
        del self.waiting[id]

    def _best(self, rung: int) -> list[str]:
        """The best 1 / FACTOR of all that have reached the rung, best first."""
        scores = self.scores[rung]
        return sorted(scores, key=lambda id: -scores[id])[: len(scores) // FACTOR]
