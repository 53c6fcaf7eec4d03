"""One job of a sweep, in this process: what it is given to train on, and what it writes."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.prepare import prepare
from trainables.data.splits import make_splits, save_splits
from trainables.job import Alone, DataSource, Job, Outcome
from trainables.models.weights import load_model
from trainables.run_directory import list_candidates
from trainables.trial import _cost, run_trial

SMALL = TrialConfig(
    backbone="speednet", width=0.125, image_size=16, epochs=2, batch_size=12, lr=5e-3, precision="fp32",
    weight_decay=0.0,
)  # fmt: skip


def job_on(folder: Path, run: UPath, config: TrialConfig) -> Job:
    """A job on these images, as a sweep gives it to a lane; their splits are written into the run."""
    data = prepare("folder", folder)
    save_splits(run, make_splits(data.labels, data.fingerprint))
    return Job("0000", config, str(run), DataSource(str(data.path), "folder", str(folder)))


def test_images_that_have_changed_are_not_trained_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "lost"))
    job = job_on(folder, UPath(tmp_path / "run"), SMALL)
    shutil.rmtree(tmp_path / "lost")
    Image.new("RGB", (12, 12), "red").save(folder / "train/grid/0.png")
    result = run_trial(job, Alone())  # before: a bug of the trial, and of the next one
    assert result.outcome is Outcome.STORAGE_LOST
    assert re.match(r"the images have changed since .* began: .*, or start a new run", result.error)


def test_another_configurations_candidate_is_not_this_trials(pictures: Path, tmp_path: Path) -> None:
    run = UPath(tmp_path / "run")
    job = job_on(pictures, run, SMALL)
    assert run_trial(job, Alone()).outcome is Outcome.FINISHED
    assert run_trial(job, Alone()).outcome is Outcome.FINISHED  # its own, which nobody had heard of
    other = dataclasses.replace(job, config=dataclasses.replace(SMALL, lr=SMALL.lr / 2))
    result = run_trial(other, Alone())
    assert (result.outcome, result.metrics) == (Outcome.INVALID, {})


def test_the_cost_is_that_of_the_size_predicted_at(pictures: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, progressive=(12, 16))
    run = UPath(tmp_path / "run")
    job = job_on(pictures, run, config)
    assert run_trial(dataclasses.replace(job, deadline=1.0), Alone()).outcome == "time"  # in the first epoch
    [candidate] = list_candidates(run)
    assert candidate.info.image_size == 12
    model, cpu = load_model(candidate), torch.device("cpu")
    assert candidate.info.flops == _cost(model, cpu, 12)[0] < _cost(model, cpu, 16)[0]
