"""Choose an ensemble from what a sweep left on disk.

    python -m ensemble.select --top-k 9

takes the newest run under runs/, prints the members with their weights and the scores of the ensemble beside the best
single candidate's, and writes runs/<name>/ensembles/<selector>.json. It needs no GPU, no torch and no Ray, takes a
second, and can be done again with other limits as often as one likes.
"""

import dataclasses
import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from upath import UPath

from ensemble.file import Ensemble, Member, as_before, list_ensembles, write_ensemble
from ensemble.pool import Pool, limits_for, load_pool
from ensemble.risk import USUAL_RISK, calibrate, measure
from ensemble.selection import metrics, selectors
from ensemble.selection.auto import Choice, auto, choose_selector
from ensemble.selection.blend import Blend, Probs, tempered
from ensemble.selection.claim import HeldOut, claim, deal_folds, leave_out, score
from ensemble.selection.explain import explain
from ensemble.selection.frontier import frontier
from ensemble.selection.goal import Decision, Goal, Judge, read_goal
from ensemble.selection.limits import Limits
from ensemble.selection.options import SPREADS, Option, Table, temperature_of
from ensemble.selection.selectors import Score
from ensemble.selection.stacking import stacking
from ensemble.show import show
from trainables.errors import UserError, exit_on_user_error
from trainables.run_directory import open_run
from trainables.storage import check_out, write_json

Fit = Callable[[Probs, np.ndarray, Limits, Score], np.ndarray | Blend]


@dataclass(frozen=True)
class Selector:
    """A way to select.

    Attributes:
        fit: f(probs, labels, limits, score) to weights (M,) or a blend.
        takes_score: --score says what it optimises; else it has its own.
        scales_itself: it finds temperatures by itself, so --temperature-scaling is not for it.
    """

    fit: Fit
    takes_score: bool = False
    scales_itself: bool = False


CHEAP = ("greedy", "uniform", "convex", "best_single")  # options that can be fitted a hundred times in a second or so
SELECTORS = {
    "auto": Selector(lambda probs, labels, limits, score: auto(probs, labels, limits), scales_itself=True),
    "greedy": Selector(selectors.greedy, takes_score=True),
    "uniform": Selector(selectors.uniform, takes_score=True),
    "accuracy_weighted": Selector(
        lambda probs, labels, limits, score: selectors.accuracy_weighted(probs, labels, limits)
    ),
    "convex": Selector(lambda probs, labels, limits, score: selectors.convex(probs, labels, limits)),
    "stacking": Selector(lambda probs, labels, limits, score: stacking(probs, labels, limits), scales_itself=True),
    "best_single": Selector(selectors.best_single, takes_score=True),
}


@dataclass(frozen=True)
class Select:
    """Choose the candidates of a sweep that vote best together, and write them as an ensemble.

    Attributes:
        run: a run directory; several (--run A --run B) merge when they share their splits. Default: the newest one.
        top_k: most distinct members.
        selector: auto (cross-validated), greedy, uniform, accuracy_weighted, convex, stacking or best_single.
        score: what greedy, uniform and best_single optimise. Default: log_loss.
        min_per_architecture: at least so many members of every architecture.
        max_latency_ms: most milliseconds per image of all members together, on the device that latencies.json names.
        max_params: most parameters of all members together.
        max_flops: most operations (two for each multiply-add) for one view of an image by all members together.
        metric: what the ensemble is to be best at: accuracy, log_loss, balanced_accuracy (mean recall of the classes),
            macro_f1, auroc (mean over classes), or cost:FILE, a table of what each wrong answer costs, as CSV: a header
            label,<classes>, then for each label a row. Options are compared by it, answers given for it, and the
            claim is about it.
        risk: share of new images, 0 to 1, whose set of classes may lack the right one, and of those that may get an
            answer that is sure and wrong; see ensemble/risk.py.
        temperature_scaling: give each candidate its own best temperature before anything is averaged, and then the
            average one; auto does so by itself.
        exclude: a candidate that is not to be a member, by its id; may be given several times.
        name: of the file under ensembles/. Default: the selector's name, with what is asked for beside it.
        default: make the result the ensemble that predict, serve, export, refit and report take unless told otherwise.
        json: file to write the same as JSON to, with the path of the ensemble's own file.
    """

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    top_k: int = 9
    selector: str = "auto"
    score: Score | None = None
    min_per_architecture: int = 0
    max_latency_ms: float | None = None
    max_params: float | None = None
    max_flops: float | None = None
    metric: str = "accuracy"
    risk: float = USUAL_RISK
    temperature_scaling: bool = False
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ID")] = ()
    name: str = ""
    default: bool = True
    json: Path | None = None


