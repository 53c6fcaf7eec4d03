"""Two sweeps on the same splits, side by side: what each claims, how they differ, what each cost.

    python -m ensemble.compare --run A --run B

prints a table and writes a page, compare.html. The difference is paired: both ensembles on the same images of the
select split, each image by what was chosen and fitted without it, as for the claims. Where that cannot be repeated,
because another tool has chosen an ensemble, the predictions of the ensembles as they are stand in, and are called
fitted. The test part stays unread.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table
from rich.text import Text
from upath import UPath

from ensemble.file import Ensemble, read_ensemble
from ensemble.pool import Pool, limits_for, load_pool
from ensemble.report.trials import list_trials
from ensemble.select import SELECTORS, Select, best_single, check, describe, fit, where
from ensemble.selection.claim import VARIANCE, HeldOut, claim, design_effect, paired_interval, score
from ensemble.selection.explain import class_gain
from ensemble.selection.metrics import Z95, log_losses
from ensemble.show import make_console
from ensemble.show import where as split_in_words
from trainables.command import make_options
from trainables.errors import UserError, exit_on_user_error
from trainables.job import Outcome
from trainables.page.shell import render
from trainables.run.records import Spent, read_records, read_spent
from trainables.run_directory import open_run, read_run
from trainables.storage import check_out, write_bytes, write_json

NAMES = ("A", "B")
TEMPLATE = Path(__file__).with_name("compare.html")
SHOWN_CLASSES = 5
OWN = ("run", "name", "json", "selector")  # options of selection that do not say how to choose


@dataclass(frozen=True)
class Compare:
    """Compare two sweeps on the same splits: claims, paired difference, members, cost."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory, twice: --run A --run B. The same one, to compare two of its ensembles."""
    ensemble: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of an ensemble of the first run, and again one of the second; default: those written last."""
    out: Path = Path("compare.html")
    """Page to write."""
    json: Path | None = None
    """File to write the same to as JSON."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two ensembles.

    Attributes:
        fitted: float32 (N, C), its predictions on the select split, on which it was chosen.
        held_out: the same by what its selector chose without each image; None where that cannot be repeated.
        is_current: the selector would choose it again from the candidates that there are now.
    """

    pool: Pool
    ensemble: Ensemble
    fitted: np.ndarray
    held_out: HeldOut | None
    is_current: bool


def compare(args: Compare) -> dict[str, Any]:
    """Write the page and the JSON, and return what the latter holds.

    Raises UserError, before anything is written, for other than two runs, runs on different splits, and what
    `ensemble.select` would refuse.
    """
    if len(args.run) != 2:
        raise UserError(f"expected two runs to compare, got {len(args.run)}; name them: --run A --run B")
    if len(args.ensemble) not in (0, 2):
        raise UserError(f"expected the names of two ensembles or none, got {len(args.ensemble)}")
    check_out(args.out, "--out")
    check_out(args.json, "--json")
    runs = [open_run(run) for run in args.run]
    infos = [read_run(run) for run in runs]
    for run, info in zip(runs, infos, strict=True):
        if info.refit_of is not None:
            raise UserError(f"{run} is a refit, which has no select split; compare the run that it is of")
    if infos[0].split_fingerprint != infos[1].split_fingerprint or infos[0].classes != infos[1].classes:
        raise UserError(
            f"{runs[0]} and {runs[1]} are on different data or splits (fingerprints {infos[0].split_fingerprint} and "
            f"{infos[1].split_fingerprint}); only sweeps of the same data, --split-seed and grouping can be compared"
        )
    sides = [open_side(run, name) for run, name in zip(runs, args.ensemble or (None, None), strict=True)]
    if not np.array_equal(sides[0].pool.labels, sides[1].pool.labels):
        raise UserError(f"{runs[0]} and {runs[1]} have different select labels under one fingerprint; one is damaged")
    found = findings(sides)
    write_bytes(UPath(args.out), _page(found))
    if args.json is not None:
        write_json(UPath(args.json), found)
    return found


def open_side(run: UPath, name: str | None = None) -> Side:
    """An ensemble of a run with its predictions on the select split. Raises UserError when its members are gone."""
    pool, ensemble = load_pool([run]), read_ensemble(run, name)
    places = {candidate.id: m for m, candidate in enumerate(pool.candidates)}
    for member in ensemble.members:
        if member.run:
            raise UserError(f"ensemble {ensemble.name} of {run} merges runs; name one of a single run with --ensemble")
        if member.id not in places:
            reason = pool.left_out.get(member.id, "it is not there")
            raise UserError(f"member {member.id} of ensemble {ensemble.name} of {run} cannot be used: {reason}")
    fitted = ensemble.predict([pool.probs[places[member.id]] for member in ensemble.members])
    args = _chosen_with(ensemble)
    if args is None:
        return Side(pool, ensemble, fitted, None, True)
    limits = limits_for(
        pool, args.top_k, args.min_per_architecture, args.max_latency_ms, args.max_params, args.max_flops
    )
    blend, held_out, _ = fit(pool, limits, args, ensemble.goal)
    again = {pool.candidates[m].id for m in np.flatnonzero(blend.weights)}
    return Side(pool, ensemble, fitted, held_out, again == {member.id for member in ensemble.members})


def _chosen_with(ensemble: Ensemble) -> Select | None:
    """The options that the ensemble's file says it was chosen with; None where no selector can repeat that."""
    if ensemble.selector not in SELECTORS:
        return None
    options = {key: value for key, value in ensemble.options.items() if key not in OWN}
    try:
        args = make_options(Select, {**options, "selector": ensemble.selector})
        check(args)
    except UserError:  # written by hand, or by another version
        return None
    return args


