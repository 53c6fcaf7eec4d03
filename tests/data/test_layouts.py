"""Folders as people have them: train beside val and test, unknown siblings, files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from search import run as search_run
from search.plan import make_plan
from tests.data.command import COLOURS, explored, learned, paint_folder, planned, predicted, refused, swept
from trainables.data.dataset import open_test
from trainables.data.prepare import prepare
from trainables.data.splits import load_splits, make_splits, save_splits, split_data
from trainables.storage import read_json, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_beside_train_is_the_held_out_part(name: str, tmp_path: Path) -> None:
    """It was passed over without a word, and 20 % of train were held out instead."""
    root = tmp_path / "photos"
    paint_folder(root / "train", 20)
    paint_folder(root / name, 8, seed=100)
    paint_folder(root / "test", 5, seed=200)
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root))
    assert (len(plan.splits.train), len(plan.splits.tune), plan.data.test_images) == (60, 12, 15)
    held = {np.asarray(Image.open(path)).tobytes() for path in (root / name).rglob("*.png")}
    rows = np.union1d(plan.splits.tune, plan.splits.select)
    assert {plan.data.images[row].tobytes() for row in rows} == held
    assert any("24 images of the held-out part" in note for note in plan.notes)
    found = explored(tmp_path / "page.html", "--data", "folder", "--data-dir", str(root))
    assert found["splits"] == {"train": 60, "tune": 12, "select": 12, "test": 15}


def test_a_large_held_out_part_is_divided(tmp_path: Path) -> None:
    labels = np.arange(9000) % 3
    splits = make_splits(labels, "abc", held_out=3000)
    assert not splits.shared
    assert splits.train.tolist() == list(range(6000))
    assert np.bincount(labels[splits.tune]).tolist() == [500] * 3
    assert np.array_equal(np.union1d(splits.tune, splits.select), np.arange(6000, 9000))


def test_train_and_val_without_test(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    paint_folder(root / "train", 12)
    paint_folder(root / "val", 5, seed=100)
    data = prepare("folder", root)
    assert (len(data.labels), data.held_out, data.test_images) == (51, 15, 0)


def test_classes_alone_are_split(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos", 20)
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root))
    assert (len(plan.splits.train), len(plan.splits.tune), plan.data.test_images) == (54, 54, 6)
    assert plan.notes == []


def test_what_is_passed_over_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "photos"
    paint_folder(root / "train", 12)
    paint_folder(root / "extra", 2)
    (root / "labels.csv").write_text("a,b")
    (root / "train" / "README").write_text("hello")
    for i in range(3):
        (root / "train" / "red" / f"{i}.txt").write_text("no image")
        (root / "train" / "red" / f"{i}.xcf").write_text("no image")
    (root / "test").mkdir()
    Image.new("RGB", (8, 8)).save(root / "test" / "1.png")
    prepare("folder", root)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in ("3 .txt", "3 .xcf", "1 .csv", "1 files without ending", "folder extra",
                 "test (1 images without class folders)"):  # fmt: skip
        assert part in line
    prepare("folder", root)
    assert capsys.readouterr().err == "", "a second time nothing is decoded, and nothing told"
    found = explored(tmp_path / "page.html", "--data", "folder", "--data-dir", str(root))
    assert [note for note in found["notes"] if "passed over" in note] == [line.strip()]


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_one_part_lacks(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    paint_folder(root / "train", 6)
    paint_folder(root / part, 3, seed=100)
    for path in (root / part / "green").iterdir():
        path.unlink()
    (root / part / "green").rmdir()
    line = refused(capsys, monkeypatch, tmp_path / "run", "--data", "folder", "--data-dir", str(root))
    assert f"green is missing in {part}" in line


def test_classes_of_one_or_two_images_are_trained_on_and_named(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos" / "train", 300).parent
    for path in sorted((root / "train" / "blue").iterdir())[2:]:
        path.unlink()
    plan = swept(tmp_path / "run", "--data", "folder", "--data-dir", str(root))
    assert set(predicted(tmp_path / "run", paint_folder(tmp_path / "new", 3, seed=9000)).values()) <= set(COLOURS)
    assert np.bincount(plan.data.labels[plan.splits.train]).tolist() == [2, 240, 240]
    assert np.bincount(plan.data.labels[plan.splits.select], minlength=3).tolist() == [0, 30, 30]
    [note] = plan.notes
    assert "of 1 classes all images are trained on" in note
    assert note.endswith("blue")


# From the version before held-out parts and twins were kept: what is as it was then keeps its fingerprint.
FINGERPRINTS = {
    ("train", "test"): ("7ad607b63569f050", 72, 72),
    ("train", "test", "broken"): ("e5fc823e24bfcbab", 72, 71),
    ("train",): ("0a5613039915edf2", 72, 0),
    ("",): ("ffdcab2af09285e6", 66, 6),
    ("", "broken"): ("f4b0f59ec02174d9", 65, 6),
}


def noise_folder(root: Path, parts: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(7)
    for part in parts:
        if part == "broken":
            next(root.rglob("05.png")).write_bytes(b"no image")
            continue
        for name in "abc":
            (root / part / name).mkdir(parents=True)
            for i in range(24):
                pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    return root


@pytest.mark.parametrize("parts", FINGERPRINTS)
def test_layouts_of_before_keep_their_fingerprints(parts: tuple[str, ...], tmp_path: Path) -> None:
    data = prepare("folder", noise_folder(tmp_path / "photos", parts))
    assert (data.fingerprint, len(data.labels), data.test_images) == FINGERPRINTS[parts]


def test_a_run_on_images_with_twins_that_began_before_goes_on(tmp_path: Path) -> None:
    """Its prepared images and its splits are those of then; only new runs keep twins on one side."""
    root = paint_folder(tmp_path / "photos", 20)
    for path in sorted((root / "red").iterdir()):
        Image.open(path).save(path.with_name(f"twin-{path.name}"))
    before = prepare("folder", root, twins=False)  # as the earlier version prepared them
    plain = split_data(before)
    now = prepare("folder", root)
    assert now.fingerprint != before.fingerprint
    config, plan = planned(tmp_path / "run", "--data", "folder", "--data-dir", str(root))
    assert plan.data.fingerprint == now.fingerprint
    run = UPath(tmp_path / "run")
    search_run._open_run(plan, config)
    info = read_json(run / "run.json")
    old = {"fingerprint": before.fingerprint, "folder": before.path.name}
    write_json(run / "run.json", info | {"data": info["data"] | old, "split_fingerprint": plain.fingerprint})
    save_splits(run, plain)
    again = make_plan(config)
    assert again.data.path == before.path
    assert again.splits.fingerprint == plain.fingerprint == load_splits(run).fingerprint
    search_run._check_continues(again, config, search_run.read_run(run))


def test_test_images_are_cut_once_and_do_not_overlap(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos", 20)
    for path in sorted((root / "red").iterdir()):
        for i in range(3):
            Image.open(path).save(path.with_name(f"twin{i}-{path.name}"))
    data = prepare("folder", root)
    images, labels = open_test(data.path)
    pixels = {image.tobytes() for image in data.images}
    assert not any(image.tobytes() in pixels for image in images)
    assert len(images) + len(data.labels) == 120
    assert np.bincount(labels).tolist()[:2] == [2, 2]
    assert np.bincount(labels)[2] == 8, "two pictures with their three twins each"
