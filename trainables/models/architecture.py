"""A trained network's shape from plain values: what an exported folder builds before it loads the weights.

Only torch, timm and torchvision are imported, because such a folder carries this file with it (see
ensemble/export/package.py). backbones.py is what trials use: it also knows pretrained weights, and what can go wrong.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainables.models.classic import NETWORKS, build_classic

SQUEEZENETS = ("squeezenet1_0", "squeezenet1_1")  # timm has none
# attribute paths of the first strided convolution and of the pooling behind it, by family
_STEMS = (("conv1", "maxpool"), ("features.conv0", "features.pool0"))


def assemble(name: str, num_classes: int, options: dict[str, Any], width: float, stem: str) -> nn.Module:
    """The network of those names and sizes, randomly initialised, without what only training needs.

    name: timm's, one of SQUEEZENETS or of NETWORKS; options: timm's, such as img_size; width: of NETWORKS; stem:
    "small" or "default".
    """
    if name in NETWORKS:
        return build_classic(name, num_classes, width, 0.0, 0.0)
    if name in SQUEEZENETS:
        return SqueezeNet(name, num_classes, 0.0)
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    if stem == "small":
        keep_resolution(model)
    return model


class SqueezeNet(nn.Module):
    """torchvision's SqueezeNet behind timm's interface."""

    def __init__(self, name: str, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        import torchvision

        net = getattr(torchvision.models, name)(num_classes=num_classes, dropout=drop_rate)
        self.features, self.classifier = net.features, net.classifier
        self.num_features = 512

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.classifier(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier


def keep_resolution(model: nn.Module) -> None:
    """Make a stem of stride 4 one of stride 1: a 3x3 convolution (the 7x7 kernel's centre) and no pooling.

    Raises ValueError when it has no such stem.
    """
    for conv_path, pool_path in _STEMS:
        try:
            conv = model.get_submodule(conv_path)
            model.get_submodule(pool_path)
        except AttributeError:
            continue
        if not isinstance(conv, nn.Conv2d):
            continue
        small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
        cut = (conv.kernel_size[0] - 3) // 2
        with torch.no_grad():
            small.weight.copy_(conv.weight[:, :, cut : cut + 3, cut : cut + 3])
            if conv.bias is not None and small.bias is not None:
                small.bias.copy_(conv.bias)
        _set_submodule(model, conv_path, small)
        _set_submodule(model, pool_path, nn.Identity())
        return
    raise ValueError("no stem of stride 4 whose place is known")


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
