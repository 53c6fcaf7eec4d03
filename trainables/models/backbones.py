"""Backbones by name.

Every network here has timm's interface: `forward_features`, `forward_head(x, pre_logits=...)`, `get_classifier`.
"""

import difflib
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainables.config import Stem, TrialConfig
from trainables.errors import UserError
from trainables.models.architecture import SQUEEZENETS, SqueezeNet, keep_resolution
from trainables.models.classic import NETWORKS, build_classic
from trainables.training.memory import is_out_of_memory

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


HUB = "hf-hub:"


def plain_name(name: str) -> str:
    """timm's name for `hf-hub:timm/NAME`, which is how timm's own repositories are called; others as they are.

    Raises UserError for repositories of others: their network is only known once their files are read, and a candidate
    must be loaded where there is no hub.
    """
    if not name.startswith(HUB):
        return name
    owner, _, model = name.removeprefix(HUB).partition("/")
    if owner != "timm":
        raise UserError(
            f"backbone {name!r} is not one of timm's own, expected {HUB}timm/NAME; download its weights as "
            "<timm name>.safetensors into a folder, and name that with --weights-dir"
        )
    return model


def check_backbone(name: str) -> None:
    """Raise UserError, with near matches, unless `name` can be built."""
    known = [*NETWORKS, *SQUEEZENETS, *timm.list_models()]
    if not re.fullmatch(r"\w+(\.\w+)?", name) or name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; near matches: {', '.join(near)}" if near else "; see timm.list_models()"
        raise UserError(f"unknown backbone {name!r}{hint}")


def check_image_size(config: TrialConfig) -> None:
    """Raise UserError when images of the config's size, or of a progressive one, cannot go through its backbone."""
    for size in (config.image_size, *config.progressive):
        _check_size(config.backbone, config.stem, config.image_size, size)


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _check_size(name: str, stem: Stem, built_for: int, size: int) -> None:
    with torch.device("meta"):  # shapes without numbers: no memory and hardly any time
        model = build(TrialConfig(backbone=name, stem=stem, image_size=built_for), 2).eval()
        try:
            model(torch.zeros(1, 3, size, size))
        except NotImplementedError:
            pass  # an operation without shape rules says nothing about the size
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"images of {size} pixels do not go through {name} ({reason}); try another image_size"
            ) from None


