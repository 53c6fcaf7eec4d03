"""The run directory on disk: a public format that other tools may read and add candidates to.

    runs/<name>/
      run.json                  data set, class names, split fingerprint, ... (needs `classes`, `split_fingerprint`)
      study.db                  the Optuna study in SQLite, unless it lies in a database (--storage)
      splits.npz                train / tune / select indices, int64
      select_labels.npy         int64 (N,)
      candidates/<id>/
        candidate.json          written LAST: a candidate without it does not exist (needs `id`)
        select_probs.npy        float32 (N, C), rows sum to 1, in select_labels order
        tune_probs.npy          optional, the same for the tune split
        weights.safetensors     absent for a candidate that only brings predictions, and where --keep-weights has
                                deleted them (candidate.json then has `weights_deleted`)
      checkpoints/<id>/         latest checkpoint of a trial that has not finished
      ensembles/<name>.json
      report.html, report.json  of the ensemble written last
      .lock                     held by the one search.run or search.refit that is at work here
      data/<name>-<fingerprint>/  of a run on a cluster or an object store: the prepared data set, see share.py

A run directory may lie on an object store (s3://bucket/run, with s3fs installed). Everything here waits out an outage
of the store of up to OUTAGE_S seconds; a longer one raises StorageLost.

Only JSON, .npy and .npz without pickles, safetensors, SQLite, and checkpoints as tensors alone (`weights_only`) are
ever read, so opening somebody else's run directory cannot run code. Neither torch nor Ray is imported here: listing
candidates and reading their predictions takes milliseconds.
"""

import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
from upath import UPath

from trainables.errors import UserError

RUNS = "runs"
AnyPath = str | os.PathLike | UPath
T = TypeVar("T")

OUTAGE_S = 120.0  # of remote storage that is waited out
RETRY_S = 2.0
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, ValueError)

for _protocol in ("s3", "gs", "gcs", "abfs"):  # others write there, too: what was listed once says little
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


class StorageLost(UserError):
    """Remote storage could not be reached for OUTAGE_S seconds."""


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
        return exists(self.path / "weights.safetensors")


def open_run(path: AnyPath | None = None, root: AnyPath = RUNS) -> UPath:
    """The run directory `path`, or the newest one under `root` (by the time of its run.json).

    Raises UserError when there is none.
    """
    if path is not None:
        run = reach(path)
        if not (run / "run.json").exists():
            raise UserError(f"{run} is not a run directory: it has no run.json; make one with python -m search.run")
        return run
    runs = [run for run in UPath(root).glob("*") if (run / "run.json").exists()]
    if not runs:
        raise UserError(f"no run directory under {root}/; make one with python -m search.run, or name one with --run")
    return max(runs, key=lambda run: (run / "run.json").stat().st_mtime)


def trial_id(number: int) -> str:
    """The candidate that a trial of the study becomes: "0007"."""
    return f"{number:04d}"


def study_name(run: UPath) -> str:
    """What the run's study is called in its storage: the folder may have been renamed since, or copied."""
    return str(read_run(run).get("study", run.absolute().name))


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
    found = []
    for path in list_folder(run / "candidates"):
        if exists(path / "candidate.json"):
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
    if is_local(path):
        shutil.rmtree(str(path), ignore_errors=True)
    elif exists(path):
        patiently(path, lambda: path.rmdir(recursive=True))


def reach(path: AnyPath) -> UPath:
    """The path, or a UserError when it is remote and nobody answers there: the first contact is not waited for."""
    try:
        found = UPath(path)
        if not is_local(found):
            found.exists()
        return found
    except Exception as error:  # a client that is not installed, no such host, no credentials
        raise UserError(
            f"{path} cannot be reached ({error}); check the address, the credentials, and that its client is installed "
            "(s3://: pip install 'ninefold[s3]')"
        ) from None


def is_local(path: UPath) -> bool:
    """Whether it is a path of this machine's file system, which may be a mounted one (NFS)."""
    return path.protocol in ("", "file")


def patiently(path: UPath, action: Callable[[], T]) -> T:
    """What `action` returns; when `path` is remote it is tried again while the storage is out of reach.

    Raises StorageLost after OUTAGE_S seconds of that; what no waiting mends (a missing file, no permission) at once.
    """
    if is_local(path):
        return action()
    end = time.monotonic() + OUTAGE_S
    while True:
        try:
            return action()
        except FINAL_ERRORS:
            raise
        except Exception as error:  # every store's client has its own
            if time.monotonic() > end:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StorageLost(
                    f"{path} could not be reached for {OUTAGE_S:g} s ({reason}); the same command goes on"
                ) from error
        time.sleep(RETRY_S)


def exists(path: UPath) -> bool:
    return patiently(path, path.exists)


def list_folder(path: UPath) -> list[UPath]:
    """What lies in a folder, in no order; [] when there is none."""
    return patiently(path, lambda: list(path.iterdir()) if path.exists() else [])


def read_bytes(path: UPath) -> bytes:
    return patiently(path, path.read_bytes)


def remove_temporaries(run: UPath) -> None:
    """Remove what processes that were killed in the middle of `write_bytes` have left of a run's candidates."""
    if is_local(run):
        for path in [*run.glob(".*.tmp"), *run.glob("candidates/*/.*.tmp")]:
            path.unlink(missing_ok=True)


def write_bytes(path: UPath, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    if not is_local(path):
        patiently(path, lambda: path.write_bytes(data))  # an object store shows an object only once it is whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
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
        value = json.loads(read_bytes(path))
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
    if is_local(path):
        return np.load(str(path), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
