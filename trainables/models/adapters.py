"""Low-rank adapters: a large network learns through two thin matrices beside each of its own.

Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models": a weight W becomes W + B A, of which only A (rank
x in) and B (out x rank) learn. Gradients and the optimiser's state then take a fraction of the memory. They are torch's
own parametrisations, and so hold where a network reads `layer.weight` past the layer's call, as EVA's attention does.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainables.errors import UserError
from trainables.models.backbones import head_of


class LowRank(nn.Module):
    """W -> W + B A; B starts at zero, so that nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.empty(rank, into, device=weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b, self.a)


def add_adapters(model: nn.Module, rank: int) -> None:
    """Give every matrix of the body an adapter; from now on these learn, and the head, and nothing else.

    Raises UserError for a network whose body has no nn.Linear.
    """
    head = set(head_of(model).modules())
    for module in set(model.modules()) - head:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in head]
    if not layers:
        raise UserError(
            f"lora is {rank}, expected 0: {type(model).__name__} has no matrices for it, as vision transformers and "
            "ConvNeXt do"
        )
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def merge_adapters(model: nn.Module) -> None:
    """Add what the adapters have learned to the weights: the network is then the one that it was built as."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
