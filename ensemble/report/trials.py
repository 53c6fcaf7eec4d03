"""Every trial of a run, as its records and its candidates tell: what it tried, how it ended, what it scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainables.job import Outcome
from trainables.run.records import Stage, TrialRecord
from trainables.run_directory import Candidate, CandidateInfo

_ELSE = {  # what a trial may be in a report beside an Outcome
    "added": "predictions added by another tool",
    Stage.RUNNING: "interrupted; the same command continues with it",
    Stage.WAITING: "stopped at a rung; the same command with a larger budget may continue with it",
}


@dataclass(frozen=True)
class Trial:
    """One trial, or a candidate that some other tool has added.

    Attributes:
        id: the candidate's, or would-be candidate's.
        outcome: an Outcome ("finished", "pruned", "diverged", ...); "running" or "waiting" where it has none yet;
            "added" where it is no trial.
        config: TrialConfig as a dict, {} when unknown.
        candidate: what it left on disk, if anything.
        curve: tune accuracy after each epoch.
        error, traceback: of a trial that failed.
    """

    id: str
    outcome: str
    config: dict[str, Any] = field(default_factory=dict)
    candidate: Candidate | None = None
    curve: tuple[float, ...] = ()
    error: str = ""
    traceback: str = ""

    @property
    def info(self) -> CandidateInfo:
        """The candidate's candidate.json, an empty one without a candidate."""
        return self.candidate.info if self.candidate else CandidateInfo(self.id)

    @property
    def architecture(self) -> str:
        return str(self.config.get("backbone", "unknown"))


def described(outcome: str) -> str:
    """What an outcome means, for a person; "" for a word that is not known."""
    return Outcome(outcome).text if outcome in set(Outcome) else _ELSE.get(outcome, "")


def is_failure(outcome: str) -> bool:
    """Whether such a trial left nothing through an error."""
    return outcome in set(Outcome) and Outcome(outcome).is_failure


def list_trials(records: Sequence[TrialRecord], candidates: list[Candidate]) -> list[Trial]:
    """All trials of the records by number, then the candidates that they do not know."""
    found = {candidate.id: candidate for candidate in candidates}
    trials = [_of_record(record, found.pop(record.id, None)) for record in records]
    return trials + [_of_candidate(candidate) for candidate in found.values()]


def _of_record(record: TrialRecord, candidate: Candidate | None) -> Trial:
    known = _of_candidate(candidate) if candidate else None
    config = record.config.to_dict() if record.config else dict(record.params)
    return Trial(
        id=record.id,
        outcome=str(record.outcome or record.stage),
        config=known.config if known and known.config else config,
        candidate=candidate,
        curve=known.curve if known else (),
        error=record.error,
        traceback=record.traceback,
    )


def _of_candidate(candidate: Candidate) -> Trial:
    info = candidate.info
    return Trial(
        id=candidate.id,
        outcome=info.outcome,
        config=info.config.to_dict() if info.config else {},
        candidate=candidate,
        curve=tuple(row["tune_accuracy"] for row in info.curve if "tune_accuracy" in row),
    )
