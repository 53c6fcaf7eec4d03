"""A run directory on S3: moto's server on loopback speaks the protocol, and can be away for a while."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from moto.server import ThreadedMotoServer
from upath import UPath

from search.study.mirror import open_mirror
from tests.errand import Hear
from trainables import storage
from trainables.config import TrialConfig
from trainables.data.dataset import default_cache, open_data, open_test
from trainables.data.share import open_prepared, open_run_data, share_data
from trainables.errors import UserError
from trainables.job import Alone, DataSource, Job, Outcome
from trainables.run import lease
from trainables.run.lease import Lease
from trainables.run.records import PACKED, Records, TrialRecord
from trainables.run_directory import list_candidates, open_run, read_run
from trainables.storage import StorageLost, list_folder, read_json, write_bytes, write_json
from trainables.trial import run_trial

ROOT = Path(__file__).parents[2]


class Store:
    """The server; what it holds outlives `stop`."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def away(self, seconds: float) -> threading.Thread:
        """Stop now; a thread starts it again after that many seconds."""
        self.stop()
        back = threading.Timer(seconds, self.start)
        back.start()
        return back


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        started = Store()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{started.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # its own retries would only make the tests slower
        UPath("s3://bucket").mkdir()
        yield started
        started.stop()


def upload(local: UPath, name: str) -> UPath:
    """A copy of a local run in the bucket."""
    run = UPath(f"s3://bucket/{name}")
    for path in Path(str(local)).rglob("*"):
        if path.is_file():
            write_bytes(run / str(path.relative_to(str(local))), path.read_bytes())
    return run


def prepared(run: UPath) -> DataSource:
    """Where the data of a run were prepared, as a job says it."""
    path = default_cache() / "data" / read_run(run).data.folder
    return DataSource(str(path), "folder")


def test_a_trial_waits_until_the_store_is_back(store: Store, small_run: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_S", 0.1)
    run = upload(small_run, "waits")
    local = list_candidates(small_run)[0]
    storage.patiently(run, lambda: run.fs.rm(f"{run.path}/candidates", recursive=True))
    backs = []

    def report(metrics: dict) -> bool:
        if metrics["epoch"] == 2:
            backs.append(store.away(2))
        return False

    job = Job("0000", local.info.config, str(run), prepared(small_run))
    result = run_trial(job, Hear(report))
    backs[0].join()
    assert result.outcome == "finished"
    (remote,) = list_candidates(run)
    assert [row["epoch"] for row in remote.info.curve] == list(range(1, 9))
    np.testing.assert_array_equal(remote.probs("select"), local.probs("select"))
    assert storage.list_folder(run / "checkpoints") == []


def test_an_outage_that_does_not_end_is_told_and_the_trial_goes_on_later(
    store: Store, small_run: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_S", 0.1)
    monkeypatch.setattr(storage, "OUTAGE_S", 0.5)
    run = upload(small_run, "lost")
    config = list_candidates(small_run)[0].info.config
    job = Job("0009", config, str(run), prepared(small_run))
    result = run_trial(job, Hear(lambda metrics: metrics["epoch"] == 2 and store.stop()))
    assert result.outcome == "storage lost"
    assert "could not be reached for 0.5 s" in result.error
    with pytest.raises(StorageLost):
        storage.exists(run / "run.json")
    with pytest.raises(UserError, match="cannot be reached"):
        open_run(run)
    store.start()
    assert run_trial(job, Alone()).outcome == "finished"
    assert read_json(run / "candidates/0009/candidate.json")["resumed_after_epochs"] == [2]


def test_records_and_the_study_are_in_the_store(store: Store, tmp_path: Path) -> None:
    run = UPath("s3://bucket/study")
    records = Records(run)
    for number in range(PACKED + 2):
        records.put(TrialRecord(number, config=TrialConfig()).ends(Outcome.FINISHED, value=number / 100))
    records.put(TrialRecord(records.next_number, config=TrialConfig()))
    mirror = open_mirror(run, None, "study", True, records)
    mirror.close()
    again = Records(run)
    assert list(again) == list(records)
    assert len(list_folder(run / "trials")) == 4  # one of many, and three of their own
    (tmp_path / "study.db").write_bytes((run / "study.db").read_bytes())
    there = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.value for trial in there.trials] == [number / 100 for number in range(PACKED + 2)]


def test_two_drivers_do_not_share_a_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: on an object store the second one overwrote what the first one wrote."""
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    run = UPath("s3://bucket/leased")
    first = Lease(run)
    with pytest.raises(UserError, match="another search is at work in s3://bucket/leased"):
        Lease(run)
    first.check()
    first.release()
    assert list_folder(run) == []

    killed = Lease(run)
    killed._ended.set()  # never renewed again
    third = Lease(run)
    killed._ended.clear()
    killed._renew()  # it was not dead, but away
    with pytest.raises(UserError, match="another search has taken over"):
        killed.check()
    killed.release()
    third.check()
    third.release()


def test_of_two_that_find_a_lease_stale_one_gets_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 3.0)
    run = UPath("s3://bucket/contended")
    write_json(run / "lease.json", {"owner": "gone"})
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(Lease, run) for _ in range(4)]
    held = [future.result() for future in found if future.exception() is None]
    assert len(held) == 1
    assert all(isinstance(future.exception(), UserError) for future in found if future.exception())
    held[0].release()


def test_a_node_copies_the_prepared_data_once(
    store: Store, small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(prepared(small_run).path)
    run = UPath("s3://bucket/shared")
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "node"))
    with pytest.raises(UserError, match="no prepared data set"):
        open_prepared(run, tmp_path / "elsewhere" / data.path.name)
    share_data(run, data)
    there = open_prepared(run, tmp_path / "elsewhere" / data.path.name)
    assert there.fingerprint == data.fingerprint
    assert there.path.is_relative_to(tmp_path / "node" / "runs"), "in a cache of that run's own"
    np.testing.assert_array_equal(there.images, data.images)
    assert not list(there.path.glob("test_*")), "who trains needs no test images"
    assert not list(there.path.parent.glob("*.tmp"))
    store.stop()
    try:  # from now on nothing is asked of the store
        assert open_prepared(run, tmp_path / "elsewhere" / data.path.name).path == there.path
    finally:
        store.start()


def test_a_node_that_was_cut_while_copying_goes_on_and_the_report_gets_the_test_part(
    store: Store, small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(prepared(small_run).path)
    run = upload(small_run, "cut")
    share_data(run, data)
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "node"))
    there = open_prepared(run, tmp_path / "elsewhere" / data.path.name).path
    before = (there / "images.npy").stat().st_ino
    (there / "meta.json").unlink()  # as after a kill: the pixels are whole, the labels not there yet
    (there / "labels.npy").unlink()
    assert open_prepared(run, tmp_path / "elsewhere" / data.path.name).path == there
    assert (there / "images.npy").stat().st_ino == before, "and not copied again"
    images, labels = open_test(open_run_data(run)[0].path)
    assert len(images) == len(labels) == data.test_images > 0


def test_a_node_without_room_for_the_data_says_so(
    store: Store, small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(prepared(small_run).path)
    run = UPath("s3://bucket/full")
    share_data(run, data)
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr("trainables.data.share.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="set NINEFOLD_CACHE to a folder on a larger disk"):
        open_prepared(run, tmp_path / "elsewhere" / data.path.name)
    assert not list((tmp_path / "node").rglob("*.npy"))
