"""The head of a frozen body: multinomial logistic regression on its features, fitted exactly.

Linear probing, the first half of LP-FT (Kumar et al., 2022, arXiv:2202.10054). A whole path of strengths is fitted,
each from the one before, which takes a second where one training of a head by steps takes ten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(2, -9, -1))  # 10 to 1e-4, of the squared weights
STEPS = 60  # of L-BFGS, for each of them
MOST_VALUES = 2e8  # rows x features that are fitted on; more rows say little more
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
    weigh: bool = False, tick: Callable[[], None] = lambda: None,
) -> tuple[Head, float]:  # fmt: skip
    """Return the head of the strength with the lowest log-loss on `tune`, fitted on `train`, and that strength.

    labels: int64, of all images; train, tune: indices. weigh: classes count by their inverse frequency. Without a tune
    split a fifth of the train images is held out to choose by, and the head fitted on all of them. A view is a row of
    its own in the fit; predictions average the views' logits.
    """
    if not len(tune):
        dealt = np.random.default_rng(0).permutation(train)
        held, rest = dealt[::FOLDS], np.setdiff1d(train, dealt[::FOLDS])
        _, strength = fit_head(rows, labels, rest, held, classes, weigh, tick)
        return fit_at(rows, labels, train, classes, (strength,), weigh, tick)[-1], strength
    heads = fit_at(rows, labels, train, classes, STRENGTHS, weigh, tick)
    views = rows(tune)
    target = torch.from_numpy(labels[tune]).to(views[0].device)
    losses = [float(F.cross_entropy(torch.stack([head(view) for view in views]).mean(0), target)) for head in heads]
    best = int(np.argmin(losses))
    return heads[best], STRENGTHS[best]


def fit_at(
    rows: Rows, labels: np.ndarray, train: np.ndarray, classes: int, strengths: Sequence[float], weigh: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> list[Head]:  # fmt: skip
    """Return a head for each strength, strongest first, fitted on the images `train`.

    Minimises the mean cross-entropy plus strength / 2 times the squared weights, on features of unit variance.
    """
    views = rows(train[:2])
    most = max(classes, int(MOST_VALUES / (len(views) * views[0].shape[1])))
    if len(train) > most:
        train = np.sort(np.random.default_rng(0).permutation(train)[:most])
    x = torch.cat(rows(train))
    target = torch.from_numpy(labels[train]).to(x.device).repeat(len(views))
    weights = torch.ones(classes, device=x.device)
    if weigh:
        counts = torch.bincount(target, minlength=classes).clamp_min(1)
        weights = len(target) / (classes * counts).float()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    heads = []
    for strength in strengths:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-6
        )

        def loss(optimizer: torch.optim.Optimizer = optimizer, strength: float = strength) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, target, weights) + strength / 2 * weight.square().sum()
            value.backward()
            tick()
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[arg-type]
        with torch.no_grad():
            own = weight / std
            heads.append(Head(own.clone(), (bias - own @ mean).clone()))
    return heads
