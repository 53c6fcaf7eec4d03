"""python -m ensemble.report : what a sweep found, as a page (report.html) and as numbers (report.json)."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ensemble.file import read_ensemble
from ensemble.report.trials import load_study
from ensemble.report.write import NUMBERS, PAGE, summary, write_report
from trainables.errors import exit_on_user_error
from trainables.run_directory import open_runs, study_name


@dataclass(frozen=True)
class Report:
    """Report on a run and its ensemble: report.html to look at, report.json to read on."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Optuna storage of the study; default: study.db in the run directory."""


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Report, description=Report.__doc__, prog="python -m ensemble.report")
        runs = open_runs(args.run)
        run, ensemble = runs[0], read_ensemble(runs[0], args.ensemble)
        study = load_study(args.storage, study_name(run)) if args.storage else None
        found = write_report(runs, ensemble, study)
        print("\n".join(summary(found)))
        print(f"written to {run / (NUMBERS if 'refit_of' in found else PAGE)}")


if __name__ == "__main__":
    main()
