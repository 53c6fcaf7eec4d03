"""Broken inputs: each is one line and exit code 2, or named and left out; nothing half-written stays."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ensemble.predict import find_images
from tests.data.command import paint, paint_folder, refused
from trainables.data import prepare as preparing
from trainables.data.prepare import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- data sets that cannot be used ------------------------------------------------------------------------------------


def touch(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def parts(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        paint_folder(root / name, 6, seed=100 * number)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil(root: Path, classes: str = "*") -> None:
    for path in root.glob(f"{classes}/*.png"):
        path.write_bytes(b"no image")


def only_a_file(root: Path) -> None:
    touch(root)


def only_images(root: Path) -> None:
    root.mkdir()
    paint("red", 0).save(root / "0.png")


def one_class(root: Path) -> None:
    paint_folder(root, 6)
    remove(root / "red")
    remove(root / "blue")


def an_empty_class(root: Path) -> None:
    paint_folder(root, 6)
    (root / "yellow").mkdir()


def a_class_of_texts(root: Path) -> None:
    paint_folder(root, 6)
    touch(root / "yellow/a.txt")


def an_empty_train(root: Path) -> None:
    (root / "train").mkdir(parents=True)
    parts(root, "val")


def val_lacks_a_class(root: Path) -> None:
    parts(root, "train", "val")
    remove(root / "val/red")


def val_has_a_class_more(root: Path) -> None:
    parts(root, "train", "val")
    touch(root / "val/yellow/0.png")


def lacks_a_test_class(root: Path) -> None:
    parts(root, "train", "test")
    remove(root / "test/blue")


def val_without_classes(root: Path) -> None:
    parts(root, "train")
    touch(root / "val/0.png")


def two_held_out_parts(root: Path) -> None:
    parts(root, "train", "val", "valid")


def no_train(root: Path) -> None:
    parts(root, "val", "test")


def no_readable_image(root: Path) -> None:
    paint_folder(root, 6)
    spoil(root)


def many_unreadable_images(root: Path) -> None:
    paint_folder(root, 15)
    spoil(root, "red")


def a_class_without_a_readable_image(root: Path) -> None:
    paint_folder(root / "train", 6)
    spoil(root / "train", "red")


def one_image_a_class(root: Path) -> None:
    paint_folder(root, 1)


def a_name_that_cannot_be_printed(root: Path) -> None:
    paint_folder(root, 6)
    (root / "red").rename(root / "re\nd")


def a_name_that_is_no_text(root: Path) -> None:
    paint_folder(root, 6)
    os.rename(root / "red", os.fsencode(root) + b"/re\xff")


def everything_twice(root: Path) -> None:
    """All images of a class are one picture, so none can be held out."""
    for colour in ("red", "blue"):
        (root / colour).mkdir(parents=True)
        for i in range(8):
            paint(colour, 0).save(root / colour / f"{i}.png")


def nothing(root: Path) -> None:
    root.mkdir()


def fine(root: Path) -> None:
    paint_folder(root, 6)


def gone(root: Path) -> None:
    pass


DATA_SETS: list[tuple[Callable[[Path], None], tuple[str, ...], str]] = [
    (gone, (), "does not exist"),
    (only_a_file, (), "does not exist"),
    (nothing, (), "has 0 class folders"),
    (only_images, (), "has 0 class folders"),
    (one_class, (), "has 1 class folder"),
    (an_empty_class, (), "no images in class folder"),
    (a_class_of_texts, (), "1 .txt"),
    (an_empty_train, (), "train has 0 class folders"),
    (val_lacks_a_class, (), "red is missing in val"),
    (val_has_a_class_more, (), "yellow is missing in train"),
    (lacks_a_test_class, (), "blue is missing in test"),
    (val_without_classes, (), "val has 0 class folders"),
    (two_held_out_parts, (), "has val and valid"),
    (no_train, (), "has test and val but no train folder"),
    (no_readable_image, (), "none of the images can be read"),
    (many_unreadable_images, (), "11 of 45 images cannot be read"),
    (a_class_without_a_readable_image, (), "class 'red' has 0 readable train images"),
    (one_image_a_class, (), "3 labelled images are too few to learn from"),
    (a_name_that_cannot_be_printed, (), "cannot be printed"),
    (a_name_that_is_no_text, (), "cannot be printed"),
    (everything_twice, (), "16 images of 2 groups are too few"),
    (fine, ("--stored-size", "0"), "size is 0"),
    (fine, ("--stored-size", "5000"), "expected 1 to 4096"),
    (fine, ("--group-by", "["), "no regular expression"),
    (fine, ("--labels", "gone.csv"), "cannot be read"),
    (fine, ("--labels", "."), "expected a file that ends in"),
]
"""What is there, what is asked, and what the line says. More, of tables and names: test_tables.py, test_named.py."""


@pytest.mark.parametrize(("make", "args", "message"), DATA_SETS, ids=lambda value: getattr(value, "__name__", None))
def test_a_data_set_that_cannot_be_used_is_one_line(
    make: Callable[[Path], None], args: tuple[str, ...], message: str, tmp_path: Path, cache: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(tmp_path / "photos")
    line = refused(
        capsys, monkeypatch, tmp_path / "run", "--data", "folder", "--data-dir", str(tmp_path / "photos"), *args
    )
    assert message in line
    assert not list(cache.rglob("*.tmp"))


# --- files that are left out ------------------------------------------------------------------------------------------


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    paint("red", 77, (64, 64)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb() -> bytes:
    """A PNG that calls itself 100,000 x 100,000."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((8, 8, 3), np.uint8))
    return file.getvalue()


