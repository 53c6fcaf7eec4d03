"""One job of a sweep, in this process: what it is given to train on, and what it writes."""

import dataclasses
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from upath import UPath

from trainables import trial
from trainables.config import TrialConfig
from trainables.data.prepare import prepare
from trainables.data.splits import make_splits, save_splits
from trainables.job import Alone, DataSource, Job, Outcome
from trainables.models.backbones import build, recompute_activations, still_statistics
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


def test_memory_that_runs_out_is_saved_before_the_micro_batch_is_halved(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: half a batch at once, which a large network on a GPU pays for in speed."""
    tries, train = [], trial.cross_fit  # what so few images get

    def short_of_memory(config: TrialConfig, *args: Any, recompute: bool, **options: Any) -> Any:
        tries.append((recompute, config.accumulate))
        if len(tries) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(config, *args, recompute=recompute, **options)

    monkeypatch.setattr(trial, "cross_fit", short_of_memory)
    run = UPath(tmp_path / "run")
    assert run_trial(job_on(pictures, run, SMALL), Alone()).outcome is Outcome.FINISHED
    assert tries == [(False, 1), (True, 1), (True, 2), (True, 4)]


@pytest.mark.parametrize(
    ("backbone", "can"), [("resnet10t", True), ("vit_tiny_patch16_224", True), ("speednet", False)]
)
def test_recomputed_activations_are_not_kept_and_the_gradients_stay(backbone: str, can: bool) -> None:
    images, found = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    config = dataclasses.replace(SMALL, backbone=backbone, image_size=32)
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(config, 3)
        assert not recompute or recompute_activations(model) == can
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().sum()
        with still_statistics(model) if recompute else nullcontext():
            loss.backward()
        statistics = [value for name, value in model.named_buffers() if "running" in name]
        found.append((kept, [*[parameter.grad for parameter in model.parameters()], *statistics]))
    (whole, gradients), (less, again) = found
    assert less < 0.6 * whole if can else less == whole
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other)
