"""The head of a frozen body: multinomial logistic regression on its features, fitted exactly.

Linear probing, the first half of LP-FT (Kumar et al., 2022, arXiv:2202.10054). A whole path of strengths is fitted,
each from the one before, which takes a second where one training of a head by steps takes ten.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from upath import UPath

from trainables.storage import write_bytes

FORMAT = 2  # of stored heads: raise it when they are fitted in another way
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(2, -9, -1))  # 10 to 1e-4, of the squared weights
STEPS = 60  # of L-BFGS, for each of them
MOST_VALUES = 2e8  # rows x features that are fitted on; more rows say little more
MUCH_WORK = 3e9  # rows x features x classes, from which on fewer strengths are tried, in fewer steps
MOST_WORK = 2e10  # of which a step takes about five seconds on a CPU core
FEW_STRENGTHS, FEW_STEPS = STRENGTHS[4:11:3], 20
FOLDS = 5  # a part of so many is held out where no tune split is left


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer on features as they come: weight (C, F), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


Rows = Callable[[np.ndarray], list[Tensor]]
"""From image indices (N,) to their features, float32 (N, F), one tensor for each view."""


def fit_head(
    rows: Rows, labels: np.ndarray, train: np.ndarray, tune: np.ndarray, classes: int,
    weigh: bool = False, tick: Callable[[], None] = lambda: None, deadline: float | None = None,
) -> tuple[Head, float]:  # fmt: skip
    """Return the head of the strength with the lowest log-loss on `tune`, fitted on `train`, and that strength.

    deadline: time.time() after which the fit ends where it stands.

    labels: int64, of all images; train, tune: indices. weigh: classes count by their inverse frequency. Without a tune
    split a fifth of the train images is held out to choose by, and the head fitted on all of them. A view is a row of
    its own in the fit; predictions average the views' logits.
    """
    if not len(tune):
        dealt = np.random.default_rng(0).permutation(train)
        held, rest = dealt[::FOLDS], np.setdiff1d(train, dealt[::FOLDS])
        _, strength = fit_head(rows, labels, rest, held, classes, weigh, tick, deadline)
        return fit_at(rows, labels, train, classes, (strength,), weigh, tick, deadline)[-1], strength
    views = rows(tune)
    work = len(train) * len(views) * views[0].shape[1] * classes
    strengths = STRENGTHS if work <= MUCH_WORK else FEW_STRENGTHS
    heads = fit_at(rows, labels, train, classes, strengths, weigh, tick, deadline)
    target = torch.from_numpy(labels[tune]).to(views[0].device)
    losses = [float(F.cross_entropy(torch.stack([head(view) for view in views]).mean(0), target)) for head in heads]
    best = int(np.argmin(losses))
    return heads[best], strengths[best]


def shared_head(
    folder: Path, question: dict[str, Any], shape: tuple[int, ...], device: torch.device,
    fit: Callable[[], tuple[Head, float]], deadline: float | None = None,
) -> tuple[Head, float]:  # fmt: skip
    """What `fit` returns, computed once on a node for all trials that ask the same `question`: a head of that `shape`
    (C, F) on `device`, and its strength. One that the deadline has cut short is not kept, and a damaged file is written
    anew."""
    name = hashlib.sha256(json.dumps({**question, "head": FORMAT}, sort_keys=True).encode()).hexdigest()[:20]
    path = folder / f"{name}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, TypeError), safe_open(path, "pt") as file:
        head = Head(file.get_tensor("weight").to(device), file.get_tensor("bias").to(device))
        fits = head.weight.shape == shape and head.bias.shape == shape[:1]
        if fits and head.weight.isfinite().all() and head.bias.isfinite().all():
            return head, float(file.metadata()["strength"])
    head, strength = fit()
    if deadline is None or time.time() < deadline:
        tensors = {"weight": head.weight.cpu().contiguous(), "bias": head.bias.cpu().contiguous()}
        write_bytes(UPath(path), save(tensors, metadata={"strength": repr(strength)}))
    return head, strength


def fit_at(
    rows: Rows, labels: np.ndarray, train: np.ndarray, classes: int, strengths: Sequence[float], weigh: bool = False,
    tick: Callable[[], None] = lambda: None, deadline: float | None = None,
) -> list[Head]:  # fmt: skip
    """Return a head for each strength, strongest first, fitted on the images `train`; those that the deadline allows,
    and one at least.

    Minimises the mean cross-entropy plus strength / 2 times the squared weights, on features of unit variance. Those
    that vary less than all do in the root mean square are not scaled up to it: a feature that is nearly dead on a few
    training images would get a weight with which it drowns all others where it wakes up, on a new or augmented image.
    """
    views = rows(train[:2])
    width = len(views) * views[0].shape[1]
    most = max(classes, int(min(MOST_VALUES / width, MOST_WORK / (width * classes))))
    steps = STEPS if len(train) * width * classes <= MUCH_WORK else FEW_STEPS
    if len(train) > most:
        train = np.sort(np.random.default_rng(0).permutation(train)[:most])
    x = torch.cat(rows(train))
    target = torch.from_numpy(labels[train]).to(x.device).repeat(len(views))
    weights = torch.ones(classes, device=x.device)
    if weigh:
        counts = torch.bincount(target, minlength=classes).clamp_min(1)
        weights = len(target) / (classes * counts).float()
    mean, std = x.mean(0), x.std(0)
    std = std.clamp_min(max(1e-6, float(std.square().mean().sqrt())))
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    heads: list[Head] = []
    for strength in strengths:
        if heads and deadline is not None and time.time() > deadline:
            break
        best: list[Any] = [float("inf"), None, None]  # of a search that is cut in the middle
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-6
        )

        def loss(
            optimizer: torch.optim.Optimizer = optimizer, strength: float = strength, best: list[Any] = best
        ) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, target, weights) + strength / 2 * weight.square().sum()
            value.backward()
            tick()
            if deadline is not None and float(value) < best[0]:
                best[:] = [float(value), weight.detach().clone(), bias.detach().clone()]
            if deadline is not None and time.time() > deadline:
                raise TimeoutError
            return value

        try:
            with torch.enable_grad():
                optimizer.step(loss)  # type: ignore[arg-type]
        except TimeoutError:
            with torch.no_grad():
                weight.copy_(best[1])
                bias.copy_(best[2])
        with torch.no_grad():
            own = weight / std
            heads.append(Head(own.clone(), (bias - own @ mean).clone()))
    return heads
