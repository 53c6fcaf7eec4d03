"""The run directory on disk: a public format that other tools may read and add candidates to.

    runs/<name>/
      run.json                  data set, class names, split fingerprint, ... (needs `classes`, `split_fingerprint`)
      splits.npz                train / tune / select indices, int64
      select_labels.npy         int64 (N,)
      candidates/<id>/
        candidate.json          written LAST: a candidate without it does not exist (needs `id`)
        select_probs.npy        float32 (N, C), rows sum to 1, in select_labels order
        tune_probs.npy          optional, the same for the tune split
        weights.safetensors     absent for a candidate that only brings predictions
      checkpoints/<id>/         latest checkpoint of a trial that has not finished
      ensembles/<name>.json

Only JSON, .npy without pickles, .npz and safetensors are ever read, so opening somebody else's run directory cannot run
code. Neither torch nor Ray is imported here: listing candidates and reading their predictions takes milliseconds.
"""

import io
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from trainables.errors import UserError

RUNS = "runs"
AnyPath = str | os.PathLike | UPath


@dataclass(frozen=True)
class Candidate:
    """One trained model as it lies on disk.

    Attributes:
        id: its folder's name under candidates/.
        path: that folder.
        info: candidate.json as written: `config` (TrialConfig), `metrics` by split, `curve`, `params`, `flops`,
            `latency_ms`, `split_fingerprint`, `seconds`, `outcome`. Only `id` is sure to be there.
    """

    id: str
    path: UPath
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The backbone's name, or "unknown" for a candidate that only brings predictions."""
        return str(self.info.get("config", {}).get("backbone", "unknown"))

    def probs(self, split: str) -> np.ndarray:
        """Stored predictions of a split ("select" or "tune"): float32 (N, C), memory-mapped when local.

        Raises FileNotFoundError when the candidate has none, ValueError when the file is not a plain array.
        """
        return read_array(self.path / f"{split}_probs.npy")

    @property
    def has_weights(self) -> bool:
        return (self.path / "weights.safetensors").exists()


def open_run(path: AnyPath | None = None, root: AnyPath = RUNS) -> UPath:
    """The run directory `path`, or the newest one under `root` (by the time of its run.json).

    Raises UserError when there is none.
    """
    if path is not None:
        run = UPath(path)
        if not (run / "run.json").exists():
            raise UserError(f"{run} is not a run directory: it has no run.json; make one with python -m search.run")
        return run
    runs = [run for run in UPath(root).glob("*") if (run / "run.json").exists()]
    if not runs:
        raise UserError(f"no run directory under {root}/; make one with python -m search.run, or name one with --run")
    return max(runs, key=lambda run: (run / "run.json").stat().st_mtime)


def read_run(run: UPath) -> dict[str, Any]:
    """run.json; raises UserError when it is unreadable or lacks `classes` or `split_fingerprint`."""
    info = read_json(run / "run.json")
    missing = [key for key in ("classes", "split_fingerprint") if key not in info]
    if missing:
        raise UserError(f"{run / 'run.json'} lacks {' and '.join(missing)}; a run directory needs both")
    return info


def select_labels(run: UPath) -> np.ndarray:
    """Labels of the select split, int64 (N,)."""
    return read_array(run / "select_labels.npy")


def list_candidates(run: UPath) -> list[Candidate]:
    """Every finished candidate of a run, sorted by id. A folder without candidate.json is not one (yet)."""
    folder = run / "candidates"
    if not folder.exists():
        return []
    found = []
    for path in folder.iterdir():
        if (path / "candidate.json").exists():
            found.append(Candidate(path.name, path, read_json(path / "candidate.json")))
    return sorted(found, key=lambda candidate: candidate.id)


def write_candidate(
    run: UPath,
    info: dict[str, Any],
    select_probs: np.ndarray | None,
    tune_probs: np.ndarray | None = None,
    weights: bytes | None = None,
) -> Candidate:
    """Write candidates/<info["id"]>/: arrays (N, C) and weights (safetensors bytes) first, candidate.json last.

    Without `select_probs` (a refit, which was trained on the select split, too) it can predict but not be selected.
    Writing the same id again replaces it, so a trial that died between two files is simply written once more.
    """
    path = run / "candidates" / info["id"]
    path.mkdir(parents=True, exist_ok=True)
    if select_probs is not None:
        write_array(path / "select_probs.npy", np.asarray(select_probs, np.float32))
    if tune_probs is not None:
        write_array(path / "tune_probs.npy", np.asarray(tune_probs, np.float32))
    if weights is not None:
        write_bytes(path / "weights.safetensors", weights)
    write_json(path / "candidate.json", info)
    return Candidate(info["id"], path, info)


def remove_checkpoint(run: UPath, id: str) -> None:
    """Forget a trial's checkpoint: it has finished, or will not go on."""
    path = run / "checkpoints" / id
    if not path.exists():
        return
    if _is_local(path):
        shutil.rmtree(str(path), ignore_errors=True)
    else:
        path.rmdir(recursive=True)


def remove_temporaries(run: UPath) -> None:
    """Remove what processes that were killed in the middle of `write_bytes` have left of a run's candidates."""
    if _is_local(run):
        for path in [*run.glob(".*.tmp"), *run.glob("candidates/*/.*.tmp")]:
            path.unlink(missing_ok=True)


def write_bytes(path: UPath, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_local(path):
        path.write_bytes(data)  # an object store shows an object only once it is whole
        return
    temporary = Path(str(path.parent)) / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, str(path))
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: UPath, value: Any) -> None:
    """Atomically write indented JSON; NaN and infinities are errors, for no JSON reader has to accept them."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: UPath) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_array(path: UPath, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: UPath) -> np.ndarray:
    """Read a .npy without ever unpickling; local files are memory-mapped, read-only."""
    if _is_local(path):
        return np.load(str(path), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def _is_local(path: UPath) -> bool:
    return path.protocol in ("", "file")
