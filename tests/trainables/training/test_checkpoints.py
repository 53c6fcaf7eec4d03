"""Checkpoints that a thread writes while a GPU goes on training; on a CPU here, tests/gpu does the same on a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from upath import UPath

from trainables import train as training
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.storage import StorageLost
from trainables.train import Checkpoints, EarlyStopping, Progress, train
from trainables.training.averaging import WeightAverage
from trainables.training.checkpoint import Copied, read_checkpoint
from trainables.training.learner import Learner

SMALL = TrialConfig(backbone="speednet", width=0.125, image_size=16, epochs=2, batch_size=12, precision="fp32")


def written_behind(data: Data, splits: Splits, path: UPath) -> Checkpoints:
    learner, progress = Learner(SMALL, data, splits), Progress()
    average = WeightAverage.of(learner.model, SMALL, steps=10)
    found = Checkpoints(path, learner, average, EarlyStopping(SMALL, progress), progress)
    found.thread = ThreadPoolExecutor(1)
    return found


def test_what_is_written_is_what_was_copied(
    data: Data, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, held = UPath(tmp_path / "state.safetensors"), threading.Event()
    write = training.write_checkpoint

    def write_late(to: UPath, state: Copied) -> None:
        held.wait(60)
        write(to, state)

    monkeypatch.setattr(training, "write_checkpoint", write_late)
    checkpoints = written_behind(data, splits, path)
    before = {name: tensor.clone() for name, tensor in checkpoints.learner.model.state_dict().items()}
    checkpoints.took = 0.0
    assert checkpoints.are_due
    checkpoints.write()
    checkpoints.took = 0.0
    assert not checkpoints.are_due  # one at a time
    for parameter in checkpoints.learner.model.parameters():  # training goes on
        torch.nn.init.zeros_(parameter)
    checkpoints.progress.epoch = 7
    held.set()
    checkpoints.finish()
    state = read_checkpoint(path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["epoch"] == 0
    for name, tensor in before.items():
        assert torch.equal(state["learner"]["model"][name], tensor)


def test_a_store_that_is_lost_ends_the_trial(
    data: Data, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageLost("away")

    monkeypatch.setattr(training, "write_checkpoint", fail)
    checkpoints = written_behind(data, splits, UPath(tmp_path / "state.safetensors"))
    checkpoints.write()
    with pytest.raises(StorageLost):
        checkpoints.write()


def test_a_trial_that_is_stopped_leaves_a_whole_checkpoint(
    data: Data, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = UPath(tmp_path / "state.safetensors"), training.write_checkpoint
    stopped = threading.Event()

    def write_late(to: UPath, state: Copied) -> None:
        stopped.wait(60)
        write(to, state)

    def behind(*arguments: object) -> Checkpoints:
        found = Checkpoints(*arguments)  # type: ignore[arg-type]
        found.thread = ThreadPoolExecutor(1)
        return found

    def stop(_: object) -> bool:
        assert not path.exists()
        stopped.set()
        return True

    monkeypatch.setattr(training, "write_checkpoint", write_late)
    monkeypatch.setattr(training, "Checkpoints", behind)
    assert train(SMALL, data, splits, stop, checkpoint=path).outcome == "pruned"
    state = read_checkpoint(path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["epoch"] == 1
