"""How many planted label errors does explore find among its first 200 suspects?

    python -m benchmarks.label_errors --run runs/cifar10-auto [--flips 100] [--draws 20] [--json FILE]

Gives `--flips` images of the tune and select splits another label, drawn at random, and looks for them with
`trainables.suspects`. The candidates of a finished sweep have learned none of these images, so changing their labels
afterwards leaves what they predict as it would have been (but for what the search would have pruned or stopped sooner).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from ensemble.show import make_console
from trainables.data.share import open_run_data
from trainables.errors import UserError, exit_on_user_error
from trainables.explore.suspects import find_suspects
from trainables.run_directory import open_run


@dataclass(frozen=True)
class LabelErrors:
    """Planted label errors among the suspects of explore."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A finished sweep; default: the newest under runs/."""
    flips: int = 100
    """Labels that are made wrong."""
    suspects: int = 200
    """Suspects that are looked at."""
    draws: int = 20
    """How often that is done."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def measure(args: LabelErrors) -> list[dict[str, Any]]:
    """One row per draw: the share of the planted errors that was found, and cleanlab's estimate of all wrong labels."""
    run = open_run(args.run)
    data, splits = open_run_data(run)
    rows = np.union1d(splits.tune, splits.select)
    if args.flips > len(rows):
        raise UserError(f"--flips is {args.flips}, but {run} has {len(rows)} images in tune and select")
    found = []
    for draw in range(args.draws):
        rng = np.random.default_rng(draw)
        wrong = rng.choice(rows, args.flips, replace=False)
        labels = np.array(data.labels)
        labels[wrong] = (labels[wrong] + rng.integers(1, len(data.classes), args.flips)) % len(data.classes)
        suspects = find_suspects(run, dataclasses.replace(data, labels=labels), args.suspects)
        right = suspects.suggested == data.labels[suspects.rows]
        found.append(
            {
                "draw": draw,
                "found": float(np.isin(wrong, suspects.rows).mean()),
                "fixed": float((right & np.isin(suspects.rows, wrong)).sum() / args.flips),
                "estimate": suspects.estimate,
                "checked": suspects.checked,
                "models": suspects.models,
            }
        )
    return found


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(LabelErrors, description=__doc__, prog="python -m benchmarks.label_errors")
        rows = measure(args)
        table = Table(
            title=f"{args.flips} wrong labels among {rows[0]['checked']:,} tune and select images, "
            f"{rows[0]['models']} models, {args.draws} draws"
        )
        table.add_column("")
        for heading in ("mean", "least", "most"):
            table.add_column(heading, justify="right")
        for name, key in (
            (f"among the first {args.suspects} suspects", "found"),
            ("and given their label back", "fixed"),
        ):
            values = [row[key] for row in rows]
            table.add_row(name, f"{np.mean(values):.1%}", f"{min(values):.1%}", f"{max(values):.1%}")
        estimates = [row["estimate"] for row in rows]
        table.add_row(
            "cleanlab's estimate of all wrong ones",
            f"{np.mean(estimates):.0f}",
            str(min(estimates)),
            str(max(estimates)),
        )
        make_console().print(table)
        if args.json:
            args.json.write_text(json.dumps({"run": str(args.run or ""), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
