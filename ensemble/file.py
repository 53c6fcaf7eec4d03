"""What an ensemble is: members with weights, how their predictions combine, and the JSON file that says so."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from upath import UPath

from ensemble.risk import Risk
from ensemble.selection.blend import Blend, Probs, Stack, combine
from ensemble.selection.goal import METRICS, MOST_PROBABLE, Decision, Goal
from trainables.errors import UserError
from trainables.run_directory import ID, Candidate, read_candidate, refuse_links, safe_id
from trainables.storage import Damaged, exists, is_link, is_local, list_folder, parse, read_json, write_json

__all__ = [
    "Ensemble",
    "Member",
    "as_before",
    "combine",
    "list_ensembles",
    "read_ensemble",
    "relative_run",
    "run_of",
    "write_ensemble",
]


def relative_run(run: UPath, home: UPath) -> str:
    """How an ensemble in `home` names another run: relative where both are local, so that they move together."""
    if run == home:
        return ""
    if is_local(run) and is_local(home):
        return os.path.relpath(str(run), str(home))
    return str(run)


def run_of(runs: Sequence[UPath], name: str) -> UPath:
    """The run that an ensemble calls `name`, among those that the user named: the ensemble's own first.

    No other is opened, because a file could name any path or address. Raises UserError when it is not among them.
    """
    home = runs[0]
    if not name:
        return home
    for run in runs[1:]:
        place = str(run) if "://" in name else os.path.abspath(str(run))
        if place == (name if "://" in name else os.path.abspath(os.path.join(str(home), name))):
            return run
    raise UserError(f"the ensemble has members of the run {name}; name it, too: --run {home} --run {name}")


DEFAULT = "default.json"  # names the ensemble that predict, serve, export, refit and report take


@dataclass(frozen=True)
class Member:
    """One candidate in an ensemble.

    Attributes:
        id: the candidate's.
        weight: its share of the average, above 0; all members' sum to 1.
        run: the run directory that holds it, when that is another one than the ensemble's; see `run_of`.
        temperature: by which its log-probabilities are divided before they are averaged; 1 leaves them as they are.
    """

    id: str
    weight: float
    run: str = ""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        safe_id(self.id, "a member's id")
        if not 0 <= self.weight <= 1 + 1e-6 or not 0 < self.temperature < np.inf:
            raise ValueError(f"member {self.id} has weight {self.weight} and temperature {self.temperature}")

    def candidate(self, runs: Sequence[UPath]) -> Candidate:
        """The candidate itself; raises UserError when it is not there. runs: the ensemble's own first; see `run_of`."""
        run = run_of(runs, self.run)
        path = run / "candidates" / self.id
        if not exists(path / "candidate.json"):
            raise UserError(f"{run} has no candidate {self.id}, which the ensemble needs; select again")
        return read_candidate(path)


