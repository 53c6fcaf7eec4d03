"""The Slurm script on a real one-node Slurm."""

import os
import subprocess
import sys
from pathlib import Path

from upath import UPath

from tests.cluster.test_launchers import ROOT, slurm  # noqa: F401
from tests.tiny_space import write_space
from trainables.run_directory import list_candidates


def test_the_slurm_script_under_a_real_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    space, run, log = tmp_path / "tiny.py", tmp_path / "run", tmp_path / "job.log"
    write_space(space, trials=2, epochs=2, batch_size=64)
    done = subprocess.run(
        [
            "sbatch", "--wait", "--nodes=1", f"--cpus-per-task={os.cpu_count()}", f"--output={log}",
            "cluster/launch/slurm.sh",
            "--data", "digits", "--space", str(space), "--run", str(run), "--pruner", "none",
        ],
        env={**slurm, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
    assert [candidate.id for candidate in list_candidates(UPath(run))] == ["0000", "0001"]
    assert "ensemble     test accuracy" in log.read_text()
