"""The study in a database: SQLite, and a real PostgreSQL (marked `storage`) that the tests start for themselves."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from upath import UPath

from ensemble.running import EnsembleSoFar
from search.budget import Budget
from search.study.open import open_study
from search.sweep import Sweep
from tests.hand_sweep import climb, finish, suggest, take
from trainables.errors import UserError
from trainables.job import DataSource, Outcome, Result
from trainables.storage import write_array, write_json

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
    where = f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")
    other = open_study(where, f"another of {tmp_path.name}", "accuracy", "random", "none", 0)
    for _ in range(3):
        other.ask()
    return where


def open_sweep(url: str, run: Path, name: str) -> Sweep:
    if not (run / "run.json").exists():
        write_array(UPath(run / "select_labels.npy"), np.array([0, 1, 0, 1]))
        write_json(UPath(run / "run.json"), {"classes": ["a", "b"], "split_fingerprint": "f"})
    study = open_study(url, name, "accuracy", "tpe", "promote", 0)
    live = EnsembleSoFar(UPath(run), 2)
    data = DataSource("/nowhere/x-0123456789abcdef", "folder")
    return Sweep(study, UPath(run), data, Budget(trials=12), {}, suggest, promote=True, live=live)


def test_what_a_sweep_remembers_is_what_the_database_holds(url: str, tmp_path: Path) -> None:
    name = tmp_path.name  # the server is the same for all tests
    sweep = open_sweep(url, tmp_path, name)

    def same(sweep: Sweep) -> bool:
        return sweep.study.get_trials(deepcopy=False) == optuna.load_study(study_name=name, storage=url).trials

    sweep.study.enqueue_trial({"lr": 0.01}, user_attrs={"why": "a guess", "pair": (1, 2)})
    assert same(sweep)
    for accuracy in (0.5, 0.3, 0.2):  # the last two wait at their rung
        climb(sweep, take(sweep), accuracy)
        assert same(sweep)
    for outcome in ("diverged", "bug", "pruned"):
        sweep.finish(take(sweep).id, Result(Outcome(outcome), error="why", traceback="where"))
        assert same(sweep)
    finish(sweep, take(sweep), 0.8)
    cut = take(sweep)
    assert same(sweep)
    assert {trial.state.name for trial in sweep.study.get_trials()} == {"COMPLETE", "PRUNED", "RUNNING"}

    again = open_sweep(url, tmp_path, name)  # what a process after a kill sees
    assert same(again)
    assert again.rungs is not None
    assert again.rungs.waiting == sweep.rungs.waiting == {"0001": 1, "0002": 1}  # type: ignore[union-attr]
    assert again.counted == sweep.counted
    assert take(again).id == cut.id


def test_a_storage_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be opened in .*; check --storage") as told:
        open_study(f"sqlite:///{tmp_path}/no/such/folder/study.db", "x", "accuracy", "tpe", "none", 0)
    assert "\n" not in str(told.value)


@pytest.fixture
def dashboard(postgresql: str, tmp_path: Path) -> Iterator[str]:
    """optuna-dashboard on the server; its address."""
    pytest.importorskip("optuna_dashboard", reason="no optuna-dashboard: pip install -e '.[storage]'")
    open_study(postgresql, "another one", "accuracy", "random", "none", 0).ask()  # it wants to find Optuna's tables
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