@dataclass(frozen=True)
class Ensemble:
    """What ensembles/<name>.json holds.

    Attributes:
        name: the file's.
        members: heaviest first.
        selector: which one chose them, for example "greedy".
        split_fingerprint: of the splits that it was chosen on.
        scores: `scores["claim"]` is what to expect on new images: `accuracy` with its 95 % `interval`, `log_loss`,
            `brier`, `ece`, all of the whole selection on rows that it did not see, `gain` (`accuracy`, `interval`) over
            the best single candidate, and where that was measured: `split`, `images`, `shared` (the split also served
            to tune). Older files have none. `scores["best_single"]` and `scores["best_single_calibrated"]` are the same
            for that candidate, with its `id`; `scores["gain"]` is the difference again; `scores["select"]` is the
            ensemble on the rows that it was chosen on, which flatters it.
        stack: the linear layer that replaces the weighted average when the selector is "stacking".
        temperature: by which the log-probabilities of the average are divided in the end; 1 leaves them as they are.
        risk: when it is unsure, see ensemble/risk.py, and `scores["risk"]` how well that does on the rows that it was
            set on; None in older files, and where nothing could be held out.
        metric: what it was chosen for, see ensemble/selection/goal.py.
        decision: how its probabilities become answers; mostly the most probable class is the answer.
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
    risk: Risk | None = None
    metric: str = "accuracy"
    decision: Decision = MOST_PROBABLE
    options: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    frontier: tuple[dict[str, Any], ...] = ()
    insight: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0

    def predict(self, probs: Probs) -> np.ndarray:
        """The ensemble's probabilities, float32 (N, C), from those of its members, in their order."""
        temperatures = np.array([member.temperature for member in self.members])
        return Blend(self.weights, temperatures, self.stack, self.temperature)(probs)

    def agreement(self, votes: Probs, probs: np.ndarray) -> np.ndarray:
        """The weight of the members that on their own give the same answer, 0 to 1, (N,).

        votes: the members' probabilities (M, N, C); probs: the ensemble's (N, C).
        """
        answer = self.decision.answers(probs)
        same = np.array([self.decision.answers(np.asarray(vote)) == answer for vote in votes], float)
        shares: np.ndarray = self.weights @ same
        return shares

    @property
    def weights(self) -> np.ndarray:
        """(len(members),) float64, in the members' order."""
        return np.array([member.weight for member in self.members])

    @property
    def goal(self) -> Goal:
        """What it was chosen for."""
        return Goal(self.metric, self.decision.cost)

    @property
    def claim(self) -> dict[str, Any] | None:
        """What to expect on new images, `scores["claim"]`; None in a file that was written before there were claims."""
        return self.scores.get("claim")

    def single(self) -> Member | None:
        """The best single model that the ensemble was compared with, alone; None when its scores do not name it."""
        named = self.scores.get("best_single", {})
        id, run = named.get("id"), named.get("run", "")
        return Member(id, 1.0, run) if isinstance(id, str) and isinstance(run, str) else None

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
        if self.metric != "accuracy":
            values["metric"] = self.metric
        decision = {"factors": self.decision.factors, "cost": self.decision.cost}
        if any(value is not None for value in decision.values()):
            values["decision"] = {key: value.tolist() for key, value in decision.items() if value is not None}
        if self.risk is not None:
            values["risk"] = dataclasses.asdict(self.risk)
        if self.frontier:
            values["frontier"] = list(self.frontier)
        if self.insight:
            values["insight"] = self.insight
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str) -> "Ensemble":
        """The inverse of `to_dict`; needs only `members`. Its name is the file's. Raises UserError for damage."""
        if "members" not in values:
            raise UserError(f"ensemble {name} is damaged: expected members: [{{id, weight}}]; select again")
        try:
            found = parse({**values, "name": name}, _File, f"ensemble {name}")
            stack = None if found.stack is None else _stack(found.stack, len(found.members))
            decision = _decision(found.decision)
            if found.metric not in METRICS or (found.metric == "cost") != (decision.cost is not None):
                raise ValueError(f"metric {found.metric[:40]!r}")
            for score in found.scores.values():
                _check_score(score)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"ensemble {name} is damaged ({error}); select again") from None
        total = sum(member.weight for member in found.members)
        if not found.members or abs(total - 1) > 1e-3 or not 0 < found.temperature < np.inf:
            raise UserError(f"ensemble {name} is damaged: its weights sum to {total:g}, expected 1; select again")
        return cls(**{key: getattr(found, key) for key in _PLAIN}, stack=stack, decision=decision)


@dataclass(frozen=True)
class _File:
    """An ensemble as its file has it; see Ensemble."""

    name: str
    members: tuple[Member, ...]
    selector: str = "unknown"
    split_fingerprint: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    stack: dict[str, Any] | None = None
    temperature: float = 1.0
    risk: Risk | None = None
    metric: str = "accuracy"
    decision: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    frontier: tuple[dict[str, float], ...] = ()
    insight: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0


