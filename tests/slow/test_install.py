"""An installed Ninefold, used from a directory outside the repository.

`pip install .` goes into an empty virtual environment, without a network: the dependencies are not installed anew, but
lent from the environment of the tests by a .pth, which does not lend the repository itself.
"""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import draw_folder

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
PACKAGES = ("ninefold", "search", "trainables", "ensemble", "cluster")
FIVE_LINES = """
import ninefold
ensemble = ninefold.sweep("photos", trials=2, scale="tiny", backbones=["speednet"], run="runs/photos", minutes=3)
answers = ninefold.load("runs/photos").predict("new")
print(len(ensemble.members), len(answers), *sorted(set(answers.labels)))
print(ninefold.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment into which the repository was installed."""
    source = tmp_path_factory.mktemp("source") / "ninefold"  # a build leaves build/ and *.egg-info
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("[A-Za-z]*"):
        if file.is_file():
            shutil.copy(file, source)
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    python: list[str | Path] = [home / "bin" / "python", "-m", "pip"]
    # Python 3.11 brings a setuptools that is too old to build this; the lent one is not
    subprocess.run([*python, "uninstall", "--quiet", "--yes", "setuptools"], capture_output=True, check=False)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", str(source)]
    done = subprocess.run([*python, *install], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return home / "bin"


def start(words: list[str | Path], folder: Path) -> str:
    """What a process prints that knows nothing of the repository."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_command_is_there(installed: Path, tmp_path: Path) -> None:
    out = start([installed / "ninefold", "--help"], tmp_path)
    assert "usage: ninefold COMMAND" in out
    assert "usage: ninefold explore" in start([installed / "ninefold", "explore", "--help"], tmp_path)


def test_pages_and_scripts_are_installed_too(installed: Path, tmp_path: Path) -> None:
    out = start([installed / "ninefold", "explore", "--data", "digits", "--out", "digits.html"], tmp_path)
    assert "written to digits.html" in out
    assert (tmp_path / "digits.html").read_text().startswith("<!doctype html>")


def test_five_lines_of_python(installed: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos" / "test", tmp_path / "new")
    out = start([installed / "python", "-c", FIVE_LINES], tmp_path)
    *_, counts, place = out.splitlines()
    members, images, *labels = counts.split()
    assert 1 <= int(members) <= 2
    assert int(images) == 90
    assert set(labels) <= {"across", "down", "grid"}
    assert Path(place).is_relative_to(installed.parent)
    assert str(ROOT) not in place
    assert (tmp_path / "runs" / "photos" / "report.html").exists()
