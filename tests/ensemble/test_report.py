"""The report: what it says is what the arrays say, whatever is missing is told, and nothing from outside runs."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
from upath import UPath

from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.report.figures import of_study
from ensemble.report.write import summary, write_report
from ensemble.select import Select, choose
from tests.ensemble.test_select import make_run
from tests.small_run import train_run
from trainables.config import TrialConfig
from trainables.data.dataset import open_test
from trainables.data.share import open_run_data
from trainables.errors import UserError
from trainables.run_directory import CandidateInfo, list_candidates, write_candidate
from trainables.storage import read_json, write_array, write_json

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text outside of scripts, and what it would load."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text, self.loads, self.handlers, self.figures = "", [], [], []
        self.sections: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [values[key] for key in ("src", "href") if values.get(key)]
        self.handlers += [key for key in values if key.startswith("on")]
        if tag == "section":
            self.sections.append(str(values["id"]))
        if tag == "script":
            self._script = values

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        elif self._script.get("type") == "application/json":
            self.figures.append(json.loads(data))

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def read_page(run: UPath) -> Page:
    return Page((run / "report.html").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> tuple[UPath, Ensemble]:
    return train_run(tmp_path_factory.mktemp("runs") / "stripes", pictures)


def copied(run: UPath, to: Path) -> UPath:
    shutil.copytree(str(run), to)
    return UPath(to)


def test_test_scores_are_those_of_the_frozen_ensemble(trained, tmp_path):
    run, ensemble = trained
    found = write_report([run], ensemble)
    stored = json.loads((run / "report.json").read_text())
    assert stored == json.loads(json.dumps(found))
    test = stored["test"]
    from ensemble.predict import candidate_predictor

    images, labels = open_test(open_run_data(run)[0].path)
    probs = [candidate_predictor(member.candidate([run]))(images) for member in ensemble.members]
    right = ensemble.predict(probs).argmax(1) == labels
    assert test["ensemble"]["accuracy"] == pytest.approx(right.mean())
    assert test["ensemble"]["images"] == len(labels) == 90
    for key in ("ensemble", "best_single"):
        low, high = test[key]["interval"]
        assert low <= test[key]["accuracy"] <= high
        assert test[key]["split"] == "test"
    assert test["best_single"]["id"] == ensemble.scores["best_single"]["id"]
    # the select scores are what selection had written, and mistakes are counted on the test part
    assert stored["select"]["select"]["accuracy"] == pytest.approx(ensemble.scores["select"]["accuracy"])
    mistakes = stored["mistakes"]
    assert (mistakes["split"], mistakes["images"]) == ("test", 90)
    assert sum(pair["images"] for pair in mistakes["confused"]) == (~right).sum()
    assert sum(row["images"] for row in mistakes["classes"]) == 90


def test_looks_at_the_test_labels_are_counted(trained, tmp_path):
    run = copied(trained[0], tmp_path / "run")
    ensemble, other = trained[1], replace(trained[1], name="other", created=1.0)
    (run / "looks.json").unlink(missing_ok=True)
    assert [look["ensemble"] for look in write_report([run], ensemble)["looks"]] == ["greedy"]
    assert "look 1 at the test labels" in (run / "report.html").read_text()
    found = write_report([run], ensemble)
    assert summary(found)[-1] == "this is look 2 at the test labels, all for this ensemble"
    found = write_report([run], other)
    assert [look["ensemble"] for look in found["looks"]] == ["greedy", "greedy", "other"]
    assert found["looks"][-1]["created"] == 1.0
    told = "look 3 at the test labels, after others for greedy"
    assert summary(found)[-1] == f"this is {told}"
    assert told in (run / "report.html").read_text()
    (run / "looks.json").write_text("{")
    assert len(write_report([run], ensemble)["looks"]) == 1, "a damaged file is no reason to have no report"


def test_the_page_has_everything_and_loads_nothing(trained):
    run, ensemble = trained
    write_report([run], ensemble)
    page = read_page(run)
    assert page.sections == [
        "picture", "members", "classes", "mistakes", "predictions", "calibration", "curves", "study", "failures",
        "reproduce",
    ]  # fmt: skip
    assert all(link.startswith("data:image/webp;base64,") for link in page.loads)
    assert len(page.loads) >= 90
    assert not page.handlers
    assert (run / "report.html").stat().st_size < 15e6
    assert (run / "report.html").read_text().count("plotly.js v") == 1
    figures = [figure for figure in page.figures if "data" in figure]
    assert len(figures) == 9, "growth, confusion, calibration, risk, curves and the study's four"
    trials = next(figure for figure in page.figures if "0000" in figure)
    assert set(trials) == {f"{n:04d}" for n in range(7)}
    assert "loss is nan" in trials["0003"]["error"]
    # every point of the growth figure and of the learning curves is a trial
    clicked = {id for figure in figures[:1] for trace in figure["data"] for id in trace.get("customdata", [])
               if isinstance(id, str)}  # fmt: skip
    assert clicked == {c.id for c in list_candidates(run)}


def test_every_score_names_its_split_and_size(trained):
    run, ensemble = trained
    write_report([run], ensemble)
    words = read_page(run).words
    assert "Ensemble, test accuracy" in words
    assert "90 images" in words
    assert "the tune and select splits are the same images, so select scores are optimistic" in words
    shared = read_json(run / "report.json")["select"]["select"]
    assert f"select split ({shared['images']} images, also used to tune: optimistic)" in words


def test_what_failed_and_why(trained):
    run, ensemble = trained
    found = write_report([run], ensemble)
    assert found["outcomes"] == {"finished": 3, "diverged": 1, "bug": 1, "pruned": 1, "not started": 1}
    assert [failure["outcome"] for failure in found["failures"]] == ["diverged", "bug"]
    words = read_page(run).words
    assert "loss is nan in epoch 1, step 3" in words
    assert "<script>alert(1)</script>" in words, "as text"


def test_the_command_prints_and_needs_no_ray(trained, tmp_path):
    run, _ = trained
    code = "import sys; from ensemble.report.__main__ import main; main(); assert 'ray' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "--run", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"best single  test accuracy \d", done.stdout)
    assert re.search(r"ensemble     test accuracy .* 90 images\)", done.stdout)
    assert "report.html" in done.stdout


def test_how_to_reproduce_hides_passwords(trained, tmp_path):
    run = copied(trained[0], tmp_path / "stripes")
    info = read_json(run / "run.json")
    command = "/x/search/run.py --data folder --storage postgresql://me:secret@host/db"
    write_json(run / "run.json", info | {"command": command})
    found = write_report([run], trained[1])
    assert found["reproduce"]["command"] == ("python -m search.run --data folder --storage postgresql://me:***@host/db")
    assert "secret" not in (run / "report.html").read_text()


def test_images_that_are_gone_and_a_record_that_is_damaged(trained, tmp_path):
    run = copied(trained[0], tmp_path / "stripes")
    info = read_json(run / "run.json")
    write_json(run / "run.json", info | {"data": info["data"] | {"folder": "folder-0123456789abcdef"}})
    (run / "trials" / "0000.json").write_bytes(b"no JSON at all, but a file of some length")
    found = write_report([run], trained[1])
    assert "test" not in found
    assert set(found["missing"]) == {"images", "test", "study"}
    page = read_page(run)
    assert len(page.sections) == 10
    assert not page.loads
    assert "The test part could not be read" in page.words
    assert "folder-0123456789abcdef" in page.words
    assert "cannot be read as JSON" in page.words


def test_a_study_of_a_single_recipe_has_no_importance():
    study = optuna.create_study()
    for value in (0.5, 0.6, 0.7):
        study.add_trial(optuna.trial.create_trial(value=value))
    figures = of_study(study)
    assert figures["Parameter importance"] == "cannot be drawn: the trials differ in no parameter"
    assert set(figures) == {"Parameter importance", "Timeline", "Parallel coordinates", "Slices"}


def test_other_images_under_the_same_path_are_not_shown(trained, tmp_path):
    run = copied(trained[0], tmp_path / "stripes")
    info = read_json(run / "run.json")
    write_json(run / "run.json", info | {"data": info["data"] | {"fingerprint": "beef"}})
    assert "holds other images" in write_report([run], trained[1])["missing"]["test"]


def test_a_renamed_run_still_has_its_trials(trained, tmp_path):
    run = copied(trained[0], tmp_path / "other-name")
    assert write_report([run], trained[1])["outcomes"]["diverged"] == 1


def test_a_run_written_by_hand_with_nothing_but_predictions(tmp_path):
    run, probs, labels = make_run(tmp_path / "hand", models=4)
    for m in range(4):  # as little as the format asks for
        write_candidate(run, CandidateInfo(f"c{m}"), probs[m])
    members = (Member("c0", 0.5), Member("c1", 0.5))
    write_json(run / "ensembles" / "mine.json", {"members": [{"id": m.id, "weight": m.weight} for m in members]})
    found = write_report([run], read_ensemble(run))
    together = (probs[0].astype(np.float64) + probs[1]) / 2
    assert found["select"]["select"]["accuracy"] == pytest.approx((together.argmax(1) == labels).mean())
    assert "test" not in found
    words = read_page(run).words
    assert "This data set has no test part" in words
    assert "does not say which prepared data set it was made of" in words
    assert "No candidate has stored a learning curve" in words
    assert "has no records of trials" in words
    assert "run.json does not say which command made this run" in words


def test_members_of_two_runs(tmp_path):
    first, _, labels = make_run(tmp_path / "first", models=3)
    second, *_ = make_run(tmp_path / "second", models=3, seed=5)
    write_array(second / "select_labels.npy", labels)
    better = (0.8 * np.eye(4)[labels] + 0.05).astype(np.float32)
    write_candidate(second, CandidateInfo("c0", config=TrialConfig(backbone="resnet18")), better)
    ensemble = choose(Select(run=(str(first), str(second))))
    write_ensemble(first, ensemble)
    with pytest.raises(UserError, match=r"name it, too: --run .*first --run \.\./second"):
        write_report([first], read_ensemble(first))
    found = write_report([first, second], read_ensemble(first))
    assert ("c0", "../second") in {(m["id"], m["run"]) for m in found["ensemble"]["members"]}
    assert "../second/c0" in read_page(first).words


def test_a_member_of_a_run_elsewhere(tmp_path):
    first, _, labels = make_run(tmp_path / "first", models=3)
    second, *_ = make_run("memory://elsewhere/second", models=3, seed=5)
    write_array(second / "select_labels.npy", labels)
    better = (0.8 * np.eye(4)[labels] + 0.05).astype(np.float32)
    write_candidate(second, CandidateInfo("c0", config=TrialConfig(backbone="resnet18")), better)
    write_ensemble(first, choose(Select(run=(str(first), str(second)))))
    ensemble = read_ensemble(first)
    [member] = [m for m in ensemble.members if m.run]
    assert (member.run, member.candidate([first, second]).architecture) == (str(second), "resnet18")
    assert (member.id, member.run) in {
        (m["id"], m["run"]) for m in write_report([first, second], ensemble)["ensemble"]["members"]
    }


@pytest.mark.parametrize("selector", ["auto", "stacking"])
def test_temperatures_and_a_stack_are_scored_as_they_were_chosen(selector, tmp_path):
    run, *_ = make_run(tmp_path / "run", models=5)
    ensemble = choose(Select(run=(str(run),), selector=selector, top_k=3))
    assert (ensemble.temperature != 1) == (selector == "auto")
    write_ensemble(run, ensemble)
    found = write_report([run], read_ensemble(run))
    assert found["select"]["select"]["log_loss"] == pytest.approx(ensemble.scores["select"]["log_loss"], abs=1e-6)
    assert (f"the average itself has {ensemble.temperature:.2f}" in read_page(run).words) == (selector == "auto")


def test_a_hundred_classes_show_the_most_confused(tmp_path):
    run, *_ = make_run(tmp_path / "run", models=3, rows=400, classes=4)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, 2000)
    write_array(run / "select_labels.npy", labels)
    write_json(run / "run.json", {"classes": [f"class {c}" for c in range(100)], "split_fingerprint": "f00d"})
    for m in range(3):
        shift = np.where((labels == 7) & (rng.random(2000) < 0.9), 8, labels)  # 7 is called 8
        p = (0.5 * np.eye(100)[shift] + 0.5 * rng.dirichlet(np.ones(100), 2000)).astype(np.float32)
        write_candidate(run, CandidateInfo(f"c{m}"), p / p.sum(1, keepdims=True))
    write_ensemble(run, choose(Select(run=(str(run),))))
    found = write_report([run], read_ensemble(run))
    assert found["mistakes"]["confused"][0] | {"images": 0} == {"label": 7, "answer": 8, "images": 0}
    matrix = next(f for f in read_page(run).figures if f.get("data", [{}])[0].get("type") == "heatmap")
    names = matrix["data"][0]["x"]
    assert len(names) <= 20
    assert {"class 7", "class 8"} <= set(names)
    assert (run / "report.html").stat().st_size < 15e6


def test_hostile_names_stay_text(tmp_path):
    run, probs, _ = make_run(tmp_path / "run", models=3)
    classes = [HOSTILE, "</script><script>alert(2)</script>", "{{ 7 * 7 }}", "&lt;b&gt;"]
    info = read_json(run / "run.json")
    info |= {"classes": classes, "command": HOSTILE, "space": HOSTILE, "versions": {HOSTILE: HOSTILE},
             "data": {"name": HOSTILE}}  # fmt: skip
    write_json(run / "run.json", info)
    for m, p in enumerate(probs):
        config = TrialConfig(backbone=HOSTILE)
        write_candidate(run, CandidateInfo(f"c{m}", config, curve=({"tune_accuracy": 0.5},), outcome=HOSTILE), p)
    write_candidate(run, CandidateInfo("bad"), probs[0] * 2)
    ensemble = replace(choose(Select(run=(str(run),))), name=HOSTILE, selector=HOSTILE, options={HOSTILE: HOSTILE})
    write_report([run], replace(ensemble, left_out={HOSTILE: HOSTILE}))
    html = (run / "report.html").read_bytes()
    page = Page(html)
    assert page.tags.count("script") == 2 + len(page.figures), "ours: plotly, page.js, and data"
    assert not page.handlers
    assert not page.loads
    assert HOSTILE in page.text
    assert "{{ 7 * 7 }}" in page.text
    matrix = next(f for f in page.figures if f.get("data", [{}])[0].get("type") == "heatmap")
    assert all("<" not in name for name in matrix["data"][0]["x"]), "plotly understands some HTML"
    assert b"default-src 'none'" in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [{"id": "gone", "weight": 1}]}, "no candidate gone"),
        ({"members": [{"id": "bad", "weight": 1}]}, r"member bad .* row 0 sums to 2"),
        ({"members": [{"id": "c0", "weight": 1}], "split_fingerprint": "beef"}, "other splits"),
    ],
)
def test_ensembles_that_cannot_be_reported_on(change, message, tmp_path):
    run, probs, _ = make_run(tmp_path / "run", models=3)
    write_candidate(run, CandidateInfo("bad"), probs[0] * 2)
    write_json(run / "ensembles" / "x.json", change)
    with pytest.raises(UserError, match=message):
        write_report([run], read_ensemble(run))
    assert not (run / "report.html").exists()
