"""ensemble.predict: the CSV, unreadable images, a real kill -9, and what is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble import predict
from ensemble.file import read_ensemble
from ensemble.predict import Predict, Voters, find_images, predict_folder
from trainables.data.share import open_run_data
from trainables.data.splits import load_splits
from trainables.errors import UserError
from trainables.run_directory import Candidate, list_candidates
from trainables.storage import read_json, write_json

ROOT = Path(__file__).parents[2]


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """90 labelled test pictures in three subfolders, whose names are their classes."""
    return Path(shutil.copytree(pictures / "test", tmp_path / "new"))


def test_every_image_has_a_row_with_its_label(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert predict_folder(Predict(folder, out, (str(small_run),), probs=True)) == (90, {})
    header, *rows = rows_of(out)
    assert header == ["id", "label", "across", "down", "grid"]
    assert [row[0] for row in rows] == sorted(f"{p.parent.name}/{p.stem}" for p in folder.glob("*/*.png"))
    assert np.mean([row[1] == row[0].split("/")[0] for row in rows]) > 0.7
    for row in rows:
        probs = [float(p) for p in row[2:]]
        assert sum(probs) == pytest.approx(1, abs=1e-5)
        assert header[2 + int(np.argmax(probs))] == row[1]
    assert json.loads((tmp_path / "out.csv.json").read_text())["complete"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out.csv", "out.csv.json"]


def test_the_same_as_json(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    out, told = tmp_path / "out.csv", tmp_path / "out of.json"
    for _ in range(2):  # the second time there is nothing left to predict
        assert predict_folder(Predict(folder, out, (str(small_run),), json=told))[0] == 91
        found = json.loads(told.read_text())
        rows = rows_of(out)[1:]
        assert found["labels"] == {id: label or None for id, label in rows}
        assert found["classes"] == {name: sum(row[1] == name for row in rows) for name in ("across", "down", "grid")}
        assert list(found["unreadable"]) == ["broken"]
        assert found["images"] == 91
        assert found["ensemble"] == "equal"
        told.unlink()
    with pytest.raises(UserError, match="name another --json"):
        predict_folder(Predict(folder, tmp_path / "new.csv", (str(small_run),), json=tmp_path / "no" / "x.json"))
    assert not (tmp_path / "new.csv").exists()


def test_it_predicts_what_the_members_predicted(small_run: UPath) -> None:
    """On the select split, with weights, temperatures and a stacked layer: as from the stored predictions."""
    ensemble = read_ensemble(small_run)
    voters = Voters.load([small_run], ensemble, "cpu")
    data = open_run_data(small_run)[0]
    images = data.images[load_splits(small_run).select]
    stored = [member.candidate([small_run]).probs("select") for member in ensemble.members]
    for vote, expected in zip(voters.votes(images), stored, strict=True):
        np.testing.assert_allclose(vote, expected, atol=1e-5)
    np.testing.assert_allclose(voters(images), ensemble.predict(stored), atol=1e-5)


def test_members_are_loaded_once(
    small_run: UPath, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(candidate: Candidate, device: object) -> object:
        loaded.append(candidate.id)
        return real(candidate, device)  # type: ignore[arg-type]

    real = predict.load_model
    monkeypatch.setattr(predict, "load_model", load)
    monkeypatch.setattr(predict, "BATCH", 7)
    predict_folder(Predict(folder, tmp_path / "out.csv", (str(small_run),)))
    assert sorted(loaded) == ["0000", "0001", "0002"]


def test_views_are_optional(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    outs = {tta: tmp_path / f"{tta}.csv" for tta in ("own", "none", "mirror")}
    for tta, out in outs.items():
        predict_folder(Predict(folder, out, (str(small_run),), probs=True, tta=tta))  # type: ignore[arg-type]
    own, none, mirror = (rows_of(out) for out in outs.values())
    assert own != none != mirror != own


def test_unreadable_images_are_named_and_get_no_label(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    (folder / "across/0.png").write_bytes(b"this is no picture")
    whole = (folder / "down/1.png").read_bytes()
    (folder / "down/1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image file by its name")
    out = tmp_path / "out.csv"
    count, unreadable = predict_folder(Predict(folder, out, (str(small_run),), probs=True))
    assert count == 90
    assert unreadable.keys() == {"across/0", "down/1"}
    assert unreadable["across/0"] == "not an image"
    rows = {row[0]: row[1:] for row in rows_of(out)[1:]}
    assert rows["across/0"] == rows["down/1"] == [""] * 4
    assert sum(1 for row in rows.values() if row[0]) == 88
    # told again when everything is done
    assert predict_folder(Predict(folder, out, (str(small_run),), probs=True))[1].keys() == {"across/0", "down/1"}


def test_nothing_but_unreadable_images(small_run: UPath, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.png").write_bytes(b"")
    assert predict_folder(Predict(tmp_path / "new", tmp_path / "out.csv", (str(small_run),)))[0] == 1
    assert rows_of(tmp_path / "out.csv") == [["id", "label"], ["a", ""]]


def test_ids_are_unique(tmp_path: Path) -> None:
    for name in ("a.png", "sub/a.png", "sub/b.v2.jpg", ".hidden/c.png", "sub/.d.png", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_images(tmp_path)) == ["a", "sub/a", "sub/b.v2"]
    (tmp_path / "a.jpg").touch()
    assert list(find_images(tmp_path)) == ["a.jpg", "a.png", "sub/a.png", "sub/b.v2.jpg"]


def test_odd_file_names_survive(small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    names = ['comma, and "quotes"', "line\nbreak", "ünïcode", os.fsdecode(b"latin\xe9"), "-dash", " space "]
    for name in names:
        shutil.copy(pictures / "test/grid/0.png", folder / f"{name}.png")
    out = tmp_path / "out.csv"
    args = Predict(folder, out, (str(small_run),))
    predict_folder(args)
    whole = out.read_bytes()
    assert sorted(row[0] for row in rows_of(out)[1:]) == sorted(names)
    for cut in range(len(whole)):  # wherever it is killed, what is whole stays and the rest is done again
        out.write_bytes(whole[:cut])
        beside = UPath(tmp_path / "out.csv.json")
        done = predict._rows_done(out, beside, ["id", "label"], json.loads(beside.read_text()))
        assert done.keys() <= set(names)
        assert whole.startswith(out.read_bytes())
    out.write_bytes(whole[:50])
    predict_folder(args)
    assert out.read_bytes() == whole


def test_killed_it_goes_on(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, of a process with thousands of images; the same command then completes the file."""
    for i in range(100):
        shutil.copytree(folder / "grid", folder / f"more{i}")
    out = tmp_path / "out.csv"
    command = [
        sys.executable, "-m", "ensemble.predict", "--images", str(folder), "--out", str(out), "--run", str(small_run),
        "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.time() + 240
    while not (out.exists() and out.read_bytes().count(b"\n") > 500):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.time() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    assert json.loads((tmp_path / "out.csv.json").read_text())["complete"] is False
    assert 500 < before.count(b"\n") < 3091, "it was killed in the middle"

    with pytest.raises(UserError, match="other columns"):
        predict_folder(Predict(folder, out, (str(small_run),), probs=True, device="cpu"))

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == f"3090 images in {out}\n"
    assert out.read_bytes().startswith(before), "nothing was done again"
    rows = rows_of(out)
    assert len(rows) == 3091
    assert len({row[0] for row in rows}) == 3091
    labels = {row[0]: row[1] for row in rows}
    for i in range(100):
        assert labels[f"more{i}/7"] == labels["grid/7"]


def test_new_images_are_added_and_lost_ones_refused(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    args = Predict(folder, out, (str(small_run),))
    predict_folder(args)
    shutil.copy(folder / "grid/0.png", folder / "late.png")
    assert predict_folder(args)[0] == 91
    assert rows_of(out)[-1][0] == "late"
    (folder / "late.png").unlink()
    with pytest.raises(UserError, match="such as late; remove it"):
        predict_folder(args)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": Path("nowhere")}, "image folder nowhere does not exist"),
        ({"out": Path("nowhere/out.csv")}, "make it, or name another --out"),
        ({"run": ("nowhere",)}, "not a run directory"),
        ({"ensemble": "best"}, "it has equal"),
        ({"device": "gpu"}, "this machine has no device 'gpu', expected .*cpu"),
        ({"device": "cuda:99"}, "this machine has no device 'cuda:99'"),
    ],
)
def test_mistakes(change: dict, expected: str, small_run: UPath, folder: Path, tmp_path: Path) -> None:
    args = {"images": folder, "out": tmp_path / "out.csv", "run": (str(small_run),), **change}
    with pytest.raises(UserError, match=expected):
        predict_folder(Predict(**args))
    assert not list(tmp_path.glob("*.csv*"))


