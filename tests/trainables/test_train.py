"""The training loop in this process: it learns, resumes exactly, freezes, averages, stops, and says how it ended."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from upath import UPath

from trainables import train as training
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.backbones import build, head_of, set_frozen
from trainables.train import Diverged, Trained, train
from trainables.training.learner import Learner

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
        {"dropout": 0.3, "crop": 2, "flip": "random", "erase": 0.3, "mixup": 0.4},
        {"optimizer": "sgd", "lr": 0.1, "lookahead": 2, "schedule": "plateau"},
        {"optimizer": "muon", "lr": 0.1, "ema": 0.9, "patience": 2, "flip": "alternating"},
    ],
)
def test_a_resumed_run_ends_in_the_same_weights(
    data: Data, splits: Splits, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config, checkpoint = replace(SMALL, **changes), UPath(tmp_path / "state.safetensors")
    whole = train(config, data, splits)
    with pytest.raises(Interrupt):
        train(config, data, splits, stop_after(2), checkpoint=checkpoint)
    resumed = train(config, data, splits, checkpoint=checkpoint)
    assert resumed.resumed == [2]
    assert [row["epoch"] for row in resumed.curve] == [1, 2, 3]
    assert same(whole, resumed)
    np.testing.assert_array_equal(whole.probs["select"], resumed.probs["select"])


@pytest.mark.parametrize("changes", [{"dropout": 0.3, "crop": 2, "mixup": 0.4}, {"optimizer": "muon", "ema": 0.9}])
def test_a_training_that_is_cut_within_an_epoch_repeats_at_most_a_tenth_of_it(
    data: Data, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Before: a machine that went in the last minute of a long epoch took all of it along."""
    monkeypatch.setattr("trainables.train.RARELY", 0)
    config, checkpoint = replace(SMALL, batch_size=8, **changes), UPath(tmp_path / "state.safetensors")
    steps, last, step = 0, 0, Learner.step

    def counted(self: Learner, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == last:
            raise Interrupt
        return step(self, *args)

    monkeypatch.setattr(Learner, "step", counted)
    whole = train(config, data, splits)
    every, steps = steps, 0
    epoch = every // config.epochs
    last = epoch + 2 * epoch // 3
    with pytest.raises(Interrupt):
        train(config, data, splits, checkpoint=checkpoint)
    done, steps, last = last - 1, 0, 0
    told: list[float] = []
    resumed = train(config, data, splits, lambda row: told.append(row["epoch"]), checkpoint=checkpoint)  # type: ignore[func-returns-value]
    assert 0 <= steps - (every - done) <= math.ceil(epoch / 10)
    assert 1.5 < resumed.resumed[0] < 1.67
    assert told == [resumed.resumed[0], 2, 3]
    assert [row["epoch"] for row in resumed.curve] == [1, 2, 3]
    assert [row["train_loss"] for row in resumed.curve] == pytest.approx([row["train_loss"] for row in whole.curve])
    assert same(whole, resumed)


def test_a_pruned_trial_stops_at_once_and_predicts_nothing(data: Data, splits: Splits) -> None:
    seen = []
    trained = train(SMALL, data, splits, lambda metrics: seen.append(metrics["epoch"]) or True)  # type: ignore[func-returns-value]
    assert (trained.outcome, seen, trained.probs) == ("pruned", [1], {})


def test_past_the_deadline_it_finishes_with_what_it_has(data: Data, splits: Splits) -> None:
    said: list[bool] = []
    trained = train(
        replace(SMALL, epochs=50), data, splits, lambda metrics: bool(said.append("last" in metrics)), deadline=0.0
    )
    assert said == [True]  # before: whoever heard its report might let it wait
    assert trained.outcome == "time"
    assert len(trained.curve) == 1
    assert trained.probs["select"].shape == (len(splits.select), 3)


def test_the_schedule_comes_down_by_the_deadline(data: Data, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: a training that was cut stood in the middle of its schedule, where its learning rate is highest."""
    clock = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter))
    trained = train(replace(SMALL, epochs=1000, schedule="triangular", warmup=0.1), data, splits, deadline=60)
    rates = [row["lr"] for row in trained.curve]
    assert trained.outcome == "time"
    assert len(rates) > 2
    assert max(rates) > 0.5 * SMALL.lr
    assert rates[-1] < 0.1 * SMALL.lr
    unhurried = train(replace(SMALL, epochs=2), data, splits, deadline=10_000)
    assert same(unhurried, train(replace(SMALL, epochs=2), data, splits))


def test_an_exploding_loss_ends_the_trial(data: Data, splits: Splits) -> None:
    with pytest.raises(Diverged):
        train(replace(SMALL, optimizer="sgd", lr=100.0, weight_decay=5.0), data, splits)


def test_accumulated_micro_batches_give_the_whole_batches_gradient(data: Data, splits: Splits) -> None:
    config = replace(SMALL, backbone="test_vit", image_size=160, epochs=1, optimizer="sgd", lr=0.01)
    whole, halved = train(config, data, splits), train(replace(config, accumulate=2), data, splits)
    for a, b in zip(weights_of(whole).values(), weights_of(halved).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_accumulation_doubled_after_a_checkpoint_holds(data: Data, splits: Splits, tmp_path: Path) -> None:
    checkpoint = UPath(tmp_path / "state.safetensors")
    with pytest.raises(Interrupt):
        train(SMALL, data, splits, stop_after(2), checkpoint=checkpoint)
    assert train(replace(SMALL, accumulate=4), data, splits, checkpoint=checkpoint).accumulate == 4


def test_pretrained_without_a_source_is_no_random_start(data: Data, splits: Splits) -> None:
    with pytest.raises(UserError, match="source was not given"):
        train(replace(SMALL, backbone="resnet10t", pretrained=True), data, splits)


def test_frozen_means_parameters_and_batchnorm_statistics(data: Data, splits: Splits) -> None:
    config = replace(SMALL, backbone="resnet10t", image_size=32, epochs=0, freeze_epochs=2, crop=1)
    torch.manual_seed(config.seed)
    before = build(config, 3).state_dict()
    trained = train(config, data, splits)
    head = {
        name for name, p in trained.model.named_parameters() if any(p is q for q in head_of(trained.model).parameters())
    }
    changed = {name for name, value in weights_of(trained).items() if not torch.equal(value, before[name])}
    assert changed == head
    assert len(head) == 2


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_batchnorms_keep_their_pretrained_statistics_while_all_else_learns(
    frozen_norm: bool, data: Data, splits: Splits, tmp_path: Path
) -> None:
    config = replace(
        SMALL, backbone="resnet10t", pretrained=True, image_size=32, epochs=1, lr=1e-4, frozen_norm=frozen_norm
    )
    before = build(replace(config, pretrained=False, frozen_norm=False), 1000).state_dict()
    save_file(before, tmp_path / "weights.safetensors")
    trained = train(config, data, splits, weights=WeightSource("file", str(tmp_path / "weights.safetensors")))
    head = {f"fc.{name}" for name in ("weight", "bias")}
    kept = {
        name for name, value in weights_of(trained).items() if name not in head and torch.equal(value, before[name])
    }
    statistics = {name for name in before if name.rpartition(".")[2].startswith(("running_", "num_batches"))}
    assert kept == (statistics if frozen_norm else set())


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


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 1000}, "batch_size is 1000"),
        ({"image_size": 8}, "images of 8 pixels do not go through speednet"),
        ({"progressive": (8, 16)}, "images of 8 pixels do not go through speednet"),
        ({"backbone": "vgg16", "image_size": 16}, "images of 16 pixels do not go through vgg16"),
        ({"backbone": "vgg16", "stem": "small"}, "vgg16 has none"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    data: Data, splits: Splits, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        train(replace(SMALL, **changes), data, splits, tick=lambda: pytest.fail("a step was made"))


def test_configurations_that_cannot_be_are_refused() -> None:
    for wrong in ({"epochs": 0}, {"lr": float("nan")}, {"freeze_epochs": -1}, {"dropout": 1.0}, {"nonsense": 1}):
        with pytest.raises(UserError, match=r"expected|unknown"):
            replace(SMALL, **wrong)


@pytest.mark.parametrize("name", ["optimizer", "schedule", "flip", "tta", "precision", "stem"])
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 'adam', expected [a-z]"):
        replace(SMALL, **{name: "adam"})


def test_config_survives_json() -> None:
    config = replace(SMALL, progressive=[8, 12, 16])
    assert TrialConfig.from_dict(config.to_dict()) == config
