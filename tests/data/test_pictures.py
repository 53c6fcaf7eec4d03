"""Pictures of more than 8 bits, of phones, and of several pages."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ensemble.predict import find_images, stored_form
from tests.data.command import COLOURS, explored, learned, paint, paint_folder, predicted, refused, swept
from trainables.data import decode
from trainables.data.decode import Canvas, Picture, find_white, read_images
from trainables.data.prepare import prepare
from trainables.errors import UserError


@pytest.fixture(autouse=True)
def formats() -> Iterator[None]:
    yield
    for cached in (decode._formats, decode.suffixes):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shade(label: int, seed: int, most: float) -> np.ndarray:
    """Stripes of one width a class, 0 to `most`, float (16, 16), with noise."""
    rng = np.random.default_rng([label, seed])
    stripes = (np.arange(16) // (label + 1) % 2)[:, None] * np.ones(16)
    return ((0.2 + 0.6 * stripes + rng.uniform(0, 0.2, (16, 16))) * most).clip(0, most)


def write_shades(root: Path, kind: str, most: float, count: int = 16) -> Path:
    """ROOT/{a,b,c}/NN.<ending> of uint16 or float32 grey."""
    for label, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            values = shade(label, i, most)
            if kind == "float":
                Image.fromarray(values.astype(np.float32)).save(root / name / f"{i:02}.tif")
            else:
                Image.fromarray(values.astype(np.uint16)).save(root / name / f"{i:02}.{kind}")
    return root


@pytest.mark.parametrize(
    ("kind", "most", "white"),
    [
        ("png", 4095, 4095.0),  # 12 bits in 16: 16 grey levels before
        ("tif", 4095, 4095.0),
        ("png", 1000, 1023.0),
        ("tif", 16000, 16383.0),
        ("png", 65535, None),
        ("float", 1.0, 1.0),  # all black before
        ("float", 250.0, 255.0),
        ("float", 60000.0, 65535.0),
        ("float", 300000.0, pytest.approx(300000, rel=0.01)),
    ],
)
def test_deep_pictures_are_scaled_by_the_data_sets_own_depth(
    kind: str, most: float, white: float | None, tmp_path: Path
) -> None:
    root = write_shades(tmp_path / "scans", kind, most)
    plan = swept(tmp_path / "run", "--data", "folder", "--data-dir", str(root))
    assert plan.data.white == white
    assert plan.data.images.max() > 225
    assert len(np.unique(plan.data.images)) > 90
    ending = "tif" if kind == "float" else kind
    [(_, pixels)] = read_images([root / f"a/00.{ending}"], plan.data.canvas)
    assert pixels is not None
    expected = shade(0, 0, most) / (plan.data.white or 65535) * 255
    assert np.abs(pixels[..., 0] - expected).max() <= 1
    assert stored_form(plan.run) == plan.data.canvas, "new images are decoded as the data set's were"
    new = write_shades(tmp_path / "new", kind, most / 2, count=4)  # darker: not to be stretched to white
    labels = predicted(tmp_path / "run", new)
    assert len(labels) == 12
    assert all(labels.values())
    [(_, pixels)] = read_images([next(new.rglob(f"*.{ending}"))], plan.data.canvas)
    assert pixels is not None
    assert pixels.max() <= 129


def test_eight_bits_have_no_white(tmp_path: Path) -> None:
    assert find_white(sorted(paint_folder(tmp_path, 2).rglob("*.png"))) is None
    assert find_white([Picture("x", lambda: Image.new("I;16", (4, 4), 4000))]) == 4095


def test_floats_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    values = np.full((8, 8), 0.5, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    [(_, pixels)] = read_images([tmp_path / "a.tif"], Canvas(8, 8))
    assert pixels is not None
    assert pixels[0, :4, 0].tolist() == [0, 255, 0, 128]


def test_the_fingerprint_of_sixteen_full_bits_is_what_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in "ab":
        (tmp_path / "scans" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 65536, (9, 9), dtype=np.uint16)
            Image.fromarray(pixels).save(tmp_path / "scans" / name / f"{i:02}.png")
    assert prepare("folder", tmp_path / "scans").fingerprint == "ce4ed1460ab47a47"


# --- phones -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos", 20, ending="avif")
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root))
    assert len(plan.data.labels) + plan.data.test_images == 60


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    root = tmp_path / "photos"
    for colour in COLOURS:
        (root / colour).mkdir(parents=True)
        for i in range(20):
            pillow_heif.from_pillow(paint(colour, i, (64, 64))).save(root / colour / f"{i}.heic", quality=90)
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root), "--stored-size", "16")
    assert len(plan.data.labels) + plan.data.test_images == 60


def test_heic_without_pillow_heif_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was passed over without a word."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed, nor had been a moment ago
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for cached in (decode._formats, decode.suffixes):
        cached.cache_clear()
    root = paint_folder(tmp_path / "photos", 12)
    for i in range(5):
        (root / "red" / f"IMG_{i}.HEIC").write_bytes(b"a photograph")
    prepare("folder", root)
    line = capsys.readouterr().err
    assert "5 .heic; .heic needs pillow-heif: pip install 'ninefold[heif]'" in line
    assert line.count("\n") == 1
    assert len(find_images(root)) == 36
    assert "5 .heic" in capsys.readouterr().err
    for path in (root / "red").glob("*.png"):
        path.unlink()
    assert "pip install 'ninefold[heif]'" in refused(
        capsys, monkeypatch, tmp_path / "run", "--data", "folder", "--data-dir", str(root)
    )
    with pytest.raises(UserError, match=r"no images below .*5 \.heic"):
        find_images(root / "red")


# --- pages ------------------------------------------------------------------------------------------------------------


def test_files_of_several_pages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = paint_folder(tmp_path / "photos", 12)
    pages = [paint("red", seed) for seed in (500, 501, 502)]
    for name in ("scan.tif", "moves.gif", "moves.webp", "moves.png"):
        pages[0].save(root / "red" / name, save_all=True, append_images=pages[1:])
    pages[0].save(root / "red" / "one.tif")
    prepare("folder", root)
    line = capsys.readouterr().err
    assert "of 4 files with several pages or frames the first is used" in line
    assert "scan.tif" in line or "moves" in line
    assert line.count("\n") == 1
    found = explored(tmp_path / "page.html", "--data", "folder", "--data-dir", str(root))
    assert any("4 files with several pages" in note for note in found["notes"])
