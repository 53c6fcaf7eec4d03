"""The ways to make an ensemble that `auto` compares, and what each finds on some of the rows.

A `Table` is all that is known: every candidate on every row. A `Fold` is what may be known for one fit: nothing in it,
neither which candidates are looked at, nor a temperature, nor a weight, comes from other rows than its own.
"""

from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from ensemble.selection.blend import Blend, Probs, measure_temperature, scale, shrink
from ensemble.selection.goal import Goal, Judge
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import true_class
from ensemble.selection.scorers import Brier, LogLoss
from ensemble.selection.selectors import grow, grow_each, mixture_weights, trim, uniform_from
from ensemble.selection.stacking import small_layer

POOL = 100  # most accurate candidates that are looked at
BRIER_POOL = 40  # of which the Brier score, whose products of predictions cost most, looks at those of lowest log-loss
SIZES = (5, 3)  # member counts tried below limits.k
SPREADS = {"none": 0.0, "tight": 0.1, "wide": 0.3, "free": np.inf}
"""Standard deviations of the prior on the logarithm of a temperature; see `shrink`. "none": every temperature is 1."""
STACKED_CLASSES = 50  # above that a file with a stacked layer is large
BAGS, BAG_STEPS = 20, 20
EM_ITERATIONS = 60


@dataclass(frozen=True)
class Option:
    """One way to select: a selector, its most members, and how free its temperatures are (a key of SPREADS)."""

    selector: str
    k: int
    temperatures: str


GREEDY = Option("greedy", 9, "none")


def list_options(limits: Limits, classes: int) -> tuple[list[Option], list[Option]]:
    """The ways to make an ensemble, the default first, and the ways to leave it at a single candidate, likewise."""
    k = limits.k
    least = limits.min_per_group * len(np.unique(limits.groups)) if limits.groups is not None else 1
    smaller = [size for size in SIZES if least <= size < k]
    ensembles = [
        Option("bagged", k, "wide"),
        *(Option("greedy", k, name) for name in ("wide", "none", "tight", "free")),
        *(Option("greedy", size, name) for size in smaller for name in ("none", "wide")),
        *(Option(selector, k, name) for selector in ("brier", "convex", "uniform") for name in ("none", "wide")),
        *(Option("stacked", k, name) for name in ("tight", "wide") if classes <= STACKED_CLASSES),
    ]
    return ensembles, [Option("best_single", 1, "none"), Option("best_single", 1, "wide")]


class Table:
    """M candidates on N rows: what they predict, where they are right, what they lose, and their temperatures.

    The goal (see goal.py) says what being right counts, and what is lost.
    """

    def __init__(self, probs: Probs, labels: np.ndarray, limits: Limits, goal: Goal | None = None) -> None:
        self.probs, self.labels, self.limits = probs, labels, limits
        self.judge = Judge(goal or Goal(), labels, probs[0].shape[1])
        self.right = np.empty((len(probs), len(labels)), np.float32)
        self.losses = np.empty((len(probs), len(labels)), np.float32)
        for m, p in enumerate(probs):
            self.right[m], self.losses[m] = self.judge.credit(np.asarray(p)), self.judge.losses(np.asarray(p))
        self.starts: dict[int, float] = {}  # a temperature that some rows gave is a good guess at other rows'

    def on(self, rows: np.ndarray, pool: np.ndarray | None = None) -> "Fold":
        """What may be known from these rows (indices) alone; pool: the candidates to look at, by default the best."""
        return Fold(self, rows, pool)

    def ranking(self, rows: np.ndarray) -> np.ndarray:
        """The candidates from the best on these rows to the worst; what they lose breaks ties. int (M,)."""
        mask = np.zeros(len(self.labels), np.float32)
        mask[rows] = 1
        return np.lexsort((self.losses @ mask, -(self.right @ mask)))

    def predict(self, blend: Blend, rows: np.ndarray) -> np.ndarray:
        """A blend's predictions on any rows (indices), of which only the members' are read."""
        members = np.flatnonzero(blend.weights)
        return blend.only(members)([np.take(self.probs[m], rows, axis=0) for m in members.tolist()])