def select(args: Select) -> tuple[Pool, Ensemble, UPath]:
    """Choose the ensemble and write it to the first run; returns what it was chosen from, it, and its file.

    Raises UserError as `choose` does, before anything is written.
    """
    check_out(args.json, "--json")
    check(args)
    runs = _runs(args)
    _refuse_to_replace(runs[0], args)
    pool = load_pool(runs, args.exclude)
    ensemble = as_before(runs[0], choose_from(pool, args))
    path = write_ensemble(runs[0], ensemble, args.default)
    if args.json is not None:
        write_json(UPath(args.json), {"path": str(path.absolute()), **ensemble.to_dict()})
    return pool, ensemble, path


def choose(args: Select) -> Ensemble:
    """The ensemble that `python -m ensemble.select` would write with these arguments.

    Raises UserError for what the user can fix: no candidates, runs that do not fit together, limits that nothing
    meets.
    """
    return choose_from(open_pool(args), args)


def open_pool(args: Select) -> Pool:
    """The usable candidates of the runs that the arguments name; refuses arguments that cannot work before it loads."""
    check(args)
    return load_pool(_runs(args), args.exclude)


def _runs(args: Select) -> list[UPath]:
    return [open_run(run) for run in args.run] or [open_run()]


# What an option adds to the name of a file, so that a selection with other limits is another file.
_SUFFIXES = {
    "metric": "{}", "top_k": "top{:g}", "score": "{}", "min_per_architecture": "min{:g}", "max_latency_ms": "{:g}ms",
    "max_params": "{:g}params", "max_flops": "{:g}flops", "risk": "risk{:g}", "temperature_scaling": "tempered",
    "exclude": "without{}",
}  # fmt: skip
LONGEST_NAME = 80


def name_of(args: Select) -> str:
    """The name of the file: as asked for, or what tells the selection from others."""
    if args.name:
        return args.name
    told = []
    for key, value in _limits(dataclasses.asdict(args)).items():
        shown = "-".join(value) if isinstance(value, tuple) else value
        shown = shown.partition(":")[0] if key == "metric" else shown  # the name of a file is no part of it
        told.append(_SUFFIXES[key].format(shown.replace("/", "-") if isinstance(shown, str) else shown))
    return "-".join([args.selector, *told])[:LONGEST_NAME]


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that say how to select and are not as usual; from arguments or an ensemble's file."""
    usual = dataclasses.asdict(Select())
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return {key: lists[key] for key in _SUFFIXES if key in lists and lists[key] != usual[key]}


def _refuse_to_replace(run: UPath, args: Select) -> None:
    """Raise UserError where the file that is to be written holds an ensemble that was selected in another way."""
    name, asked = name_of(args), (args.selector, _limits(dataclasses.asdict(args)))
    for other in list_ensembles(run):
        if other.name == name and (other.selector, _limits(other.options)) != asked:
            shown = ", ".join(f"{key} {value}" for key, value in _limits(other.options).items()) or "no limits"
            raise UserError(
                f"ensembles/{name}.json was selected by {other.selector} with {shown}; name this one with --name"
            )


def check(args: Select) -> None:
    """Raise UserError for arguments that cannot work, whatever the run."""
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}, expected at least 1 member")
    if not 0 < args.risk < 1:
        raise UserError(f"--risk is {args.risk}, expected above 0 and below 1")
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


