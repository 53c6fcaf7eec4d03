"""Every knob of TrialConfig does what it says: effects, not acceptance. Those of the loop are in test_train.py."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.models.backbones import build, head_of
from trainables.models.classic import NETWORKS, SpeedNet, has_branches
from trainables.train import train
from trainables.training.averaging import WeightAverage
from trainables.training.learner import Learner
from trainables.training.optim import lr_factor, make_optimizers, orthogonalize

SMALL = TrialConfig(
    backbone="speednet", width=0.125, image_size=16, epochs=3, batch_size=12, lr=5e-3, precision="fp32",
    weight_decay=0.0,
)  # fmt: skip
# One step of plain gradient descent: what a knob does to it can be told to the digit
PLAIN = replace(SMALL, backbone="simple", optimizer="sgd", momentum=0.0, lr=0.1, schedule="constant", warmup=0.0)


def start(config: TrialConfig, data: Data, splits: Splits) -> tuple[Learner, list[np.ndarray]]:
    """A learner in its first epoch, and that epoch's batches."""
    learner = Learner(config, data, splits)
    return learner, learner.begin_epoch(0)


def one_step(config: TrialConfig, data: Data, splits: Splits) -> dict[str, Tensor]:
    """What the first step adds to each parameter."""
    learner, batches = start(config, data, splits)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.set_lr(0.0)
    learner.step(batches[0], 0.0)
    return {name: p.detach() - before[name] for name, p in learner.model.named_parameters()}


def length(parts: dict[str, Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts.values()]).norm())


# --- the optimiser's step ---


def test_clip_norm_bounds_the_whole_gradient(data: Data, splits: Splits) -> None:
    free = one_step(PLAIN, data, splits)
    clipped = one_step(replace(PLAIN, clip_norm=length(free) / PLAIN.lr / 4), data, splits)
    assert length(clipped) == pytest.approx(length(free) / 4, rel=1e-3)
    loose = one_step(replace(PLAIN, clip_norm=length(free) / PLAIN.lr * 2), data, splits)
    assert length(loose) == pytest.approx(length(free), rel=1e-3)


def test_weight_decay_shrinks_matrices_and_spares_biases(data: Data, splits: Splits) -> None:
    weights = dict(start(PLAIN, data, splits)[0].model.named_parameters())
    plain, decayed = (one_step(replace(PLAIN, weight_decay=decay), data, splits) for decay in (0.0, 0.5))
    for name, weight in weights.items():
        expected = -PLAIN.lr * 0.5 * weight.detach() if weight.ndim >= 2 else torch.zeros_like(weight)
        torch.testing.assert_close(decayed[name] - plain[name], expected, rtol=1e-3, atol=1e-6)


def test_body_lr_is_a_factor_on_all_but_the_head(data: Data, splits: Splits) -> None:
    full, slow = one_step(PLAIN, data, splits), one_step(replace(PLAIN, body_lr=0.1), data, splits)
    for name, step in full.items():
        factor = 1.0 if name.startswith("head.") else 0.1
        torch.testing.assert_close(slow[name], factor * step, rtol=1e-3, atol=1e-7)