class Fold:
    """The candidates worth a look on some rows, at temperatures of these rows, to be selected from on these rows."""

    def __init__(self, table: Table, rows: np.ndarray, pool: np.ndarray | None = None) -> None:
        self.table, self.rows, self.labels = table, rows, table.labels[rows]
        self.ranking = table.ranking(rows)
        self.pool = screen(self.ranking, table.limits) if pool is None else np.sort(pool)
        self.limits = table.limits.subset(self.pool)
        self.fitted, self.errors = np.ones(len(self.pool)), np.ones(len(self.pool))
        for i, m in enumerate(self.pool.tolist()):
            start = table.starts.get(m, 1.0)
            self.fitted[i], self.errors[i] = measure_temperature(self._part(i), self.labels, start)
            table.starts.setdefault(m, float(self.fitted[i]))
        self._scorers: dict[str, LogLoss] = {}
        self._greedy: dict[tuple[str, int], np.ndarray] = {}  # weights by temperatures and most members

    def among(self, candidates: np.ndarray) -> "Fold":
        """The same with fewer of its candidates: only those of these indices."""
        places = np.flatnonzero(np.isin(self.pool, candidates))
        fewer = copy(self)
        fewer.pool, fewer.fitted, fewer.errors = self.pool[places], self.fitted[places], self.errors[places]
        fewer.limits, fewer.ranking = self.limits.subset(places), self.ranking[np.isin(self.ranking, candidates)]
        fewer._scorers = {name: LogLoss(scorer.true[places]) for name, scorer in self._scorers.items()}
        fewer._greedy = {}
        return fewer

    def within(self, limits: Limits) -> "Fold":
        """The same under other limits, of all M candidates."""
        other = copy(self)
        other.limits, other._greedy = limits.subset(self.pool), {}
        return other

    def heat(self, name: str) -> np.ndarray:
        """The pool's temperatures under a prior of SPREADS, float64."""
        return shrink(self.fitted, self.errors, SPREADS[name])

    def fit(self, option: Option) -> Blend:
        """What an option finds on these rows, as a blend of all M candidates."""
        if option.selector == "stacked":
            return self._stacked(option)
        limits, name = self.limits.at_most(min(option.k, self.limits.k)), option.temperatures
        found = {
            "greedy": lambda: self._grown(name, limits),
            "uniform": lambda: uniform_from(copy(self.scorer(name)), limits),
            "brier": lambda: self._brier(name, limits),
            "convex": lambda: self._convex(name, limits),
            "bagged": lambda: self._bagged(name, limits),
            "best_single": lambda: self._single(limits),
        }[option.selector]()
        weights, temperatures = np.zeros(len(self.table.probs)), np.ones(len(self.table.probs))
        weights[self.pool], temperatures[self.pool] = found, self.heat(name)
        blend = Blend(weights, temperatures)
        if np.count_nonzero(weights) == 1 or SPREADS[name] == 0:
            return blend
        together = self.table.predict(blend, self.rows)
        return replace(blend, temperature=temperature_of(together, self.labels, SPREADS[name]))

    def scorer(self, name: str) -> LogLoss:
        """The log-losses of the pool at these temperatures, with nothing added yet: copy it before you add."""
        if name not in self._scorers:
            heat = self.heat(name).tolist()
            true = [true_class(scale(self._part(i), t), self.labels) for i, t in enumerate(heat)]
            self._scorers[name] = LogLoss(np.stack(true))
        return self._scorers[name]

    def _part(self, i: int) -> np.ndarray:
        """What the i-th of the pool predicts for these rows; read anew each time, because all at once may be much."""
        return np.take(self.table.probs[int(self.pool[i])], self.rows, axis=0)

    def _grown(self, name: str, limits: Limits) -> np.ndarray:
        """The greedy weights, which several options ask for."""
        question = name, min(limits.k, len(self.pool))
        if question not in self._greedy:
            self._greedy[question] = grow(copy(self.scorer(name)), limits)
        return self._greedy[question]

    def _brier(self, name: str, limits: Limits) -> np.ndarray:
        order = self.scorer(name).order
        some = np.sort(np.union1d(order[:BRIER_POOL], limits.quota(order)).astype(np.int64))
        if limits.costs is not None:
            some = np.arange(len(order))
        heat = self.heat(name)
        scaled = [scale(self._part(i), float(heat[i])) for i in some.tolist()]
        weights = np.zeros(len(self.pool))
        weights[some] = grow(Brier(scaled, self.labels), limits.subset(some))
        return weights

    def _convex(self, name: str, limits: Limits) -> np.ndarray:
        """Weights of the highest likelihood; the lightest half of the surplus goes until the limits hold."""
        scorer = self.scorer(name)
        support = np.arange(len(self.pool))
        while True:
            weights = np.zeros(len(self.pool))
            weights[support] = mixture_weights(scorer.true[support], EM_ITERATIONS, 1e-4)
            kept = trim(weights, limits, scorer.order)
            surplus = np.flatnonzero((weights > 0) & (kept == 0))
            if not len(surplus):
                return kept
            lightest = surplus[np.argsort(weights[surplus], kind="stable")][: -(-len(surplus) // 2)]
            support = np.setdiff1d(np.flatnonzero((weights > 0) | (kept > 0)), lightest)

    def _bagged(self, name: str, limits: Limits) -> np.ndarray:
        """The mean of greedy selections, each among half of the candidates and on rows drawn with replacement.

        Source: Caruana et al. 2004, "Ensemble Selection from Libraries of Models", section 2.3.
        """
        scorer = self.scorer(name)
        if limits.costs is not None or limits.min_per_group:  # half of the candidates may not be able to keep to those
            return grow(copy(scorer), limits)
        rng = np.random.default_rng(0)
        weights = np.zeros(len(self.pool))
        models, n = scorer.true.shape
        bags: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(BAGS):
            some = scorer.order[np.sort(rng.permutation(models)[: max(1, -(-models // 2))])]
            bags.append((some, np.asarray(rng.integers(0, n, n))))
        for (some, _), found in zip(bags, grow_each(scorer.true, bags, limits.k, BAG_STEPS), strict=True):
            weights[some] += found / BAGS
        return trim(weights, limits, scorer.order)

    def _stacked(self, option: Option) -> Blend:
        """A small stacked layer on the greedy members; its prior is around their weights, as free as temperatures."""
        mixed = self.fit(replace(option, selector="greedy"))
        members = np.flatnonzero(mixed.weights)
        if len(members) == 1:
            return mixed
        parts = [np.take(self.table.probs[m], self.rows, axis=0) for m in members.tolist()]
        start = mixed.weights[members] / mixed.temperature
        stack = small_layer(parts, self.labels, start, SPREADS[option.temperatures])
        shares = np.maximum(np.abs(stack.coefficients[0, :, 0]), 1e-6)
        weights = np.zeros(len(mixed.weights))
        weights[members] = shares / shares.sum()
        return Blend(weights, stack=stack)

    def _single(self, limits: Limits) -> np.ndarray:
        fits = limits.allowed(np.zeros(len(self.pool), bool))
        place = {int(m): i for i, m in enumerate(self.pool)}
        weights = np.zeros(len(self.pool))
        weights[next(place[m] for m in self.ranking.tolist() if m in place and fits[place[m]])] = 1.0
        return weights


def temperature_of(probs: np.ndarray, labels: np.ndarray, spread: float) -> float:
    """The temperature of these predictions (N, C) under a prior of that spread; see `shrink`."""
    fitted, error = measure_temperature(probs, labels)
    return float(shrink(np.array(fitted), np.array(error), spread))


def screen(ranking: np.ndarray, limits: Limits) -> np.ndarray:
    """The POOL first candidates of a ranking (indices, the best first) and what a quota needs, sorted.

    Accurate ones, because no temperature changes that. Under a budget all stay: a bad candidate may be all it buys.
    """
    if len(ranking) <= POOL or limits.costs is not None:
        return np.sort(ranking)
    some = [ranking[m] for m in limits.subset(ranking).quota(np.arange(len(ranking)))]
    return np.unique(np.concatenate([ranking[:POOL], some]).astype(np.int64))
