"""The life of every trial of a sweep, as it stands in the run directory: trials/.

A record is written when its trial is proposed, when it waits at a rung, when it is to run again, and when it has ended:
*to resume is to read the records*. Each has a file of its own, until PACKED of them have ended; those are put into one
file that is not touched again, so that 20,000 trials are not 20,000 files to read.

    trials/
      0007.json        a trial that runs, waits or has ended not long ago
      ended-0000.json  records of the first PACKED trials that had ended, and so on
      spent.json       the time that the sweep has used
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from upath import UPath

from trainables.config import TrialConfig
from trainables.job import Outcome
from trainables.run_directory import parse_config, to_json, trial_id
from trainables.storage import Damaged, exists, is_link, list_folder, parse, patiently, read_json, write_json

FOLDER = "trials"
PACKED = 64
_LOOSE, _PACK = re.compile(r"(\d{4,9})\.json"), re.compile(r"ended-(\d{4,9})\.json")


class Stage(StrEnum):
    """Where a trial stands."""

    RUNNING = "running"
    """It is being trained, or was when its sweep was interrupted: then the next process takes it up."""
    WAITING = "waiting"
    """At a rung, with its checkpoint; see search.study.promotion."""
    ENDED = "ended"


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep.

    Attributes:
        number: counted from 0; `id` is the same as text, and the name of the candidate that the trial becomes.
        params: of its search space, as they were proposed; distributions: of each, in Optuna's JSON.
        given: those params that were not sampled, because they were to be tried.
        config: what is trained; None where the proposal was refused.
        seed_of: id of the trial whose configuration it is, with another seed.
        stage, outcome: where it stands; the outcome of those that have ended.
        value: of the sampler's objective, of those that teach it something.
        scores: (epoch, the objective's score on the tune split) of every epoch that was reported.
        retries: how often it was run again after a bug.
        error, traceback: of a trial that failed.
        seconds: of training.
        began, ended: time.time() of both.
        ensemble: the ensemble so far when it had ended, see search.budget.Goal.note.
    """

    number: int
    params: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, str] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    config: TrialConfig | None = None
    seed_of: str = ""
    stage: Stage = Stage.RUNNING
    outcome: Outcome | None = None
    value: float | None = None
    scores: tuple[tuple[int, float], ...] = ()
    retries: int = 0
    error: str = ""
    traceback: str = ""
    seconds: float | None = None
    began: float = 0.0
    ended: float = 0.0
    ensemble: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.number < 0 or (self.stage is Stage.ENDED) != (self.outcome is not None):
            raise ValueError("a trial's number is at least 0, and it has an outcome if it has ended, and only then")

    @property
    def id(self) -> str:
        return trial_id(self.number)

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that a budget allows: it was, or will be, trained."""
        return self.outcome is None or self.outcome.counts

    def scored(self, epoch: int, score: float) -> "TrialRecord":
        """With the score after an epoch; one that is known stands, for a lane that was started again repeats epochs."""
        if any(known == epoch for known, _ in self.scores):
            return self
        return replace(self, scores=tuple(sorted([*self.scores, (epoch, score)])))

    def waits(self) -> "TrialRecord":
        return replace(self, stage=Stage.WAITING)

    def goes_on(self) -> "TrialRecord":
        return replace(self, stage=Stage.RUNNING)

    def retried(self) -> "TrialRecord":
        return replace(self, retries=self.retries + 1)

    def ends(self, outcome: Outcome, **what: Any) -> "TrialRecord":
        """With its end; `what`: value, error, traceback, seconds, ended."""
        return replace(self, stage=Stage.ENDED, outcome=outcome, **what)


@dataclass(frozen=True)
class Spent:
    """What a sweep has used, over all its processes: seconds by the clock, and seconds of its devices together."""

    seconds: float = 0.0
    device_seconds: float = 0.0


class Records:
    """The records of the sweep in a run directory, in memory and on disk. One process at a time writes them.

    Raises Damaged when a file in trials/ is none of its.
    """

    def __init__(self, run: UPath) -> None:
        self.folder = run / FOLDER
        self.by_number: dict[int, TrialRecord] = {}
        self.changes = 0  # grows whenever a trial's stage or outcome has changed
        self._loose: set[int] = set()  # ended, in a file of its own
        self._unwritten: set[int] = set()
        self._packs = 0
        for path, records in _read(run):
            pack = _PACK.fullmatch(path.name)
            if pack:
                self._packs = max(self._packs, int(pack[1]) + 1)
            for record in records:
                self.by_number[record.number] = record
                if not pack and record.stage is Stage.ENDED:
                    self._loose.add(record.number)
        self.next_number = max(self.by_number, default=-1) + 1
        self.spent = read_spent(run)

    def __iter__(self) -> Iterator[TrialRecord]:
        """All records by number."""
        return iter([self.by_number[number] for number in sorted(self.by_number)])

    def __getitem__(self, id: str) -> TrialRecord:
        return self.by_number[int(id)]

    def __contains__(self, id: str) -> bool:
        return id.isdigit() and int(id) in self.by_number and self.by_number[int(id)].id == id

    def note(self, record: TrialRecord) -> TrialRecord:
        """Keep a record; it is written with the next `flush`."""
        known = self.by_number.get(record.number)
        if known is not None and (known.stage, known.outcome) != (record.stage, record.outcome):
            self.changes += 1
        self.by_number[record.number] = record
        self.next_number = max(self.next_number, record.number + 1)
        self._unwritten.add(record.number)
        return record

    def put(self, record: TrialRecord) -> TrialRecord:
        """Keep a record, and write it at once."""
        self.note(record)
        self._write(record)
        if len(self._loose) >= PACKED:
            self._pack()
        return record

    def flush(self) -> None:
        """Write what has not been written."""
        for number in sorted(self._unwritten):
            self.put(self.by_number[number])

    def spend(self, spent: Spent) -> None:
        self.spent = spent
        write_json(self.folder / "spent.json", asdict(spent))

    def _write(self, record: TrialRecord) -> None:
        write_json(self.folder / f"{record.id}.json", to_json(record))
        self._unwritten.discard(record.number)
        if record.stage is Stage.ENDED:
            self._loose.add(record.number)

    def _pack(self) -> None:
        """Ended records from files of their own into one; a kill in between leaves some twice, and the same."""
        ended = [self.by_number[number] for number in sorted(self._loose)]
        write_json(self.folder / f"ended-{self._packs:04d}.json", {"records": [to_json(record) for record in ended]})
        self._packs += 1
        for record in ended:
            path = self.folder / f"{record.id}.json"
            patiently(path, lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
        self._loose = set()


def read_records(run: UPath) -> list[TrialRecord]:
    """Return the records of a run by number; none where the run was made without a sweep, or by an earlier version.

    Raises Damaged when a file in trials/ is none of a sweep's.
    """
    for last in (False, False, True):
        try:
            found = {record.number: record for _, records in _read(run) for record in records}
        except Damaged:  # in a sweep that runs, a file that was listed may just have been packed
            if last:
                raise
            continue
        return [found[number] for number in sorted(found)]
    raise AssertionError("the last of three tries returns or raises")


def read_spent(run: UPath) -> Spent:
    """Return what a run's sweep has used; nothing where there was none. Raises Damaged for another file."""
    path = run / FOLDER / "spent.json"
    return parse(read_json(path), Spent, path) if exists(path) and not is_link(path) else Spent()


