"""The study that Optuna's tools look at: in SQLite, and in a real PostgreSQL (marked `storage`) that tests start."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from upath import UPath

from search.study import mirror
from search.study.mirror import open_mirror
from search.sweep import Sweep
from tests.hand_sweep import climb, finish, sweep, take
from trainables.errors import UserError
from trainables.job import Outcome, Result

PATIENCE = 60  # seconds for a server to start or end


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def postgresql_binaries() -> Path | None:
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


class PostgreSQL:
    """A server in a temporary folder, on a free port of the loopback interface; PostgreSQL refuses to run as root."""

    def __init__(self, binaries: Path) -> None:
        self.binaries, self.port = binaries, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.url = f"postgresql+psycopg://ninefold@127.0.0.1:{self.port}/postgres"
        self.person: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self.person = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        options = ["-U", "ninefold", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [binaries / "initdb", "-D", self.folder / "data", *options],
            cwd=self.folder, capture_output=True, text=True, check=False, **self.person,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr

    def start(self) -> None:
        import psycopg

        options = ["--listen_addresses=127.0.0.1", "--unix_socket_directories=", "--fsync=off"]
        self.process = subprocess.Popen(
            [self.binaries / "postgres", "-D", self.folder / "data", "-p", str(self.port), *options],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.person,
        )  # fmt: skip
        end = time.time() + PATIENCE
        while True:
            try:
                psycopg.connect(f"host=127.0.0.1 port={self.port} user=ninefold dbname=postgres").close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, "PostgreSQL did not start"
                assert time.time() < end, "PostgreSQL does not answer"
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # its fast shutdown
        self.process.wait(PATIENCE)

    def away(self, seconds: float) -> threading.Thread:
        """Stop now; a thread starts it again after that many seconds."""
        self.stop()
        back = threading.Timer(seconds, self.start)
        back.start()
        return back


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    binaries = postgresql_binaries()
    if binaries is None:
        pytest.fail("no PostgreSQL here; `make test-storage` installs it")
    server = PostgreSQL(binaries)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)


@pytest.fixture
def postgresql(server: PostgreSQL) -> str:
    return server.url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.storage)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with somebody else's study in it, so that a trial's id is not its number."""
    where = f"sqlite:///{tmp_path}/shared.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")
    other = optuna.create_study(study_name=f"another of {tmp_path.name}", storage=where)
    for _ in range(3):
        other.ask()
    return where


def in_database(url: str, name: str) -> dict[str, tuple[str, float | None]]:
    """The state and the value of every trial there, by its id in the sweep."""
    trials = optuna.load_study(study_name=name, storage=url).trials
    assert len({trial.user_attrs["id"] for trial in trials}) == len(trials)
    return {trial.user_attrs["id"]: (trial.state.name, trial.value) for trial in trials}


def mixed(s: Sweep) -> None:
    """Trials of every end, one that runs and two that wait at their rung."""
    for accuracy in (0.5, 0.3, 0.2):
        climb(s, take(s), accuracy)
    for outcome in ("diverged", "bug", "bug", "pruned"):
        s.finish(take(s).id, Result(Outcome(outcome), error="why", traceback="where"))
    finish(s, take(s), 0.8)
    take(s)


ENDED = {"0000": ("COMPLETE", 0.5), "0003": ("COMPLETE", 0.2), "0004": ("FAIL", None), "0005": ("PRUNED", None),
         "0006": ("COMPLETE", 0.8)}  # fmt: skip


def test_the_study_holds_what_has_ended_and_goes_on(url: str, tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=12, pruner="promote", storage=url, name=tmp_path.name)
    mixed(s)
    assert s.mirror is not None
    s.mirror.close()
    assert in_database(url, tmp_path.name) == ENDED
    s = sweep(tmp_path, trials=12, pruner="promote", storage=url, name=tmp_path.name)  # after a kill
    finish(s, take(s), 0.7)
    assert s.mirror is not None
    s.mirror.close()
    assert in_database(url, tmp_path.name) == ENDED | {"0007": ("COMPLETE", 0.7)}
    assert len(optuna.load_study(study_name=f"another of {tmp_path.name}", storage=url).trials) == 3


def test_a_study_that_disagrees_is_made_anew(url: str, tmp_path: Path) -> None:
    """Before: a trial ended at once with the score that another study had under its number."""
    foreign = optuna.create_study(study_name=tmp_path.name, storage=url, direction="maximize")
    foreign.add_trial(optuna.trial.create_trial(value=0.99, user_attrs={"id": "0000"}))
    s = sweep(tmp_path, trials=12, pruner="promote", storage=url, name=tmp_path.name)
    mixed(s)
    assert s.mirror is not None
    s.mirror.close()
    assert in_database(url, tmp_path.name) == ENDED
    optuna.delete_study(study_name=tmp_path.name, storage=url)  # and one that is gone
    s = sweep(tmp_path, trials=12, pruner="promote", storage=url, name=tmp_path.name)
    assert take(s).id == "0007"
    assert s.mirror is not None
    s.mirror.close()
    assert in_database(url, tmp_path.name) == ENDED


