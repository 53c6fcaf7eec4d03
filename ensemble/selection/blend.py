"""How members' predictions become one: weights, and where a selector asks for it, temperatures or a stacked layer.

Most selectors answer with weights alone. Temperature scaling changes what is averaged and how sure the average is,
stacking replaces the average by a linear layer; a `Blend` holds all of it, so that whoever predicts needs to know only
`blend(probs)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble.selection.metrics import FLOOR

Probs = np.ndarray | Sequence[np.ndarray]
"""Predictions of M models: (M, N, C), or a sequence of M arrays (N, C) such as memory maps; rows sum to 1."""

ROWS = 16_384
COOLEST, HOTTEST = 0.2, 5.0
NEWTON_STEPS = 20
LAST_STEP = 0.02  # of Newton's method, relative: what is then left is about its square


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
        temperature: by which the outcome's log-probabilities are divided, last of all; 1 leaves it as it is.
    """

    weights: np.ndarray
    temperatures: np.ndarray | None = None
    stack: Stack | None = None
    temperature: float = 1.0

    def __call__(self, probs: Probs) -> np.ndarray:
        """Probabilities, float32 (N, C), from those of all M models; those of weight 0 are not even read.

        Summed in float64 and rounded at the end, so that a vote that is a tie on paper is a tie here, too.
        """
        members = np.flatnonzero(self.weights).tolist()
        combined = np.empty(probs[0].shape, np.float32)
        for rows in chunks(len(combined)):
            parts = [self._member(probs, m, rows) for m in members]
            if self.stack is not None:
                together = self.stack(parts)
            else:
                together = sum(self.weights[m] * p for m, p in zip(members, parts, strict=True))
            combined[rows] = scale(together, self.temperature)
        return combined

    def only(self, candidates: np.ndarray) -> "Blend":
        """The same blend over these candidates alone, in this order; all of positive weight must be among them."""
        stack = self.stack
        if stack is not None:
            place = {int(m): k for k, m in enumerate(np.flatnonzero(self.weights))}
            order = [place[int(m)] for m in candidates if int(m) in place]
            stack = replace(stack, coefficients=stack.coefficients[:, order])
        temperatures = None if self.temperatures is None else self.temperatures[candidates]
        return replace(self, weights=self.weights[candidates], temperatures=temperatures, stack=stack)

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
    if temperature == 1:
        return probs
    powers = np.log(np.maximum(probs, FLOOR))
    powers /= temperature
    np.exp(powers, out=powers)  # of logarithms that are negative: nothing overflows
    powers /= (powers @ np.ones(powers.shape[1], powers.dtype))[:, None]
    return powers


def fit_temperature(probs: np.ndarray, labels: np.ndarray, start: float = 1.0) -> float:
    """The temperature, 0.2 to 5, at which these predictions (N, C) have the lowest log-loss; start: a guess at it.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". The log-loss is convex in 1/T, where Newton's
    method needs a handful of steps.
    """
    return measure_temperature(probs, labels, start)[0]


def measure_temperature(probs: np.ndarray, labels: np.ndarray, start: float = 1.0) -> tuple[float, float]:
    """`fit_temperature` and the standard error of its logarithm, from the curvature of the log-loss.

    The error is infinite where the rows say nothing, as when all of them are right and certain.
    """
    # classes first: sums over them are then sums of long rows, which is what numpy does fastest
    logits = np.log(np.maximum(np.ascontiguousarray(probs.T, np.float32), np.float32(FLOOR)))
    target = logits[labels, np.arange(len(labels))].mean(dtype=np.float64)
    inverse, curvature = 1 / start, 0.0
    for _ in range(NEWTON_STEPS):
        powers = np.exp(logits * np.float32(inverse))
        total = powers.sum(axis=0)
        powers *= logits
        mean = powers.sum(axis=0) / total
        powers *= logits
        variance = powers.sum(axis=0) / total - mean**2
        curvature = max(float(variance.mean(dtype=np.float64)), 1e-12)
        step = float(target - mean.mean(dtype=np.float64)) / curvature
        # at most a factor of 2 at once: far from the minimum the curvature can be almost nil
        moved = float(np.clip(inverse + step, max(inverse / 2, 1 / HOTTEST), min(inverse * 2, 1 / COOLEST)))
        close = abs(moved - inverse) < LAST_STEP * inverse
        inverse = moved
        if close:
            break
    return 1 / inverse, float(1 / np.sqrt(len(labels) * curvature * inverse**2))


def shrink(temperature: np.ndarray, error: np.ndarray, spread: float) -> np.ndarray:
    """Temperatures drawn towards 1 as far as their errors say: the mode under a normal prior on log T around 0.

    error: standard error of log T. spread: the prior's standard deviation, 0 (all become 1) to infinity (none changes).
    Source: the normal likelihood with a normal prior, Gelman et al. 2013, "Bayesian Data Analysis", section 2.5.
    """
    if spread == 0:
        return np.ones_like(temperature)
    return np.exp(np.log(temperature) / (1 + (error / spread) ** 2))


def fit_temperatures(probs: Probs, labels: np.ndarray) -> np.ndarray:
    """Each model's own `fit_temperature`, float64 (M,).

    Scaling before averaging helps where candidates differ in calibration. The average of well-calibrated models is
    itself too unsure, so it needs a temperature of its own: see `tempered`.
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


def tempered(select: Callable[[list[np.ndarray], np.ndarray], np.ndarray], probs: Probs, labels: np.ndarray) -> Blend:
    """What a selector, f(probs, labels) -> weights, finds among candidates of the best temperatures, which are fitted
    to each candidate before and to the average after it.

    Source: Rahaman and Thiery 2021, "Uncertainty Quantification and Deep Ensembles": pool, then calibrate.
    """
    temperatures = fit_temperatures(probs, labels)
    blend = Blend(select(scale_all(probs, temperatures), labels), temperatures)
    return replace(blend, temperature=fit_temperature(blend(probs), labels))
