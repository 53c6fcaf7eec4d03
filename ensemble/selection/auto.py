"""The selector that chooses how to select, by cross-validation inside the select split.

It averages in the one way that was found to be best on held-out halves. Every candidate gets its own temperature, so
that none has more say than it has earned, only because it is surer than the others. Greedy selection on the log-loss
finds members and weights, as an average over bags of rows and of candidates: on 150 rows a single greedy selection
gives nearly all weight to whoever was lucky there. The average gets a temperature of its own, because an average of
calibrated members is too unsure (pool first, then calibrate: Rahaman and Thiery 2021, "Uncertainty Quantification and
Deep Ensembles"). A prior draws all temperatures towards 1, because on few rows they are mostly noise.

Cross-validation decides whether another option (see options.py) is better by more than noise, a single candidate among
them.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ensemble.selection.blend import Blend, Probs
from ensemble.selection.claim import FOLDS, Folds, HeldOut, deal, deal_folds, leave_out
from ensemble.selection.goal import Goal
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, brier, clearly_lower, log_loss, standard_error
from ensemble.selection.options import GREEDY, Option, Table, list_options
from ensemble.selection.selectors import NINE

NESTED_ROWS = 2000  # from here on what a fold's rows leave behind in the losses of the others is too little to matter
FEWEST_ROWS = 40  # below that cross-validation cannot tell options apart, and the best single candidate is the answer


@dataclass(frozen=True)
class Compared:
    """An option, its mean held-out log-loss, and the standard error of the distance to the chosen one's."""

    selector: str
    k: int
    temperatures: str
    loss: float
    error: float


@dataclass(frozen=True, eq=False)
class Choice:
    """What auto chose, and why.

    Attributes:
        blend: of all M candidates: weights, temperatures, and the average's temperature.
        option: the one that won, "best_single" when that was better than any ensemble.
        held_out: what the whole procedure, this choice among options included, predicts for rows that it did not see;
            None when there are too few rows to leave some out, or nobody asked.
        fitted: accuracy, log_loss and brier on the rows that the blend was fitted on. They flatter.
        options: all that was compared; empty when there were too few rows to compare.
    """

    blend: Blend
    option: Option
    held_out: HeldOut | None
    fitted: dict[str, float]
    options: tuple[Compared, ...]

    def report(self) -> dict[str, Any]:
        """Everything but the blend and the predictions as plain JSON."""
        return {
            **asdict(self.option),
            "fitted": self.fitted,
            "options": [asdict(option) for option in self.options],
        }


def auto(probs: Probs, labels: np.ndarray, limits: Limits = NINE, seed: int = 0) -> Blend:
    """The blend of `choose_selector`, for whoever wants a selector like the others."""
    return choose_selector(probs, labels, limits, seed, hold_out=False).blend


def choose_selector(
    probs: Probs,
    labels: np.ndarray,
    limits: Limits = NINE,
    seed: int = 0,
    single: int | None = None,
    hold_out: bool = True,
    goal: Goal | None = None,
) -> Choice:
    """Choose an option by repeated cross-validation on these rows, then fit it on all of them; see `_Rule`.

    Screening, temperatures and weights are fitted anew in every fold. So is the choice among options before a fold
    counts in `held_out`, by cross-validation inside the other folds: the losses that all rows gave would not do,
    because every one of them comes from a fit that saw the fold. On 60 rows that flatters by one to two points
    (benchmarks/coverage.py), from NESTED_ROWS on by nothing that could be seen.

    goal: what options are compared by, see goal.py; None: accuracy. single: see `leave_out`. hold_out: predict held-out
    rows, which takes most of the time. Deterministic for a seed, which deals the rows into folds. Rows below
    FEWEST_ROWS: the best single candidate.
    """
    table = Table(probs, labels, limits, goal)
    ensembles, singles = list_options(limits, probs[0].shape[1])
    whole = table.on(np.arange(len(labels)))
    if len(labels) < FEWEST_ROWS or len(probs) == 1:
        option = replace(GREEDY, k=limits.k) if limits.min_per_group else singles[0]
        rule = _Rule([option], [])
    else:
        rule = _Rule(ensembles, singles, ensemble_is_a_must=limits.min_per_group > 0)
    folds = deal_folds(labels, seed)
    blends, losses = _cross_validate(table, rule.options, folds)
    chosen = rule.choose(losses)
    blend = whole.fit(rule.options[chosen])
    if rule.is_alone(chosen, blend):
        chosen = rule.choose_single(losses)
        blend = whole.fit(rule.options[chosen])
    differences = losses - losses[chosen]
    options = [
        Compared(**asdict(option), loss=float(x.mean()), error=standard_error(d))
        for option, x, d in zip(rule.options, losses, differences, strict=True)
    ]

    def fit(repeat: int, fold: int) -> Blend:
        """The blend of the option that the rows outside a fold choose among themselves."""
        rows = np.setdiff1d(np.arange(len(labels)), folds[repeat][fold])
        inner = losses[:, rows]
        if len(rule.options) > 1 and len(labels) < NESTED_ROWS:
            within = [[rows[part] for part in deal(labels[rows], FOLDS, np.random.default_rng([seed, fold]))]]
            inner = _cross_validate(table, rule.options, within)[1][:, rows]
        chosen = rule.choose(inner)
        if rule.is_alone(chosen, blends[repeat][fold][chosen]):
            chosen = rule.choose_single(inner)
        return blends[repeat][fold][chosen]

    return Choice(
        blend,
        rule.options[chosen],
        leave_out(table, folds[:1], fit, single) if hold_out else None,
        _scores(blend(probs), labels),
        tuple(options) if len(options) > 1 else (),
    )


