"""Pretrained weights: brought to other image sizes, told from another network's, and taken by their licence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from search.config import SearchConfig
from search.fetch import Fetch, wanted
from search.plan import make_plan
from search.spaces.auto import BACKBONES
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.models.backbones import build, check_resizing
from trainables.models.licences import PERMISSIVE, licence_of

# of each kind of tensor that depends on the image size: own side, another one
FAMILIES = {
    "eva02_tiny_patch14_336": (336, 224),
    "swin_tiny_patch4_window7_224": (224, 160),
    "swinv2_cr_tiny_224": (224, 192),
    "beit_base_patch16_224": (224, 160),
    "deit_tiny_patch16_224": (224, 160),
    "maxvit_rmlp_pico_rw_256": (256, 192),
    "coatnet_nano_rw_224": (224, 192),
    "tiny_vit_5m_224": (224, 160),
    "vit_relpos_small_patch16_224": (224, 160),
}


def state_of(name: str) -> dict[str, Tensor]:
    """Random weights, of a network for its own image size."""
    torch.manual_seed(1)
    state = build(TrialConfig(backbone=name, image_size=FAMILIES.get(name, (224, 0))[0]), 5).state_dict()
    return {key: value + 0.05 * torch.randn_like(value) if "pos" in key else value for key, value in state.items()}


@torch.no_grad()
def features(model: nn.Module, image: Tensor, side: int) -> Tensor:
    image = nn.functional.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    model.eval()
    return model.forward_head(model.forward_features(image), pre_logits=True).flatten(1)  # type: ignore[operator]


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_brought_to_another_image_size(name: str) -> None:
    own, other = FAMILIES[name]
    state = state_of(name)
    check_resizing(name, other)
    native = build(TrialConfig(backbone=name, image_size=own), 3, state)
    resized = build(TrialConfig(backbone=name, image_size=other), 3, state)
    blank = build(TrialConfig(backbone=name, image_size=other), 3)
    image = torch.rand(1, 3, 8, 8)
    before = features(native, image, own)
    # the same picture, smaller: much the same features, and not those of a network that has learned nothing of it
    assert cosine_similarity(before, features(resized, image, other)).item() > 0.8
    assert abs(cosine_similarity(before, features(blank, image, other)).item()) < 0.8
    body = {key: value for key, value in native.state_dict().items() if value.shape[:1] != (3,)}
    same = [key for key, value in body.items() if torch.equal(value, state[key])]
    assert len(same) == len(body), "at its own size nothing is changed"
    assert not hasattr(native, "pretrained_cfg") or "state_dict" not in native.pretrained_cfg


def test_another_network_s_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"not deit_tiny_patch16_224's: .* missing or of another shape"):
        build(TrialConfig(backbone="deit_tiny_patch16_224", image_size=224), 3, state_of("resnet10t"))
    lacking = {key: value for key, value in state_of("resnet10t").items() if key != "layer1.0.conv1.weight"}
    with pytest.raises(UserError, match=r"1 of .* tensors are missing or of another shape, first layer1\.0\.conv1"):
        build(TrialConfig(backbone="resnet10t"), 3, lacking)


def test_weights_without_a_head_or_with_another_are_a_body() -> None:
    state = state_of("resnet10t")
    for given in (state, {key: value for key, value in state.items() if not key.startswith("fc.")}):
        model = build(TrialConfig(backbone="resnet10t"), 3, given)
        assert torch.equal(model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
        assert model.state_dict()["fc.weight"].std() < 0.02


NON_COMMERCIAL, FREE = "convnextv2_atto.fcmae_ft_in1k", "resnet10t.c3_in1k"
SPACE = f"""
from trainables.config import TrialConfig
TRIALS = 2
BACKBONES = {{"{NON_COMMERCIAL}": "if found", "{FREE}": "if found"}}
def suggest(trial, task):
    name = trial.suggest_categorical("backbone", list(task.backbones))
    return TrialConfig(backbone=name, pretrained=True, image_size=32, epochs=1, batch_size=8)
"""


def test_restricted_licences_take_part_when_they_are_asked_for(pictures: Path, tmp_path: Path) -> None:
    assert licence_of(NON_COMMERCIAL) == "cc-by-nc-4.0"
    for name in (NON_COMMERCIAL, FREE):
        save_file(build(TrialConfig(backbone=name), 2).state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "space.py").write_text(SPACE)

    def plan(**options: object) -> tuple[list[str], list[str]]:
        made = make_plan(
            SearchConfig(
                data="folder", data_dir=pictures, space=str(tmp_path / "space.py"), weights_dir=tmp_path,
                run=str(tmp_path / "run"), **options,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        return list(made.backbones), made.restricted

    assert plan() == ([FREE], [NON_COMMERCIAL])
    assert plan(weights_licence="any") == ([NON_COMMERCIAL, FREE], [])
    assert plan(backbones=(NON_COMMERCIAL,)) == ([NON_COMMERCIAL], [])
    fetched = Fetch(tmp_path, space=str(tmp_path / "space.py"))
    assert wanted(fetched) == [FREE]


def test_the_default_space_names_what_timm_has() -> None:
    pretrained = [name for name, start in BACKBONES.items() if start != "scratch"]
    licences = {name: licence_of(name) for name in pretrained}
    restricted = [name for name, licence in licences.items() if licence not in PERMISSIVE]
    assert restricted
    assert all("dinov3" in name or "convnextv2" in name for name in restricted)
    assert len(wanted(Fetch(Path("nowhere")))) == len(pretrained) - len(restricted)
