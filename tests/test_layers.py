"""Imports run one way: search -> ensemble -> trainables, search -> cluster, ensemble.serve -> cluster."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "trainables": set(),
    "cluster": set(),
    "ensemble": {"trainables"},
    "search": {"trainables", "ensemble", "cluster"},
}
MAY_IMPORT_RAY = {
    "search/tuner.py",
    "trainables/worker.py",
    "cluster/connect.py",
    "cluster/metrics.py",
    "ensemble/serve.py",
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


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
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | {package}
    if path.name == "serve.py":
        allowed |= {"cluster"}
    assert imported(path) & set(ALLOWED) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_stays_in_few_files(path: Path) -> None:
    assert "ray" not in imported(path) or str(path.relative_to(ROOT)) in MAY_IMPORT_RAY


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("trainables.config", {"torch", "numpy", "ray"}),
        ("trainables.run_directory", {"torch", "ray"}),
        ("trainables.train", {"ray"}),
        ("ensemble.select", {"torch", "ray"}),
        ("ensemble.predict", {"ray"}),
        ("search.study", {"ray"}),
        ("search.sweep", {"ray"}),
    ],
)
def test_what_a_module_pulls_in(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join({unwanted!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
