"""Sets and thresholds keep their promise on images that they were not set on; in a CSV, in Python, in the report."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import Ensemble, read_ensemble, write_ensemble
from ensemble.model import open_model
from ensemble.predict import Predict, predict_folder
from ensemble.report.write import write_report
from ensemble.risk import Risk, calibrate, measure
from ensemble.select import Select, choose
from ensemble.selection.metrics import correct
from tests.ensemble.test_select import make_run, run_command
from trainables.errors import UserError


def draw(rng: np.random.Generator, rows: int, classes: int = 5, overconfident: float = 1.0):
    """Probabilities (rows, classes), and labels drawn from them; then sharpened, so that they promise too much."""
    probs = rng.dirichlet(np.full(classes, 0.3), size=rows)
    labels = (probs.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    sharp = np.maximum(probs, 1e-9) ** overconfident
    return (sharp / sharp.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("overconfident", [1.0, 3.0])
@pytest.mark.parametrize(("rows", "level"), [(60, 0.1), (200, 0.05), (200, 0.2)])
def test_new_images_are_covered_as_promised(rows, level, overconfident):
    rng = np.random.default_rng(0)
    covered, wrong, errors = [], [], []
    for _ in range(300):
        probs, labels = draw(rng, rows + 200, overconfident=overconfident)
        risk = calibrate(probs[None, :rows], labels[:rows], level)
        new, truth = probs[rows:], labels[rows:]
        covered.append(risk.sets(new)[np.arange(200), truth].mean())
        errors.append((~correct(new, truth)).mean())
        wrong.append((~risk.unsure(new) & ~correct(new, truth)).mean())
    assert 1 - level - 0.01 < np.mean(covered) < 1 - level + 1 / (rows + 1) + 0.01
    assert np.mean(errors) > level + 0.05, "or never to be unsure would do"
    assert level - 1 / (rows + 1) - 0.01 < np.mean(wrong) < level + 0.005


def test_repeats_count_as_one_set_of_images():
    probs, labels = draw(np.random.default_rng(1), 80)
    once = calibrate(probs[None], labels, 0.1)
    assert calibrate(np.stack([probs] * 3), labels, 0.1) == once
    assert measure(once, np.stack([probs] * 3), labels) == measure(once, probs[None], labels)


def test_few_images_promise_nothing():
    probs, labels = draw(np.random.default_rng(2), 15)
    risk = calibrate(probs[None], labels, 0.05)
    assert risk.sets(probs).all(), "of 15 images none can be spared at 5 %"
    assert risk.unsure(probs).all()
    assert measure(risk, probs[None], labels)["error"] is None


def test_a_set_always_holds_the_answer():
    risk = Risk(0.05, in_set=0.9, sure=0.5)
    probs = np.array([[0.4, 0.3, 0.3], [0.05, 0.95, 0.0]])
    assert risk.sets(probs).tolist() == [[True, False, False], [False, True, False]]
    assert risk.unsure(probs).tolist() == [True, False]


def test_measured_numbers():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    found = measure(Risk(0.1, in_set=0.4, sure=0.7), probs[None], np.array([0, 1, 1, 1]))
    assert found["covered"] == 0.75
    assert found["set_size"] == 1.25
    assert found["answered"] == 0.75
    assert found["error"] == pytest.approx(1 / 3)
    assert np.array(found["curve"]) == pytest.approx(
        np.array([[0.9, 0.25, 0], [0.8, 0.5, 0], [0.7, 0.75, 1 / 3], [0.6, 1, 0.5]])
    )


def test_a_selection_sets_it_on_rows_that_it_held_out(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    strict, loose = (choose(Select(run=(str(run),), risk=level)) for level in (0.02, 0.2))
    assert strict.risk.in_set < loose.risk.in_set
    assert strict.scores["risk"]["set_size"] > loose.scores["risk"]["set_size"]
    assert loose.scores["risk"]["covered"] == pytest.approx(0.8, abs=0.02)
    assert (loose.scores["risk"]["split"], loose.scores["risk"]["images"]) == ("select", 300)
    done = run_command("--run", run, "--risk", "0.2", cwd=tmp_path)
    assert f"sure of {loose.scores['risk']['answered']:.1%} of its answers" in " ".join(done.stdout.split())
    assert read_ensemble(run).risk == loose.risk
    done = run_command("--run", run, "--risk", "0", cwd=tmp_path)
    assert (done.returncode, "--risk is 0.0, expected above 0 and below 1" in done.stderr) == (2, True)


def test_a_damaged_risk_is_refused():
    values = {"members": [{"id": "a", "weight": 1.0}], "risk": {"level": 0.05, "in_set": float("nan"), "sure": 0.9}}
    with pytest.raises(UserError, match="damaged"):
        Ensemble.from_dict(values, "x")


@pytest.fixture
def cautious(small_run: UPath, tmp_path: Path) -> UPath:
    """A run whose ensemble finds half of its select images too unsure."""
    run = UPath(shutil.copytree(str(small_run), tmp_path / "cautious"))
    ensemble = read_ensemble(run)
    probs = ensemble.predict([member.candidate([run]).probs("select") for member in ensemble.members])
    sure = float(np.median(probs.max(axis=1)))
    write_ensemble(run, dataclasses.replace(ensemble, risk=Risk(0.05, in_set=0.25, sure=sure)))
    return run


def test_a_csv_says_how_sure_it_is(cautious: UPath, small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out.csv", pictures / "test"
    predict_folder(Predict(images, out, (str(cautious),), probs=True, unsure=True))
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["id", "label", "confidence", "agreement", "set", "unsure", "across", "down", "grid"]
    model = open_model([cautious], device="cpu")
    told = model.predict(images)
    assert told.sets is not None
    assert told.unsure is not None
    assert {"yes", "no"} == {row["unsure"] for row in rows}
    pixels = np.stack([np.asarray(Image.open(images / f"{row['id']}.png").convert("RGB")) for row in rows])
    votes = [[model.classes[i] for i in vote.argmax(axis=1)] for vote in model.voters.votes(pixels)]
    for n, (row, names, unsure, probs) in enumerate(
        zip(rows, told.sets, told.unsure.tolist(), told.probs, strict=True)
    ):
        assert row["set"].split("|") == list(names)
        assert row["label"] in names
        assert [name for name in model.classes if float(row[name]) >= 0.25 or name == row["label"]] == list(names)
        assert row["unsure"] == ("yes" if unsure else "no")
        assert float(row["confidence"]) == pytest.approx(float(probs.max()), abs=1e-5)
        same = [weight for weight, vote in zip(model.ensemble.weights, votes, strict=True) if vote[n] == row["label"]]
        assert float(row["agreement"]) == pytest.approx(sum(same), abs=1e-5)
    with pytest.raises(UserError, match="does not say when it is unsure"):
        predict_folder(Predict(images, tmp_path / "old.csv", (str(small_run),), unsure=True))
    assert not (tmp_path / "old.csv").exists()


def test_an_image_that_cannot_be_read_is_unsure(cautious: UPath, pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    told = open_model([cautious], device="cpu").predict([pictures / "test/grid/0.png", broken])
    assert told.sets is not None
    assert told.unsure is not None
    assert told.sets[1] == ()
    assert told.unsure[1]


def test_the_report_measures_it_on_the_test_part(cautious: UPath) -> None:
    ensemble = read_ensemble(cautious)
    found = write_report([cautious], ensemble)
    assert found["risk"] == dataclasses.asdict(ensemble.risk)
    score = found["test"]["risk"]
    assert (score["split"], score["images"]) == ("test", 90)
    assert score["interval"][0] < score["covered"] <= score["interval"][1]
    assert json.loads((cautious / "report.json").read_text())["test"]["risk"] == score
    page = (cautious / "report.html").read_text()
    assert "When it had better say that it is unsure" in page
    assert "test split (90 images)" in page
