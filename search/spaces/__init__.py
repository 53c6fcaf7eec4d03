"""Search spaces: one small Python file each, conditional by plain `if`.

A space has
    TRIALS: int                       trials when no budget is given
    BACKBONES: dict[str, str]         name -> "pretrained" (no weights: an error), "if found" (no weights: left out),
                                      "or scratch" (no weights: random ones, and the sweep says so), or "scratch"
    suggest(trial, task) -> TrialConfig
and may have
    FIRST: list[dict], or first(task) parameters, as `suggest` names them, that are proposed first; what is left out is
                                      sampled, and those of a backbone that does not take part are skipped
    MINUTES: float                    minutes when no budget is given, instead of TRIALS
    takes(task, backbone) -> bool     whether a backbone of BACKBONES takes part in this sweep; without it all do
"""

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import optuna

from search.config import Scale, Task
from search.spaces import recipes
from trainables.config import TrialConfig
from trainables.errors import UserError


class Space(NamedTuple):
    name: str
    trials: int
    backbones: dict[str, str]
    suggest: Callable[[optuna.Trial, Task], TrialConfig]
    first: Callable[[Task], list[dict[str, Any]]]
    takes: Callable[[Task, str], bool]
    minutes: float | None


TINY_TRIALS = 4


def known_spaces() -> list[str]:
    """Return the names of the search spaces in this folder and of the fixed recipes below it."""
    return sorted(_modules())


def load_space(name: str, scale: Scale = "full") -> Space:
    """A space by its name in this folder, or by the path of a Python file; raises UserError when it is neither.

    At scale "tiny" its trials are few, short, narrow and small: the whole road of a large space in minutes.
    """
    known = known_spaces()
    if name in known:
        module = importlib.import_module(_modules()[name])
    elif name.endswith(".py") and Path(name).exists():
        module = _from_file(Path(name))
    else:
        near = difflib.get_close_matches(name, known, n=2) or known
        raise UserError(f"unknown search space {name!r}, expected one of {', '.join(near)}, or the path of a .py file")
    missing = [part for part in ("TRIALS", "BACKBONES", "suggest") if not hasattr(module, part)]
    if missing:
        raise UserError(f"search space {name} lacks {', '.join(missing)}; see search/spaces/dry_run.py for the shape")
    fixed = getattr(module, "FIRST", [])
    first = getattr(module, "first", lambda task: fixed)
    takes = getattr(module, "takes", lambda task, backbone: True)
    minutes = getattr(module, "MINUTES", None) if scale == "full" else None
    tiny = scale == "tiny"

    def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
        try:
            config = module.suggest(trial, task)
        except UserError:
            raise
        except Exception as error:  # whatever a user's file may raise, and Optuna when its choices have changed
            raise UserError(f"search space {name} cannot propose: {type(error).__name__}: {error}") from error
        return _tiny(config) if tiny else config

    return Space(
        Path(name).stem,
        TINY_TRIALS if tiny else module.TRIALS,
        module.BACKBONES,
        suggest,
        first,
        takes,
        minutes,
    )


def _modules() -> dict[str, str]:
    """Module names by the names of the spaces that they are."""
    places = {"search.spaces": __path__, "search.spaces.recipes": recipes.__path__}
    return {
        module.name: f"{package}.{module.name}"
        for package, path in places.items()
        for module in pkgutil.iter_modules(path)
        if not module.ispkg
    }


def _tiny(config: TrialConfig) -> TrialConfig:
    return dataclasses.replace(
        config,
        epochs=min(2, config.epochs),  # 0 and 0 stay a probe
        freeze_epochs=min(1, config.freeze_epochs),
        image_size=min(32, config.image_size),
        progressive=(),
        width=min(0.25, config.width),
    )


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"search space {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