def findings(sides: Sequence[Side]) -> dict[str, Any]:
    """Everything that is told about two sides, as plain JSON; what is measured says on what."""
    first = sides[0].pool
    runs = [side.pool.runs[0] for side in sides]
    alike = runs[0].name == runs[1].name  # then the folders above have to tell them apart
    names = [f"{run.absolute().parent.name}/{run.name}" if alike else run.name for run in runs]
    is_fitted = any(side.held_out is None for side in sides)
    probs = [side.fitted if is_fitted or side.held_out is None else side.held_out.ensemble[0] for side in sides]
    right = [side.ensemble.decision.answers(p) == first.labels for side, p in zip(sides, probs, strict=True)]
    losses = log_losses(probs[1], first.labels) - log_losses(probs[0], first.labels)
    wider = VARIANCE * design_effect(losses, first.units)
    half = Z95 * math.sqrt(wider * float(losses.var()) / len(losses))
    difference = right[1].astype(np.float64) - right[0]
    return {
        "created": time.time(),
        "split_fingerprint": first.split_fingerprint,
        "classes": list(first.classes),
        "sides": [_side(side, is_fitted, name) for side, name in zip(sides, names, strict=True)],
        "difference": where(first) | {"fitted": is_fitted} | {
            "accuracy": float(difference.mean()),
            "interval": list(paired_interval(difference, units=first.units)),
            "log_loss": float(losses.mean()),
            "log_loss_interval": [float(losses.mean()) - half, float(losses.mean()) + half],
            "only_first_right": int((right[0] & ~right[1]).sum()),
            "only_second_right": int((right[1] & ~right[0]).sum()),
            "classes": class_gain(right[1], right[0], first.labels, first.classes),
        },
    }  # fmt: skip


def _side(side: Side, is_fitted: bool, name: str) -> dict[str, Any]:
    pool, ensemble = side.pool, side.ensemble
    candidates = {candidate.id: candidate for candidate in pool.candidates}
    held_out, goal = None if is_fitted else side.held_out, ensemble.goal
    single = best_single(pool, goal)
    if held_out is None:
        score_of = describe(side.fitted, pool.labels, goal, ensemble.decision)
        alone = describe(np.asarray(pool.probs[single]), pool.labels, goal)
    else:
        score_of = claim(held_out, goal, pool.learned_from, pool.units)
        alone = score(held_out.single, pool.labels, goal, pool.learned_from, pool.units)
    return {
        "run": name,
        "path": str(pool.runs[0].absolute()),
        "ensemble": ensemble.name,
        "selector": ensemble.selector,
        "is_current": side.is_current,
        "score": where(pool) | {"fitted": is_fitted} | score_of,
        "best_single": {"id": pool.candidates[single].id} | where(pool) | {"fitted": is_fitted} | alone,
        "members": [
            {"id": m.id, "architecture": candidates[m.id].architecture, "weight": m.weight} for m in ensemble.members
        ],
        "latency_ms": _sum(candidates[m.id].info.latency_ms for m in ensemble.members),
        "params": _sum(candidates[m.id].info.params for m in ensemble.members),
        "candidates": len(pool.candidates),
        "cost": cost(pool),
    }


