"""The training loop in this process: it learns, resumes exactly, freezes, averages, stops, and says how it ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from upath import UPath

from trainables.augment import Pixels, augment, cutout, mix
from trainables.backbones import build, head_of, set_frozen
from trainables.config import TrialConfig
from trainables.data import Data, prepare
from trainables.errors import UserError
from trainables.optim import lr_factor, orthogonalize
from trainables.splits import Splits, make_splits
from trainables.train import Diverged, Trained, train

SMALL = TrialConfig(
    backbone="speednet",
    width=0.125,
    image_size=16,
    epochs=3,
    batch_size=12,
    lr=5e-3,
    precision="fp32",
    weight_decay=0.0,
)


class Interrupt(Exception):
    pass


def stop_after(epochs: int) -> Callable[[dict[str, Any]], bool]:
    def report(metrics: dict[str, Any]) -> bool:
        if metrics["epoch"] == epochs:
            raise Interrupt
        return False

    return report


def replace(config: TrialConfig, **changes: Any) -> TrialConfig:
    return TrialConfig.from_dict({**config.to_dict(), **changes})


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare("folder", pictures, cache_dir=tmp_path_factory.mktemp("train-cache"))


@pytest.fixture(scope="module")
def splits(data: Data) -> Splits:
    return make_splits(data.labels, data.fingerprint)


def weights_of(trained: Trained) -> dict[str, torch.Tensor]:
    return trained.model.state_dict()


def same(a: Trained, b: Trained) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True))


def test_it_learns_and_names_its_scores(data: Data, splits: Splits) -> None:
    trained = train(replace(SMALL, epochs=12), data, splits)
    assert trained.outcome == "finished"
    assert trained.metrics["tune_accuracy"] >= 0.8
    assert trained.metrics["tune_images"] == len(splits.tune)
    assert trained.probs["select"].shape == (len(splits.select), 3)
    np.testing.assert_allclose(trained.probs["select"].sum(1), 1, atol=1e-5)
    assert [row["epoch"] for row in trained.curve] == list(range(1, 13))


def test_same_seed_same_weights_other_seed_other_weights(data: Data, splits: Splits) -> None:
    first, again = train(SMALL, data, splits), train(SMALL, data, splits)
    assert same(first, again)
    assert not same(first, train(replace(SMALL, seed=1), data, splits))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3, "crop": 2, "flip": "random", "cutout": 0.3, "mixup": 0.4},
        {"optimizer": "sgd", "lr": 0.1, "lookahead": 2, "schedule": "plateau"},
        {"optimizer": "muon", "lr": 0.1, "ema": 0.9, "patience": 2, "flip": "alternating"},
    ],
)
def test_a_resumed_run_ends_in_the_same_weights(
    data: Data, splits: Splits, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, checkpoint = replace(SMALL, **changes), UPath(tmp_path / "state.pt")
    whole = train(config, data, splits)
    with pytest.raises(Interrupt):
        train(config, data, splits, stop_after(2), checkpoint=checkpoint)
    resumed = train(config, data, splits, checkpoint=checkpoint)
    assert resumed.resumed == [2]
    assert [row["epoch"] for row in resumed.curve] == [1, 2, 3]
    assert same(whole, resumed)
    np.testing.assert_array_equal(whole.probs["select"], resumed.probs["select"])


def test_a_pruned_trial_stops_at_once_and_predicts_nothing(data: Data, splits: Splits) -> None:
    seen = []
    trained = train(SMALL, data, splits, lambda metrics: seen.append(metrics["epoch"]) or True)  # type: ignore[func-returns-value]
    assert (trained.outcome, seen, trained.probs) == ("pruned", [1], {})


def test_past_the_deadline_it_finishes_with_what_it_has(data: Data, splits: Splits) -> None:
    trained = train(replace(SMALL, epochs=50), data, splits, deadline=0.0)
    assert trained.outcome == "time"
    assert len(trained.curve) == 1
    assert trained.probs["select"].shape == (len(splits.select), 3)


def test_an_exploding_loss_ends_the_trial(data: Data, splits: Splits) -> None:
    with pytest.raises(Diverged):
        train(replace(SMALL, optimizer="sgd", lr=100.0, weight_decay=5.0), data, splits)


def test_accumulated_micro_batches_give_the_whole_batches_gradient(data: Data, splits: Splits) -> None:
    config = replace(SMALL, backbone="test_vit", image_size=160, epochs=1, optimizer="sgd", lr=0.01)
    whole, halved = train(config, data, splits), train(replace(config, accumulate=2), data, splits)
    for a, b in zip(weights_of(whole).values(), weights_of(halved).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_accumulation_doubled_after_a_checkpoint_holds(data: Data, splits: Splits, tmp_path: Path) -> None:
    checkpoint = UPath(tmp_path / "state.pt")
    with pytest.raises(Interrupt):
        train(SMALL, data, splits, stop_after(2), checkpoint=checkpoint)
    assert train(replace(SMALL, accumulate=4), data, splits, checkpoint=checkpoint).accumulate == 4


def test_pretrained_without_a_source_is_no_random_start(data: Data, splits: Splits) -> None:
    with pytest.raises(UserError, match="source was not given"):
        train(replace(SMALL, backbone="resnet10t", pretrained=True), data, splits)


def test_frozen_means_parameters_and_batchnorm_statistics(data: Data, splits: Splits) -> None:
    config = replace(SMALL, backbone="resnet10t", image_size=32, epochs=2, freeze_epochs=2, crop=1)
    torch.manual_seed(config.seed)
    before = build(config, 3).state_dict()
    trained = train(config, data, splits)
    head = {
        name for name, p in trained.model.named_parameters() if any(p is q for q in head_of(trained.model).parameters())
    }
    changed = {name for name, value in weights_of(trained).items() if not torch.equal(value, before[name])}
    assert changed == head
    assert len(head) == 2


def test_thawing_makes_everything_learn_again_but_what_never_did() -> None:
    model = build(SMALL, 3)
    never = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "whiten.weight" in never
    set_frozen(model, True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight"}
    set_frozen(model.train(), False)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == never


def test_patience_stops_early_and_keeps_the_best_epoch(data: Data, splits: Splits) -> None:
    trained = train(replace(SMALL, epochs=40, patience=2, schedule="constant", lr=0.02), data, splits)
    losses = [row["tune_log_loss"] for row in trained.curve]
    best = int(np.argmin(losses))
    assert len(losses) < 40
    assert len(losses) == best + 3
    assert trained.metrics["tune_log_loss"] == pytest.approx(losses[best], rel=1e-4)


def test_ema_weights_are_what_is_kept(data: Data, splits: Splits) -> None:
    plain, averaged = train(SMALL, data, splits), train(replace(SMALL, ema=0.99), data, splits)
    start = build(SMALL, 3)

    def distance(trained: Trained) -> float:
        return float((trained.model.head.weight - start.head.weight).detach().norm())  # type: ignore[union-attr, operator]

    assert distance(averaged) < distance(plain)


def test_configurations_that_cannot_be_are_refused() -> None:
    for wrong in ({"epochs": 0}, {"lr": float("nan")}, {"freeze_epochs": 4}, {"dropout": 1.0}, {"nonsense": 1}):
        with pytest.raises(UserError, match=r"expected|unknown"):
            replace(SMALL, **wrong)


def test_config_survives_json() -> None:
    config = replace(SMALL, progressive=[8, 12, 16])
    assert TrialConfig.from_dict(config.to_dict()) == config


# --- augmentation: effects, not acceptance ---


def grid(n: int = 6, size: int = 8) -> torch.Tensor:
    return torch.arange(n * size * size * 3).reshape(n, size, size, 3).remainder(251).to(torch.uint8)


def test_alternating_flip_mirrors_every_image_exactly_every_second_epoch() -> None:
    images, indices = grid(), np.arange(6)
    config = replace(SMALL, flip="alternating")
    epochs = [augment(images, indices, config, epoch, torch.Generator()) for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0], epochs[1].flip(2))
    assert not torch.equal(epochs[0], images)
    assert not torch.equal(epochs[0], images.flip(2))


def test_crop_shifts_and_reflects() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 8, 8)[..., None].expand(64, 8, 8, 3)
    out = augment(ramp, np.arange(64), replace(SMALL, crop=2), 0, torch.Generator().manual_seed(0))
    rows = {tuple(row.tolist()) for row in out[:, 0, :, 0]}
    assert rows == {
        (2, 1, 0, 1, 2, 3, 4, 5), (1, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)),
        (1, 2, 3, 4, 5, 6, 7, 6), (2, 3, 4, 5, 6, 7, 6, 5),
    }  # fmt: skip


def test_cutout_clears_a_square() -> None:
    x = cutout(torch.ones(50, 3, 10, 10), 0.4, torch.Generator().manual_seed(0))
    cleared = (x[:, 0] == 0).sum((1, 2))
    assert cleared.max() == 16
    assert cleared.min() >= 4  # a corner may cut the square


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_images_and_targets_by_the_same_share(kind: str) -> None:
    x = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    mixed, targets = mix(x, torch.eye(2), replace(SMALL, **{kind: 1.0}), torch.Generator().manual_seed(1))
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed[0].mean(), torch.tensor(1 - share))
    torch.testing.assert_close(targets.sum(1), torch.ones(2))


def test_randaugment_changes_images_and_nothing_else_of_them() -> None:
    images = grid(32, 12)
    out = augment(images, np.arange(32), replace(SMALL, randaugment=8.0), 0, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    assert not torch.equal(out, images)


def test_pixels_are_normalised_and_resized() -> None:
    x = Pixels.of([0.5] * 3, [0.25] * 3, torch.device("cpu"))(torch.full((2, 8, 8, 3), 255, dtype=torch.uint8), 16)
    assert x.shape == (2, 3, 16, 16)
    torch.testing.assert_close(x, torch.full_like(x, 2.0))


# --- schedules and optimisers ---


def test_schedules() -> None:
    assert lr_factor("onecycle", 0.0, 0.2) < 0.01
    assert lr_factor("onecycle", 0.2, 0.2) == pytest.approx(1.0)
    assert lr_factor("triangular", 0.6, 0.2) == pytest.approx(0.5)
    assert lr_factor("cosine", 1.0, 0.0) == pytest.approx(0.0)
    assert lr_factor("constant", 0.9, 0.1) == 1.0


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3
