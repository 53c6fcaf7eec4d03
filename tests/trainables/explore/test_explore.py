"""Explore, end to end on folders with planted duplicates, unreadable files and wrong labels."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from tests.conftest import split_once
from tests.ensemble.test_report import HOSTILE, Page
from tests.small_run import doubt_first, train_run
from tests.trainables.data.test_duplicates import pictures as draw
from trainables.data.dataset import open_test, open_test_images
from trainables.data.origin import find_origin
from trainables.data.prepare import prepare
from trainables.data.splits import load_splits, make_splits, save_splits
from trainables.errors import UserError
from trainables.explore.__main__ import Explore, explore, main
from trainables.explore.findings import summary
from trainables.explore.suspects import find_suspects
from trainables.run_directory import CandidateInfo, write_candidate
from trainables.storage import write_array, write_json

ROOT = Path(__file__).parents[3]


def write_folder(root: Path, per_class: int = 40, tests: int = 10) -> Path:
    """ROOT/{train,test}/{a,b,c}/NN.png of 32x32 pictures that are all different."""
    images = iter(draw(3 * (per_class + tests), seed=1))
    for part, count in (("train", per_class), ("test", tests)):
        for name in "abc":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(images)).save(root / part / name / f"{i:02}.png")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "photos")


def explored(folder: Path, out: Path, **more) -> dict:
    return explore(Explore(data="folder", data_dir=folder, out=out, **more))


def test_it_says_what_an_epoch_takes_here(folder, tmp_path):
    found = explored(folder, tmp_path / "page.html")
    epoch = found["epoch"]
    assert epoch["images"] == next(iter(found["splits"].values())), "those that are trained on"
    assert epoch["seconds"] > 0
    line = f"an epoch of tf_efficientnet_lite0 at {epoch['pixels']} pixels takes about"
    assert any(said.startswith(line) for said in summary(found))
    assert f"An epoch of tf_efficientnet_lite0 at {epoch['pixels']} pixels" in (tmp_path / "page.html").read_text()


def test_planted_twins_across_splits_and_unreadable_files(folder, tmp_path):
    shutil.copy(folder / "train/a/03.png", folder / "test/b/90.png")
    with Image.open(folder / "train/b/07.png") as image:
        image.save(folder / "test/b/91.jpg", quality=80)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "train/c/92.png")
    (folder / "train/a/broken.png").write_bytes(b"not an image")
    whole = (folder / "train/c/01.png").read_bytes()
    (folder / "train/c/cut.png").write_bytes(whole[: len(whole) // 2])
    found = explored(folder, tmp_path / "page.html")
    groups = {frozenset(image["name"] for image in group["images"]): group for group in found["groups"]}
    assert set(groups) == {
        frozenset({"train/a/03.png", "test/b/90.png"}),
        frozenset({"train/b/07.png", "test/b/91.jpg", "train/c/92.png"}),
    }
    exact = groups[frozenset({"train/a/03.png", "test/b/90.png"})]
    assert (exact["kind"], exact["across"], exact["contradictory"]) == ("exact", True, False)
    three = groups[frozenset({"train/b/07.png", "test/b/91.jpg", "train/c/92.png"})]
    assert (three["kind"], three["contradictory"]) == ("mirrored", True)
    assert sum(leak["images"] for leak in found["leaks"] if leak["split"] == "test") >= 2
    assert len(found["unreadable"]) == 2
    assert any("broken.png (not an image)" in file for file in found["unreadable"])
    assert any("cut.png" in file for file in found["unreadable"])
    assert json.loads((tmp_path / "page.json").read_text()) == json.loads(json.dumps(found))
    page = Page((tmp_path / "page.html").read_bytes())
    assert page.sections == ["classes", "samples", "leaks", "light", "unreadable", "suspects"]
    assert all(link.startswith("data:image/webp;base64,") for link in page.loads)
    assert "broken.png (not an image)" in page.words
    assert "train/b/07.png" in page.words
    assert "Known after a sweep" in page.words


def test_counts_are_those_of_the_splits_that_a_sweep_will_use(folder, tmp_path):
    found = explored(folder, tmp_path / "page.html")
    data = prepare("folder", folder)
    splits = make_splits(data.labels, data.fingerprint)
    assert found["splits"] == {"train, tune and select, cross-fitted": len(splits.train), "test": 30}
    assert found["counts"]["a"] == {"train, tune and select, cross-fitted": 40}
    assert "nothing reads their labels before the report does" in Page((tmp_path / "page.html").read_bytes()).words


def test_original_sizes_are_those_of_the_files(folder, tmp_path):
    Image.fromarray(draw(1, side=64)[0]).resize((90, 64)).save(folder / "train/a/wide.png")
    found = explored(folder, tmp_path / "page.html")
    assert found["original_sizes"] == [[32, 32, 150], [90, 64, 1]]


def test_names_are_in_the_order_of_the_rows(folder):
    prepare("folder", folder)
    (folder / "train/b/90.png").write_bytes(b"broken (really)")  # what can be read is the same as before
    data = prepare("folder", folder)
    origin = find_origin("folder", folder)
    assert len(origin.train) == len(data.labels) == 120
    assert "train/b/90.png" not in origin.train
    assert [entry.endswith("train/b/90.png (not an image)") for entry in origin.unreadable] == [True]
    for row in (0, 40, 118):
        assert np.array_equal(np.asarray(Image.open(folder / origin.train[row])), data.images[row])
    images, _ = open_test(data.path)
    assert np.array_equal(open_test_images(data.path), images)
    assert np.array_equal(np.asarray(Image.open(folder / origin.test[7])), images[7])


def test_digits_need_no_folder(tmp_path):
    found = explore(Explore(out=tmp_path / "page.html"))
    assert found["data"]["name"] == "digits"
    assert sum(found["splits"].values()) == 1797
    assert found["groups"] == [], "no digit is there twice"


def test_hostile_class_names_stay_text(tmp_path):
    root = write_folder(tmp_path / "photos", per_class=12, tests=0)
    shutil.rmtree(root / "test")
    (root / "train/a").rename(root / "train" / HOSTILE.replace("/", "∕"))
    explored(root, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_bytes())
    assert page.tags.count("script") == 2 + len(page.figures)
    assert not page.handlers
    assert HOSTILE.replace("/", "∕") in page.text


def learnable_run(path: Path, flips: int, models: int = 3) -> tuple:
    """A run of models that know the true labels of most images; `flips` labels of its tune and select splits are wrong.

    Returns the data with these wrong labels, and the rows that have them.
    """
    data = prepare("digits")
    rng = np.random.default_rng(0)
    splits = split_once(data)
    wrong = rng.choice(splits.select, flips, replace=False)
    labels = np.array(data.labels)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, flips)) % 10
    run = open_run_dir(path, data, splits, labels)
    for m in range(models):
        truth = data.labels[splits.select]
        answers = np.where(rng.random(len(truth)) < 0.1, rng.integers(0, 10, len(truth)), truth)
        sure = rng.uniform(0.5, 0.99, len(truth))[:, None]
        probs = sure * np.eye(10)[answers] + (1 - sure) * rng.dirichlet(np.ones(10), len(truth))
        write_candidate(run, CandidateInfo(f"c{m}"), probs, probs)
    return run, dataclasses.replace(data, labels=labels), wrong


def open_run_dir(path: Path, data, splits, labels) -> UPath:
    path.mkdir(parents=True)
    info = {"classes": list(data.classes), "split_fingerprint": splits.fingerprint,
            "data": {"name": data.name, "fingerprint": data.fingerprint}}  # fmt: skip
    run = UPath(path)
    write_json(run / "run.json", info)
    save_splits(run, splits)
    write_array(run / "select_labels.npy", labels[splits.select])
    return run


def test_planted_label_errors_are_among_the_suspects(tmp_path):
    run, data, wrong = learnable_run(tmp_path / "run", flips=20)
    write_candidate(run, CandidateInfo("short"), np.full((3, 10), 0.1))  # left out
    # and so is what the pool of an ensemble would leave out; before, models like these had a say
    sure = np.eye(10, dtype=np.float32)[(data.labels[load_splits(run).select] + 1) % 10]
    write_candidate(run, CandidateInfo("other", split_fingerprint="of other images"), sure, sure)
    write_candidate(run, CandidateInfo("logits"), 9 * sure, 9 * sure)
    suspects = find_suspects(run, data, most=40)
    assert np.isin(wrong, suspects.rows).mean() >= 0.9
    assert (np.diff(suspects.quality) >= 0).all()
    assert suspects.checked == len(load_splits(run).select)
    assert suspects.models <= 3
    assert 10 <= suspects.estimate <= 60
    found = dict(zip(suspects.rows.tolist(), suspects.suggested.tolist(), strict=True))
    truth = prepare("digits").labels
    assert np.mean([found[row] == truth[row] for row in wrong.tolist() if row in found]) >= 0.9


def test_a_poor_model_does_not_bury_what_good_ones_see(tmp_path):
    run, data, wrong = learnable_run(tmp_path / "run", flips=20)
    rng = np.random.default_rng(1)
    for m in range(6):
        noise = rng.dirichlet(np.ones(10), len(load_splits(run).select))
        write_candidate(run, CandidateInfo(f"poor{m}"), noise, noise)
    assert np.isin(wrong, find_suspects(run, data, most=40).rows).mean() >= 0.9


def test_a_run_without_predictions_says_so(tmp_path):
    data = prepare("digits")
    splits = make_splits(data.labels, data.fingerprint)
    run = open_run_dir(tmp_path / "run", data, splits, data.labels)
    with pytest.raises(UserError, match="label errors need some"):
        find_suspects(run, data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    run, _ = train_run(tmp_path_factory.mktemp("runs") / "stripes", pictures, trials=2)
    doubt_first(run)
    return run, pictures


def test_after_a_sweep_with_an_export_for_fiftyone(trained, tmp_path):
    run, pictures = trained
    args = Explore(run=str(run), data_dir=pictures, out=tmp_path / "page.html", fiftyone=tmp_path / "export")
    found = explore(args)
    assert found["data"]["folder"] == str(pictures)
    assert found["suspects"]["models"] == 2
    assert found["suspects"]["checked"] == 90
    suspects = found["suspects"]["images"]
    assert suspects[0]["row"] == load_splits(run).select[0]
    assert all(suspect["label"] != suspect["suggested"] for suspect in suspects)
    assert "Cleanlab estimates" in Page((tmp_path / "page.html").read_bytes()).words
    labels = json.loads((tmp_path / "export/labels.json").read_text())
    assert labels["classes"] == ["across", "down", "grid"]
    files = {path.stem: path for path in (tmp_path / "export/data").iterdir()}
    assert set(files) == set(labels["labels"])
    assert len(files) == 180
    entry = labels["labels"]["train-0000000"]
    assert entry["label"] == "across"
    assert entry["attributes"]["source"].startswith("train/across/")
    assert entry["attributes"]["split"] in ("train, tune and select, cross-fitted",)
    assert np.array_equal(Image.open(files["train-0000000"]), Image.open(pictures / entry["attributes"]["source"]))
    test = labels["labels"]["test-0000000"]
    assert test["label"] is None, "test labels are the report's"
    first = next(e for e in labels["labels"].values() if e["attributes"].get("suspect_rank") == 1)
    assert first["attributes"]["suggested"] == suspects[0]["suggested"]
    explore(args)  # again, over itself
    found = explore(Explore(run=str(run), out=tmp_path / "page.html"))  # where the files lie is not for a run to say
    assert found["data"]["folder"] == ""
    assert found["suspects"]["images"][0]["name"].startswith("train ")


def test_the_command_and_what_a_user_can_get_wrong(trained, tmp_path, folder, capsys):
    run, _ = trained
    command = [sys.executable, "-m", "trainables.explore", "--data", "folder", "--data-dir", str(folder)]
    command += ["--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "3 classes" in done.stdout
    assert "0 unreadable files" in done.stdout
    out = ["--out", str(tmp_path / "none.html")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    for args, message in [
        (["--out", "page.pdf"], "ends in .html"),
        (["--out", str(tmp_path / "no/page.html")], "does not exist"),
        (["--run", str(tmp_path), *out], "is not a run directory"),
        (["--run", str(run), "--data", "folder", "--data-dir", str(folder), *out], "other images"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(args)
        said = capsys.readouterr().err.strip()
        assert (exit.value.code, len(said.splitlines())) == (2, 1), said
        assert message in said
    assert not (tmp_path / "none.html").exists()
    with pytest.raises(UserError, match="neither empty nor an earlier export"):
        explored(folder, tmp_path / "page.html", fiftyone=tmp_path / "full")
