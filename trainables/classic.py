"""Small networks trained from scratch, with timm's interface: forward_features, forward_head, get_classifier.

`speednet` is ours. Its shape follows the published airbench94 recipe (Jordan, 2024, arXiv:2404.00498): a frozen
whitening layer, three groups of two 3x3 convolutions that start as identities, GELU, BatchNorm without scale, scaled logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SpeedNet(nn.Module):
    """A fast convnet for images of about 32 pixels.

    Args:
        num_classes: size of the output.
        width: multiplies the widths 64, 256, 256 of the three groups.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, num_classes: int, width: float = 1.0, drop_rate: float = 0.0) -> None:
        super().__init__()
        widths = [max(8, round(w * width / 8) * 8) for w in (64, 256, 256)]
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
        patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        patches = patches[torch.linspace(0, len(patches) - 1, min(len(patches), 500_000)).long()]
        values, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
        # eigenvectors have no natural sign; fixing one keeps equal data giving equal weights
        vectors = vectors * torch.sign(vectors[vectors.abs().argmax(0), torch.arange(12)])
        filters = (vectors / torch.sqrt(values + 5e-4)).T.flip(0).reshape(12, 3, 2, 2).float()
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

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


NETWORKS: dict[str, Callable[..., nn.Module]] = {"speednet": SpeedNet}


def build_classic(name: str, num_classes: int, width: float, drop_rate: float) -> nn.Module:
    """One of NETWORKS by name, randomly initialised."""
    return NETWORKS[name](num_classes=num_classes, width=width, drop_rate=drop_rate)