FILES: dict[str, bytes] = {
    "empty.png": b"",
    "text.jpg": b"no image",
    "html.jpg": b"<!DOCTYPE html><html>404</html>",
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "array.png": array(),
    "bomb.png": bomb(),
    "header.png": encoded("PNG")[:33],
    "cut.png": encoded("PNG")[:-400],
    "crc.png": encoded("PNG").replace(b"IHDR\x00\x00\x00\x40", b"IHDR\x00\x00\x00\x41"),
    "cut.jpg": encoded("JPEG")[:-400],
    "header.jpg": encoded("JPEG")[:20],
    "cut.webp": encoded("WEBP", lossless=True)[:-400],
    "cut.gif": encoded("GIF")[:200],
    "cut.tif": encoded("TIFF")[:3000],
    "head.tif": b"II*\x00\xff\xff\xff\x00",
    "cut.bmp": encoded("BMP")[:300],
    "cut.ppm": encoded("PPM")[:300],
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_and_left_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = paint_folder(tmp_path / "photos", 8)
    touch(root / "red" / name, FILES[name])
    data = prepare("folder", root)
    assert len(data.labels) + data.test_images == 24
    line = capsys.readouterr().err
    assert (name if name != "script.eps" else "1 .eps") in line
    assert line.count("\n") == 1


def test_links_pipes_and_circles(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before: a pipe named like an image was waited for, for ever, and a circle of links listed forty times."""
    root = paint_folder(tmp_path / "photos", 8)
    (root / "red" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (root / "red" / "circle").symlink_to(root)
    (root / "red" / "self").symlink_to(root / "red" / "self")
    os.mkfifo(root / "red" / "pipe.png")
    (root / "red" / "folder.png").mkdir()
    (root / "red" / "twin.png").symlink_to(root / "red" / "00.png")
    data = prepare("folder", root)
    assert len(data.labels) + data.test_images == 25
    assert "broken.png" in capsys.readouterr().err
    assert len(find_images(root)) == 26


def test_a_file_that_goes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = paint_folder(tmp_path / "photos", 8)
    real = preparing._canvas

    def canvas(*args: object):
        (root / "red" / "03.png").unlink()
        return real(*args)

    monkeypatch.setattr(preparing, "_canvas", canvas)
    data = prepare("folder", root)
    assert len(data.labels) + data.test_images == 23


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos", 8)
    os.rename(root / "red/00.png", os.fsencode(root) + b"/red/\xff\xfe.png")
    data = prepare("folder", root)
    assert len(data.labels) + data.test_images == 24


def test_there_are_forty_of_them() -> None:
    assert len(DATA_SETS) + len(FILES) >= 40
