"""Every seed network learns, and every backbone of the seeds goes through the loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import draw_folder
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, make_splits
from trainables.errors import UserError
from trainables.models.backbones import build, check_image_size, head_of
from trainables.models.classic import NETWORKS
from trainables.models.weights import find_weights
from trainables.train import train

# What each learns with; dropout of the size that the seeds have would starve networks an eighth as wide
RECIPES: dict[str, dict[str, Any]] = {
    "speednet": {"lr": 2e-2},
    "simple": {"lr": 1e-3},
    "simple_norm_dropout": {"lr": 1e-3, "dropout": 0.1},
    "simple_sigmoid": {"lr": 1e-3, "epochs": 8},
    "simple_tanh": {"lr": 1e-3},
    "keras_cnn": {"lr": 3e-3, "dropout": 0.1},
    "vit_scratch": {"lr": 1e-3},
}
BACKBONES = {
    "vgg16": 32, "vgg19": 32, "resnet34": 32, "resnet50": 32, "densenet121": 32, "efficientnet_b0": 32,
    "tf_efficientnetv2_b0": 32, "vit_base_patch32_224": 64, "mobilenetv2_100": 32, "squeezenet1_1": 32,
}  # fmt: skip
SCRATCH = TrialConfig(width=0.125, epochs=4, precision="fp32")
LARGE = ("vgg16", "vgg19", "vit_base_patch32_224")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare("digits", cache_dir=tmp_path_factory.mktemp("digits-cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Colour images of CIFAR-10's size."""
    folder = draw_folder(tmp_path_factory.mktemp("photos"), per_class=60, size=32, parts=("train",))
    return prepare("folder", folder, cache_dir=tmp_path_factory.mktemp("photos-cache"))


def part_of(data: Data, images: int) -> Splits:
    """Splits of only the first so many images, half of them to train on."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.labels))[:images])
    return Splits(chosen[::2], chosen[1::2], chosen[1::2], True, "part")


def test_every_seed_network_has_a_recipe() -> None:
    assert set(RECIPES) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_networks_learn_digits(name: str, digits: Data) -> None:
    config = replace(SCRATCH, backbone=name, image_size=16, batch_size=10, **RECIPES[name])
    trained = train(config, digits, part_of(digits, 1000))
    assert trained.metrics["tune_accuracy"] > 0.4  # guessing gives 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_networks_learn_colour_images_of_32_pixels(name: str, photos: Data) -> None:
    config = replace(SCRATCH, backbone=name, image_size=32, batch_size=6, **RECIPES[name])
    trained = train(config, photos, make_splits(photos.labels, photos.fingerprint))
    assert trained.metrics["tune_accuracy"] > 0.6  # guessing gives 0.33


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in BACKBONES]
)
def test_backbones_freeze_train_and_predict(name: str, photos: Data) -> None:
    config = TrialConfig(
        backbone=name, image_size=BACKBONES[name], epochs=2, freeze_epochs=1, batch_size=8, optimizer="sgd",
        momentum=0.0, lr=0.01, precision="fp32",
    )  # fmt: skip
    splits = part_of(photos, 16)
    torch.manual_seed(config.seed)
    start = {key: value.clone() for key, value in build(config, 3).state_dict().items()}
    frozen = train(replace(config, epochs=0), photos, splits).model
    head = {id(p) for p in head_of(frozen).parameters()}
    for key, parameter in frozen.named_parameters():
        assert torch.equal(parameter, start[key]) == (id(parameter) not in head), key
    del frozen
    trained = train(config, photos, splits)
    moved = [key for key, parameter in trained.model.named_parameters() if not torch.equal(parameter, start[key])]
    assert len(moved) > len(start) / 4  # branches that start at zero learn from the second step on
    assert trained.probs["tune"].shape == (8, 3)
    np.testing.assert_allclose(trained.probs["tune"].sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["fastvit_t8", "tiny_vit_5m_224", "efficientvit_b0", "nextvit_small", "shvit_s1"])
def test_options_that_a_family_does_not_take_are_left_out(name: str) -> None:
    with torch.device("meta"):
        model = build(TrialConfig(backbone=name, image_size=64, drop_path=0.1), 3)
    assert any(parameter.shape[0] == 3 for parameter in head_of(model).parameters())


def test_a_hybrid_that_is_called_vit_takes_small_images() -> None:
    model = build(TrialConfig(backbone="shvit_s1", image_size=64), 3).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_name_that_timm_refuses_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^resnet18\.nonsense cannot be built \(.*nonsense.*\); try another backbone"):
        build(TrialConfig(backbone="resnet18.nonsense"), 3)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "resnet10t.safetensors").write_bytes(b"no tensors")
    (tmp_path / "resnet14t.pth").write_bytes(b"no tensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "resnet18.pth")  # a whole module: opening it may run code
    for name in ("resnet10t.safetensors", "resnet14t.pth", "resnet18.pth"):
        with pytest.raises(UserError, match=f"{name} cannot be read as weights"):
            find_weights(name.split(".")[0], tmp_path)


@pytest.mark.parametrize("size", [12, 16, 36, 224, 1024])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_image_size_goes_through(name: str, size: int) -> None:
    check_image_size(TrialConfig(backbone=name, image_size=size))


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_what_the_head_is_given(name: str) -> None:
    model = build(TrialConfig(backbone=name, width=0.25, image_size=16), 5).eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(torch.zeros(2, 3, 16, 16)), pre_logits=True)
        assert features.shape == (2, model.num_features)
        assert model.get_classifier()(features).shape == (2, 5)
