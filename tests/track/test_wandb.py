"""Weights & Biases offline: what it wrote, which `wandb sync` would send, is read from its logs."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from search.track import tracking
from search.track.tracking import make_trackers
from tests.hand_sweep import finish, sweep, take
from tests.track.conftest import conclude, every_end
from trainables.storage import read_json, write_json

BLOCK = 32 * 2**10


@pytest.fixture(autouse=True)
def _own_service(_own_variables: None) -> Iterator[None]:
    """wandb reads its variables once in a process, unless it is torn down."""
    import wandb

    yield
    wandb.teardown()


def read(folder: Path) -> list[Any]:
    """The records of the one transaction log in an offline run's folder."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    return [wandb_internal_pb2.Record.FromString(content) for content in contents(file.read_bytes())]


def contents(log: bytes) -> Iterator[bytes]:
    """What is in a log of LevelDB's format: blocks of 32 KiB with pieces, each after its checksum, length and kind."""
    assert log[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(log):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only piece, or the last
            yield whole
            whole = b""


def runs(folder: Path) -> dict[str, list[list[Any]]]:
    """Display name -> the records of every folder of that run."""
    import wandb

    wandb.teardown()  # as at the end of a process: its service writes what it still has
    found: dict[str, list[list[Any]]] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        records = read(path)
        (run,) = [record.run for record in records if record.HasField("run")][:1]
        assert run.run_group
        found.setdefault(run.display_name, []).append(records)
    return found


def config(records: list[Any]) -> dict[str, Any]:
    items = [i for record in records if record.HasField("config") for i in record.config.update]
    items += [i for record in records if record.HasField("run") for i in record.run.config.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def summary(records: list[Any]) -> dict[str, Any]:
    items = [item for record in records if record.HasField("summary") for item in record.summary.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(records: list[Any], name: str) -> list[tuple[int, float]]:
    found = []
    for record in records:
        items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        if name in items:
            found.append((record.history.step.num, items[name]))
    return found


def test_a_sweep_is_a_group_with_a_run_for_each_trial(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"]))
    every_end(s)
    conclude(s)
    assert s.tracking is not None
    key = s.tracking.sweep.key
    assert s.tracking.places() == [f"wandb: project ninefold, group {key}, offline"]
    found = runs(tmp_path)
    assert {name: len(folders) for name, folders in found.items()} == {
        tmp_path.name: 1, "0000": 1, "0001": 1, "0002": 1, "0003": 1,
    }  # fmt: skip
    best, parent = found["0000"][0], found[tmp_path.name][0]
    assert {r.run.run_id for r in best if r.HasField("run")} == {f"{key}-0000"}
    assert config(best)["lr"] == s.records["0000"].params["lr"]
    assert history(best, "curve/seconds") == [(epoch, epoch) for epoch in range(1, 7)]
    assert summary(best)["select_log_loss"] == pytest.approx(0.2)
    assert summary(found["0001"][0])["outcome"] == "diverged"
    assert summary(found["0001"][0])["error"] == "loss is nan"
    assert history(found["0002"][0], "curve/tune_accuracy") == [(1, 0.1), (2, 0.2)]
    assert [record.exit.exit_code for record in found["0001"][0] if record.HasField("exit")] == [1]
    assert summary(parent)["select_claim_accuracy"] == 0.75
    assert summary(parent)["test_ensemble_accuracy"] == 0.5
    (artifact,) = [r.request.log_artifact.artifact for r in parent if r.request.HasField("log_artifact")] or [
        r.artifact for r in parent if r.HasField("artifact")
    ]
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["best.json", "report.html", "report.json"]
    assert capfd.readouterr() == ("", "")


def test_a_sweep_that_is_continued_sends_no_trial_twice(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"]))
    every_end(s)
    conclude(s)
    s = sweep(tmp_path, trials=5, pruner="median", trackers=make_trackers(["wandb"]))
    finish(s, take(s))
    conclude(s)
    found = runs(tmp_path)
    assert {name: len(folders) for name, folders in found.items() if name.isdigit()} == {f"000{i}": 1 for i in range(5)}
    ids = {r.run.run_id for records in found[tmp_path.name] for r in records if r.HasField("run")}
    assert len(ids) == 1


def test_no_password_is_in_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb notes the command line of a run, unless it is told not to."""
    monkeypatch.setattr(sys, "argv", ["search.run", "--storage", "postgresql://me:not-to-be-seen@host/x"])
    sweep(tmp_path)
    options = {"search": {"labels": "https://me:not-to-be-seen@host/x.csv"}}
    write_json(UPath(tmp_path / "run.json"), read_json(UPath(tmp_path / "run.json")) | options)
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"]))
    every_end(s)
    conclude(s)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if b"not-to-be-seen" in path.read_bytes()] == []
    assert any(b"https://me:***@host/x.csv" in path.read_bytes() for path in files)


def test_a_folder_that_is_away_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A file stands where wandb would write."""
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(away))
    (away / "wandb").write_text("in its place")
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"]))
    every_end(s)
    conclude(s)
    printed = capsys.readouterr().err
    assert printed.count("wandb failed, the sweep continues") == 1
    assert "wandb lacks 4 of 4 trials and the end" in printed
    (away / "wandb").unlink()
    conclude(sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"])))
    assert {name: len(folders) for name, folders in runs(away).items()} == {
        tmp_path.name: 1, "0000": 1, "0001": 1, "0002": 1, "0003": 1,
    }  # fmt: skip


def test_a_server_that_is_away_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nobody listens on that port. wandb itself waits for half a minute, in the tracker's thread."""
    for name, value in (("MODE", "online"), ("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", 40 * "0")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(tracking, "STUCK_S", 1.0)
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["wandb"]))
    every_end(s)
    assert len([record for record in s.records if record.outcome is not None]) == 4
    conclude(s)
    assert "wandb lacks 4 of 4 trials and the end; the same command sends them" in capsys.readouterr().err
    assert not (tmp_path / "tracking" / "wandb.json").exists()


def test_nobody_is_asked_for_a_key_in_the_middle_of_a_sweep(tmp_path: Path) -> None:
    code = (
        "from search.track.tracking import make_trackers\n"
        "from trainables.errors import exit_on_user_error\n"
        "with exit_on_user_error():\n    make_trackers(['wandb'])"
    )
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 2, told.stderr
    assert "error: --track wandb: " in told.stderr
    assert "WANDB_MODE=offline" in told.stderr