def build(config: TrialConfig, num_classes: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the network of a trial with a head for `num_classes`; with pretrained tensors when given.

    Raises UserError when they do not fit the architecture, or there is no such network.
    """
    name = config.backbone
    check_backbone(name)
    if name in NETWORKS:
        return build_classic(name, num_classes, config.width, config.dropout, config.drop_path)
    if name in SQUEEZENETS:
        model: nn.Module = SqueezeNet(name, num_classes, config.dropout)
        if weights is not None:
            body = _body_of(name, config.image_size, weights)
            model.load_state_dict(body, strict=False)
    else:
        options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": config.dropout}
        if config.drop_path > 0:
            options["drop_path_rate"] = config.drop_path
        if takes_image_size(name):
            options["img_size"] = config.image_size
        if weights is not None:
            weights = _body_of(name, config.image_size, weights)
        model, _ = _create(name, options, weights)
    if weights is not None:
        _start_head(model)
    if config.stem == "small":
        try:
            keep_resolution(model)
        except ValueError:
            raise UserError(
                f"stem='small' is for ResNet- and DenseNet-like stems; {name} has none; use stem='default'"
            ) from None
    return model


def recompute_activations(model: nn.Module) -> bool:
    """Have the network compute its activations again for the gradients, instead of keeping them: far less memory, a
    third more time (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). Returns whether it can."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError):  # no network of timm's, or one that cannot
        return False
    return True


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorms do not move their running statistics: for a backward pass that computes activations again, which
    would count every batch twice."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, kinds)]
    for norm, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def describe_architecture(config: TrialConfig, num_classes: int) -> dict[str, Any]:
    """What `architecture.assemble` takes to build the network of a trial, but for the number of classes: plain JSON."""
    name, options = config.backbone, dict[str, Any]()
    if name not in NETWORKS and name not in SQUEEZENETS and takes_image_size(name):
        with torch.device("meta"):
            _, options = _create(name, {"num_classes": num_classes, "img_size": config.image_size})
        options.pop("num_classes")
    return {"name": name, "options": options, "width": config.width, "stem": config.stem}


def _create(
    name: str, options: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's network, and those of the options that it took: what its family does not take (stochastic depth, an image
    size) is left out.

    weights: of its body, which timm brings to the image size of the options (positions, windows, relative positions).
    """
    source: dict[str, Any] = {"pretrained": False}
    if weights is not None:  # no classes: the head is not among them
        source = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights), "num_classes": 0}}
    while True:
        try:
            model = timm.create_model(name, **source, **options)
            if weights is not None:
                model.pretrained_cfg.pop("state_dict")  # type: ignore[union-attr, operator]  # a second copy, for as long as the network lives
            return model, options
        except (TypeError, RuntimeError, ValueError) as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused and refused[1] in options:
                options = {key: value for key, value in options.items() if key != refused[1]}
                continue
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"{name} cannot be built ({reason}); try another backbone or image_size") from None


@functools.lru_cache(maxsize=64)
def _shapes(name: str, size: int | None = None) -> dict[str, torch.Size]:
    """The shapes of the tensors of a network's body: as pretrained, or for images of `size` pixels."""
    options: dict[str, Any] = {"num_classes": 2}
    if size is not None and takes_image_size(name):
        options["img_size"] = size
    with torch.device("meta"):
        model = SqueezeNet(name, 2, 0.0) if name in SQUEEZENETS else _create(name, options)[0]
    head = {id(parameter) for parameter in head_of(model).parameters()}
    in_head = {key for key, parameter in model.named_parameters() if id(parameter) in head}
    return {key: tensor.shape for key, tensor in model.state_dict().items() if key not in in_head}


def _resized(name: str, size: int) -> set[str]:
    """Names of the tensors of its body that have another shape when images have another size than it was trained on."""
    own = _shapes(name)
    return {key for key, shape in _shapes(name, size).items() if own.get(key) != shape}


def _body_of(name: str, size: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pretrained tensors of everything but the head. Raises UserError when they are another network's."""
    shapes = _shapes(name)
    free = _resized(name, size) | {"pos_embed"}  # they may come from a network that was trained on other images' size
    lacking = [
        key for key, shape in shapes.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state or (state[key].shape != shape and key not in free))
    ]  # fmt: skip
    if lacking:
        raise UserError(
            f"these weights are not {name}'s: {len(lacking)} of {len(shapes)} tensors are "
            f"missing or of another shape, first {lacking[0]}"
        )
    return {key: state[key] for key in shapes if key in state}


@functools.lru_cache(maxsize=256)
def check_resizing(name: str, size: int) -> None:
    """Raise UserError when a backbone's pretrained weights cannot be brought to images of `size` pixels.

    Random ones of the same shapes are: a second of work, for networks of which more than the positions depends on it.
    """
    if name in NETWORKS or name in SQUEEZENETS or _resized(name, size) <= {"pos_embed"}:
        return
    model, _ = _create(name, {"num_classes": 2})
    build(TrialConfig(backbone=name, image_size=size), 2, model.state_dict())


def _start_head(model: nn.Module) -> None:
    """Start the head close to zero: its usual start may give logits of ten and more on pretrained features, which takes
    epochs to unlearn."""
    for module in head_of(model).modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normalisation(name: str, pretrained: bool, mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation (3 each, for pixels in 0..1) to normalise inputs with: the weights' own, or the data's."""
    if not pretrained:
        return [float(x) for x in mean], [float(x) for x in std]
    if name in SQUEEZENETS:
        return list(IMAGENET[0]), list(IMAGENET[1])
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, name
    return list(cfg.mean), list(cfg.std)


def head_of(model: nn.Module) -> nn.Module:
    """The classifier: what still learns during freeze epochs."""
    head = model.get_classifier()  # type: ignore[operator]
    return head if isinstance(head, nn.Module) else nn.ModuleList(head)


def set_frozen(model: nn.Module, frozen: bool) -> None:
    """Freeze or thaw the body: its parameters take no gradient and its BatchNorms keep their statistics.

    Parameters that never learn (no gradient as built) are marked on first use and stay so. Call after model.train().
    """
    head = {id(p) for p in head_of(model).parameters()}
    for parameter in model.parameters():
        if not hasattr(parameter, "learns"):
            parameter.learns = parameter.requires_grad  # type: ignore[attr-defined]
        parameter.requires_grad = parameter.learns and (not frozen or id(parameter) in head)  # type: ignore[attr-defined]
    if frozen:
        keep_statistics(model)


def keep_statistics(model: nn.Module) -> None:
    """Let the body's BatchNorms use and keep the statistics that they have. Call after model.train()."""
    head_modules = set(head_of(model).modules())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in head_modules:
            module.eval()


@functools.cache
def takes_image_size(name: str) -> bool:
    """Whether it may be a network for one image size: vision transformers fix their number of patches when built."""
    if any(part in name for part in ("vit_", "deit", "beit", "swin", "eva", "mixer")):
        return True
    architecture = name.split(".")[0]
    known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return known is not None and known.fixed_input_size
