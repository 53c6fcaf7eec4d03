"""search.refit: the chosen members trained anew on everything, the selection untouched."""

import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble.export import export
from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.predict import Predict, predict_folder
from ensemble.report.write import summary, write_report
from ensemble.select import Select, open_pool
from ensemble.serve.page import Examples, build_page
from search import refit as room
from search.config import SearchConfig
from search.refit import Refit, refit, without_validation
from tests.errand import HereLanes, run_here
from trainables.config import TrialConfig
from trainables.data.splits import load_splits
from trainables.errors import UserError
from trainables.run_directory import CandidateInfo, list_candidates, lock_run, read_run
from trainables.storage import read_json, write_json

ROOT = Path(__file__).parents[2]


def test_early_stopping_becomes_the_best_epoch() -> None:
    curve = [{"epoch": e, "tune_log_loss": loss} for e, loss in ((1, 0.9), (2, 0.5), (3, 0.6), (4, 0.7))]
    config = TrialConfig(epochs=10, freeze_epochs=3, patience=2, schedule="plateau")
    again = without_validation(config, curve)
    assert (again.epochs, again.freeze_epochs, again.patience, again.schedule) == (0, 2, 0, "cosine")
    assert without_validation(TrialConfig(epochs=10, schedule="onecycle"), curve[:2]).epochs == 10, "a cut one is whole"


@pytest.mark.parametrize("where", ["here", pytest.param("in lanes", marks=pytest.mark.slow)])
def test_members_are_trained_on_everything_and_the_selection_stays(
    where: str, pictures: Path, small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "here":
        monkeypatch.setattr(room, "run_trials", run_here)
        monkeypatch.setattr(room, "Lanes", HereLanes)
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    source = UPath(run)
    searched = asdict(SearchConfig(data="folder", data_dir=pictures, cpus_per_trial=1.0))
    write_json(
        source / "run.json", {**read_json(source / "run.json"), "search": {**searched, "data_dir": str(pictures)}}
    )
    both = (Member("0001", 0.75), Member("0000", 0.25, temperature=1.5))
    chosen = read_ensemble(source)
    scores = {**chosen.scores, "best_single": {"id": "0001", "run": ""}}
    write_ensemble(source, Ensemble("both", both, "by hand", chosen.split_fingerprint, scores))

    target, ensemble = refit(Refit(run=(str(run),), ensemble="both"))

    assert [(m.id, m.weight, m.temperature) for m in ensemble.members] == [("0001", 0.75, 1.0), ("0000", 0.25, 1.5)]
    assert all(score["before_refit"] for score in ensemble.scores.values())
    old, new = load_splits(source), load_splits(target)
    assert sorted(new.train) == sorted({*old.train, *old.tune, *old.select})
    assert read_run(target).splits.select == 0
    for before, after in zip(list_candidates(source)[:2], list_candidates(target), strict=True):
        assert after.has_weights
        assert after.info.config == before.info.config
        assert after.info.metrics == {}, "no split is left to score it on"
        assert not (after.path / "select_probs.npy").exists()
    written = {path: path.stat().st_mtime for path in Path(str(target)).glob("candidates/*/candidate.json")}

    held = lock_run(target)
    assert held is not None
    with pytest.raises(UserError, match="another search is at work"):
        refit(Refit(run=(str(run),), ensemble="both"))
    held.release()

    # the same command again, as a user types it, has nothing to train, reads the test part and says where it is
    ended = subprocess.run(
        [sys.executable, "-m", "search.refit", "--run", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "0 of 2 members" in " ".join(ended.stdout.split())
    assert "ensemble     test accuracy" in ended.stdout
    assert {path: path.stat().st_mtime for path in written} == written

    # and images can be predicted with it, but nothing selected from it
    predict_folder(Predict(images=pictures / "test", out=tmp_path / "p.csv", run=(str(target),)))
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 91

    # it can be shown and exported, although there is no select split to take pictures from
    async def answer(content: bytes) -> dict:
        return {}

    assert Examples.of(target) is None
    build_page(target, ensemble, Examples.of(target), answer, tmp_path)
    exported = export([target], ensemble, tmp_path / "e.pt2", "torch")
    assert (exported.real, exported.images) == (False, 1000)

    # and reported on when its ensemble does not say which single model was best
    found = write_report([target], dataclasses.replace(ensemble, scores={}))
    assert found["test"].keys() == {"ensemble"}
    assert [line.split()[0] for line in summary(found)] == ["ensemble", "this"], "and that it is another look"

    with pytest.raises(UserError, match="select"):
        open_pool(Select(run=(str(target),)))


def test_what_cannot_be_retrained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from trainables.run_directory import write_candidate

    run = UPath(tmp_path / "run")
    write_json(run / "run.json", {"classes": ["a", "b"], "split_fingerprint": "x"})
    write_candidate(run, CandidateInfo("guest"), np.full((2, 2), 0.5))
    write_ensemble(run, Ensemble("e", (Member("guest", 1.0),), "by hand", "x", {}))
    with pytest.raises(UserError, match="guest cannot be retrained: it only brought predictions"):
        refit(Refit(run=(str(run),)))
    assert not os.path.exists(f"{run}-refit")
    assert read_json(run / "run.json")["classes"] == ["a", "b"]