def cost(pool: Pool) -> dict[str, Any]:
    """What a sweep took: `trials` and their `outcomes`, `training_seconds` of its candidates (those that say it), and,
    where it has left records, `sweep_seconds` of the clock and `device_seconds` of all devices; else None."""
    records, spent = [], Spent()
    with contextlib.suppress(UserError):
        records, spent = read_records(pool.runs[0]), read_spent(pool.runs[0])
    outcomes = Counter(trial.outcome for trial in list_trials(records, pool.candidates))
    return {
        "trials": sum(n for outcome, n in outcomes.items() if outcome not in set(Outcome) or Outcome(outcome).counts),
        "outcomes": dict(outcomes),
        "has_records": bool(records),
        "training_seconds": _sum(candidate.info.seconds for candidate in pool.candidates),
        "sweep_seconds": spent.seconds or None,
        "device_seconds": spent.device_seconds or None,
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """None where not one of them is known."""
    known = [float(value) for value in values if value is not None]
    return sum(known) if known else None


# --- for a person ----------------------------------------------------------------------------------------------------


def in_words(difference: dict[str, Any]) -> list[str]:
    """The paired difference in three lines."""
    low, high = difference["interval"]
    bottom, top = difference["log_loss_interval"]
    how = "which took part in the choice" if difference["fitted"] else "each by what was chosen without it"
    verdict = f"{'B' if low > 0 else 'A'} is more accurate, beyond what chance explains"
    return [
        f"B minus A: {100 * difference['accuracy']:+.2f} points (95 % {100 * low:+.2f} to {100 * high:+.2f}), log-loss "
        f"{difference['log_loss']:+.4f} ({bottom:+.4f} to {top:+.4f})",
        f"{difference['only_first_right']} images only A gets right, {difference['only_second_right']} only B: paired "
        f"on the {split_in_words(difference)}, {how}",
        "no difference in accuracy that chance does not explain" if low <= 0 <= high else verdict,
    ]


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The lines of the table: what it is, of A, and of B."""
    described = {
        "ensemble": lambda s: f"{s['ensemble']} ({s['selector']})" if s["ensemble"] != s["selector"] else s["ensemble"],
        _heading(found): lambda s: _accuracy(s["score"]),
        "log-loss": lambda s: f"{s['score']['log_loss']:.4f}",
        "best single model": lambda s: _accuracy(s["best_single"]),
        "members": lambda s: f"{len(s['members'])}: {_architectures(s['members'])}",
        "latency, all members": lambda s: "?" if s["latency_ms"] is None else f"{s['latency_ms']:.1f} ms an image",
        "candidates": lambda s: f"{s['candidates']:,}",
        "trials": lambda s: f"{s['cost']['trials']:,}: {_outcomes(s['cost']['outcomes'])}",
        "sweep": lambda s: _time(s["cost"]["sweep_seconds"]),
        "on devices": lambda s: _time(s["cost"]["device_seconds"]),
        "training of the candidates": lambda s: _time(s["cost"]["training_seconds"]),
    }
    first, second = found["sides"]
    return [(name, text(first), text(second)) for name, text in described.items()]


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader has to know about the numbers, a line each."""
    lines = []
    if found["difference"]["fitted"]:
        lines.append(
            "fitted: at least one of the ensembles cannot be chosen again without an image, so both are scored on "
            "images that took part in the choice, which flatters them"
        )
    for name, side in zip(NAMES, found["sides"], strict=True):
        if not side["cost"]["has_records"]:
            lines.append(f"{name}: it has no records of its trials, so only those that left a candidate are counted")
        if not side["is_current"]:
            lines.append(
                f"{name}: its selector would choose other members from the candidates that there are now; what is "
                f"claimed is of such a choice: python -m ensemble.select --run {side['path']}"
            )
    return lines


def _heading(found: dict[str, Any]) -> str:
    return "accuracy, fitted" if found["difference"]["fitted"] else "expected on new images"


def _accuracy(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.2%} ({low:.2%} to {high:.2%})"


def _architectures(members: list[dict[str, Any]]) -> str:
    counts = Counter(member["architecture"] for member in members)
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.most_common())


def _outcomes(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items(), key=lambda item: -item[1]))


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:,.0f} s"


def _classes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes that differ most."""
    differing = [row for row in found["difference"]["classes"] if row["gain"]]
    return sorted(differing, key=lambda row: -abs(row["gain"]))[:SHOWN_CLASSES]


def _page(found: dict[str, Any]) -> bytes:
    scores = [side["score"] for side in found["sides"]]
    return render(
        TEMPLATE, found=found, names=NAMES, rows=rows(found), notes=notes(found), heading=_heading(found),
        difference=in_words(found["difference"]), classes=_classes(found), split=split_in_words(found["difference"]),
        scale=(min(score["interval"][0] for score in scores), max(score["interval"][1] for score in scores)),
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(found["created"])),
    )  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print the table and the difference."""
    console = make_console()
    table = Table()
    for heading in ("", *(f"{name}: {side['run']}" for name, side in zip(NAMES, found["sides"], strict=True))):
        table.add_column(Text(heading))
    for row in rows(found):
        table.add_row(*map(Text, row))
    console.print(table)
    console.print("\n".join(in_words(found["difference"])), style="bold", markup=False, soft_wrap=True)
    if classes := _classes(found):
        told = ", ".join(f"{row['class']} {100 * row['gain']:+.1f} points of {row['images']}" for row in classes)
        console.print(f"classes that differ most: {told}", markup=False, soft_wrap=True)
    for line in notes(found):
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.compare") -> None:
    with exit_on_user_error():
        args = tyro.cli(Compare, description=Compare.__doc__, prog=prog, args=arguments)
        show(compare(args))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
