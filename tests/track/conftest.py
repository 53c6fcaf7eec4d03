"""A sweep of every kind of end, and an MLflow server that tests start, kill and start again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from ensemble.file import Ensemble, Member, write_ensemble
from search.sweep import Sweep
from tests.hand_sweep import finish, take
from trainables.job import Outcome, Result
from trainables.storage import write_json

PATIENCE = 120  # seconds for a server to start, or for trials to arrive


class MlflowServer:
    """On the loopback interface, with SQLite and a folder for artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--host", "127.0.0.1"]
        options += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, "--workers", "1"],
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < end, "MLflow does not answer"
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Without a word of farewell, its workers with it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracker reaches out of the test's folder, whatever the person who runs it has set."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


def every_end(s: Sweep) -> None:
    """Four more trials: a candidate, one that diverged, one that was pruned after two epochs, and a candidate."""
    finish(s, take(s), 0.8)
    s.finish(take(s).id, Result(Outcome.DIVERGED, error="loss is nan", traceback="where"))
    job = take(s)
    for epoch in (1, 2):
        s.report(job.id, {"epoch": epoch, "tune_accuracy": epoch / 10, "tune_log_loss": 1.0})
    s.finish(job.id, Result(Outcome.PRUNED))
    finish(s, take(s), 0.7)


def conclude(s: Sweep) -> Ensemble:
    """End the sweep as search.run does, with an ensemble and a report."""
    claim = {"split": "select", "images": 4, "accuracy": 0.75, "interval": [0.3, 0.9]}
    ensemble = Ensemble("best", (Member("0000", 1.0),), "hand", "f", {"claim": claim})
    s.close()
    write_ensemble(s.run, ensemble)
    write_json(s.run / "report.json", {"test": {"ensemble": {"split": "test", "accuracy": 0.5}}})
    UPath(s.run / "report.html").write_text("<p>report</p>")
    assert s.tracking is not None
    s.tracking.close(ensemble, complete=True)
    return ensemble
