"""Whether recent pictures are like those that the ensemble was chosen on, by what it answers to them.

Nobody labels the pictures that a server is sent, so only the answers can be compared: their mean confidence, and how
often each class is among them. That is done for the last WINDOW answers against those to the select split. A difference
shows other pictures, or other shares of the classes; it does not say that the answers are wrong.

To compare predicted classes and confidences instead of pixels: Lipton, Wang and Smola 2018, "Detecting and Correcting
for Label Shift with Black Box Predictors"; Rabanser, Günnemann and Lipton 2019, "Failing Loudly" (with the same
chi-square test of the classes); Guillory et al. 2021, "Predicting with Confidence on Unseen Distributions".
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtrc, ndtr
from upath import UPath

from ensemble.file import Ensemble
from ensemble.risk import confidence
from trainables.errors import UserError
from trainables.run_directory import read_run
from trainables.storage import Damaged

WINDOW = 1000  # answers that are compared
FEWEST = 30  # answers, and images of the select split, below which nothing is tested
CLEAR = 1e-3  # p-value below which a difference is clear
EXPECTED = 5.0  # answers of a class that a chi-square test wants at least (Cochran 1954)
ROUNDING = 1e-6  # of the confidence that an answer states; no error of a mean is taken to be less
MOST_CLASSES = 100  # that are named one by one


@dataclass(frozen=True, eq=False)
class Reference:
    """What the ensemble answered to the select split.

    Attributes:
        confidence: float64 (N,), of each answer, 0 to 1.
        counts: int64 (C,), answers by class.
    """

    confidence: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[UPath], ensemble: Ensemble) -> "Reference | None":
        """From the members' stored predictions; None when they are not there (a refit) or cannot be used.

        Members may have been trained a little further since (see CandidateInfo.refitted), and the ensemble was fitted
        to these very images, which makes it a little more confident there than on new images of the same kind.
        """
        try:
            classes = len(read_run(runs[0]).classes)
            probs = [member.candidate(runs).probs("select") for member in ensemble.members]
            shapes = {array.shape for array in probs}
            if len(shapes) != 1 or next(iter(shapes))[1] != classes or not len(probs[0]):
                return None
            together = ensemble.predict(probs)
            sure = confidence(together, ensemble.decision).astype(np.float64)
            counts = np.bincount(ensemble.decision.answers(together), minlength=classes)
        except (UserError, OSError, Damaged, ValueError):
            return None
        return cls(sure, counts) if np.isfinite(sure).all() else None


@dataclass(frozen=True)
class Difference:
    """A test that two samples are alike.

    Attributes:
        statistic: z, or chi-square.
        p: probability of one at least as large where they are, 0 to 1.
        degrees: of freedom; None for z.
    """

    statistic: float
    p: float
    degrees: int | None = None

    @property
    def is_clear(self) -> bool:
        return self.p < CLEAR


def compare_means(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """Two-sided z test that samples (N,) and (M,) have the same mean, variances being unequal; None for few values.

    Welch's statistic, normal for large samples (Lehmann and Romano 2005, "Testing Statistical Hypotheses", 11.3).
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    z = float((a.mean() - b.mean()) / max(error, ROUNDING))
    return Difference(z, float(2 * ndtr(-abs(z))))


