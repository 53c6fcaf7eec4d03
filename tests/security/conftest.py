"""A run directory of somebody else, and commands that open it."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_run import train_run


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three candidates with their study and an ensemble, "greedy"."""
    run, _ = train_run(tmp_path_factory.mktemp("victim") / "run", pictures)
    return Path(str(run))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "foreign" / "run"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run a module's main() with arguments: its exit code, and what it printed."""

    def start(module, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        try:
            module.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return code, printed.out + printed.err

    return start
