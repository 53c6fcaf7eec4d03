"""What a sweep may cost: trials, time, devices, disk; and when it has reached enough."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from upath import UPath

from ensemble.file import list_ensembles
from ensemble.running import EnsembleSoFar
from trainables.errors import UserError
from trainables.run_directory import BEFORE, WEIGHTS, Candidate, mark_weights_deleted
from trainables.storage import exists, patiently

RISE = 1e-4  # nats by which the live ensemble's log-loss must fall to count as better


@dataclass(frozen=True)
class Budget:
    """When a sweep ends. None: no such limit.

    Attributes:
        trials: in all.
        deadline: time.time() at which running trials finish with what they have.
        device_seconds: seconds that lanes were busy, times their devices, in all.
        target_accuracy: 0 to 1, of the live ensemble on the select split.
        plateau: trials that end without raising the live ensemble, in a row.
        final_seeds: share (0 to 1) of trials or time that is kept for new seeds of the ensemble's members.
        began: time.time() when this process began to use the time; None: when the sweep was opened.
    """

    trials: int | None = None
    deadline: float | None = None
    device_seconds: float | None = None
    target_accuracy: float | None = None
    plateau: int | None = None
    final_seeds: float = 0.0
    began: float | None = None


class Goal:
    """Whether the ensemble so far has reached what the budget asks for: its target, or its plateau.

    `live` None: there is no ensemble to look at, and so nothing is ever reached.
    """

    def __init__(self, budget: Budget, live: EnsembleSoFar | None) -> None:
        self.budget, self.live = budget, live
        self.best: tuple[float, int] | None = None  # the ensemble's log-loss, and how many trials were tried by then

    def note(self, tried: int) -> dict[str, Any]:
        """After a candidate, the last of so many trials: the ensemble's scores as a point of its curve, JSON-able."""
        assert self.live is not None
        candidates, accuracy, loss = self.live.curve[-1]
        self._rise(loss, tried)
        return {
            "candidates": candidates, "tried": tried, "members": len(self.live.members),
            "select_accuracy": accuracy, "select_log_loss": loss,
        }  # fmt: skip

    def restore(self, points: list[dict[str, Any]]) -> None:
        """Take up the curve that earlier processes have noted."""
        if self.live is None or not points:
            return
        points = sorted(points, key=lambda point: point["candidates"])
        for point in points:
            self._rise(point["select_log_loss"], point["tried"])
        self.live.curve = [(p["candidates"], p["select_accuracy"], p["select_log_loss"]) for p in points]

    def reached(self, tried: int) -> str | None:
        """Why it is enough after so many trials, or None."""
        if self.live is None or not self.live.curve:
            return None
        _, accuracy, _ = self.live.curve[-1]
        target, plateau = self.budget.target_accuracy, self.budget.plateau
        if target is not None and accuracy >= target:
            return f"the ensemble's select accuracy of {accuracy:.2%} has reached the target"
        if plateau is not None and self.best is not None and tried - self.best[1] >= plateau:
            return f"{tried - self.best[1]} more trials have not raised the ensemble"
        return None

    def _rise(self, loss: float, tried: int) -> None:
        if self.best is None or loss < self.best[0] - RISE:
            self.best = (loss, tried)


@dataclass(frozen=True)
class KeepWeights:
    """How many candidates may keep their weights, or how many bytes those may take; None: no limit."""

    candidates: int | None = None
    bytes: int | None = None


def parse_keep(text: str) -> KeepWeights:
    """ "30" candidates, or "20GB" (MB, TB) on disk; raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB)?", text.strip(), re.IGNORECASE)
    if found is None or (found[2] is None and "." in found[1]):
        raise UserError(f"--keep-weights is {text!r}, expected a number of candidates (30) or a size (20GB)")
    if found[2] is None:
        return KeepWeights(candidates=int(found[1]))
    return KeepWeights(bytes=int(float(found[1]) * {"MB": 1e6, "GB": 1e9, "TB": 1e12}[found[2].upper()]))


class WeightStore:
    """The weights of a sweep's candidates: those that can no longer matter go, predictions stay for all."""

    def __init__(self, run: UPath, keep: KeepWeights) -> None:
        self.run, self.keep = run, keep
        self.kept: dict[str, tuple[float, int, Candidate]] = {}  # id -> select log-loss, bytes, whose

    def add(self, candidate: Candidate) -> None:
        loss = candidate.info.metrics.get("select_log_loss")
        path = candidate.path / WEIGHTS
        # what other tools have added is theirs, and a soup is an ensemble's
        if loss is not None and not candidate.info.soup and exists(path):
            files = [file for file in (path, candidate.path / BEFORE) if exists(file)]
            size = sum(patiently(file, file.stat).st_size for file in files)
            self.kept[candidate.id] = (float(loss), size, candidate)

    def trim(self, members: set[str]) -> list[str]:
        """Delete weights until the limit is kept, the worst by select log-loss first; returns whose.

        Those of `members` (the live ensemble's) and of any ensemble in ensembles/ are never deleted.
        """
        if not self._too_many():
            return []
        safe = members | saved_members(self.run)
        gone = []
        for id in sorted(self.kept, key=lambda id: self.kept[id][:2], reverse=True):
            if id not in safe and self._too_many():
                candidate = self.kept[id][2]
                mark_weights_deleted(candidate)  # first: an ensemble must not count on them any longer
                for file in (candidate.path / WEIGHTS, candidate.path / BEFORE):
                    patiently(file, partial(file.unlink, missing_ok=True))
                del self.kept[id]
                gone.append(id)
        return gone

    def _too_many(self) -> bool:
        if self.keep.candidates is not None and len(self.kept) > self.keep.candidates:
            return True
        return self.keep.bytes is not None and sum(size for _, size, _ in self.kept.values()) > self.keep.bytes


def saved_members(run: UPath) -> set[str]:
    """Ids of all candidates of this run that a saved ensemble consists of."""
    return {member.id for ensemble in list_ensembles(run) for member in ensemble.members if not member.run}