def test_what_somebody_else_made_is_left_alone(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("id,label\nmine,precious\n")
    args = Predict(folder, out, (str(small_run),))
    with pytest.raises(UserError, match="another ensemble or folder"):
        predict_folder(args)
    assert out.read_text() == "id,label\nmine,precious\n"
    out.unlink()
    predict_folder(args)
    with pytest.raises(UserError, match="another ensemble or folder"):
        predict_folder(Predict(folder, out, (str(small_run),), tta="none"))


def test_two_at_a_time_are_refused(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    args = Predict(folder, tmp_path / "out.csv", (str(small_run),))
    with predict._alone(args.out), pytest.raises(UserError, match=r"another ensemble\.predict is writing"):
        predict_folder(args)
    assert not args.out.exists()


def test_a_member_without_weights(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(str(small_run), tmp_path / "run"))
    (run / "candidates/0001/weights.safetensors").unlink()
    with pytest.raises(UserError, match="candidate 0001 has no weights"):
        predict_folder(Predict(folder, tmp_path / "out.csv", (str(run),)))
    assert len(list_candidates(UPath(run))) == 3


def test_members_whose_files_are_damaged_or_lack_something(small_run: UPath, folder: Path, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    args = Predict(folder, tmp_path / "out.csv", (str(run),))
    weights, info = run / "candidates/0001/weights.safetensors", run / "candidates/0000/candidate.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="the weights of candidate 0001 are damaged"):
        predict_folder(args)
    write_json(info, {key: value for key, value in read_json(info).items() if key not in ("mean", "std")})
    with pytest.raises(UserError, match=r"candidate 0000 cannot predict: its candidate\.json lacks mean, std"):
        predict_folder(args)
