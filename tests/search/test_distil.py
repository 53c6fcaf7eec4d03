"""search.distil: an ensemble teaches one network, in lanes; the table says what that was good for."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble.file import read_ensemble, write_ensemble
from ensemble.model import open_model
from ensemble.pool import load_pool
from ensemble.select import Select, select
from ensemble.selection.blend import Stack
from ensemble.selection.metrics import accuracy
from search import distil as room
from search.distil import Distil, distil, student
from tests.errand import HereLanes, run_here
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.run_directory import CandidateInfo, list_candidates, write_candidate
from trainables.storage import read_json, write_json


@pytest.fixture
def run(small_run: UPath, pictures: Path, tmp_path: Path) -> UPath:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    asked = {"data": "folder", "data_dir": str(pictures), "cpus_per_trial": 1.0}
    write_json(run / "run.json", {**read_json(run / "run.json"), "search": asked})
    select(Select(run=(str(run),)))
    return run


@pytest.mark.parametrize("where", ["here", pytest.param("in lanes", marks=pytest.mark.slow)])
def test_one_network_is_taught_and_compared(
    where: str,
    run: UPath,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if where == "here":
        monkeypatch.setattr("search.refit.run_trials", run_here)
        monkeypatch.setattr("search.refit.Lanes", HereLanes)
    asked = Distil(
        "speednet", run=(str(run),), epochs=6, unlabelled=pictures / "test", json=tmp_path / "table.json",
    )  # fmt: skip
    _, table = distil(asked)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    found = {candidate.id: candidate for candidate in list_candidates(run)}
    taught, alone = found["distilled-speednet"], found["distilled-speednet-without-teacher"]
    assert (taught.info.taught_by, alone.info.taught_by) == ("auto", "")
    assert taught.info.config == alone.info.config
    pool = load_pool([run])
    for key, candidate in (("distilled", taught), ("control", alone)):
        assert table[key]["accuracy"] == pytest.approx(accuracy(candidate.probs("select"), pool.labels))
        assert table[key]["params"] == candidate.info.params
        assert table[key]["latency_ms"] > 0
        assert (table[key]["split"], table[key]["images"]) == ("select", len(pool.labels))
    assert table["ensemble"]["accuracy"] == read_ensemble(run, "auto").scores["claim"]["accuracy"]
    assert table["device"]
    assert read_ensemble(run).name == "auto", "it is no default"
    assert open_model([run], "distilled-speednet", "cpu").predict(pictures / "test/grid").labels

    def never(*_: object) -> None:
        raise AssertionError("there is nothing to train")

    monkeypatch.setattr(room, "train_all", never)
    monkeypatch.setattr("sys.argv", ["distil", "--backbone", "speednet", "--run", str(run), "--epochs", "6"])
    room.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "the same without a teacher" in printed
    assert f"{table['distilled']['accuracy']:.2%}" in printed
    assert "--ensemble distilled-speednet" in printed
    with pytest.raises(UserError, match="was trained in another way; name this one with --name"):
        distil(dataclasses.replace(asked, epochs=7))


def test_the_student_is_trained_as_the_best_of_its_kind_was(run: UPath) -> None:
    best = next(c for c in list_candidates(run) if c.id == "0000").info
    assert best.config is not None
    probs = np.full((18, 3), 1 / 3, np.float32)
    for id, loss, config in (
        ("better", 0.01, dataclasses.replace(best.config, lr=0.123, epochs=5, label_smoothing=0.1, patience=3)),
        ("probe", 0.0, TrialConfig(backbone="speednet", epochs=0, pretrained=True)),
    ):
        write_candidate(run, CandidateInfo(id, config, {"tune_log_loss": loss}), probs)
    config = student(Distil("speednet", run=(str(run),)), run)
    assert (config.lr, config.epochs, config.label_smoothing, config.patience) == (0.123, 10, 0.0, 0)
    config = student(Distil("speednet", run=(str(run),), epochs=3, image_size=24), run)
    assert (config.lr, config.epochs, config.image_size) == (0.123, 3, 24)
    config = student(Distil("tf_efficientnet_lite0", run=(str(run),)), run)
    assert (config.backbone, config.pretrained, config.image_size, config.epochs) == (
        "tf_efficientnet_lite0", True, 224, 16,
    )  # fmt: skip


def _stacked(run: UPath) -> None:
    ensemble = read_ensemble(run)
    members = len(ensemble.members)
    stack = Stack(np.zeros((3, members, 3)), np.zeros(3))
    write_ensemble(run, dataclasses.replace(ensemble, stack=stack))


def _without_data(run: UPath) -> None:
    info = read_json(run / "run.json")
    write_json(run / "run.json", {**info, "data": {**info["data"], "folder": ""}})


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"backbone": "spednet"}, "unknown backbone"),
        (None, {"share": 0.0}, "--share is 0.0, expected above 0, at most 1"),
        (None, {"softness": -1.0}, "--softness is -1.0"),
        (None, {"epochs": 0}, "--epochs is 0"),
        (None, {"name": "../x"}, "--name"),
        (None, {"name": "0000"}, "candidate 0000 of .* was trained in another way"),
        (None, {"ensemble": "none"}, "has no ensemble none"),
        (None, {"unlabelled": Path("/nowhere")}, "does not exist"),
        (_stacked, {}, "is stacked and cannot teach"),
        (_without_data, {}, "does not say which images it is of"),
    ],
)
def test_what_cannot_teach_or_learn(spoil: object, options: dict, message: str, run: UPath) -> None:
    if spoil is not None:
        spoil(run)  # type: ignore[operator]
    before = sorted(path.name for path in (run / "candidates").iterdir())
    with pytest.raises(UserError, match=message):
        distil(Distil(**{"backbone": "speednet", "run": (str(run),), **options}))
    assert sorted(path.name for path in (run / "candidates").iterdir()) == before
