"""ensemble.serve.answer: what is answered to a picture, and which pictures are refused."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.predict import Voters
from ensemble.selection.blend import scale
from ensemble.serve import answer as answering
from ensemble.serve.answer import LARGEST_BATCH, Batcher, Busy, Decoders
from tests.server import Server, bomb, encoded, lying_tiff, many_scans, wait_for


def test_an_answer_is_what_the_ensemble_predicts(server: Server, run: UPath, picture: Image.Image) -> None:
    status, told = server.post(encoded(picture, "PNG"))
    assert status == 200
    voters = Voters.load([run], read_ensemble(run), "cpu")
    votes = voters.votes(np.asarray(picture)[None])
    probs = voters.ensemble.predict(votes)[0]
    assert list(told["probs"]) == list(voters.classes)
    np.testing.assert_allclose(list(told["probs"].values()), probs, atol=1e-4)
    assert told["label"] == voters.classes[int(probs.argmax())]
    assert told["probability"] == pytest.approx(float(probs.max()), abs=1e-4)
    assert [m["id"] for m in told["members"]] == [m.id for m in voters.ensemble.members]
    for shown, member, vote in zip(told["members"], voters.ensemble.members, votes, strict=True):
        assert shown["label"] == voters.classes[int(vote[0].argmax())]
        assert shown["probability"] == pytest.approx(float(scale(vote, member.temperature).max()), abs=1e-4)
        assert shown["weight"] == member.weight


def test_odd_pictures_are_answered(server: Server, picture: Image.Image) -> None:
    same = [  # the same pixels in other clothes
        encoded(picture, "PNG"),
        encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)] * 3),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture, "TIFF"),
    ]
    answers = [server.post(content) for content in same]
    assert [status for status, _ in answers] == [200] * 4
    for _, told in answers[2:]:
        assert told["probs"] == pytest.approx(answers[0][1]["probs"], abs=1e-4)
    assert answers[1][1]["probs"] == pytest.approx(answers[0][1]["probs"], abs=0.2), "the first frame, in 256 colours"

    turned = Image.Exif()
    turned[0x0112] = 6
    upright = server.post(encoded(picture, "PNG"))[1]
    assert server.post(encoded(picture.rotate(90), "PNG", exif=turned))[1]["probs"] == pytest.approx(
        upright["probs"], abs=1e-4
    )

    sixteen = np.linspace(0, 65535, 900, dtype=np.uint16).reshape(30, 30)
    for content in (
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(sixteen), "PNG"),
        encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        encoded(Image.new("1", (5000, 2)), "PNG"),
        encoded(picture.convert("P"), "PNG", transparency=0),
    ):
        status, told = server.post(content)
        assert status == 200
        assert sum(told["probs"].values()) == pytest.approx(1, abs=1e-3)


def test_what_is_no_picture_is_refused_in_words(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file"
    for content, expected in (
        (b"", "not an image"),
        (b"just some text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (eps, "not an image"),
        (png[: len(png) // 2], "truncated"),
        (encoded(picture, "TIFF")[:20], "not an image"),  # of which Pillow warns, in the log
        (bomb(), "100,000,000 pixels, expected at most 50,000,000"),
        (bomb(40_000), "pixels"),  # Pillow itself refuses this one
    ):
        status, told = server.post(content)
        assert status == 415
        assert expected in told["error"]
        assert len(told["error"]) < 200


def test_pictures_that_hide_their_cost_are_refused(server: Server, picture: Image.Image) -> None:
    for content, expected in (
        (encoded(picture, "JPEG2000"), "JPEG2000 is not accepted"),
        (encoded(picture, "AVIF"), "AVIF is not accepted"),
        (lying_tiff(10_000), "tiles of 100,000,000 pixels, expected at most 50,000,000"),
        (many_scans(picture), "more than 50 scans"),
    ):
        status, told = server.post(content)
        assert status == 415
        assert expected in told["error"]
    assert server.post(lying_tiff(64))[0] == 200
    assert server.post(encoded(picture, "JPEG", progressive=True))[0] == 200


def test_many_at_once_get_each_their_own_answer(server: Server, pictures: Path, run: UPath) -> None:
    paths = sorted((pictures / "test").glob("*/*.png"))[::2]
    voters = Voters.load([run], read_ensemble(run), "cpu")
    expected = voters(np.stack([np.asarray(Image.open(path)) for path in paths]))
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(lambda path: server.post(path.read_bytes()), paths))
    assert len(answers) == 45
    assert {status for status, _ in answers} == {200}
    found = np.array([list(told["probs"].values()) for _, told in answers])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_waiting_images_are_predicted_together() -> None:
    sizes = []
    taken, go = threading.Event(), threading.Event()

    def votes(images: np.ndarray) -> list[np.ndarray]:
        taken.set()
        go.wait()
        sizes.append(len(images))
        return [images.reshape(len(images), -1)[:, :2] / 255] * 3

    batcher = Batcher(votes)
    futures = [batcher.submit(np.full((2, 2, 3), 0, np.uint8))]
    assert taken.wait(30)
    futures += [batcher.submit(np.full((2, 2, 3), i, np.uint8)) for i in range(1, 50)]
    go.set()
    for i, future in enumerate(futures):
        np.testing.assert_allclose(future.result(timeout=30).probs, np.full((3, 2), i / 255))
    assert sizes == [1, LARGEST_BATCH, 49 - LARGEST_BATCH]
    assert [size for future in futures if (size := future.result().batch)] == sizes, "each is counted once"


def test_a_failed_batch_and_a_cancelled_request_are_not_the_end() -> None:
    calls = []
    taken, go = threading.Event(), threading.Event()

    def votes(images: np.ndarray) -> list[np.ndarray]:
        taken.set()
        go.wait()
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return [np.ones((len(images), 2))]

    batcher = Batcher(votes)
    image = np.zeros((2, 2, 3), np.uint8)
    failing = batcher.submit(image)
    assert taken.wait(30)  # it is in the first batch now
    cancelled = [batcher.submit(image) for _ in range(3)]
    assert all(future.cancel() for future in cancelled)
    go.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.result(timeout=30)
    assert batcher.submit(image).result(timeout=30).probs.shape == (1, 2)


def test_large_pictures_are_decoded_one_by_one_and_small_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    begun: list[bytes] = []
    gates = {name: threading.Event() for name in (b"first", b"large", b"middle", b"small", b"least")}

    def decode(content: bytes) -> np.ndarray:
        begun.append(content)
        gates[content].wait()
        return np.zeros(1)

    decoders = Decoders(decode, 100)
    futures = [decoders.submit(b"first", 90)]
    wait_for(lambda: begun == [b"first"])
    futures += [decoders.submit(b"large", 95), decoders.submit(b"middle", 60), decoders.submit(b"small", 30)]
    futures += [decoders.submit(b"least", 10)]
    wait_for(lambda: begun == [b"first", b"least"])
    gates[b"first"].set()
    wait_for(lambda: set(begun[2:]) == {b"small", b"middle"})
    for name in (b"least", b"small", b"middle"):
        assert b"large" not in begun, "95 pixels have no room beside any other"
        gates[name].set()
        futures[{b"least": 4, b"small": 3, b"middle": 2}[name]].result(timeout=30)
    gates[b"large"].set()
    assert futures[1].result(timeout=30).shape == (1,)


def test_of_too_many_waiting_pictures_the_largest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "WAITING", 3)
    taken, go = threading.Event(), threading.Event()
    decoded = []

    def decode(content: bytes) -> np.ndarray:
        taken.set()
        go.wait()
        decoded.append(content)
        if content == b"damaged":
            raise ValueError("damaged")
        return np.zeros(1)

    decoders = Decoders(decode, 10)
    first = decoders.submit(b"first", 10)
    assert taken.wait(30)
    large, damaged, cancelled = (decoders.submit(name, 10) for name in (b"large", b"damaged", b"cancelled"))
    cancelled.cancel()
    small = decoders.submit(b"small", 1)  # takes the place of who has left
    smaller = decoders.submit(b"smaller", 1)
    with pytest.raises(Busy):
        damaged.result(timeout=30)
    damaged = decoders.submit(b"damaged", 1)
    with pytest.raises(Busy):
        large.result(timeout=30)
    go.set()
    with pytest.raises(ValueError, match="damaged"):
        damaged.result(timeout=30)
    for future in (first, small, smaller):
        assert future.result(timeout=30).shape == (1,)
    assert set(decoded) == {b"first", b"small", b"smaller", b"damaged"}
