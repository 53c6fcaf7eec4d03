"""The command `ninefold`: one verb for each command that `python -m` starts, with the same options.

    ninefold sweep --data folder --data-dir photos --minutes 30
    ninefold predict --images new-photos

A verb imports what it needs, and no other does. Shell completion, of all verbs and options:

    ninefold --tyro-print-completion bash > ~/.local/share/bash-completion/completions/ninefold
"""

import difflib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Annotated, Any, Union

from trainables.errors import UserError, exit_on_user_error

Command = tuple[Any, Callable[[list[str], str], None]]
"""The dataclass of a command's options, and its main(arguments, prog)."""


def _sweep() -> Command:
    """Sweep backbones and hyperparameters; keep the nine that vote best together."""
    from search.config import SearchConfig
    from search.run import main

    return SearchConfig, main


def _select() -> Command:
    """Choose the candidates of a sweep that vote best together, and write them as an ensemble."""
    from ensemble.select import Select, main

    return Select, main


def _report() -> Command:
    """Report on a run and its ensemble: report.html to look at, report.json to read on."""
    from ensemble.report.__main__ import Report, main

    return Report, main


def _predict() -> Command:
    """Predict a folder of images with an ensemble."""
    from ensemble.predict import Predict, main

    return Predict, main


def _serve() -> Command:
    """Show an ensemble on a page, and answer pictures over HTTP."""
    from ensemble.serve.__main__ import main
    from ensemble.serve.app import Serve

    return Serve, main


def _export() -> Command:
    """Write an ensemble for other runtimes and libraries, and check it against PyTorch."""
    from ensemble.export import Export, main

    return Export, main


def _compare() -> Command:
    """Compare two sweeps on the same splits: claims, paired difference, members, cost."""
    from ensemble.compare import Compare, main

    return Compare, main


def _refit() -> Command:
    """Retrain an ensemble's members on train + tune + select."""
    from search.refit import Refit, main

    return Refit, main


def _distil() -> Command:
    """Teach one network what an ensemble knows."""
    from search.distil import Distil, main

    return Distil, main


def _explore() -> Command:
    """Look at a data set: what is in it, what leaks from one split into another, what cannot be read."""
    from trainables.explore.__main__ import main
    from trainables.explore.findings import Explore

    return Explore, main


def _fetch() -> Command:
    """Put a space's pretrained weights into a folder, for machines that reach no hub."""
    from search.fetch import Fetch, main

    return Fetch, main


VERBS = {
    "sweep": _sweep,
    "select": _select,
    "report": _report,
    "predict": _predict,
    "serve": _serve,
    "export": _export,
    "compare": _compare,
    "refit": _refit,
    "distil": _distil,
    "explore": _explore,
    "fetch": _fetch,
}


def main() -> None:
    verb, *rest = sys.argv[1:] or ["--help"]
    with exit_on_user_error():
        if verb in ("-h", "--help"):
            print(overview())
        elif verb == "--version":
            print(importlib.metadata.version("ninefold"))
        elif verb in ("--tyro-print-completion", "--tyro-write-completion"):
            _complete([verb, *rest])
        elif verb in VERBS:
            VERBS[verb]()[1](rest, f"ninefold {verb}")
        else:
            near = difflib.get_close_matches(verb, VERBS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown command {verb!r}; {hint}known: {', '.join(VERBS)}")


def overview() -> str:
    """What `ninefold --help` prints: nothing needs to be imported to know it."""
    lines = [f"  {verb:<8}  {find.__doc__}" for verb, find in VERBS.items()]
    usage, options = "usage: ninefold COMMAND [options]", "ninefold COMMAND --help lists its options."
    return "\n".join([usage, "", *lines, "", options])


def _complete(arguments: list[str]) -> None:
    """Print or write the completion of all verbs with their options."""
    import tyro

    kinds = [Annotated[find()[0], tyro.conf.subcommand(verb, description=find.__doc__)] for verb, find in VERBS.items()]
    verbs: Any = Union[tuple(kinds)]  # noqa: UP007
    tyro.cli(verbs, prog="ninefold", args=arguments)


if __name__ == "__main__":
    main()
