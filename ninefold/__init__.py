"""Ninefold from Python: sweep backbones and hyperparameters, keep the nine that vote best together, use them.

    import ninefold

    ninefold.sweep("photos/", minutes=30)
    model = ninefold.load()
    answers = model.predict("new-photos/")
    print(answers.labels, answers.probs)

What the commands can do, these functions can: their options are those of the commands, with _ for -. Whatever the
caller can fix raises `UserError`, with one line that says what was expected. Nothing is imported before it is used.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainables.errors import UserError

if TYPE_CHECKING:
    from ensemble.file import Ensemble
    from ensemble.model import Model

__all__ = ["UserError", "load", "report", "select", "sweep"]

Path = str | os.PathLike
Runs = Path | Sequence[Path]
"""A run directory; or several, where an ensemble merges runs, its own first."""


def sweep(data: Path = "digits", *, minutes: float | None = None, **options: Any) -> "Ensemble | None":
    """Run (or continue) a sweep and return its ensemble; None when no trial has finished. `ninefold sweep`.

    Args:
        data: a folder with train/<class>/* or <class>/*, a table of images (.csv, .tsv, .parquet, .txt), or the name of
            a data set: digits, cifar10, cifar100, torchvision:..., hf:...
        minutes: time in all, ensemble included; without any budget the automatic space takes an hour.
        options: fields of `search.config.SearchConfig`, such as run, backbones, trials, weights_dir.
    """
    from search.config import SearchConfig, name_data
    from search.run import run_sweep
    from trainables.command import make_options

    return run_sweep(make_options(SearchConfig, {**name_data(data), "minutes": minutes, **options}))


def load(run: Runs = (), ensemble: str | None = None, *, device: str | None = None) -> "Model":
    """Load an ensemble of a run, ready to predict: `load(run).predict(images)`.

    Args:
        run: default: the newest one under runs/.
        ensemble: its name; default: the one written last.
        device: cuda, mps or cpu; default: the first that there is.
    """
    from ensemble.model import open_model

    return open_model([run] if isinstance(run, str | os.PathLike) else run, ensemble, device)


def select(run: Runs = (), **options: Any) -> "Ensemble":
    """Choose the candidates of a run that vote best together, write them as an ensemble, and return it.

    `ninefold select`.

    Args:
        run: default: the newest one under runs/. Several merge when they share their splits.
        options: fields of `ensemble.select.Select`, such as top_k, selector, max_latency_ms, name.
    """
    from ensemble.select import Select
    from ensemble.select import select as choose_and_write
    from trainables.command import make_options

    return choose_and_write(make_options(Select, {"run": run, **options}))[1]


def report(run: Runs = (), **options: Any) -> dict[str, Any]:
    """Write report.html and report.json of a run and its ensemble; returns what the latter holds. `ninefold report`.

    The test part, where there is one, is read for it.

    Args:
        run: default: the newest one under runs/.
        options: fields of `ensemble.report.__main__.Report`: ensemble, storage, json.
    """
    from ensemble.report.__main__ import Report
    from ensemble.report.__main__ import report as write
    from trainables.command import make_options

    return write(make_options(Report, {"run": run, **options}))[1]
