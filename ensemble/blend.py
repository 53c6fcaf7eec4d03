"""How members' predictions become one: weights, and where a selector asks for it, temperatures or a stacked layer.

Most selectors answer with weights alone. Temperature scaling changes what is averaged, stacking replaces the average by
a linear layer; a `Blend` holds all three, so that whoever predicts needs to know only `blend(probs)`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble.metrics import FLOOR

Probs = np.ndarray | Sequence[np.ndarray]
"""Predictions of M models: (M, N, C), or a sequence of M arrays (N, C) such as memory maps; rows sum to 1."""

ROWS = 16_384
COOLEST, HOTTEST = 0.2, 5.0
NEWTON_STEPS = 20


def chunks(n: int) -> Iterator[slice]:
    """Slices that cover n rows, each small enough to work on: memory stays bounded however many images there are."""
    for start in range(0, n, ROWS):
        yield slice(start, min(start + ROWS, n))


@dataclass(frozen=True, eq=False)
class Stack:
    """A linear layer on K members' log-probabilities.

    Attributes:
        coefficients: float64 (C, K, C): output class, member, input class.
        intercept: float64 (C,).
    """

    coefficients: np.ndarray
    intercept: np.ndarray

    def __call__(self, members: list[np.ndarray]) -> np.ndarray:
        """Probabilities float64 (N, C) from the K members' (N, C)."""
        logits = self.intercept + sum(
            np.log(np.maximum(p, FLOOR)) @ self.coefficients[:, k].T for k, p in enumerate(members)
        )
        return softmax(logits)


@dataclass(frozen=True, eq=False)
class Blend:
    """What a selector found.

    Attributes:
        weights: float64 (M,), non-negative, sum 1. With a stack: each member's share of the coefficients' norm.
        temperatures: float64 (M,), by which each model's log-probabilities are divided first; None: none are.
        stack: replaces the weighted average; its K members are those of positive weight, in order. None: nothing does.
    """

    weights: np.ndarray
    temperatures: np.ndarray | None = None
    stack: Stack | None = None

    def __call__(self, probs: Probs) -> np.ndarray:
        """Probabilities, float32 (N, C), from those of all M models; those of weight 0 are not even read.

        Summed in float64 and rounded at the end, so that a vote that is a tie on paper is a tie here, too.
        """
        members = np.flatnonzero(self.weights).tolist()
        combined = np.empty(probs[0].shape, np.float32)
        for rows in chunks(len(combined)):
            parts = [self._member(probs, m, rows) for m in members]
            if self.stack is not None:
                combined[rows] = self.stack(parts)
            else:
                combined[rows] = sum(self.weights[m] * p for m, p in zip(members, parts, strict=True))
        return combined

    def only(self, candidates: np.ndarray) -> "Blend":
        """The same blend over these candidates alone, in this order; all of positive weight must be among them."""
        stack = self.stack
        if stack is not None:
            place = {int(m): k for k, m in enumerate(np.flatnonzero(self.weights))}
            order = [place[int(m)] for m in candidates if int(m) in place]
            stack = replace(stack, coefficients=stack.coefficients[:, order])
        temperatures = None if self.temperatures is None else self.temperatures[candidates]
        return Blend(self.weights[candidates], temperatures, stack)

    def _member(self, probs: Probs, m: int, rows: slice) -> np.ndarray:
        part = np.asarray(probs[m][rows], np.float64)
        return part if self.temperatures is None else scale(part, float(self.temperatures[m]))


def combine(probs: Probs, weights: np.ndarray) -> np.ndarray:
    """The weighted average of M models' predictions, float32 (N, C); weights (M,), non-negative, sum 1."""
    return Blend(weights)(probs)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Rows of logits (N, C) as probabilities."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def scale(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, C) whose logarithms were divided by a temperature: above 1 softer, below 1 sharper."""
    return probs if temperature == 1 else softmax(np.log(np.maximum(probs, FLOOR)) / temperature)


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, 0.2 to 5, at which these predictions (N, C) have the lowest log-loss.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". The log-loss is convex in 1/T, where Newton's
    method needs a handful of steps.
    """
    logits = np.log(np.maximum(np.asarray(probs, np.float64), FLOOR))
    target = logits[np.arange(len(labels)), labels].mean()
    inverse = 1.0
    for _ in range(NEWTON_STEPS):
        scaled = softmax(logits * inverse)
        mean = np.einsum("nc,nc->n", scaled, logits)
        variance = np.einsum("nc,nc,nc->n", scaled, logits, logits) - mean**2
        step = (target - mean.mean()) / max(float(variance.mean()), 1e-12)
        # at most a factor of 2 at once: far from the minimum the curvature can be almost nil
        moved = float(np.clip(inverse + step, max(inverse / 2, 1 / HOTTEST), min(inverse * 2, 1 / COOLEST)))
        if abs(moved - inverse) < 1e-4:
            return 1 / moved
        inverse = moved
    return 1 / inverse


def fit_temperatures(probs: Probs, labels: np.ndarray) -> np.ndarray:
    """Each model's own `fit_temperature`, float64 (M,).

    Scaling before averaging helps where candidates differ in calibration; an average of well-calibrated models is
    itself too unsure, so it is an option, no default (Rahaman and Thiery 2021, "Uncertainty Quantification and Deep
    Ensembles").
    """
    return np.array([fit_temperature(p, labels) for p in probs])


def scale_all(probs: Probs, temperatures: np.ndarray) -> list[np.ndarray]:
    """Every model's scaled predictions, float32; takes M N C x 4 bytes of memory."""
    scaled = []
    for p, temperature in zip(probs, temperatures, strict=True):
        out = np.empty(p.shape, np.float32)
        for rows in chunks(len(out)):
            out[rows] = scale(np.asarray(p[rows], np.float64), float(temperature))
        scaled.append(out)
    return scaled
