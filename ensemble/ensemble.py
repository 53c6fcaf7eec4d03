"""What an ensemble is: members with weights, how their predictions combine, and the JSON file that says so."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from upath import UPath

from trainables import candidate as run_directory
from trainables.candidate import Candidate
from trainables.errors import UserError

Probs = np.ndarray | Sequence[np.ndarray]
"""Predictions of M models: (M, N, C), or a sequence of M arrays (N, C) such as memory maps; rows sum to 1."""

ROWS = 16_384


def chunks(n: int) -> Iterator[slice]:
    """Slices that cover n rows, each small enough to work on: memory stays bounded however many images there are."""
    for start in range(0, n, ROWS):
        yield slice(start, min(start + ROWS, n))


def combine(probs: Probs, weights: np.ndarray) -> np.ndarray:
    """The weighted average of M models' predictions, float32 (N, C).

    weights: (M,), non-negative, sum 1; members of weight 0 are not even read. Summed in float64 and rounded at the end,
    so that a vote that is a tie on paper is a tie here, too.
    """
    members = np.flatnonzero(weights)
    combined = np.empty(probs[0].shape, np.float32)
    for rows in chunks(len(combined)):
        combined[rows] = sum(weights[m] * np.asarray(probs[int(m)][rows], np.float64) for m in members)
    return combined


@dataclass(frozen=True)
class Member:
    """One candidate in an ensemble.

    Attributes:
        id: the candidate's.
        weight: its share of the average, above 0; all members' sum to 1.
        run: the run directory that holds it, when that is another one than the ensemble's: absolute, or relative to it.
    """

    id: str
    weight: float
    run: str = ""

    def candidate(self, home: UPath) -> Candidate:
        """The candidate itself; raises UserError when it is no longer there. home: the run that holds the ensemble."""
        run = home / self.run if self.run else home
        path = run / "candidates" / self.id
        if not (path / "candidate.json").exists():
            raise UserError(f"{run} has no candidate {self.id}, which the ensemble needs; select again")
        return Candidate(self.id, path, run_directory.read_json(path / "candidate.json"))


@dataclass(frozen=True)
class Ensemble:
    """What ensembles/<name>.json holds.

    Attributes:
        name: the file's.
        members: heaviest first.
        selector: which one chose them, for example "greedy".
        split_fingerprint: of the splits that it was chosen on.
        scores: `scores["select"]` is the ensemble on the select split: `accuracy` with its 95 % `interval`, `log_loss`,
            `brier`, `ece`, and where that was measured: `split`, `images`, `shared` (the split also served to tune).
            `scores["best_single"]` is the same for the most accurate single candidate, with its `id`;
            `scores["gain"]` is the difference.
        options: what the selector was asked for.
        left_out: candidates that could not be used, by id, with the reason.
        created: seconds since the epoch.
    """

    name: str
    members: tuple[Member, ...]
    selector: str
    split_fingerprint: str
    scores: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    @property
    def weights(self) -> np.ndarray:
        """(len(members),) float64, in the members' order."""
        return np.array([member.weight for member in self.members])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        members = []
        for member in self.members:
            entry: dict[str, Any] = {"id": member.id, "weight": member.weight}
            if member.run:
                entry["run"] = member.run
            members.append(entry)
        return {
            "name": self.name,
            "members": members,
            "selector": self.selector,
            "options": self.options,
            "split_fingerprint": self.split_fingerprint,
            "scores": self.scores,
            "left_out": self.left_out,
            "created": self.created or time.time(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "ensemble") -> "Ensemble":
        """The inverse of `to_dict`; needs only `members`. Raises UserError when they are damaged."""
        try:
            members = tuple(Member(str(m["id"]), float(m["weight"]), m.get("run", "")) for m in values["members"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"ensemble {name} is damaged: expected members: [{{id, weight}}]; select again") from None
        total = sum(member.weight for member in members)
        if not members or min(member.weight for member in members) < 0 or abs(total - 1) > 1e-3:
            raise UserError(f"ensemble {name} is damaged: its weights sum to {total:g}, expected 1; select again")
        return cls(
            name=str(values.get("name", name)),
            members=members,
            selector=str(values.get("selector", "unknown")),
            split_fingerprint=str(values.get("split_fingerprint", "")),
            scores=values.get("scores", {}),
            options=values.get("options", {}),
            left_out=values.get("left_out", {}),
            created=float(values.get("created", 0.0)),
        )


def write_ensemble(run: UPath, ensemble: Ensemble) -> UPath:
    """Write ensembles/<name>.json, whole or not at all, and return its path."""
    path = run / "ensembles" / f"{ensemble.name}.json"
    run_directory.write_json(path, ensemble.to_dict())
    return path


def read_ensemble(run: UPath, name: str | None = None) -> Ensemble:
    """The ensemble of that name, or the one written last. Raises UserError when there is none."""
    folder = run / "ensembles"
    files = {path.stem: path for path in folder.glob("*.json")} if folder.exists() else {}
    if not files:
        raise UserError(f"{run} has no ensemble yet; make one with python -m ensemble.select --run {run}")
    if name is None:
        name = max(files, key=lambda stem: files[stem].stat().st_mtime)
    if name not in files:
        raise UserError(f"{run} has no ensemble {name}; it has {', '.join(sorted(files))}")
    return Ensemble.from_dict(run_directory.read_json(files[name]), name)
