"""Choose an ensemble from what a sweep left on disk.

    python -m ensemble.select --top-k 9

takes the newest run under runs/, prints the members with their weights and the scores of the ensemble beside the best
single candidate's, and writes runs/<name>/ensembles/<selector>.json. It needs no GPU, no torch and no Ray, takes a
second, and can be done again with other limits as often as one likes.
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from ensemble.file import Ensemble, Member, write_ensemble
from ensemble.pool import Pool, limits_for, load_pool
from ensemble.selection import metrics, selectors
from ensemble.selection.auto import Choice, choose_selector
from ensemble.selection.blend import Blend, Probs, tempered
from ensemble.selection.convex import convex
from ensemble.selection.explain import explain
from ensemble.selection.frontier import frontier
from ensemble.selection.limits import Limits
from ensemble.selection.selectors import Score
from ensemble.selection.stacking import stacking
from ensemble.show import show
from trainables.errors import UserError, exit_on_user_error
from trainables.run_directory import open_run

Fit = Callable[[Probs, np.ndarray, Limits, Score], np.ndarray | Blend | Choice]


@dataclass(frozen=True)
class Selector:
    """A way to select.

    Attributes:
        fit: f(probs, labels, limits, score) to weights (M,), a blend, or a choice with an account of itself.
        takes_score: --score says what it optimises; else it has its own.
        scales_itself: it finds temperatures by itself, so --temperature-scaling is not for it.
    """

    fit: Fit
    takes_score: bool = False
    scales_itself: bool = False


SELECTORS = {
    "auto": Selector(lambda probs, labels, limits, score: choose_selector(probs, labels, limits), scales_itself=True),
    "greedy": Selector(selectors.greedy, takes_score=True),
    "uniform": Selector(selectors.uniform, takes_score=True),
    "accuracy_weighted": Selector(
        lambda probs, labels, limits, score: selectors.accuracy_weighted(probs, labels, limits)
    ),
    "convex": Selector(lambda probs, labels, limits, score: convex(probs, labels, limits)),
    "stacking": Selector(lambda probs, labels, limits, score: stacking(probs, labels, limits), scales_itself=True),
    "best_single": Selector(selectors.best_single, takes_score=True),
}
DESCRIPTION = "Choose the candidates of a sweep that vote best together, and write them as an ensemble."


@dataclass(frozen=True)
class Select:
    """The command line.

    Attributes:
        run: a run directory; several (--run A --run B) merge when they share their splits. Default: the newest one.
        top_k: most distinct members.
        selector: auto (cross-validated), greedy, uniform, accuracy_weighted, convex, stacking or best_single.
        score: what greedy, uniform and best_single optimise. Default: log_loss.
        min_per_architecture: at least so many members of every architecture.
        max_latency_ms: most milliseconds per image of all members together.
        max_params: most parameters of all members together.
        temperature_scaling: give each candidate its own best temperature before anything is averaged, and then the
            average one; auto does so by itself.
        name: of the file under ensembles/. Default: the selector's name.
    """

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    top_k: int = 9
    selector: str = "auto"
    score: Score | None = None
    min_per_architecture: int = 0
    max_latency_ms: float | None = None
    max_params: float | None = None
    temperature_scaling: bool = False
    name: str = ""


def choose(args: Select) -> Ensemble:
    """The ensemble that `python -m ensemble.select` would write with these arguments.

    Raises UserError for what the user can fix: no candidates, runs that do not fit together, limits that nothing
    meets.
    """
    return choose_from(open_pool(args), args)


def open_pool(args: Select) -> Pool:
    """The usable candidates of the runs that the arguments name; refuses arguments that cannot work before it loads."""
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}, expected at least 1 member")
    if args.selector not in SELECTORS:
        near = difflib.get_close_matches(args.selector, SELECTORS, 1, 0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown selector {args.selector!r}; {hint}known: {', '.join(SELECTORS)}")
    selector = SELECTORS[args.selector]
    if args.temperature_scaling and selector.scales_itself:
        raise UserError(
            f"{args.selector} scales by itself; leave --temperature-scaling away, or name another --selector"
        )
    if args.score and not selector.takes_score:
        others = ", ".join(name for name, other in SELECTORS.items() if other.takes_score)
        raise UserError(f"{args.selector} has its own score; leave --score away, or name one of {others}")
    return load_pool([open_run(run) for run in args.run] or [open_run()])


def choose_from(pool: Pool, args: Select) -> Ensemble:
    """As `choose`, for candidates that are already loaded."""
    limits = limits_for(pool, args.top_k, args.min_per_architecture, args.max_latency_ms, args.max_params)
    blend, choice = fit(pool, limits, args)
    heaviest = [m for m in np.argsort(-blend.weights, kind="stable").tolist() if blend.weights[m] > 0]
    ordered = blend.only(np.array(heaviest))
    members = []
    for place, m in enumerate(heaviest):
        temperature = 1.0 if ordered.temperatures is None else float(ordered.temperatures[place])
        members.append(Member(pool.candidates[m].id, float(ordered.weights[place]), pool.run_of(m), temperature))
    single = best_single(pool)
    scores = score_all(pool, blend, single)
    insight = explain(blend, pool.probs, pool.labels, single, pool.classes)
    if choice is not None:
        scores["cross_validated"] = where(pool) | choice.cross_validated
        insight["auto"] = choice.report()
    asked = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("run", "selector", "name") and v}
    return Ensemble(
        name=args.name or args.selector,
        members=tuple(members),
        selector=args.selector,
        split_fingerprint=pool.split_fingerprint,
        scores=scores,
        stack=ordered.stack,
        temperature=ordered.temperature,
        options=asked,
        left_out=pool.left_out,
        frontier=tuple(frontier(pool.probs, pool.labels, limits, pool.numbers("latency_ms"), blend.temperatures)),
        insight=insight,
    )


def fit(pool: Pool, limits: Limits, args: Select) -> tuple[Blend, Choice | None]:
    """What the selector that the arguments name finds in the pool, and auto's account of how it chose."""

    def select(probs: Probs, labels: np.ndarray) -> Any:
        return SELECTORS[args.selector].fit(probs, labels, limits, args.score or "log_loss")

    if args.temperature_scaling:
        return tempered(select, pool.probs, pool.labels), None
    found = select(pool.probs, pool.labels)
    if isinstance(found, Choice):
        return found.blend, found
    return found if isinstance(found, Blend) else Blend(found), None


