"""Trials are trained once here: what is tested is where they run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pictures(pictures_with_val: Path) -> Path:
    return pictures_with_val