def choose_from(pool: Pool, args: Select) -> Ensemble:
    """As `choose`, for candidates that are already loaded."""
    limits = limits_for(
        pool, args.top_k, args.min_per_architecture, args.max_latency_ms, args.max_params, args.max_flops
    )
    goal = read_goal(args.metric, pool.classes)
    blend, held_out, choice = fit(pool, limits, args, goal)
    heaviest = [m for m in np.argsort(-blend.weights, kind="stable").tolist() if blend.weights[m] > 0]
    ordered = blend.only(np.array(heaviest))
    members = []
    for place, m in enumerate(heaviest):
        temperature = 1.0 if ordered.temperatures is None else float(ordered.temperatures[place])
        members.append(Member(pool.candidates[m].id, float(ordered.weights[place]), pool.run_of(m), temperature))
    single = best_single(pool, goal)
    scores = score_all(pool, blend, single, held_out, goal)
    decision = goal.decide(blend(pool.probs)[None] if held_out is None else held_out.ensemble, pool.labels)
    insight = explain(blend, pool.probs, pool.labels, single, pool.classes)
    if choice is not None:
        insight["auto"] = choice.report()
    asked = {k: v for k, v in dataclasses.asdict(args).items() if k in _SUFFIXES and v}
    risk = None
    if held_out is not None:
        risk = calibrate(held_out.ensemble, pool.labels, args.risk, decision)
        scores["risk"] = where(pool) | measure(risk, held_out.ensemble, pool.labels, decision)
    return Ensemble(
        name=name_of(args),
        members=tuple(members),
        selector=args.selector,
        split_fingerprint=pool.split_fingerprint,
        scores=scores,
        stack=ordered.stack,
        temperature=ordered.temperature,
        risk=risk,
        metric=goal.name,
        decision=decision,
        options=asked,
        left_out=pool.left_out,
        frontier=tuple(
            frontier(
                pool.probs,
                pool.labels,
                limits,
                pool.numbers("latency_ms"),
                cheap_option(args.selector, args.top_k, insight, args.temperature_scaling),
                (blend, scores["claim"]) if "claim" in scores else None,
            )
        ),
        insight=insight,
        created=time.time(),
    )


def fit(pool: Pool, limits: Limits, args: Select, goal: Goal) -> tuple[Blend, HeldOut | None, Choice | None]:
    """What the selector that the arguments name finds in the pool, what it predicts for rows that it did not see, and
    auto's account of how it chose."""
    single = pool.best_on_tune(goal)
    if args.selector == "auto":
        choice = choose_selector(pool.probs, pool.labels, limits, single=single, goal=goal)
        return choice.blend, choice.held_out, choice

    def select(probs: Probs, labels: np.ndarray) -> Blend:
        chosen = SELECTORS[args.selector].fit

        def one(p: Probs, y: np.ndarray) -> Any:
            return chosen(p, y, limits, args.score or "log_loss")

        found = tempered(one, probs, labels) if args.temperature_scaling else one(probs, labels)
        return found if isinstance(found, Blend) else Blend(found)

    table, folds = Table(pool.probs, pool.labels, limits, goal), deal_folds(pool.labels)[:1]

    def without(repeat: int, fold: int) -> Blend:
        rows = np.setdiff1d(np.arange(len(pool.labels)), folds[repeat][fold])
        return select([np.take(p, rows, axis=0) for p in pool.probs], pool.labels[rows])

    return select(pool.probs, pool.labels), leave_out(table, folds, without, single), None


def cheap_option(selector: str, k: int, insight: dict[str, Any], tempered: bool = False) -> Option:
    """The option (see options.py) that comes closest to how an ensemble was chosen, for curves that choose it often.

    insight: of the ensemble's file, where `auto` says what it chose.
    """
    chosen = insight.get("auto", {})
    if chosen.get("selector") in CHEAP and chosen.get("temperatures") in SPREADS:
        return Option(chosen["selector"], k if chosen["selector"] != "best_single" else 1, chosen["temperatures"])
    if selector == "auto":
        return Option("greedy", k, "wide")
    return Option(selector if selector in CHEAP else "greedy", k, "free" if tempered else "none")


