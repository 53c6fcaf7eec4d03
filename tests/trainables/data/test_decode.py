"""Decoding: every kind of image becomes RGB of the right size; what cannot be read is reported, not raised."""

import io
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from tests.trainables.data.test_data import picture
from trainables.data import decode as decoding
from trainables.data.decode import GREY, Canvas, Fit, count_pixels, decode_bytes, read_images

ROOT = Path(__file__).parents[3]


def grey_16_bit(path: Path) -> np.ndarray:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(path)
    return np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2)


def cmyk(path: Path) -> np.ndarray:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=95)
    return np.full((8, 8, 3), (254, 0, 0))


def transparent(path: Path) -> np.ndarray:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.save(path)
    return np.array([[[255] * 3] * 4 + [[255, 0, 0]] * 4] * 8)


def palette_with_transparency(path: Path) -> np.ndarray:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (4, 0, 8, 8))
    image.save(path, transparency=0)
    return np.array([[[255] * 3] * 4 + [[40, 50, 60]] * 4] * 8)


def black_and_white(path: Path) -> np.ndarray:
    Image.new("1", (8, 8), 1).save(path)
    return np.full((8, 8, 3), 255)


def grey_with_alpha(path: Path) -> np.ndarray:
    Image.new("LA", (8, 8), (100, 255)).save(path)
    return np.full((8, 8, 3), 100)


def animation(path: Path) -> np.ndarray:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return np.full((8, 8, 3), (255, 0, 0))


def turned_by_exif(path: Path) -> np.ndarray:
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    upright.rotate(90).save(path, exif=exif, quality=95, subsampling=0)
    return np.asarray(upright)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grey16.png", grey_16_bit),
        ("grey16.tif", grey_16_bit),
        ("cmyk.jpg", cmyk),
        ("alpha.png", transparent),
        ("palette.png", palette_with_transparency),
        ("palette.gif", palette_with_transparency),
        ("bits.png", black_and_white),
        ("la.png", grey_with_alpha),
        ("anim.gif", animation),
        ("turned.jpg", turned_by_exif),
    ],
)
def test_every_kind_of_image_becomes_rgb(name, make, tmp_path):
    expected = make(tmp_path / name)
    [(path, image)] = read_images([tmp_path / name], Canvas(8, 8))
    assert path == tmp_path / name
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "bmp", "gif", "tiff", "ppm", "jp2"])
def test_an_image_of_other_proportions_is_squashed_cropped_or_padded(suffix, tmp_path):
    """Before: the middle was always cut out, so a 4:3 photograph lost a quarter of its width for ever."""
    image = Image.new("RGB", (120, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    image.save(tmp_path / f"x.{suffix}")

    def read(canvas: Canvas) -> np.ndarray:
        [(_, pixels)] = read_images([tmp_path / f"x.{suffix}"], canvas)
        assert pixels.shape == canvas.shape
        return pixels.astype(int)

    red, blue = (255, 0, 0), (0, 0, 255)
    assert np.abs(read(Canvas(12, 12, "crop"))[:, 1:-1] - blue).max() < 20
    assert np.abs(read(Canvas(12, 12, "squash"))[6, [1, 6, 10]] - (red, blue, red)).max() < 20
    padded = read(Canvas(12, 12, "pad"))
    assert np.abs(padded[6, [1, 6, 10]] - (red, blue, red)).max() < 30
    assert np.abs(padded[[0, 1, 10, 11]] - GREY).max() < 3
    for fit in get_args(Fit):  # one of these proportions needs none of it
        assert np.abs(read(Canvas(10, 30, fit))[5, [2, 15, 27]] - (red, blue, red)).max() < 20


def test_read_images_keeps_order_and_reports_errors(tmp_path):
    paths = []
    for i in range(100):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), (i, i, i)).save(paths[-1])
    paths[40].write_bytes(b"no image")
    paths[41].unlink()
    errors = {}
    read = list(read_images(map(str, paths), Canvas(4, 4), lambda path, reason: errors.setdefault(path.name, reason)))
    assert [path for path, _ in read] == paths
    assert [None if image is None else int(image[0, 0, 0]) for _, image in read] == [
        *range(40),
        None,
        None,
        *range(42, 100),
    ]
    assert errors["40.png"] == "not an image"
    assert "No such file" in errors["41.png"]


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    picture(0, (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    reasons = []
    with pytest.warns(Image.DecompressionBombWarning):
        [(_, image)] = read_images([tmp_path / "bomb.png"], Canvas(8, 8), lambda path, reason: reasons.append(reason))
    assert image is None
    assert reasons == ["2,500 pixels, expected at most 2,000"]


def test_bands_are_laid_on_white_as_the_whole_is(monkeypatch):
    monkeypatch.setattr(decoding, "BAND", 1000)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (101, 67, 4), np.uint8))
    for kind in (image, image.convert("LA"), image.convert("RGB").quantize(64)):
        file = io.BytesIO()
        kind.save(file, "PNG", **({"transparency": bytes(range(0, 256, 4))} if kind.mode == "P" else {}))
        whole = Image.open(file).convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
        np.testing.assert_array_equal(decode_bytes(file.getvalue(), Canvas(101, 67)), np.asarray(expected))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux reports the peak of one process")
def test_a_large_transparent_picture_takes_little_more_than_its_pixels(tmp_path):
    """It was in memory four times: 16 bytes a pixel."""
    Image.new("RGBA", (5000, 5000), (1, 2, 3, 4)).save(tmp_path / "a.png")
    code = (
        "import re, sys; from trainables.data.decode import Canvas, decode_bytes\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "content, before = open(sys.argv[1], 'rb').read(), peak()\n"
        "decode_bytes(content, Canvas(8, 8)); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 12 * 5000 * 5000


def test_pixels_are_counted_without_decoding(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (3000, 2000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "load", None)
    assert count_pixels(file.getvalue(), 6_000_000) == 6_000_000
    with pytest.raises(ValueError, match="6,000,000 pixels, expected at most 5,999,999"):
        count_pixels(file.getvalue(), 5_999_999)
    with pytest.raises(ValueError, match="not an image"):
        count_pixels(b"text", 1)
