"""Two gloo workers with half the batch do what one worker with the whole batch does."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from timm.layers import SyncBatchNormAct
from upath import UPath

from tests.conftest import split_once
from trainables.config import TrialConfig
from trainables.data.dataset import Data, open_data
from trainables.data.splits import Splits
from trainables.job import WeightSource
from trainables.models.backbones import build
from trainables.models.weights import read_pretrained
from trainables.train import Trained, train
from trainables.training import learner

# Without BatchNorm, whose statistics are a worker's own, or with it frozen
PLAIN = TrialConfig(
    backbone="simple", width=0.125, image_size=16, epochs=2, batch_size=12, optimizer="sgd", lr=0.02, weight_decay=1e-3,
    label_smoothing=0.1, clip_norm=1.0, accumulate=2, precision="fp32",
)  # fmt: skip
FROZEN = TrialConfig(
    backbone="resnet10t", pretrained=True, image_size=32, epochs=0, freeze_epochs=2, batch_size=12, lr=1e-2,
    precision="fp32",
)  # fmt: skip
CONFIGS = {"plain": PLAIN, "frozen": FROZEN}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    torch.manual_seed(5)
    save_file(build(TrialConfig(backbone="resnet10t", image_size=32), 1000).state_dict(), path)
    return WeightSource("file", str(path))


def rank_main(rank: int, folder: Path, data_path: Path, weights: WeightSource) -> None:
    """One worker: trains each of CONFIGS and leaves weights, predictions and how many images it predicted itself."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = open_data(data_path)
    splits = split_once(data)
    predicted = 0
    predict = learner.predict_probs

    def counting(model: Any, images: Any, indices: Any, *rest: Any, **named: Any) -> Any:
        nonlocal predicted
        predicted += len(indices)
        return predict(model, images, indices, *rest, **named)

    learner.predict_probs = counting  # type: ignore[assignment]
    for name, config in CONFIGS.items():
        predicted = 0
        checkpoint = UPath(folder / name / "state.safetensors")
        trained = train(config, data, splits, weights=weights if config.pretrained else None, checkpoint=checkpoint)
        state = {key: value.contiguous() for key, value in trained.model.state_dict().items()}
        save_file(state, folder / f"{name}-{rank}.safetensors")
        np.savez(folder / f"{name}-{rank}.npz", select=trained.probs["select"], predicted=predicted)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(data: Data, weights: WeightSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two workers left."""
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(rank_main, (folder, data.path, weights), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_two_workers_follow_one(name: str, folder: Path, data: Data, splits: Splits, weights: WeightSource) -> None:
    config = CONFIGS[name]
    alone: Trained = train(config, data, splits, weights=weights if config.pretrained else None)
    start = build(config, 3, read_pretrained(config.backbone, weights) if config.pretrained else None).state_dict()
    together = load_file(folder / f"{name}-0.safetensors")
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-4)  # sums in another order
    assert any((together[key] - start[key]).abs().max() > 1e-3 for key in start)  # and they went somewhere
    np.testing.assert_allclose(np.load(folder / f"{name}-0.npz")["select"], alone.probs["select"], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_end_with_the_same_weights_and_predictions(name: str, folder: Path) -> None:
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    first_probs, second_probs = (np.load(folder / f"{name}-{rank}.npz")["select"] for rank in (0, 1))
    np.testing.assert_array_equal(first_probs, second_probs)


def test_every_image_is_predicted_by_one_of_the_two(folder: Path, splits: Splits) -> None:
    by_rank = [int(np.load(folder / f"plain-{rank}.npz")["predicted"]) for rank in (0, 1)]
    passes = PLAIN.epochs + 1 + (not splits.shared)  # tune after each epoch, then tune and select for good
    assert sum(by_rank) == passes * len(splits.tune)
    assert abs(by_rank[0] - by_rank[1]) <= passes


def test_synced_batchnorms_keep_the_activations_inside_timms() -> None:
    torch.manual_seed(0)
    model = build(TrialConfig(backbone="test_efficientnet", image_size=32), 3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        synced = learner.with_synced_batchnorm(model)
        torch.testing.assert_close(synced(images), expected)
    norms = [module for module in synced.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert norms
    assert any(isinstance(norm, SyncBatchNormAct) and not isinstance(norm.act, torch.nn.Identity) for norm in norms)
