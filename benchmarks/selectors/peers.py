"""The peers' own released code, in an environment of its own so that their pins and ours need not agree.

`phem` (auto-sklearn's greedy selection, Purucker and Beel) and `autogluon.core` are installed once under the cache
folder, with `phem` lacking the dependencies that its greedy selection does not import.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainables.data.dataset import default_cache

PINS = (["autogluon.core==1.6.3"], ["--no-deps", "phem==0.0.0.2"])
NEEDED_BY_PHEM = ["scikit-learn", "pandas"]
WORKER = Path(__file__).with_name("peer_worker.py")


@dataclass(frozen=True)
class Job:
    """One fit: a name in peer_worker.PEERS, "log_loss" or "accuracy", greedy steps, the rows to fit on (None: all)."""

    peer: str
    score: str
    steps: int
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Fit:
    """What came of a job: weights (M,), seconds and CPU seconds of the fit alone, or the error that the peer raised."""

    weights: np.ndarray
    seconds: float
    cpu_seconds: float
    error: str = ""


def peer_python() -> Path:
    """The Python of the peers' environment, which is made on the first call (minutes, needs the package index)."""
    home = default_cache() / "peers"
    python = home / "bin" / "python"
    stamp = home / ".installed"
    wanted = repr(PINS)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing the peers into {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        for arguments in (NEEDED_BY_PHEM, *PINS):
            # one that does not install is told by its jobs, which cannot import it
            subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=False)
        stamp.write_text(wanted)
    return python


def run_peers(probs: np.ndarray, labels: np.ndarray, jobs: Sequence[Job]) -> Iterator[Fit]:
    """The outcome of every job, in order and as soon as it is there.

    probs: (M, N, C), converted to float64 for the peers before their clock starts, as their own pipelines hold it.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / f"{name}.npy") for name in ("probs", "labels")}
        np.save(paths["probs"], probs)
        np.save(paths["labels"], labels)
        told = []
        for i, job in enumerate(jobs):
            rows = None
            if job.rows is not None:
                rows = str(Path(folder) / f"rows{i}.npy")
                np.save(rows, job.rows)
            told.append({"peer": job.peer, "score": job.score, "steps": job.steps, "rows": rows})
        # -W: their use of old interfaces is not ours to print
        worker = subprocess.Popen(
            [peer_python(), "-W", "ignore", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        with worker:
            json.dump({**paths, "jobs": told}, worker.stdin)
            worker.stdin.close()
            for job in jobs:
                line = worker.stdout.readline()
                answer: dict[str, Any] = json.loads(line) if line else {"error": f"the worker died on {job.peer}"}
                if "error" in answer:
                    yield Fit(np.zeros(0), math.nan, math.nan, answer["error"])
                else:
                    yield Fit(np.array(answer["weights"]), answer["seconds"], answer["cpu_seconds"])
