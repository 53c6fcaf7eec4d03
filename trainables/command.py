"""What every command has: options, which are a dataclass, for the command line and for Python alike."""

import difflib
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from trainables.errors import UserError

T = TypeVar("T")


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
