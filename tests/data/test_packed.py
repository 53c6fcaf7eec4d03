"""Images kept as JPEG where raw pixels would not fit: read as from an array, from the command line to a prediction."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.report.write import write_report
from tests.data.command import explored, learned, paint, paint_folder
from trainables.data import prepare as preparing
from trainables.data.dataset import Data, open_data, open_test, open_test_images, open_units
from trainables.data.packed import PackedImages, encode, index_of, is_too_large, size_of
from trainables.data.prepare import prepare
from trainables.data.share import open_run_data, share_data
from trainables.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "photos", 20)


@pytest.fixture
def packed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: True)
    return prepare("folder", root)


def test_packed_images_are_read_as_an_array_is(root: Path, packed: Data, tmp_path: Path) -> None:
    assert isinstance(packed.images, PackedImages)
    assert not list(packed.path.glob("*images.npy"))
    assert list(packed.path.glob("*.pack"))
    all_images = packed.images[:]
    n = len(packed.labels)
    assert packed.images.shape == all_images.shape == (n, 16, 16, 3)
    assert len(packed.images) == n
    assert all_images.dtype == packed.images.dtype == np.uint8
    some = np.array([5, 0, 5, n - 1])
    for key in (3, -1, slice(2, 9, 3), slice(0, 0), some, some[::-1], np.arange(n) % 2 == 0, [1, 2]):
        np.testing.assert_array_equal(packed.images[key], all_images[key])
    with pytest.raises(IndexError):
        packed.images[n]
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            np.testing.assert_array_equal(packed.images[some], all_images[some])
    finally:
        torch.set_num_threads(threads)


def test_they_are_the_same_pictures_under_another_fingerprint(
    root: Path, packed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(preparing, "is_too_large", is_too_large)
    raw = prepare("folder", root, cache_dir=tmp_path / "other")
    assert isinstance(raw.images, np.ndarray)
    np.testing.assert_array_equal(raw.labels, packed.labels)
    assert raw.fingerprint != packed.fingerprint, "features of the one are not those of the other"
    assert raw.test_images == packed.test_images > 0
    off = np.abs(raw.images.astype(int) - packed.images[:]).mean()
    assert 0 < off < 8
    (raw_test, raw_labels), (test, labels) = open_test(raw.path), open_test(packed.path)
    np.testing.assert_array_equal(raw_labels, labels)
    assert np.abs(raw_test[:].astype(int) - test[:]).mean() < 8
    np.testing.assert_allclose(raw.mean, packed.mean, atol=0.02)


def test_it_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: True)
    prepare("folder", root)
    said = capsys.readouterr().err
    assert "60 images of 16 x 16 pixels would take 0.0 GB, more than half of the memory or of the free disk" in said
    assert "kept as JPEG of quality 92" in said


@pytest.mark.parametrize("images", [1000, 10**9])
def test_what_would_not_fit_is_too_large(images: int, tmp_path: Path) -> None:
    assert is_too_large(images, (256, 341, 3), tmp_path) == (images == 10**9)


def test_from_the_command_line_to_a_prediction_and_a_report(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: True)
    run = tmp_path / "run"
    plan = learned(run, tmp_path, "--data", "folder", "--data-dir", str(root))
    assert isinstance(plan.data.images, PackedImages)
    assert write_report([UPath(run)], read_ensemble(UPath(run)))["test"]["ensemble"]["images"] == plan.data.test_images
    found = explored(tmp_path / "explored.html", "--data", "folder", "--data-dir", str(root))
    assert found["stored_bytes"] == plan.data.images.nbytes + open_test_images(plan.data.path).nbytes


def test_twins_are_found_among_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: True)
    paint("red", 0, (64, 64)).save(root / "red/00.png")
    paint("red", 0, (64, 64)).save(root / "red/again.jpg", quality=95)
    data = prepare("folder", root, size=16)
    assert isinstance(data.images, PackedImages)
    units = open_units(data)
    assert units is not None
    assert len(units) - len(np.unique(units)) == 1


def test_they_lie_beside_a_run_and_are_copied(packed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_data(UPath(tmp_path / "run"), packed)
    copied = open_data(tmp_path / "run/data" / packed.path.name)
    np.testing.assert_array_equal(copied.images[:], packed.images[:])
    assert open_test_images(copied.path).shape == open_test_images(packed.path).shape


def bomb() -> bytes:
    """A JPEG whose header says 65,500 pixels a side."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = (65500).to_bytes(2, "big") * 2
    return bytes(content)


def test_damaged_packs_are_named(packed: Data) -> None:
    path = packed.path / "images.pack"
    whole, index = path.read_bytes(), np.load(index_of(path))

    def spoil(content: bytes, places: np.ndarray = index) -> None:
        path.write_bytes(content)
        np.save(index_of(path), places)
        open_data(packed.path).images[:]

    for content, places, message in (
        (whole[:-1], index, "its index does not fit"),
        (whole, index.astype(np.int32), "its index does not fit"),
        (whole, np.array([0, 9, 5, len(whole)]), "its index is not in order"),
        (b"\x00" * len(whole), index, r"image \d+ of .* is damaged \(another size\)"),
        (bomb() + whole, np.concatenate([[0], index[1:] + len(bomb())]), r"is damaged \(another size\)"),
        (whole[:200] + b"\x00" * (len(whole) - 200), index, "is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            spoil(content, places)
    index_of(path).unlink()
    with pytest.raises(UserError, match="is damaged"):
        open_data(packed.path)


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_a_jpeg_s_size_is_read_from_its_header(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 17)).save(file, "JPEG", progressive=kind == "progressive", exif=b"Exif\x00\x00 and more")
    assert size_of(file.getvalue()) == (17, 300)
    assert size_of(encode(np.zeros((5, 9, 3), np.uint8))) == (5, 9)
    assert size_of(b"") == size_of(b"\xff\xd8") == size_of(b"no image at all") == (0, 0)


def test_a_run_on_packed_images_is_opened_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "is_too_large", lambda *_: True)
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root))
    data, splits = open_run_data(UPath(tmp_path / "run"))
    assert data.fingerprint == plan.data.fingerprint
    assert data.images[splits.select].shape[1:] == (16, 16, 3)
