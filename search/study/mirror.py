"""The sweep's study for Optuna's own tools: study.db in the run directory, or the storage of --storage.

Every trial is added once, when it has ended, and nothing is read back to decide anything: a study that lacks a trial,
or has another one, is made anew from the records. A storage that cannot be reached does no harm to the sweep: what it
lacks is added when it is back.
"""

import contextlib
import math
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError
from upath import UPath

from ensemble.report.study import as_trial
from trainables.errors import UserError
from trainables.run.records import Stage, TrialRecord
from trainables.storage import hide_password, is_local, write_bytes

SQLITE = "sqlite:///"  # and then a file's path
AGAIN_S = 30.0  # after which a storage that could not be reached is tried again
FLUSH_S = 0.2  # that a sweep may be held up at a time
UPLOAD_S = 60.0


class Mirror:
    """The study in a storage.

    Args:
        url: of the storage, as Optuna takes it.
        name: of the study.
        maximise: its direction.
        records: what it is to hold so far.
        upload: where to put the file of `url` now and then, for a run on an object store; None: nowhere.
        patient: the storage may be away now, as it may be later.

    Raises UserError when the storage cannot be opened; if patient, only where no waiting would change that.
    """

    def __init__(
        self, url: str, name: str, maximise: bool, records: Iterable[TrialRecord], upload: UPath | None = None,
        patient: bool = False,
    ) -> None:  # fmt: skip
        self.url, self.name = url, name
        self.direction: Literal["maximize", "minimize"] = "maximize" if maximise else "minimize"
        self.upload = upload
        self.waiting = [record for record in records if record.stage is Stage.ENDED]
        self.failed_at = self.uploaded_at = 0.0
        self.changed = False
        self.study: optuna.Study | None = None
        try:
            self._open()
        except UserError:  # a record that is none
            raise
        except Exception as error:  # SQLAlchemy's many, and a driver that is not installed
            if not (patient and isinstance(error, OperationalError)):
                raise UserError(
                    f"the study cannot be opened in {hide_password(url)}: {_reason(error)}; check --storage"
                ) from None
            self._failed(error)

    def add(self, record: TrialRecord) -> None:
        """Let it have a trial that has ended; with the next `flush`."""
        self.waiting.append(record)

    def flush(self, most_s: float = FLUSH_S) -> None:
        """Add what it lacks, or as much of it as takes so long. Cheap to call often."""
        now = time.time()
        if self.waiting and now - self.failed_at > AGAIN_S:
            try:
                study = self.study or self._open()
                while self.waiting and time.time() - now < most_s:
                    study.add_trial(as_trial(self.waiting[0]))
                    self.waiting.pop(0)
                    self.changed = True
            except UserError:  # a record that is none
                raise
            except Exception as error:  # SQLAlchemy's many
                self._failed(error)
        if self.upload is not None and self.changed and now - self.uploaded_at > UPLOAD_S:
            self._put(now)

    def close(self) -> None:
        self.failed_at = self.uploaded_at = 0.0
        self.flush(math.inf)

    def _failed(self, error: Exception) -> None:
        if not self.failed_at:
            print(f"the study's storage failed, the sweep goes on: {_reason(error)}", file=sys.stderr)
        self.failed_at = time.time()

    def _open(self) -> optuna.Study:
        """The study, with the trials that it has in common with the records; the others wait to be added."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # a database server may have closed an idle connection since: ask before use
        options = {} if self.url.startswith(SQLITE) else {"pool_pre_ping": True}
        storage = RDBStorage(self.url, engine_kwargs=options)
        study = self._create(storage)
        present = [(trial.user_attrs.get("id"), trial.value) for trial in study.get_trials(deepcopy=False)]
        ids = {record.id: as_trial(record).value for record in self.waiting}
        if any(ids.get(str(id), id) != value for id, value in present) or len(dict(present)) < len(present):
            optuna.delete_study(study_name=self.name, storage=storage)
            study, present = self._create(storage), []
        known = {id for id, _ in present}
        self.waiting = [record for record in self.waiting if record.id not in known]
        self.study = study
        return study

    def _create(self, storage: RDBStorage) -> optuna.Study:
        return optuna.create_study(storage=storage, study_name=self.name, direction=self.direction, load_if_exists=True)

    def _put(self, now: float) -> None:
        """Write the file to the run on the object store; whole, whatever is being written to it."""
        assert self.upload is not None
        with tempfile.TemporaryDirectory() as folder:
            snapshot = Path(folder) / "study.db"
            source, target = sqlite3.connect(self.url.removeprefix(SQLITE)), sqlite3.connect(snapshot)
            with contextlib.closing(source), contextlib.closing(target):
                source.backup(target)
            write_bytes(self.upload, snapshot.read_bytes())
        self.uploaded_at, self.changed = now, False


def open_mirror(
    run: UPath, storage: str | None, name: str, maximise: bool, records: Iterable[TrialRecord], patient: bool = False
) -> Mirror:
    """The mirror of a run's records: in `storage`, else in the run directory's study.db. See Mirror."""
    if storage:
        return Mirror(storage, name, maximise, records, patient=patient)
    records = list(records)
    if is_local(run):
        file = Path(str(run)) / "study.db"
        if file.exists() and not _is_study(file):
            file.unlink()
        try:
            return Mirror(f"{SQLITE}{file}", name, maximise, records)
        except UserError:  # killed when it was made, or damaged; the records have it all
            file.unlink(missing_ok=True)
            return Mirror(f"{SQLITE}{file}", name, maximise, records)
    # made anew here at each start: there is nothing to be learnt from the old one
    file = Path(tempfile.mkdtemp(prefix="study-")) / "study.db"
    return Mirror(f"{SQLITE}{file}", name, maximise, records, upload=run / "study.db")


def _is_study(file: Path) -> bool:
    """Whether a file is a database with nothing but tables and indexes, as Optuna makes them.

    A view or a trigger in the place of a table is a program, which may never end.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            entries = database.execute("SELECT type, sql FROM sqlite_master").fetchall()
    except sqlite3.Error:
        return False
    texts = [(kind, str(sql or "").upper()) for kind, sql in entries]
    strange = ("CREATE VIRTUAL", "GENERATED ALWAYS", " AS (")
    return all(kind in ("table", "index") and not any(word in text for word in strange) for kind, text in texts)


def _reason(error: BaseException) -> str:
    return hide_password((str(error).strip() or type(error).__name__).splitlines()[0])
