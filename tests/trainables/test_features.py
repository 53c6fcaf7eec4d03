"""Stored features of a frozen backbone: the same head as without them, computed once, for whoever asks."""

import hashlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits
from trainables.features import FrozenFeatures, OutOfTime
from trainables.job import WeightSource
from trainables.models.backbones import build, head_of
from trainables.models.weights import read_pretrained
from trainables.train import Trained, train
from trainables.training.learner import Learner

HEAD = TrialConfig(
    backbone="resnet10t", pretrained=True, image_size=32, epochs=3, freeze_epochs=3, batch_size=12, lr=1e-2,
    precision="fp32",
)  # fmt: skip


@pytest.fixture
def own(data: Data, pictures: Path, tmp_path: Path) -> Data:
    """The data in a cache without any features yet."""
    return prepare("folder", pictures, cache_dir=tmp_path)


def weights_at(path: Path, seed: int = 5) -> WeightSource:
    torch.manual_seed(seed)
    save_file(build(replace(HEAD, pretrained=False), 1000).state_dict(), path)
    return WeightSource("file", str(path))


@pytest.fixture
def weights(tmp_path: Path) -> WeightSource:
    return weights_at(tmp_path / "resnet10t.safetensors")


def stored(data: Data) -> list[Path]:
    return sorted((data.path.parent.parent / "features").glob("*.npy"))


def head(trained: Trained) -> dict[str, torch.Tensor]:
    return head_of(trained.model).state_dict()


@pytest.mark.parametrize("changes", [{}, {"flip": "random"}, {"flip": "alternating"}, {"ema": 0.9}])
def test_stored_features_train_the_same_head(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    config = replace(HEAD, **changes)
    cached = train(config, own, splits, weights=weights)
    assert len(stored(own)) == (2 if "flip" in changes else 1)  # the plain and the mirrored view
    monkeypatch.setattr(FrozenFeatures, "_head_takes_vectors", lambda self: False)
    through_all = train(config, own, splits, weights=weights)
    for key, value in head(through_all).items():
        torch.testing.assert_close(head(cached)[key], value, rtol=0.02, atol=2e-3)  # they are kept in half precision
    np.testing.assert_allclose(cached.probs["select"], through_all.probs["select"], atol=0.01)
    start = head_of(build(config, 3, read_pretrained(config.backbone, weights)))
    assert (head(cached)["weight"] - start.weight).abs().max() > 0.01  # type: ignore[operator]


def test_after_the_freeze_epochs_the_whole_network_trains_on(own: Data, splits: Splits, weights: WeightSource) -> None:
    trained = train(replace(HEAD, freeze_epochs=2), own, splits, weights=weights)
    start = build(HEAD, 3, read_pretrained(HEAD.backbone, weights)).state_dict()
    moved = [key for key, value in trained.model.state_dict().items() if not torch.equal(value, start[key])]
    assert len(moved) == len(start)


def test_trials_share_features_as_long_as_they_ask_for_the_same(own: Data, splits: Splits, tmp_path: Path) -> None:
    weights = weights_at(tmp_path / "resnet10t.safetensors")
    train(HEAD, own, splits, weights=weights)
    train(replace(HEAD, lr=1e-3, seed=3, dropout=0.2, batch_size=20), own, splits, weights=weights)
    assert len(stored(own)) == 1
    train(replace(HEAD, image_size=48), own, splits, weights=weights)
    assert len(stored(own)) == 2
    train(HEAD, own, splits, weights=weights_at(tmp_path / "other.safetensors", seed=6))
    assert len(stored(own)) == 3


def test_features_of_an_older_format_are_not_used(own: Data, splits: Splits, weights: WeightSource) -> None:
    learner = Learner(HEAD, own, splits, weights)
    learner.choose_layout()
    assert learner.features is not None
    older = {key: value for key, value in learner.features.question.items() if key != "format"}
    question = json.dumps({**older, "precision": "fp32", "mirrored": False}, sort_keys=True)
    path = own.path.parent.parent / "features" / f"{hashlib.sha256(question.encode()).hexdigest()[:20]}.npy"
    path.parent.mkdir()
    np.save(path, np.zeros((len(own.images), 512), np.float16))
    assert learner.features._take(np.arange(5), mirrored=False).any()


def test_two_that_ask_at_the_same_time_compute_once(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = FrozenFeatures._compute

    def slowly(self: FrozenFeatures, path: Path, mirrored: bool) -> None:
        computed.append(path)
        time.sleep(1.5)
        compute(self, path, mirrored)

    monkeypatch.setattr(FrozenFeatures, "_compute", slowly)
    ticks = [0, 0]

    def tick(i: int) -> None:
        ticks[i] += 1

    learners = [Learner(HEAD, own, splits, weights, tick=lambda i=i: tick(i)) for i in (0, 1)]  # type: ignore[misc]
    rows: list[torch.Tensor] = []
    threads = []
    for one in learners:
        one.choose_layout()
        assert one.features is not None
        threads.append(threading.Thread(target=lambda f=one.features: rows.append(f._take(np.arange(5), False))))  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    assert torch.equal(*rows)
    assert min(ticks) > 0  # the one that waits gives signs of life, too


def test_past_the_deadline_nothing_half_written_stays(own: Data, splits: Splits, weights: WeightSource) -> None:
    with pytest.raises(OutOfTime):
        train(HEAD, own, splits, weights=weights, deadline=0.0)
    assert [path for path in (own.path.parent.parent / "features").iterdir() if path.suffix != ".lock"] == []


def test_a_convolutional_head_is_trained_through_the_whole_network(own: Data, splits: Splits, tmp_path: Path) -> None:
    path = tmp_path / "squeezenet1_1.safetensors"
    save_file(build(TrialConfig(backbone="squeezenet1_1"), 1000).state_dict(), path)
    config = replace(HEAD, backbone="squeezenet1_1", epochs=1, freeze_epochs=1)
    trained = train(config, own, splits, weights=WeightSource("file", str(path)))
    assert stored(own) == []
    start = head_of(build(config, 3)).state_dict()
    assert head(trained).keys() == start.keys()


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0"])
def test_a_new_head_on_pretrained_features_starts_without_opinions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scratch = build(TrialConfig(backbone=name, image_size=32), 1000)
    path = tmp_path / "weights.safetensors"
    save_file(scratch.state_dict(), path)
    model = build(
        TrialConfig(backbone=name, pretrained=True, image_size=32),
        6,
        read_pretrained(name, WeightSource("file", str(path))),
    ).eval()
    with torch.no_grad():
        features = 2 * torch.rand(16, model.num_features)  # type: ignore[arg-type]
        assert head_of(model)(features).abs().max() < 2
