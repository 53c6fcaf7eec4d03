"""What this code relies on in Ray and Optuna is there, by its name and parameters: what a new version lacks is named
here, before a sweep finds out."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("ray", "optuna")
PACKAGES = ("cluster", "ensemble", "search", "trainables", "ninefold")


def places(path: Path, tree: ast.AST) -> dict[str, str]:
    """What names of a file stand for: "optuna.trial:FrozenTrial" for FrozenTrial, as far as they are a library's."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    found[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}:{alias.name}"
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The library's full name of an expression like `ray.train.report`, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def find(name: str) -> Any:
    """The object of a full name; AttributeError names what is missing."""
    path, _, imported = name.rpartition(":")
    first, *parts = (imported if path else name).split(".")
    path = path or first
    found = importlib.import_module(path)
    for part in parts if path == first else [first, *parts]:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(path)  # a module that its package does not import
        found = getattr(found, part)
    return found


def uses() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(full name, keywords of a call) of all that is used; without keywords where it is not called."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            names = places(path, tree)
            for node in ast.walk(tree) if names else ():
                if isinstance(node, ast.Call) and (name := dotted(node.func, names)):
                    yield name, tuple(keyword.arg for keyword in node.keywords if keyword.arg)
                elif isinstance(node, ast.Attribute) and (name := dotted(node, names)):
                    yield name, ()
            for name in names.values():
                yield name, ()


USES = sorted(set(uses()))


def test_there_are_some() -> None:
    names = {name for name, _ in USES}
    assert {"ray.init", "ray.train.torch:TorchTrainer", "optuna.samplers.TPESampler"} <= names


@pytest.mark.parametrize("name", sorted({name for name, _ in USES}))
def test_a_name_is_there_and_public(name: str) -> None:
    find(name)
    assert not any(part.startswith("_") for part in name.replace(":", ".").split("."))


@pytest.mark.parametrize(("name", "keywords"), [use for use in USES if use[1]])
def test_a_call_s_parameters_are_there(name: str, keywords: tuple[str, ...]) -> None:
    parameters = inspect.signature(find(name)).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert set(keywords) <= parameters.keys()


def test_the_next_minor_of_ray_is_not_installed_untested() -> None:
    import ray

    assert '"ray[default,train,tune]>=2.60,<2.61"' in (ROOT / "pyproject.toml").read_text()
    assert ray.__version__.startswith("2.60.")
