"""What an ensemble is: members with weights, how their predictions combine, and the JSON file that says so."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from upath import UPath

from ensemble.blend import Blend, Probs, Stack, combine
from trainables import candidate as run_directory
from trainables.candidate import Candidate
from trainables.errors import UserError

__all__ = ["Ensemble", "Member", "combine", "read_ensemble", "run_at", "write_ensemble"]


def run_at(home: UPath, name: str) -> UPath:
    """The run that an ensemble in the run `home` calls `name`: a URL, or a path, absolute or relative to `home`."""
    return UPath(name) if "://" in name else home / name


@dataclass(frozen=True)
class Member:
    """One candidate in an ensemble.

    Attributes:
        id: the candidate's.
        weight: its share of the average, above 0; all members' sum to 1.
        run: the run directory that holds it, when that is another one than the ensemble's; see `run_at`.
        temperature: by which its log-probabilities are divided before they are averaged; 1 leaves them as they are.
    """

    id: str
    weight: float
    run: str = ""
    temperature: float = 1.0

    def candidate(self, home: UPath) -> Candidate:
        """The candidate itself; raises UserError when it is no longer there. home: the run that holds the ensemble."""
        run = run_at(home, self.run) if self.run else home
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
            `scores["gain"]` is the difference, `scores["cross_validated"]` (of `auto`) what to expect on new images.
        stack: the linear layer that replaces the weighted average when the selector is "stacking".
        temperature: by which the log-probabilities of the average are divided in the end; 1 leaves them as they are.
        options: what the selector was asked for.
        left_out: candidates that could not be used, by id, with the reason.
        frontier: the best ensemble within each latency: `latency_ms`, `members`, `accuracy`, `log_loss`.
        insight: what each member is good for; see ensemble.explain.
        created: seconds since the epoch.
    """

    name: str
    members: tuple[Member, ...]
    selector: str
    split_fingerprint: str
    scores: dict[str, Any]
    stack: Stack | None = None
    temperature: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    frontier: tuple[dict[str, Any], ...] = ()
    insight: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0

    def predict(self, probs: Probs) -> np.ndarray:
        """The ensemble's probabilities, float32 (N, C), from those of its members, in their order."""
        temperatures = np.array([member.temperature for member in self.members])
        return Blend(self.weights, temperatures, self.stack, self.temperature)(probs)

    @property
    def weights(self) -> np.ndarray:
        """(len(members),) float64, in the members' order."""
        return np.array([member.weight for member in self.members])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is empty is left away, so that a plain average reads as one."""
        members = []
        for member in self.members:
            entry: dict[str, Any] = {"id": member.id, "weight": member.weight}
            if member.run:
                entry["run"] = member.run
            if member.temperature != 1:
                entry["temperature"] = member.temperature
            members.append(entry)
        values: dict[str, Any] = {
            "name": self.name,
            "members": members,
            "selector": self.selector,
            "options": self.options,
            "split_fingerprint": self.split_fingerprint,
            "scores": self.scores,
            "left_out": self.left_out,
            "created": self.created or time.time(),
        }
        if self.temperature != 1:
            values["temperature"] = self.temperature
        if self.stack is not None:
            values["stack"] = {
                "coefficients": self.stack.coefficients.tolist(),
                "intercept": self.stack.intercept.tolist(),
            }
        if self.frontier:
            values["frontier"] = list(self.frontier)
        if self.insight:
            values["insight"] = self.insight
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "ensemble") -> "Ensemble":
        """The inverse of `to_dict`; needs only `members`. Raises UserError when they are damaged."""
        try:
            members = tuple(_member(entry) for entry in values["members"])
            stack = _stack(values["stack"], len(members)) if "stack" in values else None
            temperature = _temperature(values)
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
            stack=stack,
            temperature=temperature,
            options=values.get("options", {}),
            left_out=values.get("left_out", {}),
            frontier=tuple(values.get("frontier", ())),
            insight=values.get("insight", {}),
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


def _member(entry: dict[str, Any]) -> Member:
    id, weight = str(entry["id"]), float(entry["weight"])
    return Member(id, weight, str(entry.get("run", "")), _temperature(entry))


def _temperature(values: dict[str, Any]) -> float:
    temperature = float(values.get("temperature", 1.0))
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature {temperature}")
    return temperature


def _stack(values: dict[str, Any], members: int) -> Stack:
    stack = Stack(np.array(values["coefficients"], np.float64), np.array(values["intercept"], np.float64))
    classes = len(stack.intercept)
    if stack.coefficients.shape != (classes, members, classes):
        raise ValueError(f"coefficients {stack.coefficients.shape}")
    return stack
