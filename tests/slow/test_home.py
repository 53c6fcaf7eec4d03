"""A home that cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_home_that_cannot_be_written_to_is_enough(tmp_path: Path) -> None:
    """Before: a local Ray wanted to write ~/.ray/auth_token, and the cache ~/.cache."""
    env = {k: v for k, v in os.environ.items() if k not in ("NINEFOLD_CACHE", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
    space = tmp_path / "one.py"
    space.write_text(
        "from trainables.config import TrialConfig\nTRIALS = 1\nBACKBONES = {'speednet': 'scratch'}\n"
        "def suggest(trial, task):\n"
        "    trial.suggest_float('x', 0, 1)\n"
        "    return TrialConfig(backbone='speednet', width=0.1, image_size=16, epochs=1, batch_size=64)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "search.run", "--space", str(space), "--run", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        env={**env, "HOME": "/dev/null/nobody", "TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.json").exists()
    assert (tmp_path / f"ninefold-{os.getuid()}" / "data").is_dir()
