"""ensemble.compare: two runs written by hand, whose difference is known."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble import compare as comparing
from ensemble.compare import Compare, compare
from ensemble.file import Ensemble, Member, write_ensemble
from ensemble.select import Select, select
from ensemble.selection.metrics import correct, log_losses
from tests.ensemble.test_select import make_run
from trainables.errors import UserError
from trainables.job import Outcome
from trainables.run.records import Records, Spent, TrialRecord
from trainables.storage import read_json, write_json

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two candidates, "few", and one of ten that has these, too, "many"; each with an ensemble."""
    home = tmp_path_factory.mktemp("chosen")
    make_run(home / "many", models=10, rows=400)
    shutil.copytree(home / "many", home / "few")
    for candidate in sorted((home / "few" / "candidates").iterdir())[2:]:
        shutil.rmtree(candidate)
    for name in ("few", "many"):
        select(Select(run=(str(home / name),), selector="greedy", temperature_scaling=True, name="greedy"))
    return home


@pytest.fixture
def runs(chosen: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of these two."""
    return tuple(Path(shutil.copytree(chosen / name, tmp_path / name)) for name in ("few", "many"))  # type: ignore[return-value]


def options(runs: tuple[Path, Path], **more) -> Compare:
    return Compare(run=tuple(map(str, runs)), out=runs[0].parent / "compare.html", **more)


def test_both_claims_stand_beside_each_other(runs: tuple[Path, Path]) -> None:
    found = compare(options(runs))
    for side, run in zip(found["sides"], runs, strict=True):
        written = read_json(UPath(run) / "ensembles" / "greedy.json")
        assert side["run"] == run.name
        assert side["is_current"]
        assert {key: side["score"][key] for key in written["scores"]["claim"]} == written["scores"]["claim"]
        assert side["best_single"]["accuracy"] == written["scores"]["best_single"]["accuracy"]
        assert [m["id"] for m in side["members"]] == [m["id"] for m in written["members"]]
    difference = found["difference"]
    few, many = (side["score"] for side in found["sides"])
    assert difference["accuracy"] == pytest.approx(many["accuracy"] - few["accuracy"])
    assert difference["log_loss"] == pytest.approx(many["log_loss"] - few["log_loss"])
    assert difference["accuracy"] * 400 == difference["only_second_right"] - difference["only_first_right"]
    assert difference["interval"][0] < difference["accuracy"] < difference["interval"][1]
    assert difference["interval"][0] > 0, "ten candidates are better than two, and that is no chance"
    assert difference["log_loss_interval"][1] < 0
    assert (difference["split"], difference["images"], difference["fitted"]) == ("select", 400, False)
    assert sum(row["images"] for row in difference["classes"]) == 400
    assert sum(row["images"] * row["gain"] for row in difference["classes"]) / 400 == pytest.approx(
        difference["accuracy"]
    )


def test_turned_round_the_difference_changes_its_sign(runs: tuple[Path, Path]) -> None:
    there, back = compare(options(runs))["difference"], compare(options(runs[::-1]))["difference"]
    assert back["accuracy"] == -there["accuracy"]
    assert back["interval"] == pytest.approx([-there["interval"][1], -there["interval"][0]])
    assert back["log_loss_interval"] == pytest.approx([-end for end in there["log_loss_interval"][::-1]])
    assert back["only_first_right"] == there["only_second_right"]


def test_a_sweep_does_not_differ_from_itself(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    found = compare(options((runs[0], runs[0])))
    difference = found["difference"]
    assert (difference["accuracy"], difference["log_loss"]) == (0, 0)
    assert difference["interval"][0] < 0 < difference["interval"][1]
    comparing.show(found)
    assert "no difference in accuracy that chance does not explain" in capsys.readouterr().out


def test_two_ensembles_of_one_run(runs: tuple[Path, Path]) -> None:
    select(Select(run=(str(runs[1]),), selector="best_single"))
    found = compare(options((runs[1], runs[1]), ensemble=("best_single", "greedy")))
    assert [side["ensemble"] for side in found["sides"]] == ["best_single", "greedy"]
    assert found["difference"]["accuracy"] > 0


def test_an_ensemble_that_no_selector_chose_is_compared_as_it_is(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    few, many = runs
    members = tuple(Member(f"c{m}", 0.5) for m in (3, 4))
    write_ensemble(UPath(many), Ensemble("mine", members, "hand", "f00d", {}))
    found = compare(options((few, many), ensemble=("greedy", "mine")))
    probs = [np.load(many / "candidates" / f"c{m}" / "select_probs.npy") for m in (3, 4)]
    labels = np.load(many / "select_labels.npy")
    mine = (probs[0] + probs[1]) / 2
    assert found["sides"][1]["score"]["accuracy"] == correct(mine, labels).mean()
    assert found["sides"][1]["score"]["log_loss"] == pytest.approx(log_losses(mine, labels).mean(), rel=1e-5)
    assert found["difference"]["fitted"]
    assert all(side["score"]["fitted"] for side in found["sides"]), "like with like"
    comparing.show(found)
    assert "accuracy, fitted" in capsys.readouterr().out


def test_an_ensemble_of_before_says_so(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    few, many = runs
    for candidate in sorted((many / "candidates").iterdir())[2:6]:
        shutil.copytree(candidate, few / "candidates" / candidate.name)
    found = compare(options(runs))
    assert [side["is_current"] for side in found["sides"]] == [False, True]
    comparing.show(found)
    assert f"python -m ensemble.select --run {few}" in capsys.readouterr().out


def test_what_they_cost(runs: tuple[Path, Path]) -> None:
    few, _ = runs
    records = Records(UPath(few))
    for outcome in (Outcome.FINISHED, Outcome.FINISHED, Outcome.PRUNED, Outcome.BUG, Outcome.NOT_STARTED):
        records.put(TrialRecord(records.next_number).ends(outcome))
    records.spend(Spent(61.5, 120.0))
    for candidate in (few / "candidates").iterdir():
        path = UPath(candidate / "candidate.json")
        write_json(path, {**read_json(path), "seconds": 10.0})
    found = compare(options(runs))
    cost, unknown = (side["cost"] for side in found["sides"])
    assert cost["outcomes"]["pruned"] == 1
    assert cost["trials"] == sum(cost["outcomes"].values()) - 1, "one did not fit into the time"
    assert cost["sweep_seconds"] == 61.5
    assert cost["device_seconds"] == 120.0
    assert cost["training_seconds"] == 20.0
    assert unknown == {
        "trials": 10, "outcomes": {"added": 10}, "has_records": False, "training_seconds": None, "sweep_seconds": None,
        "device_seconds": None,
    }  # fmt: skip
    assert any("B: it has no records of its trials" in line for line in comparing.notes(found))


def test_the_command(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    for run in runs:
        info = read_json(UPath(run) / "run.json")
        write_json(UPath(run) / "run.json", info | {"classes": [HOSTILE, *info["classes"][1:]]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "--run", "few", "--run", "many", "--json", "told.json"])
    comparing.main()
    out = capsys.readouterr().out
    assert "A: few" in out
    assert "B minus A: +" in out
    assert "expected on new images" in out
    assert "written to compare.html" in out
    found = json.loads((tmp_path / "told.json").read_text())
    assert [side["run"] for side in found["sides"]] == ["few", "many"]
    page = (tmp_path / "compare.html").read_text()
    assert HOSTILE not in page
    assert "few and many" in page
    assert found["split_fingerprint"] in page


def test_what_cannot_be_compared_is_refused_in_a_line(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    few, many = runs
    other = Path(str(make_run(tmp_path / "other", fingerprint="beef")[0]))
    select(Select(run=(str(other),)))
    refit = tmp_path / "refit"
    shutil.copytree(few, refit)
    write_json(
        UPath(refit / "run.json"), {**read_json(UPath(few / "run.json")), "refit_of": {"run": "x", "ensemble": "y"}}
    )
    merged = tmp_path / "merged"
    shutil.copytree(few, merged)
    write_ensemble(UPath(merged), Ensemble("both", (Member("c3", 1.0, "../many"),), "auto", "f00d", {}))
    gone = tmp_path / "gone"
    shutil.copytree(few, gone)
    write_ensemble(UPath(gone), Ensemble("gone", (Member("c7", 1.0),), "auto", "f00d", {}))
    before = sorted(tmp_path.rglob("*"))
    for words, expected in (
        ([few, other], "are on different data or splits (fingerprints f00d and beef)"),
        ([few], "expected two runs to compare, got 1"),
        ([few, many, many], "got 3"),
        ([few, refit], "is a refit"),
        ([few, merged], "ensemble both of"),
        ([gone, few], "member c7 of ensemble gone"),
        ([few, "nowhere"], "nowhere is not a run directory"),
    ):
        arguments = [part for run in words for part in ("--run", str(run))]
        monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--out", str(tmp_path / "x.html")])
        with pytest.raises(SystemExit) as exit:
            comparing.main()
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
    with pytest.raises(UserError, match="expected the names of two ensembles or none, got 1"):
        compare(options(runs, ensemble=("auto",)))
    with pytest.raises(UserError, match="name another --json"):
        compare(options(runs, json=tmp_path / "no" / "x.json"))
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: tuple[Path, Path], tmp_path: Path) -> None:
    twins = tuple(Path(shutil.copytree(run, tmp_path / run.name / "photos")) for run in runs)
    found = compare(Compare(run=tuple(map(str, twins)), out=tmp_path / "compare.html"))
    assert [side["run"] for side in found["sides"]] == ["few/photos", "many/photos"]