class _Rule:
    """How one of the options is chosen from held-out log-losses.

    The first ensemble is the default. Another one replaces it only where its mean loss is lower by more than a
    standard error; of those that are, the lowest. The single candidate is the answer where it is better than the
    winner by that much, unless a quota forbids it. A choice within noise costs: to prefer fewer members already when
    they are *not worse* by a standard error cost 0.1 to 0.3 points of accuracy on the pools of
    benchmarks/selection_quality.py, and to prefer the single one then 0.1 to 0.4 on five of photographs.
    """

    def __init__(self, ensembles: list[Option], singles: list[Option], ensemble_is_a_must: bool = False) -> None:
        self.options = [*ensembles, *singles]
        self._ensembles, self._singles = np.arange(len(ensembles)), np.arange(len(ensembles), len(self.options))
        self._must = ensemble_is_a_must or not singles

    def choose(self, losses: np.ndarray) -> int:
        """The place of the option to take, from its losses on some rows; losses: (options, rows)."""
        best = _first_unless_better(losses, self._ensembles)
        if self._must:
            return best
        single = self.choose_single(losses)
        return single if clearly_lower(losses[single], losses[best]) else best

    def choose_single(self, losses: np.ndarray) -> int:
        """The same among the options that keep a single candidate."""
        return _first_unless_better(losses, self._singles)

    def is_alone(self, option: int, blend: Blend) -> bool:
        """Whether an ensemble came out as one candidate, which had better be the most accurate one then."""
        return not self._must and option in self._ensembles and np.count_nonzero(blend.weights) == 1


def _cross_validate(table: Table, options: list[Option], folds: Folds) -> tuple[list[list[list[Blend]]], np.ndarray]:
    """O options fitted without every fold: the blends by repeat, fold and option, and losses (O, N).

    A row's loss is what the goal compares by, under the blends that did not see it, as a mean over repeats. Rows that
    are in no fold take no part.
    """
    losses = np.zeros((len(options), len(table.labels)))
    blends: list[list[list[Blend]]] = []
    for parts in folds:
        blends.append([])
        for held in parts:
            fold = table.on(np.setdiff1d(np.concatenate(parts), held))
            blends[-1].append([fold.fit(option) for option in options])
            for o, blend in enumerate(blends[-1][-1]):
                losses[o, held] += table.judge.losses(table.predict(blend, held), held) / len(folds)
    return blends, losses


def _first_unless_better(losses: np.ndarray, places: np.ndarray) -> int:
    """Of the options in these places the one of the lowest mean loss, if it is better than the first; else that."""
    better = [place for place in places.tolist() if clearly_lower(losses[place], losses[places[0]])]
    return min(better, key=lambda place: losses[place].mean(), default=int(places[0]))


def _scores(together: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": accuracy(together, labels),
        "log_loss": log_loss(together, labels),
        "brier": brier(together, labels),
    }
