"""Small networks trained from scratch, with timm's interface: forward_features, forward_head, get_classifier.

`speednet` is ours. Its shape follows the published airbench94 recipe (Jordan, 2024, arXiv:2404.00498): a frozen
whitening layer, three groups of two 3x3 convolutions that start as identities, GELU, BatchNorm without
scale, scaled logits.
"""

import inspect
from collections.abc import Callable

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MOST_PATCHES = 2_000_000  # that the whitening filters are computed from
GAINS: dict[type[nn.Module], float] = {nn.ReLU: 2**0.5, nn.Tanh: 5 / 3, nn.Sigmoid: 4.8}


class SpeedNet(nn.Module):
    """A fast convnet for images of about 32 pixels.

    Args:
        num_classes: size of the output.
        width: multiplies the widths 64, 256, 256 of the three groups.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, num_classes: int, width: float = 1.0, drop_rate: float = 0.0) -> None:
        super().__init__()
        widths = [_scaled(w, width) for w in (64, 256, 256)]
        self.whiten = nn.Conv2d(3, 24, 2, bias=True)
        self.whiten.weight.requires_grad = False  # set from the data, see `prepare`
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.groups = nn.Sequential(
            *[_group(before, after) for before, after in zip([24, *widths], widths, strict=False)]
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.num_features = widths[-1]
        self.logit_scale = 1 / 9

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Set the whitening filters from normalised training images, float (N, 3, H, W), N of a few thousand.

        The filters are the eigenvectors of the 2x2 patches' covariance, scaled to unit variance, with both signs.
        """
        images = images[: max(1, MOST_PATCHES // (images.shape[2] * images.shape[3]))]
        patches = images.float().cpu().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
        # eigenvectors have no natural sign; fixing one keeps equal data giving equal weights
        vectors = vectors * torch.sign(vectors[vectors.abs().argmax(0), torch.arange(12)])
        filters = (vectors / torch.sqrt(values + 5e-4)).T.flip(0).reshape(12, 3, 2, 2).float()
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def own_rates(self) -> dict[str, tuple[float, float]]:
        """Biases learn 64 times as fast (Jordan, 2024, section 3.2), that of the whitening only in the beginning."""
        biases = [name for name, _ in self.named_parameters() if name.endswith("bias")]
        return {name: (64.0, 3 / 8 if name == "whiten.bias" else 1.0) for name in biases}

    def forward_features(self, x: Tensor) -> Tensor:
        return self.groups(nn.functional.gelu(self.whiten(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pool(x).flatten(1))
        return x if pre_logits else self.head(x) * self.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head


def _group(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        _identity_conv(before, after),
        nn.MaxPool2d(2),
        _norm(after),
        nn.GELU(),
        _identity_conv(after, after),
        _norm(after),
        nn.GELU(),
    )


def _identity_conv(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:before])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-5, momentum=0.4)
    norm.weight.requires_grad = False  # the scale is redundant before a convolution
    return norm


class PlainNet(nn.Module):
    """A plain stack of convolutions with a small dense top: what the seeds trained from scratch.

    Args:
        num_classes: size of the output.
        body: the convolutional part; any spatial size comes out of it.
        channels: of the body's output.
        hidden: widths of the dense layers before the classifier.
        activation: of the dense layers.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self, num_classes: int, body: nn.Module, channels: int, hidden: tuple[int, ...],
        activation: type[nn.Module], drop_rate: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body = body
        # The seeds flatten the last feature map, which ties them to one image size; a fixed 2x2 map frees them of it.
        self.pool = _TwoByTwo()
        layers: list[nn.Module] = []
        before = 4 * channels
        for after in hidden:
            layers += [nn.Linear(before, after), activation()]
            before = after
        self.dense = nn.Sequential(*layers)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(before, num_classes)
        self.num_features = before
        _keep_scale([*self.body.modules(), *self.dense.modules()], activation)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.dense(self.pool(x).flatten(1)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head


class _TwoByTwo(nn.Module):
    """AdaptiveMaxPool2d(2), written as the plain pooling it comes down to: that can be exported for every map size."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if min(height, width) < 2:
            return nn.functional.adaptive_max_pool2d(x, 2)
        return nn.functional.max_pool2d(x, (height - height // 2, width - width // 2), (height // 2, width // 2))


@torch.no_grad()
def _keep_scale(modules: list[nn.Module], activation: type[nn.Module]) -> None:
    """Initialise so that activations keep their spread from layer to layer; torch's default loses it within nine.

    Normal weights of variance gain^2 / fan-in (He et al., 2015). A sigmoid's outputs lie around a half, which the next
    layer's biases take away.
    """
    layers = [module for module in modules if isinstance(module, nn.Conv2d | nn.Linear)]
    for i, layer in enumerate(layers):
        nn.init.normal_(layer.weight, std=GAINS[activation] / layer.weight[0].numel() ** 0.5)
        if layer.bias is not None:
            centre = 0.5 if activation is nn.Sigmoid and i > 0 else 0.0
            layer.bias.copy_(-centre * layer.weight.flatten(1).sum(1))


def _conv_blocks(
    blocks: tuple[tuple[int, ...], ...], activation: type[nn.Module], norm: bool, drops: tuple[float, ...]
) -> nn.Sequential:
    """3x3 convolutions, each [with BatchNorm and] an activation; max-pooling and dropout after each block."""
    layers: list[nn.Module] = []
    before = 3
    for widths, drop in zip(blocks, drops, strict=True):
        for after in widths:
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(after)] if norm else []
            layers.append(activation())
            before = after
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        layers += [nn.Dropout(drop)] if drop else []
    return nn.Sequential(*layers)


def _simple(activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> Callable[..., nn.Module]:
    """The Intel seed's CNN: three blocks of three convolutions, then 256-256-classes."""

    def make(num_classes: int, width: float, drop_rate: float) -> nn.Module:
        widths = ((32, 64, 64), (128, 256, 256), (512, 1024, 1024))
        blocks = tuple(tuple(_scaled(w, width) for w in block) for block in widths)
        body = _conv_blocks(blocks, activation, norm, (0.25, 0.25, 0.25) if norm else (0.0, 0.0, 0.0))
        hidden = (_scaled(256, width), _scaled(256, width))
        return PlainNet(num_classes, body, blocks[-1][-1], hidden, activation, drop_rate or (0.5 if norm else 0.0))

    return make


def _keras_cnn(num_classes: int, width: float, drop_rate: float) -> nn.Module:
    """The Keras seed's CNN: pairs of 64, of 128, of 256 and 128 filters with BatchNorm, then a dense layer of 128.

    Its L2 on the dense layer is the trial's weight decay; its dropout of 0.3 there is used unless the config sets one.
    """
    blocks = tuple(tuple(_scaled(w, width) for w in block) for block in ((64, 64), (128, 128), (256, 128)))
    body = _conv_blocks(blocks, nn.ReLU, True, (0.1, 0.2, 0.4))
    return PlainNet(num_classes, body, blocks[-1][-1], (_scaled(128, width),), nn.ReLU, drop_rate or 0.3)


def _vit_scratch(num_classes: int, width: float, drop_rate: float, drop_path_rate: float = 0.0) -> nn.Module:
    """A small ViT for 32x32 images: patches of 4, six blocks of width 192, by timm; positions as fixed sines and
    cosines (Beyer et al., 2022, arXiv:2205.01580), which few images could not teach it."""
    dim = max(64, round(192 * width / 64) * 64)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=dim, depth=6, num_heads=dim // 64, mlp_ratio=2.0, num_classes=num_classes,
        drop_rate=drop_rate, drop_path_rate=drop_path_rate, class_token=False, global_pool="avg", dynamic_img_size=True,
    )  # fmt: skip
    positions = build_sincos2d_pos_embed([8, 8], dim, temperature=100.0)
    model.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
    return model


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width / 8) * 8)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "speednet": SpeedNet,
    "simple": _simple(),
    "simple_norm_dropout": _simple(norm=True),
    "simple_sigmoid": _simple(nn.Sigmoid),
    "simple_tanh": _simple(nn.Tanh),
    "keras_cnn": _keras_cnn,
    "vit_scratch": _vit_scratch,
}


def build_classic(name: str, num_classes: int, width: float, drop_rate: float, drop_path_rate: float) -> nn.Module:
    """One of NETWORKS by name, randomly initialised; drop_path_rate is for those that have branches to drop."""
    more = {"drop_path_rate": drop_path_rate} if has_branches(name) else {}
    return NETWORKS[name](num_classes=num_classes, width=width, drop_rate=drop_rate, **more)


def has_branches(name: str) -> bool:
    """Whether a network of NETWORKS takes a `drop_path_rate`, because it has residual branches."""
    return "drop_path_rate" in inspect.signature(NETWORKS[name]).parameters
