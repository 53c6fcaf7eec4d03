"""Preparing that was killed continues, and whoever waits for it says so."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from trainables.data import decode
from trainables.data import prepare as preparing
from trainables.data.arrays import FLUSHED, Entry, Log, is_abandoned
from trainables.data.decode import Canvas
from trainables.data.prepare import prepare

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def slow_folder(root: Path, count: int) -> Path:
    """ROOT/{train,test}/{a,b}/*.png that take a while, three of which are broken."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.roll(pixels, 7 * i + ord(name), axis=1) ^ np.uint8(len(part)))
                image.save(root / part / name / f"{i:03}.png", compress_level=1)
    for broken in ("train/a/000.png", "train/b/007.png", "test/a/001.png"):
        (root / broken).write_bytes(b"no image")
    return root


def kill_in_the_middle(root: Path, cache: Path, entries: int, packed: bool) -> None:
    code = "import sys; from trainables.data import prepare as p; "
    code += f"p.is_too_large = lambda *_: {packed}; p.prepare('folder', sys.argv[1], size=64)"
    environment = {**os.environ, "NINEFOLD_CACHE": str(cache)}
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=ROOT, env=environment)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        logs = list((cache / "data").glob("*.tmp/log.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") > entries:
            break
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("entries", "packed"),
    [(1, False), (2 * FLUSHED, False), (2 * FLUSHED, True)],
    ids=["early", "in the test part", "packed"],
)
def test_preparing_continues_after_kill_9(
    entries: int,
    packed: bool,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    root = slow_folder(tmp_path / "photos", 100)
    kill_in_the_middle(root, cache, entries, packed)
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: packed)
    [left] = (cache / "data").glob("*.tmp")
    logged = (left / "log.jsonl").read_bytes().count(b"\n") - 1
    assert entries <= logged < 400
    read = []
    real = decode._read
    monkeypatch.setattr(decode, "_read", lambda item, canvas: read.append(item) or real(item, canvas))
    data = prepare("folder", root, size=64)
    assert len(read) == 400 - logged
    assert (len(data.labels), data.test_images) == (198, 199)
    assert "left out 3 of 400 images" in capsys.readouterr().err
    assert not list((cache / "data").glob("*.tmp"))
    whole = prepare("folder", root, cache_dir=tmp_path / "other", size=64)
    assert whole.fingerprint == data.fingerprint
    files = {file.name for file in data.path.iterdir()}
    assert ("images.pack" in files) == packed
    assert files == {file.name for file in whole.path.iterdir()}
    for name in files:
        assert (data.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_a_log_that_is_cut_or_of_another_form_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    canvas = Canvas(8, 8)
    log = Log(tmp_path, canvas, 9)
    log.add("", [Entry(0, "abc"), Entry(1, reason="no image"), Entry(2, "def", True)])
    log.add("test_", [Entry(0, "ghi")])
    log.file.close()
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole[:-10])
    again = Log(tmp_path, canvas, 9)
    assert again.found == {"": [Entry(0, "abc"), Entry(1, reason="no image"), Entry(2, "def", True)], "test_": []}
    again.file.close()
    (tmp_path / "log.jsonl").write_bytes(whole.replace(b"abc", b'"b"'))
    assert Log(tmp_path, canvas, 9).found[""] == []
    (tmp_path / "log.jsonl").write_bytes(whole)
    assert Log(tmp_path, Canvas(8, 9), 9).found[""] == []
    assert not is_abandoned(tmp_path), "it is this process's"
    (tmp_path / "owner").write_text("another-machine boot 1")
    assert not is_abandoned(tmp_path), "which may well be at work"


def test_who_waits_for_another_process_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = slow_folder(tmp_path / "photos", 4)
    monkeypatch.setattr(preparing, "QUIET_S", 0.01)
    source = preparing.find_source("folder", root, cache)
    listing = preparing.listing_of(cache / "data", "folder", None, "squash", source)
    listing.parent.mkdir(parents=True)
    held = threading.Event()

    def hold() -> None:
        with FileLock(listing.with_suffix(".lock")):
            held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(30)
    prepare("folder", root)
    other.join()
    assert "another process prepares these images; waiting for it" in capsys.readouterr().err
