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

from ensemble import metrics, selection
from ensemble.ensemble import Ensemble, Member, Probs, combine, write_ensemble
from ensemble.limits import Limits
from ensemble.pool import Pool, limits_for, load_pool, relative_run
from ensemble.selection import Score
from trainables.candidate import Candidate, open_run
from trainables.errors import UserError, exit_on_user_error

Selector = Callable[[Probs, np.ndarray, Limits, Score], np.ndarray]

SELECTORS: dict[str, Selector] = {
    "greedy": selection.greedy,
    "uniform": selection.uniform,
    "accuracy_weighted": lambda probs, labels, limits, score: selection.accuracy_weighted(probs, labels, limits),
    "best_single": selection.best_single,
}


DESCRIPTION = "Choose the candidates of a sweep that vote best together, and write them as an ensemble."


@dataclass(frozen=True)
class Select:
    """The command line.

    Attributes:
        run: a run directory; several (--run A --run B) merge when they share their splits. Default: the newest one.
        top_k: most distinct members.
        selector: greedy, uniform, accuracy_weighted or best_single.
        score: what greedy and uniform optimise: log_loss, brier or accuracy.
        min_per_architecture: at least so many members of every architecture.
        max_latency_ms: most milliseconds per image of all members together.
        max_params: most parameters of all members together.
        name: of the file under ensembles/. Default: the selector's name.
    """

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    top_k: int = 9
    selector: str = "greedy"
    score: Score = "log_loss"
    min_per_architecture: int = 0
    max_latency_ms: float | None = None
    max_params: float | None = None
    name: str = ""


def choose(args: Select) -> Ensemble:
    """The ensemble that `python -m ensemble.select` would write with these arguments.

    Raises UserError for what the user can mend: no candidates, runs that do not fit together, limits that nothing
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
    return load_pool([open_run(run) for run in args.run] or [open_run()])


def choose_from(pool: Pool, args: Select) -> Ensemble:
    """As `choose`, for candidates that are already loaded."""
    limits = limits_for(pool, args.top_k, args.min_per_architecture, args.max_latency_ms, args.max_params)
    weights = SELECTORS[args.selector](pool.probs, pool.labels, limits, args.score)
    members = []
    for m in sorted(np.flatnonzero(weights), key=lambda m: (-weights[m], m)):
        candidate = pool.candidates[m]
        members.append(Member(candidate.id, float(weights[m]), run_of(candidate, pool)))
    asked = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("run", "selector", "name") and v}
    return Ensemble(
        name=args.name or args.selector,
        members=tuple(members),
        selector=args.selector,
        split_fingerprint=pool.split_fingerprint,
        scores=score_all(pool, weights),
        options=asked,
        left_out=pool.left_out,
    )


def run_of(candidate: Candidate, pool: Pool) -> str:
    """What Member.run says about where a candidate lies."""
    return relative_run(candidate.path.parent.parent, pool.runs[0])


def score_all(pool: Pool, weights: np.ndarray) -> dict[str, Any]:
    """The select scores of the weighted average, of the most accurate single candidate, and their difference.

    weights: (M,) over the pool's candidates.
    """
    single = int(np.flatnonzero(selection.best_single(pool.probs, pool.labels, score="accuracy"))[0])
    ensemble_probs, single_probs = combine(pool.probs, weights), np.asarray(pool.probs[single])
    right, single_right = metrics.correct(ensemble_probs, pool.labels), metrics.correct(single_probs, pool.labels)
    mean, low, high = metrics.paired_bootstrap(right, single_right)
    where = {"split": "select", "images": len(pool.labels), "shared": pool.shared}
    return {
        "select": where | describe(ensemble_probs, pool.labels),
        "best_single": {"id": pool.candidates[single].id} | where | describe(single_probs, pool.labels),
        "gain": where | {"accuracy": mean, "interval": [low, high], "mcnemar_p": metrics.mcnemar(right, single_right)},
    }


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


def show(pool: Pool, ensemble: Ensemble) -> None:
    """Print members, weights and scores."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    by_place = {(run_of(c, pool), c.id): m for m, c in enumerate(pool.candidates)}
    title = f"{ensemble.selector}: {len(ensemble.members)} of {len(pool.candidates)} candidates"
    table = Table(title=title, title_justify="left")
    for heading in ("weight", "accuracy", "log-loss"):
        table.add_column(heading, justify="right")
    table.add_column("candidate")
    table.add_column("architecture")
    for member in ensemble.members:
        m = by_place[member.run, member.id]
        own = describe(pool.probs[m], pool.labels)
        table.add_row(
            f"{member.weight:.3f}",
            f"{own['accuracy']:.2%}",
            f"{own['log_loss']:.4f}",
            f"{member.run}/{member.id}" if member.run else member.id,
            pool.candidates[m].architecture,
        )
    console.print(table)

    scores = Table(title=f"on the {where(ensemble.scores['select'])}", title_justify="left")
    for heading in ("", "accuracy", "95 % interval", "log-loss", "Brier", "ECE"):
        scores.add_column(heading, justify="right" if heading else "left")
    for label, key in (("best single", "best_single"), ("ensemble", "select")):
        score = ensemble.scores[key]
        low, high = score["interval"]
        scores.add_row(
            label,
            f"{score['accuracy']:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{score['log_loss']:.4f}",
            f"{score['brier']:.4f}",
            f"{score['ece']:.4f}",
        )
    console.print(scores)
    gain = ensemble.scores["gain"]
    low, high = gain["interval"]
    console.print(
        f"ensemble minus best single: {100 * gain['accuracy']:+.2f} points "
        f"(95 % {100 * low:+.2f} to {100 * high:+.2f}, McNemar p = {gain['mcnemar_p']:.2g})"
    )
    for id, reason in ensemble.left_out.items():
        console.print(f"left out {id}: {reason}", style="yellow", markup=False)


def where(score: dict[str, Any]) -> str:
    """A score's split in words, for wherever it is printed: "select split (500 images, also used to tune)"."""
    also = ", also used to tune: optimistic" if score["shared"] else ""
    return f"{score['split']} split ({score['images']} images{also})"


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
