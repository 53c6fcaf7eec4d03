"""Optimisers, parameter groups and learning-rate schedules: functions from a TrialConfig to torch's own objects."""

import math

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from trainables.config import Optimizer, Schedule


def make_optimizers(
    model: nn.Module,
    head: nn.Module,
    optimizer: Optimizer,
    lr: float,
    body_lr: float,
    layer_decay: float,
    weight_decay: float,
    momentum: float,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model.

    Their groups carry `lr_scale`, the factor between the schedule's lr and the group's, and `until`, the share of the
    training (0 to 1) over which the group runs through the schedule, and after which it no longer learns.

    A network may give single parameters a scale and a share of their own in `own_rates()`; Adam, which is blind to
    scale, ignores them. Muon takes the hidden matrices and filters; what it is not made for (the head, biases, norms)
    goes to SGD-Nesterov. Weights of one dimension get no weight decay, but those with a scale of their own: they shrink
    as fast as the head does.
    """
    own_rates = model.own_rates() if optimizer != "adamw" and hasattr(model, "own_rates") else {}  # type: ignore[operator]
    groups = _parameter_groups(model, head, body_lr, layer_decay, weight_decay, own_rates)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    if optimizer == "adamw":
        fused = next(model.parameters()).device.type in ("cpu", "cuda")  # a third of the time for small networks
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=fused)]
    if optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)]
    head_parameters = {id(p) for p in head.parameters()}
    hidden: list[dict] = []
    other: list[dict] = []
    for group in groups:
        # timm's position embeddings and class tokens are a single row: vectors, whose scale is theirs to learn
        is_hidden = [p.ndim >= 2 and len(p) > 1 and id(p) not in head_parameters for p in group["params"]]
        for groups_of, kind in ((hidden, True), (other, False)):
            params = [p for p, is_one in zip(group["params"], is_hidden, strict=True) if is_one is kind]
            if params:  # together, because a GPU updates a group's tensors in one go
                groups_of.append({**group, "params": params})
    made: list[torch.optim.Optimizer] = []
    if other:
        made.append(torch.optim.SGD(other, lr=lr, momentum=0.85, nesterov=True))
    if hidden:
        made.append(Muon(hidden, lr=lr, momentum=momentum))
    return made


def _parameter_groups(
    model: nn.Module,
    head: nn.Module,
    body_lr: float,
    layer_decay: float,
    weight_decay: float,
    own_rates: dict[str, tuple[float, float]],
) -> list[dict]:
    """Groups by (lr_scale, weight_decay, until); `own_rates` are single parameters' lr_scale and until, by name."""
    layer_scale: dict[int, float] = {}
    if layer_decay < 1.0 and hasattr(model, "group_matcher"):
        for group in param_groups_layer_decay(model, layer_decay=layer_decay):
            layer_scale.update({id(p): group["lr_scale"] for p in group["params"]})
    head_parameters = {id(p) for p in head.parameters()}
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[tuple[float, float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # such as a whitening layer, which never learns
        if name in own_rates:
            scale, until = own_rates[name]
            decay = weight_decay / scale  # the lr multiplies it again
        else:
            scale = 1.0 if id(parameter) in head_parameters else body_lr * layer_scale.get(id(parameter), 1.0)
            until = 1.0
            decay = weight_decay if parameter.ndim >= 2 and name not in undecayed else 0.0
        groups.setdefault((scale, decay, until), []).append(parameter)
    return [{"params": p, "lr_scale": s, "weight_decay": d, "until": u} for (s, d, u), p in groups.items()]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), for matrices and convolution filters.

    A filter (out, in, h, w) is treated as the matrix (out, in * h * w), which torch.optim.Muon (2-D only) does not
    do. As in the published CIFAR-10 recipe the weights are kept at their initial scale: each is renormalised to
    norm sqrt(out) before its update, so no weight decay is needed; a `weight_decay` is applied decoupled.
    """

    def __init__(self, params: list[dict], lr: float, momentum: float = 0.6, steps: int = 3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                gradient = parameter.grad.add(buffer, alpha=group["momentum"])  # Nesterov
                update = orthogonalize(gradient.reshape(len(gradient), -1), group["steps"]).view_as(parameter)
                parameter.mul_(math.sqrt(len(parameter)) / parameter.norm().clamp_min(1e-12))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        return None


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: quintic Newton-Schulz iteration with Jordan's coefficients.

    `matrix` float (rows, columns); singular values of the result lie near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    # Each step multiplies x by a polynomial of its Gram matrix. They commute, so all steps can be taken on the small
    # Gram matrix, and x, which is nine times as wide, is multiplied once.
    gram = x @ x.T
    product: Tensor | None = None
    for _ in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    x = x if product is None else product @ x
    return x.T if tall else x


def lr_factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """Factor on the peak lr after `progress` (0 to 1) of all steps; `warmup` is the rising fraction.

    "plateau" and "constant" only warm up here; the halving on a plateau depends on results (see train.py).
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    fall = (progress - warmup) / max(1e-9, 1.0 - warmup)
    if schedule in ("cosine", "onecycle"):
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, fall)))
    if schedule == "triangular":
        return max(0.0, 1.0 - fall)
    return 1.0
