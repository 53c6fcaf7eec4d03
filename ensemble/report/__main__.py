"""python -m ensemble.report : what a sweep found, as a page (report.html) and as numbers (report.json)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.report.write import NUMBERS, PAGE, summary, write_report
from trainables.errors import exit_on_user_error
from trainables.run_directory import open_runs
from trainables.storage import check_out, write_json


@dataclass(frozen=True)
class Report:
    """Report on a run and its ensemble: report.html to look at, report.json to read on."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    json: Path | None = None
    """File to write the numbers to, too, wherever it lies."""


def report(args: Report) -> tuple[UPath, dict[str, Any]]:
    """Write the run's report; returns its page (its numbers, where there is none), and what report.json holds.

    Raises UserError as `write_report` does.
    """
    check_out(args.json, "--json")
    runs = open_runs(args.run)
    run, ensemble = runs[0], read_ensemble(runs[0], args.ensemble)
    found = write_report(runs, ensemble)
    if args.json is not None:
        write_json(UPath(args.json), found)
    return run / (NUMBERS if "refit_of" in found else PAGE), found


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.report") -> None:
    with exit_on_user_error():
        path, found = report(tyro.cli(Report, description=Report.__doc__, prog=prog, args=arguments))
        print("\n".join(summary(found)))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
