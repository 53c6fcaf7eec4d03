"""python -m ensemble.report : what a sweep found, as a page (report.html) and as numbers (report.json)."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ensemble.file import read_ensemble
from ensemble.report.write import NUMBERS, PAGE, summary, write_report
from trainables.errors import exit_on_user_error
from trainables.run_directory import open_runs


@dataclass(frozen=True)
class Report:
    """Report on a run and its ensemble: report.html to look at, report.json to read on."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Report, description=Report.__doc__, prog="python -m ensemble.report")
        runs = open_runs(args.run)
        run, ensemble = runs[0], read_ensemble(runs[0], args.ensemble)
        found = write_report(runs, ensemble)
        print("\n".join(summary(found)))
        print(f"written to {run / (NUMBERS if 'refit_of' in found else PAGE)}")


if __name__ == "__main__":
    main()
