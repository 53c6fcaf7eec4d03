"""The architecture, held: which package may import which, and which library each knows.

ninefold -> search -> ensemble -> trainables, search -> cluster -> trainables, ensemble.serve -> cluster.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
ALLOWED = {
    "trainables": set(),
    "cluster": {"trainables"},
    "ensemble": {"trainables"},
    "search": {"trainables", "ensemble", "cluster"},
    "ninefold": {"trainables", "ensemble", "search"},
}
LIBRARIES = {  # which places may import them
    "ray": ("cluster/", "ensemble/serve/"),
    "optuna": ("search/", "ensemble/report/"),
    "timm": ("trainables/",),
}
TORCH = (
    "trainables/", "cluster/ranks.py", "ensemble/export/", "ensemble/soup.py", "search/plan.py",
    "search/track/tensorboard.py",
)  # fmt: skip
PRIVATE = ("ray._private", "optuna.storages._", "study._storage", "._get_trials", "._trial_id", "._study_id")
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
MOST_FILES = 13  # of a folder, __init__.py among them


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 60


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | {package}
    if place(path).startswith("ensemble/serve/"):
        allowed |= {"cluster"}
    assert imported(path) & set(ALLOWED) <= allowed


@pytest.mark.parametrize("path", FILES, ids=place)
def test_one_package_knows_a_library(path: Path) -> None:
    names = imported(path)
    for library, places in LIBRARIES.items():
        assert library not in names or place(path).startswith(places), library
    assert "torch" not in names or place(path).startswith(TORCH)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_librarys_private_parts_are_used(path: Path) -> None:
    text = path.read_text()
    assert [name for name in PRIVATE if name in text] == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=place)
def test_a_folder_holds_at_most_a_dozen_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("trainables.config", {"torch", "numpy", "ray"}),
        ("trainables.job", {"torch", "numpy", "ray"}),
        ("trainables.run_directory", {"torch", "ray"}),
        ("trainables.train", {"ray"}),
        ("ensemble.select", {"torch", "ray", "optuna"}),
        ("ensemble.predict", {"ray"}),
        ("search.config", {"torch", "rich", "ray", "optuna"}),
        ("search.spaces.auto", {"torch", "rich", "ray"}),
        ("search.study.mirror", {"ray", "torch"}),
        ("search.sweep", {"ray", "torch"}),
        ("ninefold", {"ray", "torch", "optuna", "rich", "numpy", "tyro"}),
        ("ninefold.__main__", {"ray", "torch", "optuna", "rich", "numpy", "tyro"}),
    ],
)
def test_what_a_module_pulls_in(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join({unwanted!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
