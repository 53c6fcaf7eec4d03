"""Every trial of a run, as its study and its candidates tell: what it tried, how it ended, what it scored."""

import contextlib
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from upath import UPath

from trainables.errors import UserError
from trainables.job import Outcome
from trainables.run_directory import Candidate, CandidateInfo, study_name, trial_id
from trainables.storage import exists, hide_password, is_link, is_local, read_bytes

NO_TIME = "not started"  # what a proposal that did not fit into the time left is called here
_ELSE = {  # what a trial may be in a report beside an Outcome
    "added": "predictions added by another tool",
    NO_TIME: "proposed, but did not fit into the time left",
    "running": "interrupted; the same command continues with it",
    "failed": "failed",
}


@dataclass(frozen=True)
class Trial:
    """One trial, or a candidate that some other tool has added.

    Attributes:
        id: the candidate's, or would-be candidate's.
        outcome: "finished", "time", "pruned", "diverged", "out of memory", "bug", ...; "not started" for a proposal
            that did not fit into the time left; "running" when nobody has told how it ended.
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
    return outcome == "failed" or (outcome in set(Outcome) and Outcome(outcome).is_failure)


def read_study(run: UPath) -> optuna.Study:
    """A copy in memory of the study in a run's study.db: the file itself may be in use, elsewhere or read-only.

    Raises UserError when there is none, or none that Optuna can read.
    """
    path = run / "study.db"
    if not exists(path) or is_link(path):
        raise UserError(f"{run.name} has no study.db; a study in another storage is read with --storage URL")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "study.db"
        try:
            if is_local(path):  # through SQLite, which waits for a writer in the middle of a transaction
                source = sqlite3.connect(f"{Path(str(path)).resolve().as_uri()}?mode=ro", uri=True)
                with contextlib.closing(source), contextlib.closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            else:
                copy.write_bytes(read_bytes(path))
            _check_schema(copy)
            return load_study(f"sqlite:///{copy}", study_name(run))
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path} is no study database ({error})") from None


def _check_schema(file: Path) -> None:
    """Raise UserError for a database with anything but tables and indexes.

    A view or a trigger in the place of a table is a program, which may never end.
    """
    with contextlib.closing(sqlite3.connect(file)) as database:
        entries = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    for kind, name, sql in entries:
        text = str(sql or "").upper()
        if kind not in ("table", "index") or "CREATE VIRTUAL" in text or "GENERATED ALWAYS" in text or " AS (" in text:
            raise UserError(f"its study.db holds a {kind} ({str(name)[:40]!r}) that no study has")


def load_study(storage: str, name: str) -> optuna.Study:
    """A copy in memory of the study of that name in an Optuna storage, or of the only one that is there."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    memory = optuna.storages.InMemoryStorage()
    try:
        opened = optuna.storages.get_storage(storage)
        names = optuna.get_all_study_names(opened)
        if name not in names and len(names) != 1:
            raise UserError(f"the storage has no study {name}; it has {', '.join(names) or 'none'}")
        name = name if name in names else names[0]
        optuna.copy_study(from_study_name=name, from_storage=opened, to_storage=memory)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy's many, and a driver that is not installed
        raise UserError(f"the study cannot be read: {hide_password(str(error).splitlines()[0])}") from None
    return optuna.load_study(study_name=name, storage=memory)


def list_trials(study: optuna.Study | None, candidates: list[Candidate]) -> list[Trial]:
    """All trials of the study by number, then the candidates that it does not know."""
    found = {candidate.id: candidate for candidate in candidates}
    trials = []
    if study is not None:
        is_accuracy = study.direction == optuna.study.StudyDirection.MAXIMIZE
        for frozen in study.get_trials(deepcopy=False):
            trials.append(_of_study(frozen, found.pop(trial_id(frozen.number), None), is_accuracy))
    return trials + [_of_candidate(candidate) for candidate in found.values()]


def _of_study(frozen: FrozenTrial, candidate: Candidate | None, is_accuracy: bool) -> Trial:
    attributes = frozen.user_attrs
    outcome = str(attributes.get("outcome", ""))
    if not outcome:
        outcome = "running"
        if frozen.state.is_finished():
            failed_early = frozen.state == TrialState.FAIL and "config" not in attributes
            outcome = (
                NO_TIME
                if failed_early
                else {"COMPLETE": "finished", "PRUNED": "pruned"}.get(frozen.state.name, "failed")
            )
    known = _of_candidate(candidate) if candidate else None
    curve = tuple(v for _, v in sorted(frozen.intermediate_values.items())) if is_accuracy else ()
    config = attributes.get("config")
    if not isinstance(config, dict):
        config = frozen.params
    return Trial(
        id=trial_id(frozen.number),
        outcome=outcome,
        config=known.config if known and known.config else dict(config),
        candidate=candidate,
        curve=known.curve if known and known.curve else curve,
        error=str(attributes.get("error", "")),
        traceback=str(attributes.get("traceback", "")),
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