def _check_score(score: dict[str, Any]) -> None:
    """Raise ValueError for a score whose numbers are none: what shows them need not ask again."""
    for key, value in score.items():
        if key in ("id", "run", "split", "named_by", "name"):
            is_fine = isinstance(value, str)
        elif key == "interval":
            is_fine = isinstance(value, list) and len(value) == 2 and all(_is_number(end) for end in value)
        elif key in ("gain", "metric"):
            is_fine = isinstance(value, dict)
            if is_fine:
                _check_score(value)
        else:
            is_fine = _is_number(value) or isinstance(value, bool | dict | list) or value is None
        if not is_fine:
            raise ValueError(f"scores have {key} {str(value)[:40]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PLAIN = tuple(part.name for part in dataclasses.fields(_File) if part.name not in ("stack", "decision"))


def write_ensemble(run: UPath, ensemble: Ensemble, default: bool = True) -> UPath:
    """Write ensembles/<name>.json, whole or not at all, and return its path; `default`: `read_ensemble` takes it."""
    refuse_links(run)
    path = run / "ensembles" / f"{safe_id(ensemble.name, 'the name of an ensemble')}.json"
    write_json(path, ensemble.to_dict())
    if default:
        write_json(run / DEFAULT, {"ensemble": ensemble.name})
    return path


def as_before(run: UPath, ensemble: Ensemble) -> Ensemble:
    """The ensemble with the `created` of the one that its file holds, where that answers alike.

    To choose again and choose the same is no new choice: what was predicted or reported with it still holds.
    """
    path = run / "ensembles" / f"{ensemble.name}.json"
    try:
        before = Ensemble.from_dict(read_json(path), ensemble.name) if exists(path) and not is_link(path) else None
    except (UserError, Damaged):
        before = None
    if before is None or _answers(before) != _answers(ensemble):
        return ensemble
    return replace(ensemble, created=before.created)


def _answers(ensemble: Ensemble) -> dict[str, Any]:
    """What decides an ensemble's answers, and how sure they are."""
    apart = ("options", "scores", "left_out", "created", "frontier", "insight")
    return {key: value for key, value in ensemble.to_dict().items() if key not in apart}


def read_ensemble(run: UPath, name: str | None = None) -> Ensemble:
    """The ensemble of that name, or the run's default. Raises UserError when there is none."""
    files = _files(run)
    if not files:
        raise UserError(f"{run} has no ensemble yet; make one with python -m ensemble.select --run {run}")
    if name is None:
        name = _default(run, files)
    if name not in files:
        raise UserError(f"{run} has no ensemble {name}; it has {', '.join(sorted(files))}")
    return Ensemble.from_dict(read_json(files[name]), name)


def _default(run: UPath, files: dict[str, UPath]) -> str:
    """The name that default.json gives; without one (an older run), that of the ensemble that was created last."""
    if exists(run / DEFAULT) and not is_link(run / DEFAULT):
        name = read_json(run / DEFAULT).get("ensemble")
        if isinstance(name, str) and name in files:
            return name
        raise UserError(
            f"{run / DEFAULT} names the ensemble {str(name)[:40]!r}; expected one of {', '.join(sorted(files))}: "
            "name one with --ensemble, or select again"
        )
    found = list_ensembles(run)
    return max(found, key=lambda ensemble: (ensemble.created, ensemble.name)).name if found else min(files)


def list_ensembles(run: UPath) -> list[Ensemble]:
    """Every ensemble of a run that can be read."""
    found = []
    for name, path in sorted(_files(run).items()):
        with contextlib.suppress(UserError, OSError):
            found.append(Ensemble.from_dict(read_json(path), name))
    return found


def _files(run: UPath) -> dict[str, UPath]:
    return {
        path.stem: path
        for path in list_folder(run / "ensembles")
        if path.suffix == ".json" and ID.fullmatch(path.stem) and not is_link(path)
    }


def _decision(values: dict[str, Any]) -> Decision:
    factors, cost = (None if key not in values else np.array(values[key], np.float64) for key in ("factors", "cost"))
    for array, dimensions in ((factors, 1), (cost, 2)):
        if array is None:
            continue
        if array.ndim != dimensions or array.shape[0] != array.shape[-1] or not np.isfinite(array).all():
            raise ValueError(f"a decision of shape {array.shape}")
    return Decision(factors, cost) if values else MOST_PROBABLE


def _stack(values: dict[str, Any], members: int) -> Stack:
    stack = Stack(np.array(values["coefficients"], np.float64), np.array(values["intercept"], np.float64))
    classes = len(stack.intercept)
    if stack.coefficients.shape != (classes, members, classes) or not np.isfinite(stack.coefficients).all():
        raise ValueError(f"coefficients {stack.coefficients.shape}")
    return stack