def best_single(pool: Pool, goal: Goal | None = None) -> int:
    """The candidate that every ensemble is compared with: best on the tune split, else the best on select."""
    named = pool.best_on_tune(goal)
    if named is not None:
        return named
    judge = Judge(goal or Goal(), pool.labels, len(pool.classes))
    credit = [judge.credit(np.asarray(p)).mean() for p in pool.probs]
    best = [m for m in range(len(credit)) if credit[m] == max(credit)]
    return min(best, key=lambda m: (judge.losses(np.asarray(pool.probs[m])).mean(), m))


def score_all(
    pool: Pool, blend: Blend, single: int, held_out: HeldOut | None = None, goal: Goal | None = None
) -> dict[str, Any]:
    """The select scores of the ensemble and of the best single candidate (an index).

    `claim` is what to expect on new images, held out; so are then `best_single` and `best_single_calibrated`, and
    `gain` is the difference of the first two. `select` is fitted: measured on the rows that the ensemble was chosen on.
    Without held-out predictions there is no claim, and the other scores are fitted, too.
    """
    split, fitted = where(pool), where(pool) | {"fitted": True}
    named = {
        "id": pool.candidates[single].id,
        "run": pool.run_of(single),
        "named_by": "select" if pool.best_on_tune(goal) is None else "tune",
    }
    alone = np.asarray(pool.probs[single])
    goal = goal or Goal()
    scores = {"select": fitted | describe(blend(pool.probs), pool.labels, goal)}
    if held_out is None:
        right, single_right = metrics.correct(blend(pool.probs), pool.labels), metrics.correct(alone, pool.labels)
        mean, low, high = metrics.paired_bootstrap(right, single_right)
        gain = {"accuracy": mean, "interval": [low, high]}
        return scores | {"best_single": named | fitted | describe(alone, pool.labels, goal), "gain": fitted | gain}
    claimed = claim(held_out, goal, pool.learned_from, pool.units)
    temperature = temperature_of(alone, pool.labels, SPREADS["wide"])
    return scores | {
        "claim": split | claimed,
        "best_single": named | split | score(held_out.single, pool.labels, goal, pool.learned_from, pool.units),
        "best_single_calibrated": named
        | {"temperature": temperature}
        | split
        | score(held_out.calibrated, pool.labels, goal, pool.learned_from, pool.units),
        "gain": split | claimed["gain"],
    }


def where(pool: Pool) -> dict[str, Any]:
    """What every score says about the images that it was measured on."""
    return {"split": "select", "images": len(pool.labels), "shared": pool.shared}


def describe(
    probs: np.ndarray, labels: np.ndarray, goal: Goal | None = None, decision: Decision | None = None
) -> dict[str, Any]:
    """Accuracy with its 95 % interval, log-loss, Brier score and calibration error of probs (N, C), as plain JSON.

    Answers are the goal's, by the decision if one is given; see `score` in claim.py.
    """
    goal = goal or Goal()
    decision = decision or goal.decide(probs[None], labels)
    right = int((decision.answers(probs) == labels).sum())
    more = {} if goal.is_scored else {"metric": goal.measure(probs[None], labels, decision)}
    return more | {
        "accuracy": right / len(labels),
        "interval": list(metrics.wilson(right, len(labels))),
        "log_loss": metrics.log_loss(probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels),
    }


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.select") -> None:
    with exit_on_user_error():
        args = tyro.cli(Select, prog=prog, args=arguments)
        pool, ensemble, path = select(args)
        show(pool, ensemble)
        told = f"it is the default of {pool.runs[0]}" if args.default else f"take it with --ensemble {ensemble.name}"
        print(f"\nwritten to {path}; {told}")
        name = "" if args.default else f" --ensemble {ensemble.name}"
        print(f"next: python -m ensemble.report --run {pool.runs[0]}{name}")


if __name__ == "__main__":
    main()
