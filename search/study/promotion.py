"""Successive halving that pauses and promotes: no trial is ended by a rung, only postponed behind better ones.

Stop-only halving hardly stops anything on few devices, for the first trials to reach a rung have nobody to lose
against. Here a trial goes on from a rung only while it is among the best 1 / FACTOR of all that have reached it; the
others wait with their checkpoint, and the best of them go on when later arrivals have made the rung larger. A device
that is free takes such a trial if there is one, else a new configuration, so it never waits.

The best of each kind goes on, too, once FACTOR of them are there. A kind is a backbone: backbones differ in how fast
they start, and an ensemble lives on several.

Source: Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning" (ASHA), algorithm 2.
"""

import bisect
import math

FACTOR = 4  # of those that reach a rung, one in so many goes on
# Rungs lie at shares of a trial's own epochs: a schedule that ends at zero makes an early score pessimistic, and
# comparable only between trials that are equally far along theirs. One early rung is enough: in the middle of a
# schedule, where the learning rate is highest, scores say less about the end than after the first ninth. On recorded
# curves (benchmarks/search.py) further rungs at a third or two thirds found the best no sooner, and left an ensemble
# half of the candidates to choose from.
SHARES = (1 / 9,)
Place = tuple[float, int, str]  # of a trial at a rung: minus its score, how many came before it, its id


def rung_epochs(epochs: int, freeze_epochs: int = 0) -> tuple[int, ...]:
    """The epochs after which a trial is at a rung; short ones have fewer rungs than SHARES, and probes none.

    They count from where the body begins to learn, if it does: before that all trials of a backbone look the same.
    """
    before, learning = (freeze_epochs, epochs) if epochs else (0, freeze_epochs)
    return tuple(sorted({before + math.ceil(share * learning) for share in SHARES} - {before + learning}))


class Rungs:
    """Who has reached which rung with what score, and who may go on.

    Rungs are counted from the top, so that trials with fewer of them share the upper ones: 1 is the last before the
    end. All scores are to be maximised.
    """

    def __init__(self) -> None:
        self.scores: dict[int, dict[str, float]] = {}  # rung -> id -> score
        self.waiting: dict[str, int] = {}  # id -> the rung it waits at
        # The same, the best first, and of equals whoever came first: nothing is sorted anew as a sweep grows.
        self._reached: dict[int, list[Place]] = {}
        self._kinds: dict[int, dict[str, list[Place]]] = {}
        self._queues: dict[int, list[Place]] = {}

    def at(self, epoch: int, rungs: tuple[int, ...]) -> int | None:
        """The rung that a trial with rungs at these epochs is at after `epoch`, or None."""
        return len(rungs) - rungs.index(epoch) if epoch in rungs else None

    def reach(self, id: str, kind: str, rung: int, score: float) -> bool:
        """Note the score; whether the trial may go on at once. If not, it waits.

        One that has been there before goes on: it was promoted, but its checkpoint was lost.
        """
        scores = self.scores.setdefault(rung, {})
        if id in scores:
            return True
        place = (-score, len(scores), id)
        scores[id] = score
        bisect.insort(self._reached.setdefault(rung, []), place)
        bisect.insort(self._kinds.setdefault(rung, {}).setdefault(kind, []), place)
        if self._is_among_best(rung, place) or place in self._leaders(rung):
            return True
        self.waiting[id] = rung
        bisect.insort(self._queues.setdefault(rung, []), place)
        return False

    def replay(self, id: str, kind: str, rungs: tuple[int, ...], scores: dict[int, float], running: bool) -> bool:
        """Note what a trial of an earlier process has reached, its scores by epoch in order; whether it still waits."""
        going_on = True
        for epoch, score in scores.items():
            rung = self.at(epoch, rungs)
            if rung is not None:
                going_on = self.reach(id, kind, rung, score)
                is_last = running and epoch == max(scores)
                if not going_on and not is_last:  # it was promoted, or has ended
                    self.go_on(id)
                    going_on = True
        return not going_on

    def promotable(self) -> str | None:
        """The waiting trial that goes on next by the rule, highest rung first; None when nobody may."""
        for rung, queue in sorted(self._queues.items()):
            if queue and self._is_among_best(rung, queue[0]):
                return queue[0][-1]
            for *_, id in self._leaders(rung):
                if self.waiting.get(id) == rung:
                    return id
        return None

    def ranked(self) -> list[str]:
        """All waiting trials, the most promising first: by rung, then by score."""
        return [id for _, queue in sorted(self._queues.items()) for *_, id in queue]

    def go_on(self, id: str) -> None:
        queue = self._queues[self.waiting.pop(id)]
        del queue[next(index for index, (*_, other) in enumerate(queue) if other == id)]

    def _is_among_best(self, rung: int, place: Place) -> bool:
        """Whether it is among the best 1 / FACTOR of all that have reached the rung, or the best of all."""
        reached = self._reached[rung]
        return bisect.bisect_left(reached, place) < max(1, len(reached) // FACTOR)

    def _leaders(self, rung: int) -> list[Place]:
        """The best of each kind of which FACTOR have reached the rung."""
        return [places[0] for places in self._kinds.get(rung, {}).values() if len(places) >= FACTOR]