@pytest.mark.parametrize("content", [b"", b"no database at all, but a file of some length", b"half-made"])
def test_a_damaged_study_of_a_run_is_made_anew(tmp_path: Path, content: bytes) -> None:
    s = sweep(tmp_path, pruner="promote", trials=12)
    mixed(s)
    s.close()
    if content == b"half-made":  # killed between SQLite's tables and the index of study names, by an earlier version
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute("DROP INDEX ix_studies_study_name")
            database.execute("INSERT INTO studies (study_name) VALUES ('test')")
    else:
        (tmp_path / "study.db").write_bytes(content)
    s = sweep(tmp_path, pruner="promote", trials=12)
    assert s.mirror is not None
    s.mirror.close()
    ended = {record.id for record in s.records if record.outcome is not None}
    assert in_database(s.mirror.url, "test").keys() == ended


def test_a_storage_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be opened in .*; check --storage") as told:
        open_mirror(UPath(tmp_path), f"sqlite:///{tmp_path}/no/such/folder/study.db", "x", True, ())
    assert "\n" not in str(told.value)


def test_a_record_that_is_none_is_not_taken_for_a_storage_that_is_away(tmp_path: Path) -> None:
    s, url, told = sweep(tmp_path, trials=4), f"sqlite:///{tmp_path}/other.db", "^the record of trial 0000 holds"
    finish(s, take(s), 0.5)
    damaged = replace(next(iter(s.records)), distributions={"lr": "nonsense"})
    study = open_mirror(UPath(tmp_path), url, "test", True, (), patient=True)
    study.add(damaged)
    with pytest.raises(UserError, match=told):
        study.flush()
    study.study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"id": "0000"}))
    with pytest.raises(UserError, match=told):
        open_mirror(UPath(tmp_path), url, "test", True, [damaged], patient=True)


def test_a_storage_that_is_away_when_a_run_goes_on_does_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: a command that was repeated while the database was away ended at once."""
    monkeypatch.setattr(mirror, "AGAIN_S", 0.0)
    (tmp_path / "away").mkdir()
    url = f"sqlite:///{tmp_path}/away/study.db"
    s = sweep(tmp_path, trials=4, storage=url)
    finish(s, take(s), 0.5)
    s.tick()
    (tmp_path / "away").rename(tmp_path / "gone")
    study = open_mirror(UPath(tmp_path), url, "test", True, s.records, patient=True)
    finish(s, take(s), 0.6)
    study.add(list(s.records)[1])
    study.flush()
    assert capsys.readouterr().err.count("the sweep goes on") == 1
    (tmp_path / "gone").rename(tmp_path / "away")
    study.flush()
    assert in_database(url, "test") == {"0000": ("COMPLETE", 0.5), "0001": ("COMPLETE", 0.6)}
    with pytest.raises(UserError, match="check --storage"):  # no waiting makes a database of that
        open_mirror(UPath(tmp_path), "nonsense://host/db", "test", True, s.records, patient=True)


def test_a_storage_that_fails_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "away").mkdir()
    url = f"sqlite:///{tmp_path}/away/study.db"
    s = sweep(tmp_path, trials=4, storage=url)
    finish(s, take(s), 0.5)
    (tmp_path / "away").rename(tmp_path / "gone")
    (tmp_path / "away").write_text("in its place")
    finish(s, take(s), 0.6)
    s.tick()
    s.tick()
    assert capsys.readouterr().err.count("the sweep goes on") == 1
    (tmp_path / "away").unlink()
    (tmp_path / "gone").rename(tmp_path / "away")
    for accuracy in (0.7, 0.8):
        finish(s, take(s), accuracy)
    s.close()
    assert in_database(url, "test") == {f"000{i}": ("COMPLETE", value) for i, value in enumerate((0.5, 0.6, 0.7, 0.8))}


@pytest.fixture
def dashboard(postgresql: str, tmp_path: Path) -> Iterator[str]:
    """optuna-dashboard on the server; its address."""
    pytest.importorskip("optuna_dashboard", reason="no optuna-dashboard: pip install -e '.[storage]'")
    optuna.create_study(study_name="another one", storage=postgresql, load_if_exists=True)  # it wants Optuna's tables
    port = free_port()
    with open(tmp_path / "dashboard.log", "wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "optuna-dashboard", postgresql, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def trials_seen(dashboard: str, name: str) -> list[str]:
    """States of the study's trials, as the dashboard's page would get them."""
    with contextlib.suppress(OSError):  # it is still starting
        studies = _get(f"{dashboard}/api/studies")["study_summaries"]
        ids = [study["study_id"] for study in studies if study["study_name"].startswith(name)]
        if ids:
            return [trial["state"] for trial in _get(f"{dashboard}/api/studies/{ids[0]}?after=0")["trials"]]
    return []


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.loads(answer.read())
