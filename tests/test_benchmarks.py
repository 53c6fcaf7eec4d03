"""Benchmarks are run by hand, now and then: what is moved or renamed must not break them unseen."""

import importlib
import pkgutil

import pytest

import benchmarks


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_benchmark_can_be_imported(name: str) -> None:
    """Before: benchmarks.freeze asked for a class that had gone."""
    importlib.import_module(f"benchmarks.{name}")