def compare_shares(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """Pearson's chi-square test of homogeneity of counts (C,) and (C,); None where there are too few for one.

    Classes that would be expected less than EXPECTED times in either are counted together, in groups that reach it.
    """
    table = np.stack([a, b]).astype(np.float64)
    rows = table.sum(axis=1)
    if rows.min() < FEWEST:
        return None
    groups = _group(table.sum(axis=0) * rows.min() / rows.sum())
    table = np.stack([np.bincount(groups, counts) for counts in table])
    degrees = table.shape[1] - 1
    if not degrees:
        return None
    expected = rows[:, None] * table.sum(axis=0) / rows.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    return Difference(statistic, float(chdtrc(degrees, statistic)), degrees)


def _group(expected: np.ndarray) -> np.ndarray:
    """The number of each class's group, int64 (C,), so that each group is expected at least EXPECTED times.

    The rarest classes come together first. These are sums of both rows, which say nothing of how the rows differ.
    """
    groups, last, together = np.zeros(len(expected), np.int64), 0, 0.0
    for number in np.argsort(expected, kind="stable"):
        groups[number] = last
        together += expected[number]
        if together >= EXPECTED:
            last, together = last + 1, 0.0
    return np.minimum(groups, max(0, last - 1))  # what is left over joins the last one


class Drift:
    """The last answers, and how they compare."""

    def __init__(self, classes: Sequence[str], reference: Reference | None) -> None:
        """reference: None where the select split's answers are not known; then nothing is compared."""
        self.classes = list(classes)
        self.reference = reference
        self._index = {name: number for number, name in enumerate(self.classes)}
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._until_full = WINDOW
        self._reported: set[str] = set()  # what differed clearly in the last full window

    def __len__(self) -> int:
        return len(self._last)

    def add(self, label: str, confidence: float) -> str | None:
        """Count an answer. Returns a line for the log when a full window differs, or no longer does.

        The windows that are looked at for it do not overlap, so that two tests at 1 in 1,000 raise a false alarm about
        once in 500,000 answers.
        """
        self._last.append((self._index[label], confidence))
        self._until_full -= 1
        if self._until_full:
            return None
        self._until_full = WINDOW
        clear = {name: test.p for name, test in self.differences().items() if test is not None and test.is_clear}
        before, self._reported = self._reported, set(clear)
        if self._reported == before:
            return None
        last = f"drift: the last {len(self):,} answers"
        if not clear or self.reference is None:
            return f"{last} are like those to the select split again"
        there = self.reference
        gaps = {
            "confidence": f"mean confidence {self.confidence().mean():.1%}, there {there.confidence.mean():.1%}",
            "classes": f"most often {self._commonest(self.counts())}, there {self._commonest(there.counts)}",
        }
        reasons = "; ".join(f"{gaps[name]} (p = {p:.0e})" for name, p in clear.items())
        return f"{last} differ from those to the select split: {reasons}; see /drift"

    def confidence(self) -> np.ndarray:
        """Of the last answers, float64 (N,), the oldest first."""
        return np.array([value for _, value in self._last], np.float64)

    def counts(self) -> np.ndarray:
        """Last answers by class, int64 (C,)."""
        return np.bincount([number for number, _ in self._last], minlength=len(self.classes)).astype(np.int64)

    def differences(self) -> dict[str, Difference | None]:
        """The tests of `confidence` and of `classes`; None where there is too little to test."""
        if self.reference is None:
            return {"confidence": None, "classes": None}
        return {
            "confidence": compare_means(self.confidence(), self.reference.confidence),
            "classes": compare_shares(self.counts(), self.reference.counts),
        }

    def shares(self) -> dict[str, dict[str, float]]:
        """Shares of the classes in `answers` and in `select`, each 0 to 1, by name: of those that differ most, at most
        MOST_CLASSES of them, in the classes' order."""
        found = {"answers": _shares(self.counts())}
        if self.reference is not None:
            found["select"] = _shares(self.reference.counts)
        gap = np.abs(found["answers"] - found.get("select", 0))
        named = np.sort(np.argsort(-gap, kind="stable")[:MOST_CLASSES])
        return {of: {self.classes[n]: float(values[n]) for n in named} for of, values in found.items()}

    def report(self) -> dict[str, Any]:
        """What /drift answers, JSON-able; see ensemble/serve/document.py. What is not known is left away."""
        shares = self.shares()
        sides = {
            of: {
                "images": len(values),
                "confidence": round(float(values.mean()), 6),
                "classes": {name: round(share, 6) for name, share in shares[of].items()},
            }
            for of, values in (("answers", self.confidence()), ("select", self._reference_confidence()))
            if len(values)
        }
        tests = {
            name: {"statistic": found.statistic, "p": found.p, "clear": found.is_clear}
            | ({} if found.degrees is None else {"degrees": found.degrees})
            for name, found in self.differences().items()
            if found is not None
        }
        return {"window": WINDOW, **sides, "tests": tests}

    def _reference_confidence(self) -> np.ndarray:
        return np.empty(0) if self.reference is None else self.reference.confidence

    def _commonest(self, counts: np.ndarray) -> str:
        number = int(counts.argmax())
        return f"{self.classes[number]} ({counts[number] / counts.sum():.0%})"


def _shares(counts: np.ndarray) -> np.ndarray:
    shares: np.ndarray = counts / max(1, int(counts.sum()))
    return shares
