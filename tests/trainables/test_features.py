"""Stored features of a frozen backbone: the same head as without them, computed once, for whoever asks."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainables import features
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits
from trainables.features import Features, OutOfTime
from trainables.job import WeightSource
from trainables.models.backbones import build, head_of
from trainables.models.weights import read_pretrained
from trainables.train import Trained, train
from trainables.training import learner as learning
from trainables.training.head import STRENGTHS, Head, fit_at
from trainables.training.learner import Learner

HEAD = TrialConfig(
    backbone="resnet10t", pretrained=True, image_size=32, epochs=0, freeze_epochs=3, batch_size=12, lr=1e-2,
    precision="fp32",
)  # fmt: skip


@pytest.fixture
def own(data: Data, pictures: Path, tmp_path: Path) -> Data:
    """The data in a cache without any features yet."""
    return prepare("folder", pictures, cache_dir=tmp_path)


def weights_at(path: Path, seed: int = 5, backbone: str = HEAD.backbone) -> WeightSource:
    torch.manual_seed(seed)
    save_file(build(TrialConfig(backbone=backbone), 1000).state_dict(), path)
    return WeightSource("file", str(path))


@pytest.fixture
def weights(tmp_path: Path) -> WeightSource:
    return weights_at(tmp_path / "resnet10t.safetensors")


def stored(data: Data) -> list[Path]:
    return sorted((data.cache / "features").glob("*.npy"))


def head(trained: Trained) -> dict[str, torch.Tensor]:
    return head_of(trained.model).state_dict()


@pytest.mark.parametrize("changes", [{}, {"flip": "random"}, {"flip": "alternating"}, {"ema": 0.2}])
def test_stored_features_train_the_same_head(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    monkeypatch.setattr(learning, "fit_head", lambda *args: (Head(torch.zeros(3, 512), torch.zeros(3)), 1.0))
    config = replace(HEAD, **changes)
    cached = train(config, own, splits, weights=weights)
    assert len(stored(own)) == (2 if "flip" in changes else 1)  # the plain and the mirrored view
    for path in stored(own):
        path.unlink()
    monkeypatch.setattr(features, "_takes_vectors", lambda model, x: False)
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, std: nn.init.zeros_(tensor))  # the same start
    through_all = train(config, own, splits, weights=weights)
    for key, value in head(through_all).items():
        torch.testing.assert_close(head(cached)[key], value, rtol=0.02, atol=2e-3)  # they are kept in half precision
    np.testing.assert_allclose(cached.probs["select"], through_all.probs["select"], atol=0.01)
    assert head(cached)["weight"].abs().max() > 0.01


def test_a_probe_is_the_logistic_regression_that_scikit_learn_fits(
    own: Data, splits: Splits, weights: WeightSource
) -> None:
    from sklearn.linear_model import LogisticRegression

    config = replace(HEAD, freeze_epochs=0)
    learner = Learner(config, own, splits, weights)
    assert learner.features is not None
    assert learner.strength in STRENGTHS
    x = learner.features.take(np.arange(len(own.labels)), mirrored=False).numpy()
    mean, std = x[splits.train].mean(0), x[splits.train].std(0, ddof=1)
    std = np.maximum(std, np.sqrt(np.square(std).mean()))
    oracle = LogisticRegression(C=1 / (learner.strength * len(splits.train)), max_iter=2000, tol=1e-8)
    oracle.fit((x[splits.train] - mean) / std, own.labels[splits.train])
    trained = train(config, own, splits, weights=weights)
    expected = oracle.predict_proba((x[splits.select] - mean) / std)
    np.testing.assert_allclose(trained.probs["select"], expected, atol=0.02)
    assert [row["epoch"] for row in trained.curve] == [0]
    assert trained.metrics["tune_accuracy"] > 0.5


def test_the_strength_is_the_best_on_tune(own: Data, splits: Splits, weights: WeightSource) -> None:
    learner = Learner(replace(HEAD, freeze_epochs=0), own, splits, weights)
    assert learner.features is not None
    heads = fit_at(learner.features.rows, own.labels, splits.train, 3, STRENGTHS)
    views = learner.features.rows(splits.tune)
    labels = torch.from_numpy(own.labels[splits.tune])
    losses = [float(nn.functional.cross_entropy(sum(h(v) for v in views) / len(views), labels)) for h in heads]
    assert learner.strength == STRENGTHS[int(np.argmin(losses))]
    assert losses[0] > min(losses), "the strongest restraint is not it"


def test_a_probes_head_is_fitted_on_everything_in_the_end(own: Data, splits: Splits, weights: WeightSource) -> None:
    config = replace(HEAD, freeze_epochs=0)
    learner = Learner(config, own, splits, weights)
    assert learner.features is not None
    trained = train(config, own, splits, weights=weights)
    assert trained.refitted
    everything = np.arange(len(own.labels))
    assert learner.strength is not None
    (expected,) = fit_at(learner.features.rows, own.labels, everything, 3, (learner.strength,))
    torch.testing.assert_close(head(trained)["weight"], expected.weight, atol=1e-3, rtol=0.05)
    assert learner.head is not None
    assert not torch.allclose(head(trained)["weight"], learner.head.weight, atol=1e-3), "its scores are those before"


def test_the_whole_network_starts_from_the_probe(own: Data, splits: Splits, tmp_path: Path) -> None:
    """Before: the body began at full speed under a head that knew nothing."""
    steady = replace(HEAD, backbone="convnext_atto", freeze_epochs=0)  # without BatchNorm, the same in both modes
    weights = weights_at(tmp_path / "atto.safetensors", backbone=steady.backbone)
    probe = train(steady, own, splits, weights=weights)
    tuned = train(replace(steady, epochs=2, lr=1e-5), own, splits, weights=weights)
    assert tuned.metrics["tune_log_loss"] < np.log(3)
    assert tuned.metrics["tune_log_loss"] == pytest.approx(probe.metrics["tune_log_loss"], abs=0.02)
    start = build(steady, 3, read_pretrained(steady.backbone, weights)).state_dict()
    moved = [key for key, value in tuned.model.state_dict().items() if not torch.equal(value, start[key])]
    assert len(moved) == len(start)
    assert not tuned.refitted


def test_head_and_body_have_schedules_of_their_own(own: Data, splits: Splits, weights: WeightSource) -> None:
    config = replace(HEAD, epochs=4, freeze_epochs=2, warmup=0.5, lr=1.0, body_lr=0.1)
    learner = Learner(config, own, splits, weights)
    rates = []
    for at in (0.0, 1.0, 1.99, 2.0, 3.0, 4.0, 5.9):
        learner.begin_epoch(int(at))
        learner.set_lr(at)
        rates.append(learner.lr)
    assert rates == pytest.approx([1e-3, 1.0, 0.0, 1e-3, 0.5, 1.0, 0.0], abs=0.01)


def test_epochs_count_those_of_the_body(own: Data, splits: Splits, tmp_path: Path) -> None:
    config = replace(HEAD, backbone="convnext_atto", epochs=1, freeze_epochs=2, body_lr=0.01)
    weights = weights_at(tmp_path / "atto.safetensors", backbone=config.backbone)
    learner = Learner(config, own, splits, weights)
    body = learner.model.get_parameter("stem.0.weight")
    assert [bool(learner.begin_epoch(epoch)) and body.requires_grad for epoch in range(3)] == [False, False, True]
    trained = train(config, own, splits, weights=weights)
    assert [row["epoch"] for row in trained.curve] == [1, 2, 3]


def test_folded_batchnorm_changes_nothing(own: Data, weights: WeightSource) -> None:
    torch.manual_seed(0)
    model = build(TrialConfig(backbone="tf_efficientnet_lite0"), 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 64, 64)
    small = features.folded(model, x)
    assert small is not model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    with features.evaluating(model), torch.no_grad():
        torch.testing.assert_close(features.vectors_of(small, x), features.vectors_of(model, x), atol=1e-3, rtol=1e-3)


def test_trials_share_features_as_long_as_they_ask_for_the_same(own: Data, splits: Splits, tmp_path: Path) -> None:
    weights = weights_at(tmp_path / "resnet10t.safetensors")
    train(HEAD, own, splits, weights=weights)
    train(replace(HEAD, lr=1e-3, seed=3, dropout=0.2, batch_size=20), own, splits, weights=weights)
    assert len(stored(own)) == 1
    train(replace(HEAD, image_size=48), own, splits, weights=weights)
    assert len(stored(own)) == 2
    train(HEAD, own, splits, weights=weights_at(tmp_path / "other.safetensors", seed=6))
    assert len(stored(own)) == 3
    same = weights_at(tmp_path / "copy.safetensors")  # the tensors count, not where they were read
    train(replace(HEAD, freeze_epochs=0), own, splits, weights=same)
    assert len(stored(own)) == 3


def test_two_that_ask_at_the_same_time_compute_once(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = Features._compute

    def slowly(self: Features, paths: dict[bool, Path]) -> None:
        computed.append(paths)
        time.sleep(1.5)
        compute(self, paths)

    monkeypatch.setattr(Features, "_compute", slowly)
    ticks = [0, 0]

    def tick(i: int) -> None:
        ticks[i] += 1

    learners: list[Learner] = []

    def learn(i: int) -> None:
        learners.append(Learner(replace(HEAD, flip="random"), own, splits, weights, tick=lambda: tick(i)))

    threads = [threading.Thread(target=learn, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    rows = [learner.features.take(np.arange(5), mirrored=True) for learner in learners if learner.features]
    assert torch.equal(*rows)
    assert min(ticks) > 0  # the one that waits gives signs of life, too


def test_past_the_deadline_nothing_half_written_stays(own: Data, splits: Splits, weights: WeightSource) -> None:
    with pytest.raises(OutOfTime):
        train(HEAD, own, splits, weights=weights, deadline=0.0)
    assert [path for path in (own.cache / "features").iterdir() if path.suffix != ".lock"] == []


def test_stored_features_spare_every_pass_through_the_body(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(HEAD, own, splits, weights=weights)

    def never(*args: object) -> torch.Tensor:
        raise AssertionError("the features are stored")

    monkeypatch.setattr(features, "vectors_of", never)
    again = train(HEAD, own, splits, weights=weights)
    np.testing.assert_array_equal(again.probs["select"], first.probs["select"])


def test_a_convolutional_head_is_trained_through_the_whole_network(own: Data, splits: Splits, tmp_path: Path) -> None:
    path = tmp_path / "squeezenet1_1.safetensors"
    save_file(build(TrialConfig(backbone="squeezenet1_1"), 1000).state_dict(), path)
    config = replace(HEAD, backbone="squeezenet1_1", freeze_epochs=1)
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


def test_a_head_is_fitted_once_for_all_trials_on_the_same_images(
    own: Data, splits: Splits, weights: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Learner(HEAD, own, splits, weights)
    fits: list[None] = []
    fit = learning.fit_head
    monkeypatch.setattr(learning, "fit_head", lambda *args: fits.append(None) or fit(*args))
    again = Learner(replace(HEAD, lr=HEAD.lr / 2, epochs=2), own, splits, weights)
    assert not fits
    assert again.strength == first.strength
    assert first.head is not None
    assert again.head is not None
    assert torch.equal(again.head.weight, first.head.weight)
    assert torch.equal(head_of(again.model).weight, head_of(first.model).weight)  # type: ignore[arg-type]

    labels = own.labels.copy()
    labels[splits.train] = labels[splits.train][::-1]
    fewer = replace(splits, train=splits.train[1:])
    for data, rows, config in (
        (own, fewer, HEAD), (replace(own, labels=labels), splits, HEAD), (own, splits, replace(HEAD, balanced=True)),
        (own, splits, replace(HEAD, flip="random" if HEAD.flip == "none" else "none", tta="none")),
    ):  # fmt: skip
        fits.clear()
        Learner(config, data, rows, weights)
        assert len(fits) == 1

    for path in (own.cache / "heads").glob("*.safetensors"):
        path.write_bytes(b"cut")
    fits.clear()
    assert torch.equal(Learner(HEAD, own, splits, weights).head.weight, first.head.weight)  # type: ignore[union-attr]
    assert len(fits) == 1