def test_layer_decay_slows_a_block_by_the_blocks_above_it(data: Data, splits: Splits) -> None:
    config = replace(PLAIN, backbone="test_vit", image_size=160)
    full, decayed = one_step(config, data, splits), one_step(replace(config, layer_decay=0.5), data, splits)
    stem, first, second, head = (
        float(decayed[name].norm() / full[name].norm())
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight")
    )
    assert head == pytest.approx(1.0)
    assert first == pytest.approx(second / 2, rel=0.01)
    assert stem == pytest.approx(first / 2, rel=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_of_sgd_is_nesterovs(momentum: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    (optimizer,) = make_optimizers(model, model[1], "sgd", 0.1, 1.0, 1.0, 0.0, momentum)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    m = momentum
    torch.testing.assert_close(before - model[0].weight, torch.full((2, 2), 0.1 * ((1 + m) + (1 + m + m * m))))


def test_adamw_moves_every_weight_by_lr_at_first(data: Data, splits: Splits) -> None:
    steps = one_step(replace(PLAIN, optimizer="adamw", lr=1e-3), data, splits)["head.weight"].abs()
    moved = steps[steps > 0]  # behind a dead ReLU there is no gradient
    assert len(moved) > 10
    torch.testing.assert_close(moved.median(), torch.tensor(1e-3), rtol=0.01, atol=0)


def test_muon_steps_are_orthogonal_and_filters_keep_their_norm(data: Data, splits: Splits) -> None:
    config = replace(PLAIN, backbone="speednet", width=0.5, optimizer="muon", momentum=0.6, lr=0.1)
    learner, batches = start(config, data, splits)
    filters = {n: p for n, p in learner.model.named_parameters() if p.ndim == 4 and p.requires_grad}
    assert len(filters) == 6
    before = {name: p.detach().clone() for name, p in filters.items()}
    learner.set_lr(0.0)
    learner.step(batches[0], 0.0)
    for name, after in filters.items():
        kept = before[name] * math.sqrt(len(after)) / before[name].norm()
        values = torch.linalg.svdvals(((kept - after.detach()) / config.lr).reshape(len(after), -1))
        assert float(values.max()) < 1.4, name
        if name.startswith("groups.0"):  # elsewhere twelve images give a gradient of low rank
            assert float(values.min()) > 0.5, name
        assert float(after.detach().norm()) == pytest.approx(math.sqrt(len(after)), rel=0.02)


def test_muon_leaves_position_embeddings_at_their_scale() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    sgd, muon = make_optimizers(model, model.head, "muon", 0.1, 1.0, 1.0, 0.0, 0.9)
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    by_sgd = {id(p) for group in sgd.param_groups for p in group["params"]}
    assert {id(model.pos_embed), id(model.cls_token), id(model.head.weight), id(model.norm.weight)} <= by_sgd
    assert {id(model.patch_embed.proj.weight), id(model.blocks[0].attn.qkv.weight)} <= by_muon


def test_momentum_of_muon_remembers_the_last_gradient() -> None:
    def second_step(momentum: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
        muon = make_optimizers(model, model[1], "muon", 0.1, 1.0, 1.0, 0.0, momentum)[-1]
        parameter = model[0].weight
        for gradient in (torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.diag(torch.tensor([0.0, 0, 1, 1]))):
            before = parameter.detach() * 2 / parameter.detach().norm()  # renormalised by the step
            parameter.grad = gradient
            muon.step()
        return (before - parameter.detach()).diag().abs()

    forgetful, remembering = second_step(0.0), second_step(0.9)
    assert forgetful[:2].max() < 1e-5 < 0.03 < forgetful[2:].min()
    assert remembering.min() > 0.03


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_speednets_biases_learn_fast_and_that_of_its_whitening_only_at_first(data: Data, splits: Splits) -> None:
    config = replace(PLAIN, backbone="speednet", optimizer="muon", momentum=0.6, epochs=8, schedule="triangular")
    learner, _ = start(config, data, splits)
    network = learner.model
    assert isinstance(network, SpeedNet)
    rate = {
        id(p): group for optimizer in learner.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    bias, whitening = rate[id(network.groups[0][2].bias)], rate[id(network.whiten.bias)]
    learner.set_lr(1)
    assert bias["lr"] == pytest.approx(64 * config.lr * 7 / 8)
    assert whitening["lr"] == pytest.approx(64 * config.lr * 2 / 3)
    learns = []
    for epoch in range(8):
        learner.begin_epoch(epoch)
        learns.append(network.whiten.bias.requires_grad)
        assert network.groups[0][2].bias.requires_grad
    assert learns == [True] * 3 + [False] * 5


# --- schedules ---


def test_schedules() -> None:
    assert lr_factor("onecycle", 0.0, 0.2) < 0.01
    assert lr_factor("onecycle", 0.2, 0.2) == pytest.approx(1.0)
    assert lr_factor("triangular", 0.6, 0.2) == pytest.approx(0.5)
    assert lr_factor("cosine", 1.0, 0.0) == pytest.approx(0.0)
    assert lr_factor("constant", 0.9, 0.1) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "triangular", "constant", "plateau"])
def test_warmup_makes_the_first_step_small(data: Data, splits: Splits, schedule: Any) -> None:
    config = replace(PLAIN, schedule=schedule)
    cold, warm = one_step(config, data, splits), one_step(replace(config, warmup=0.3), data, splits)
    assert length(warm) == pytest.approx(1e-3 * length(cold), rel=0.01)


def test_plateau_halves_the_lr_each_time_the_tune_loss_stands_still(tmp_path: Path) -> None:
    data, splits = noise(tmp_path, [40, 40])  # can be memorised, so that the tune loss rises
    curve = train(replace(SMALL, schedule="plateau", warmup=0.0, epochs=12, lr=0.02), data, splits).curve
    best, still, factor = math.inf, 0, 1.0
    for row in curve:
        assert row["lr"] == pytest.approx(0.02 * factor)
        still = 0 if row["tune_log_loss"] < best else still + 1
        best = min(best, row["tune_log_loss"])
        factor /= 2 if still and still % 2 == 0 else 1
    assert curve[-1]["lr"] <= 0.01


# --- what is trained on ---


def noise(folder: Path, counts: list[int]) -> tuple[Data, Splits]:
    """Images of nothing, `counts` of each class: all that can be learnt from them is how frequent classes are."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    classes = tuple(f"class{i}" for i in range(len(counts)))
    data = Data(
        "folder", classes, images, labels, "noise", folder / "data" / "noise", folder, 0, (0.5,) * 3, (0.3,) * 3
    )
    held_out = np.arange(0, len(labels), 5)
    train_part = np.setdiff1d(np.arange(len(labels)), held_out)
    return data, Splits(train_part, held_out, held_out, True, "noise")


@pytest.mark.parametrize("knob", ["class_weights", "balanced"])
def test_rare_classes_count_as_much_as_common_ones(tmp_path: Path, knob: str) -> None:
    data, splits = noise(tmp_path, [180, 20])
    config = replace(SMALL, backbone="simple", image_size=8, lr=3e-3, epochs=6, batch_size=20, seed=1)
    plain, fair = (
        train(replace(config, **{knob: on}), data, splits).probs["tune"][:, 1].mean() for on in (False, True)
    )
    assert plain < 0.2
    assert 0.35 < fair < 0.65


def test_batches_of_an_epoch_hold_every_image_once(data: Data, splits: Splits) -> None:
    _, batches = start(replace(SMALL, batch_size=15), data, splits)
    assert sorted(len(batch) for batch in batches) == [14, 14, 14, 15, 15]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), splits.train)


def test_progressive_sizes_are_spread_over_the_epochs(data: Data, splits: Splits) -> None:
    seen: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, SpeedNet) and module.training and inputs[0].shape[-1] not in seen[-1:]:
            seen.append(inputs[0].shape[-1])

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        trained = train(replace(SMALL, epochs=4, progressive=(12, 16), image_size=16), data, splits)
    finally:
        handle.remove()
    assert seen == [12, 16]
    assert trained.image_size == 16


def test_label_smoothing_makes_predictions_less_sure(data: Data, splits: Splits) -> None:
    config = replace(SMALL, epochs=10, lr=0.03)
    sure, smoothed = (
        train(replace(config, label_smoothing=smoothing), data, splits).probs["tune"].max(1).mean()
        for smoothing in (0.0, 0.6)
    )
    assert smoothed < sure - 0.1


@pytest.mark.parametrize(
    "changes",
    [{"erase": 1.0}, {"trivial": True}, {"mixup": 1.0}, {"cutmix": 1.0}, {"randaugment": 9.0}],
)
def test_augmented_images_are_harder_to_fit(data: Data, splits: Splits, changes: dict[str, Any]) -> None:
    config = replace(SMALL, epochs=8, lr=0.03)
    plain, harder = (train(c, data, splits).curve[-1]["train_loss"] for c in (config, replace(config, **changes)))
    assert harder > 1.2 * plain


# --- the network ---


def spread(model: nn.Module, size: int = 32) -> float:
    """How far two passes of a training network lie apart, its BatchNorms aside."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    x = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((model(x) - model(x)).abs().max())


OWN_DROPOUT = ("simple_norm_dropout", "keras_cnn")  # networks that drop even without the trial's dropout


@pytest.mark.parametrize("name", [*NETWORKS, "resnet10t", "squeezenet1_1", "test_vit"])
def test_dropout_drops(name: str) -> None:
    size = 160 if name == "test_vit" else 32
    config = TrialConfig(backbone=name, width=0.25, image_size=size)
    torch.manual_seed(0)
    if name not in OWN_DROPOUT:
        assert spread(build(config, 5), size) == 0
    assert spread(build(replace(config, dropout=0.5), 5), size) > 0


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10t", 32), ("test_vit", 160), *((name, 32) for name in NETWORKS if has_branches(name))]
)
def test_drop_path_drops_whole_branches(name: str, size: int) -> None:
    torch.manual_seed(0)
    config = TrialConfig(backbone=name, image_size=size)
    model = build(replace(config, drop_path=0.9), 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # some start at zero, and with them their branches
    assert spread(model, size) > 0
    model.eval()
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        assert torch.equal(model(x), model(x))


def test_width_multiplies_and_a_small_stem_keeps_the_resolution() -> None:
    narrow, wide = (sum(p.numel() for p in build(replace(SMALL, width=w), 5).parameters()) for w in (0.25, 0.5))
    assert 3 < wide / narrow < 5
    x = torch.randn(1, 3, 32, 32)
    for name in ("resnet18", "densenet121"):
        shapes = [
            build(TrialConfig(backbone=name, stem=stem), 5).eval().forward_features(x).shape[-1]  # type: ignore[operator, arg-type]
            for stem in ("default", "small")
        ]
        assert shapes == [1, 4], name


# --- averages, precision, predictions ---


def test_lookahead_pulls_the_weights_back_harder_as_training_goes_on() -> None:
    for progress in (0.1, 1.0):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        average = WeightAverage(model, ema=0.0, lookahead=2)
        nn.init.ones_(model.weight)
        average.update(model, progress)
        assert float(model.weight) == 1.0  # not yet
        average.update(model, progress)
        assert float(model.weight) == pytest.approx(1 - 0.95**2 * progress**3)


def test_ema_follows_and_is_what_is_evaluated() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, ema=0.5, lookahead=0)
    nn.init.ones_(model.weight)
    for _ in range(20):
        average.update(model, 0.5)
        with average.applied(model):
            evaluated = float(model.weight)
        assert float(model.weight) == 1.0  # training goes on from the fast weights
    assert 0.99 < evaluated < 1
    average.apply(model)
    assert float(model.weight) == evaluated


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_activations(data: Data, splits: Splits, precision: Any, dtype: torch.dtype) -> None:
    learner, batches = start(replace(SMALL, precision=precision), data, splits)
    seen = []
    learner.model.groups[0][0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # type: ignore[index, union-attr]
    learner.set_lr(0.5)
    learner.step(batches[0], 0.0)
    assert seen == [dtype]
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


def test_the_head_is_what_learns_first(data: Data, splits: Splits) -> None:
    learner, batches = start(replace(PLAIN, epochs=2, freeze_epochs=1), data, splits)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.set_lr(0.0)
    learner.step(batches[0], 0.0)
    head = {id(p) for p in head_of(learner.model).parameters()}
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in head)