def _read(run: UPath) -> Iterator[tuple[UPath, list[TrialRecord]]]:
    """Every file of records with what it holds: packs first, for a file of its own is at least as new."""
    paths = [path for path in list_folder(run / FOLDER) if path.name.endswith(".json") and path.name != "spent.json"]
    for path in sorted(paths, key=lambda path: (_PACK.fullmatch(path.name) is None, path.name)):
        if is_link(path):
            raise Damaged(f"{path} is a symbolic link, which is not followed")
        if _PACK.fullmatch(path.name):
            records = read_json(path).get("records")
            if not isinstance(records, list):
                raise Damaged(f"{path} has no list of records")
            yield path, [_record(values, path) for values in records]
        elif _LOOSE.fullmatch(path.name):
            record = _record(read_json(path), path)
            if f"{record.id}.json" != path.name:
                raise Damaged(f"{path} is the record of another trial, {record.id}")
            yield path, [record]
        else:
            raise Damaged(f"{path} is no record of a trial; nothing else belongs there")


def _record(values: object, where: UPath) -> TrialRecord:
    if not isinstance(values, dict):
        raise Damaged(f"{where} holds {type(values).__name__}, expected an object")
    config = parse_config(values.get("config"), where)
    record = parse({key: value for key, value in values.items() if key != "config"}, TrialRecord, where)
    return replace(record, config=config)
