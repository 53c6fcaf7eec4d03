"""What every command has: options, which are a dataclass, for the command line and for Python alike; and progress."""

import contextlib
import difflib
import importlib.util
import os
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from trainables.errors import UserError

T = TypeVar("T")
LINE_S = 10.0  # between two lines of progress where there is no terminal


def make_options(kind: type[T], values: dict[str, Any]) -> T:
    """Return the options of a command from Python's keywords, as forgiving as a command line is.

    Paths may be texts and texts paths, one text stands for a tuple of one, and None for the default. Raises UserError
    for an option that there is not, and for a value of another type.
    """
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in types:
            near = difflib.get_close_matches(name, types, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(types)}"
            raise UserError(f"unknown option {name!r}; {hint}")
    given = {name: _plain(value, types[name]) for name, value in values.items() if value is not None}
    try:
        return msgspec.convert(given, kind, dec_hook=_path)
    except msgspec.ValidationError as error:
        what, _, where = str(error).rpartition(" - at `$.")
        name = where.rstrip("`").split("[")[0]
        choices = [value for part in (types[name], *typing.get_args(types[name])) for value in typing.get_args(part)]
        if what.startswith("Invalid enum"):
            what = f"expected one of {', '.join(value for value in choices if isinstance(value, str))}"
        raise UserError(f"option {name} is {values[name]!r}: {what[:1].lower()}{what[1:]}") from None


def _plain(value: Any, kind: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, np.generic):
        return value.item()
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, Iterable):
            return tuple(str(one) if isinstance(one, os.PathLike) else one for one in value)
    return value


def _path(kind: type, value: Any) -> Any:
    """The one type in options that JSON does not have."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected a path, got {type(value).__name__}")


@contextlib.contextmanager
def progress(task: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Tell on stderr how far a task is; yields what is to be called with every number of steps that were done.

    On a terminal, and in a notebook with ipywidgets, that is a bar, which goes when the task is over. Elsewhere it is a
    line every LINE_S seconds, so nothing for what takes less. total: steps in all, None when nobody knows, which is a
    bar without an end, and no line. shown: False tells nothing.
    """
    from rich.console import Console  # not while importing: many need this module and show nothing
    from rich.progress import Progress

    console = Console(stderr=True)
    if not shown:
        yield lambda steps: None
    elif console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None):
        with Progress(console=console, transient=True) as bar:
            number = bar.add_task(task, total=total, completed=done)
            yield lambda steps: bar.advance(number, steps)
    else:
        last = time.monotonic()

        def advance(steps: int) -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= LINE_S and total is not None and done < total:
                print(f"{task}: {done:,} of {total:,}", file=sys.stderr, flush=True)
                last = time.monotonic()

        yield advance
