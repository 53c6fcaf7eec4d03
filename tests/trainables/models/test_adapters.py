"""Low-rank adapters, from the configuration to the weights that are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.adapters import add_adapters, merge_adapters
from trainables.models.backbones import build, head_of
from trainables.train import train
from trainables.training.learner import Learner

VIT = TrialConfig(
    backbone="test_vit", pretrained=True, image_size=32, epochs=3, batch_size=12, lr=1e-2, precision="fp32", lora=2
)


def weights_of(backbone: str, folder: Path) -> tuple[WeightSource, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    state = build(replace(VIT, backbone=backbone, pretrained=False, lora=0), 7).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{backbone}.safetensors")
    return WeightSource("file", str(folder / f"{backbone}.safetensors")), state


def test_what_is_kept_differs_from_the_pretrained_weights_by_a_low_rank(
    data: Data, splits: Splits, tmp_path: Path
) -> None:
    weights, before = weights_of("test_vit", tmp_path)
    trained = train(VIT, data, splits, weights=weights)
    after = trained.model.state_dict()
    assert after.keys() == before.keys()  # as of a network that never had adapters
    matrices = 0
    head = {name for name in after if name.startswith("head.")}
    for name in after.keys() - head:
        moved = after[name] - before[name]
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) and "blocks" in name:
            assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 2
            matrices += 1
        else:
            assert not moved.any()
    assert matrices == 4 * len(trained.model.blocks)  # type: ignore[arg-type, attr-defined]
    assert trained.curve[-1]["train_loss"] < trained.curve[0]["train_loss"]


def test_hardly_anything_learns(data: Data, splits: Splits, tmp_path: Path) -> None:
    weights, _ = weights_of("test_vit", tmp_path)
    counts = {}
    for rank in (0, 2):
        learner = Learner(replace(VIT, lora=rank), data, splits, weights)
        learner.begin_epoch(0)
        counts[rank] = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
        held = sum(p.numel() for o in learner.optimizers for g in o.param_groups for p in g["params"])
        assert held == counts[rank]  # no state is kept for the rest
    assert counts[2] < counts[0] / 8


def test_a_training_with_adapters_goes_on_where_it_was(data: Data, splits: Splits, tmp_path: Path) -> None:
    weights, _ = weights_of("test_vit", tmp_path)
    whole = train(VIT, data, splits, weights=weights)
    path = UPath(tmp_path / "state.safetensors")
    cut = train(VIT, data, splits, lambda metrics: metrics["epoch"] == 1, weights=weights, checkpoint=path)
    assert cut.outcome == "pruned"
    again = train(VIT, data, splits, weights=weights, checkpoint=path)
    assert again.resumed == [1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "test_convnext", "test_vit2"])
def test_adapters_count_in_every_family_and_change_nothing_at_first(name: str) -> None:
    """EVA reads its attention's matrix past the layer's call, where adapters that wrap layers have no effect."""
    model = build(
        replace(VIT, backbone=name, image_size=28 if "14" in name else 32, pretrained=False, lora=0), 3
    ).eval()
    x = torch.randn(2, 3, *([28, 28] if "14" in name else [32, 32]))
    plain = model.forward_features(x)
    names = set(model.state_dict())
    add_adapters(model, 2)
    assert torch.allclose(model.forward_features(x), plain, atol=1e-5)
    head = {id(p) for p in head_of(model).parameters()}
    model.forward_features(x).square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad and id(p) not in head]
    assert learning
    for parameter in learning:  # A's gradient is zero while B is
        assert parameter.grad is not None
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = model.forward_features(x)
    assert not torch.equal(adapted, plain)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    assert torch.allclose(model.forward_features(x), adapted, atol=1e-4)


def test_networks_without_matrices_are_refused(data: Data, splits: Splits, tmp_path: Path) -> None:
    weights, _ = weights_of("test_resnet", tmp_path)
    with pytest.raises(UserError, match=r"lora is 2, expected 0: ResNet has no matrices"):
        train(replace(VIT, backbone="test_resnet"), data, splits, weights=weights)
    with pytest.raises(UserError, match="expected 0 without pretrained weights"):
        replace(VIT, pretrained=False)
