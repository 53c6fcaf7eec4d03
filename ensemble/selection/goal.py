"""What an ensemble is chosen for: a metric, how probabilities become answers under it, and what rows count for.

Accuracy is the usual one. Where classes are unequal, or mistakes cost unequally, the most probable class is not the
best answer: balanced accuracy wants it to be held against how frequent a class is, a matrix of costs the cheapest one.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.selection.metrics import FLOOR, Z95, auroc, log_losses, macro_f1, mean_recall
from trainables.errors import UserError

METRICS = ("accuracy", "log_loss", "balanced_accuracy", "macro_f1", "auroc", "cost")
LOWER_IS_BETTER = ("log_loss", "cost")
BALANCED = ("balanced_accuracy", "macro_f1")  # to which every class counts the same
POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a class's frequency, by which its probability may be divided to answer
SHIFTS = (1.0, 0.5, 0.0)  # the same, to compare what is to be chosen
DRAWS, DRAWN_VALUES = (100, 1000), 4e7  # of a bootstrap: fewest and most, and values to be drawn in all


@dataclass(frozen=True, eq=False)
class Decision:
    """How probabilities become answers.

    Attributes:
        factors: float64 (C,), by which the classes' probabilities are multiplied before the largest is taken.
        cost: float64 (C, C), of answering column for row's label: the answer of least expected cost is taken instead.
    """

    factors: np.ndarray | None = None
    cost: np.ndarray | None = None

    @property
    def classes(self) -> int | None:
        """C, where it says so."""
        return next((len(array) for array in (self.factors, self.cost) if array is not None), None)

    def answers(self, probs: np.ndarray) -> np.ndarray:
        """The answer for each image, int64 (N,), from probabilities (N, C); the lowest class wins a tie."""
        if self.cost is not None:
            return np.argmin(probs.astype(np.float64) @ self.cost, axis=1)
        return np.argmax(probs if self.factors is None else probs * self.factors, axis=1)


MOST_PROBABLE = Decision()


@dataclass(frozen=True, eq=False)
class Goal:
    """A metric.

    Attributes:
        name: one of METRICS.
        cost: of "cost" alone, float64 (C, C), of answering column for row's label.
    """

    name: str = "accuracy"
    cost: np.ndarray | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it is one of the scores that are always given."""
        return self.name in ("accuracy", "log_loss")

    @property
    def higher_is_better(self) -> bool:
        return self.name not in LOWER_IS_BETTER

    def value(self, probs: np.ndarray, labels: np.ndarray, decision: Decision) -> float:
        """The metric of probabilities (N, C), or of the answers that they become. Cost: the mean of an image."""
        if self.name == "log_loss":
            return float(log_losses(probs, labels).mean())
        if self.name == "auroc":
            return auroc(probs, labels)
        answers = decision.answers(probs)
        if self.name == "balanced_accuracy":
            return mean_recall(answers, labels)
        if self.name == "macro_f1":
            return macro_f1(answers, labels)
        if self.cost is not None:
            return float(self.cost[labels, answers].mean())
        return float((answers == labels).mean())

    def decide(self, probs: np.ndarray, labels: np.ndarray) -> Decision:
        """How to answer, from held-out predictions (R, N, C) of images with these labels (N,), R times over.

        Balanced metrics divide by a power of how frequent a class is: 1 gives the highest expected recall where
        probabilities are calibrated, 0 where classes were weighed in training. For balanced accuracy the log-loss with
        every class counting the same says which, because on few rows that is less noisy; for macro_f1 itself.
        """
        if self.name == "cost":
            return Decision(cost=self.cost)
        if self.name not in BALANCED:
            return MOST_PROBABLE
        frequency = _frequency(labels, probs.shape[2])
        decisions = [Decision(frequency**-power) for power in POWERS]
        if self.name == "macro_f1":
            return max(decisions, key=lambda decision: np.mean([self.value(p, labels, decision) for p in probs]))
        judge = Judge(self, labels, probs.shape[2])
        losses = [np.mean([judge.loss_at(power, p) for p in probs]) for power in POWERS]
        return decisions[int(np.argmin(losses))]

    def measure(
        self, probs: np.ndarray, labels: np.ndarray, decision: Decision, variance: float = 1.0,
        minus: tuple[np.ndarray, Decision] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The metric's `name`, `value` and 95 % `interval` of probs (R, N, C) of N images, as plain JSON.

        By a bootstrap within the classes (Efron and Tibshirani 1993), widened to `variance` times its variance.
        `minus`: other predictions of the same images and how they become answers; the value is then the difference.
        """

        def value(repeat: int, rows: np.ndarray | slice) -> float:
            own = self.value(probs[repeat][rows], labels[rows], decision)
            return own if minus is None else own - self.value(minus[0][repeat][rows], labels[rows], minus[1])

        rng = np.random.default_rng(0)
        by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        values = np.empty(int(np.clip(DRAWN_VALUES / probs.size, *DRAWS)))
        for draw in range(len(values)):
            drawn = np.concatenate([rng.choice(rows, len(rows)) for rows in by_class])
            values[draw] = value(draw % len(probs), drawn)
        found = float(np.mean([value(repeat, slice(None)) for repeat in range(len(probs))]))
        spread = float(values.std())
        if minus is None and self.name in BALANCED:  # a bootstrap knows no doubt of a class that is all right
            spread = max(spread, _recall_error(decision.answers(probs[0]), labels))
        half = Z95 * spread * variance**0.5
        ends = [found - half, found + half]
        if minus is None and self.name not in LOWER_IS_BETTER:
            ends = [max(0.0, ends[0]), min(1.0, ends[1])]
        return {"name": self.name, "value": found, "interval": ends}


class Judge:
    """A goal on some rows: what candidates are ranked by, and what ways to select are compared by.

    Most metrics are too coarse to choose by on a few hundred rows, so what is compared is a loss whose minimum is the
    metric's best: the log-loss, for balanced metrics with every class counting the same, after its probabilities are
    divided by a power of their frequency (0 for what was trained on weighed classes); for a matrix of costs the costs.
    """

    def __init__(self, goal: Goal, labels: np.ndarray, classes: int) -> None:
        """labels: int (N,) of all rows."""
        self.goal, self.labels = goal, labels
        self.frequency: np.ndarray | None = None
        self.weights: np.ndarray | None = None
        if goal.name in BALANCED:
            self.frequency = _frequency(labels, classes)
            self.weights = (1 / self.frequency)[labels]
            self.weights = self.weights / self.weights.mean()

    def credit(self, probs: np.ndarray) -> np.ndarray:
        """What a candidate with these predictions for all rows, (N, C), is ranked by, higher is better: (N,)."""
        if self.goal.name in ("log_loss", "auroc"):
            return -log_losses(probs, self.labels)
        if self.goal.cost is not None:
            return -self.goal.cost[self.labels, Decision(cost=self.goal.cost).answers(probs)]
        if self.frequency is None or self.weights is None:
            return np.argmax(probs, axis=1) == self.labels
        decisions = [Decision(self.frequency**-power) for power in SHIFTS]
        found = [self.weights * (decision.answers(probs) == self.labels) for decision in decisions]
        return max(found, key=lambda credit: float(credit.mean()))

    def losses(self, probs: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """What predictions (N, C) for these rows are compared by, lower is better: float64 (N,)."""
        labels = self.labels[rows]
        if self.goal.cost is not None:
            return self.goal.cost[labels, Decision(cost=self.goal.cost).answers(probs)]
        if self.weights is None:
            return log_losses(probs, labels)
        found = [self.weights[rows] * log_losses(self._shift(probs, power), labels) for power in SHIFTS]
        return min(found, key=lambda losses: float(losses.mean()))

    def shifted(self, probs: np.ndarray) -> np.ndarray:
        """The probabilities (N, C) of all rows as they are compared; unchanged where every row counts the same."""
        if self.weights is None:
            return probs
        return self._shift(probs, min(SHIFTS, key=lambda power: self.loss_at(power, probs)))

    def loss_at(self, power: float, probs: np.ndarray) -> float:
        """Of a balanced metric: the log-loss of all rows after a shift by that power, every class counting the same."""
        assert self.weights is not None
        return float((self.weights * log_losses(self._shift(probs, power), self.labels)).mean())

    def _shift(self, probs: np.ndarray, power: float) -> np.ndarray:
        """The probabilities divided by a power of how frequent the classes are, float64 (N, C)."""
        assert self.frequency is not None
        scaled: np.ndarray = np.maximum(probs, FLOOR) * self.frequency**-power
        return scaled / scaled.sum(axis=1, keepdims=True)


def read_goal(text: str, classes: list[str]) -> Goal:
    """The goal that --metric names: one of METRICS, "cost" as "cost:FILE".

    The file is a table in CSV: a header `label` and the classes, then for each class a row with what answering each of
    them costs when that class is the label. Raises UserError for an unknown name, and for a table that is none.
    """
    name, _, file = text.partition(":")
    if name not in METRICS or (name == "cost") != bool(file):
        raise UserError(f"--metric is {text!r}, expected {', '.join(METRICS[:-1])} or cost:FILE")
    return Goal(name, _read_costs(Path(file), classes) if name == "cost" else None)


def _read_costs(path: Path, classes: list[str]) -> np.ndarray:
    expected = f"expected a header label,{','.join(classes[:3])},... and a row of numbers for each class"
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
        header, body = [cell.strip() for cell in rows[0][1:]], {row[0].strip(): row[1:] for row in rows[1:]}
        if sorted(header) != sorted(classes) or sorted(body) != sorted(classes):
            raise UserError(f"costs {path} has other classes than the data set; {expected}")
        cost = np.array([[float(body[label][header.index(answer)]) for answer in classes] for label in classes])
    except (OSError, IndexError, ValueError) as error:
        raise UserError(f"costs {path} cannot be read ({error}); {expected}") from None
    if not np.isfinite(cost).all() or (cost < 0).any() or (cost == 0).all():
        raise UserError(f"costs {path} has negative or no costs; {expected}")
    return cost


def _recall_error(answers: np.ndarray, labels: np.ndarray) -> float:
    """Standard error of the mean recall, with two images more right and two more wrong in each class (Agresti and Coull
    1998), so that none is certain."""
    rows, right = np.bincount(labels), np.bincount(labels, weights=answers == labels)
    shares = (right[rows > 0] + 2) / (rows[rows > 0] + 4)
    return float(np.sqrt((shares * (1 - shares) / (rows[rows > 0] + 4)).sum()) / np.count_nonzero(rows))


def _frequency(labels: np.ndarray, classes: int) -> np.ndarray:
    """How frequent each class is, float64 (C,), none of them 0."""
    return (np.bincount(labels, minlength=classes) + 1) / (len(labels) + classes)