def best_single(pool: Pool) -> int:
    """The most accurate candidate, which every ensemble is compared with; log-loss breaks ties."""
    accuracies = [metrics.accuracy(p, pool.labels) for p in pool.probs]
    best = [m for m, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    return min(best, key=lambda m: (metrics.log_loss(pool.probs[m], pool.labels), m))


def score_all(pool: Pool, blend: Blend, single: int) -> dict[str, Any]:
    """The select scores of the ensemble, of the best single candidate (an index), and their difference."""
    ensemble_probs, single_probs = blend(pool.probs), np.asarray(pool.probs[single])
    right, single_right = metrics.correct(ensemble_probs, pool.labels), metrics.correct(single_probs, pool.labels)
    mean, low, high = metrics.paired_bootstrap(right, single_right)
    return {
        "select": where(pool) | describe(ensemble_probs, pool.labels),
        "best_single": {"id": pool.candidates[single].id, "run": pool.run_of(single)}
        | where(pool)
        | describe(single_probs, pool.labels),
        "gain": where(pool)
        | {"accuracy": mean, "interval": [low, high], "mcnemar_p": metrics.mcnemar(right, single_right)},
    }


def where(pool: Pool) -> dict[str, Any]:
    """What every score says about the images that it was measured on."""
    return {"split": "select", "images": len(pool.labels), "shared": pool.shared}


def describe(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95 % interval, log-loss, Brier score and calibration error of probs (N, C), as plain JSON."""
    right = int(metrics.correct(probs, labels).sum())
    return {
        "accuracy": right / len(labels),
        "interval": list(metrics.wilson(right, len(labels))),
        "log_loss": metrics.log_loss(probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels),
    }


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Select, description=DESCRIPTION, prog="python -m ensemble.select")
        pool = open_pool(args)
        ensemble = choose_from(pool, args)
        path = write_ensemble(pool.runs[0], ensemble)
        show(pool, ensemble)
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
