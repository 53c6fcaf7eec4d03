"""What an experiment tracker is to a sweep: a run for the sweep itself, and one below it for every ended trial.

Standard library only. The trackers are in files of their names; who feeds them is tracking.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from upath import UPath

from trainables.errors import UserError
from trainables.job import Outcome

Value = str | int | float | bool
PROJECT = "ninefold"  # the experiment or project, where the user's environment names none
CURVE = "curve/"  # before the names of an epoch's scores: a trial's own score of the same name is another number


@dataclass(frozen=True)
class SweepInfo:
    """The sweep that is tracked.

    Attributes:
        key: tells it from all others, also of the same name: letters, digits and . _ - only.
        name: the run directory's, for people.
        run: the run directory.
        options: of its command, by name; without passwords.
    """

    key: str
    name: str
    run: UPath
    options: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class EndedTrial:
    """A trial that has ended.

    Attributes:
        id: "0007"; unique in its sweep.
        params: its hyperparameters, by the names of TrialConfig.
        outcome: how it ended; error: one line, where something went wrong.
        curve: a row for each epoch, with "epoch" and scores by name; "seconds" are those since it began, where known.
        scores: of the candidate that it left, by names that carry their split, such as select_accuracy; and its costs.
        began, ended: time.time() of both.
    """

    id: str
    params: dict[str, Value]
    outcome: Outcome
    error: str
    curve: tuple[dict[str, float], ...]
    scores: dict[str, float]
    began: float
    ended: float

    def time_of(self, row: dict[str, float]) -> float:
        """When an epoch of the curve had ended, as time.time(); the same whenever it is asked."""
        return self.began + row["seconds"] if "seconds" in row else self.ended


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep stands when its command ends.

    Attributes:
        complete: False when it was stopped and is to be continued.
        trials: that have ended so far.
        scores: of the ensemble, by names that carry their split, such as select_claim_accuracy.
        files: name -> text: the ensemble's file and the reports, as far as there are any.
        at: time.time() of the last trial's end.
        model: the ensemble as a folder of `ensemble.export --to mlflow`, for trackers that register models; None when
            none of them lacks it.
        digest: tells this ensemble from others of the same name.
    """

    complete: bool
    trials: int
    scores: dict[str, float]
    files: dict[str, str]
    at: float
    model: Path | None = None
    digest: str = ""


class Tracker(Protocol):
    """Where a sweep is shown. Only `Feed` calls it, from one thread.

    Every method may raise anything, and is then called again: so each may be called twice for the same, and what it
    has left half-done is completed.
    """

    name: str
    registers: bool  # models: then its SweepEnd has one

    def where(self, sweep: SweepInfo) -> str:
        """Return where people find it; without passwords."""

    def open(self, sweep: SweepInfo, key: str) -> str:
        """Start the sweep's run, or continue it, and return its key there.

        key: what `open` returned before, "" at first. Another return value says that the run is a new one, which has
        none of the trials.
        """

    def add(self, trial: EndedTrial) -> None:
        """Show a trial, whole."""

    def conclude(self, end: SweepEnd) -> None:
        """Show what the sweep has reached, and end its run."""


def missing(name: str, error: ImportError) -> UserError:
    """The error of a tracker whose library is not installed."""
    return UserError(f"--track {name} needs the package {error.name or name}; pip install 'ninefold[{name}]'")
