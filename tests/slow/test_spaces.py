"""Search spaces, really trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.search.test_spaces import ROOT, SEEDS


@pytest.mark.parametrize("name", SEEDS)
def test_a_tiny_sweep_of_every_seed_ends_in_an_ensemble(name: str, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / name
    command = [
        sys.executable, "-m", "search.run", "--data", "folder", "--data-dir", str(pictures), "--space", name,
        "--scale", "tiny", "--run", str(run),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env={**os.environ})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ids = {path.parent.name for path in run.glob("candidates/*/candidate.json")}
    chosen = json.loads(next(run.glob("ensembles/*.json")).read_text())
    assert ids >= {member["id"] for member in chosen["members"]} != set()
    assert "test accuracy" in ended.stdout
