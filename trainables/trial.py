"""run_trial: one job of the sweep, from the prepared data to the candidate on disk, with every outcome named.

This is what a lane runs (see worker.py). It knows the run directory; it knows neither Ray nor Optuna.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from upath import UPath

from trainables.backbones import WeightSource
from trainables.config import TrialConfig
from trainables.data import Data, prepare
from trainables.errors import UserError
from trainables.features import OutOfTime
from trainables.run_directory import CandidateInfo, read_candidate, remove_checkpoint, write_candidate
from trainables.share import open_prepared
from trainables.splits import Splits, load_splits
from trainables.storage import Damaged, StorageLost, exists
from trainables.train import Diverged, Trained, train

LATENCY_REPEATS = 5


def run_trial(job: dict[str, Any], report: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Train one candidate and write it; called on every rank of a lane with the same job.

    `job` is JSON-able: `id`, `config` (TrialConfig as a dict), `run` (path of the run directory), `data` ({"path",
    "name", "data_dir", "size"}), `weights` (WeightSource as a dict, or None), `gpus` (of this lane), `deadline`
    (time.time(), or None), `node` (where it runs, for candidate.json; optional).

    Returns plain JSON: `outcome` is "finished", "time" (cut at the deadline, still a candidate), "pruned",
    "interrupted" (no time left to begin), "storage lost" (the run directory cannot be reached), "out of memory",
    "diverged" or "invalid"; with it the scores, or `error`. Any other exception is a bug, and the lane's matter; so is
    the MemoryError of one rank among several.
    """
    try:
        return _run_trial(job, report)
    except StorageLost as error:
        return {"outcome": "storage lost", "error": str(error)}


def _run_trial(job: dict[str, Any], report: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    config = TrialConfig.from_dict(job["config"])
    run = UPath(job["run"])
    data, splits = _open(job["run"], *sorted(job["data"].items()))
    weights = WeightSource(**job["weights"]) if job.get("weights") else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    written = run / "candidates" / job["id"]
    if exists(written / "candidate.json"):  # an earlier process got that far and died before it was heard
        info = read_candidate(written).info
        return {"outcome": info.outcome, **info.metrics, "seconds": info.seconds}
    try:
        trained = _train_within_memory(config, data, splits, report, weights, run, job)
        result: dict[str, Any] = {"outcome": trained.outcome, **trained.metrics, "seconds": trained.seconds}
        if trained.outcome != "pruned" and rank == 0:
            _write(run, job, config, data, splits, trained)
    except Diverged as error:
        result = {"outcome": "diverged", "error": str(error)}
    except StorageLost:
        raise
    except UserError as error:
        result = {"outcome": "invalid", "error": str(error)}
    except OutOfTime as error:
        return {"outcome": "interrupted", "error": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if world > 1:  # the other ranks wait in a collective: only the lane can end them, and name the outcome
            raise MemoryError(reason) from error
        result = {"outcome": "out of memory", "error": reason}
    if rank == 0 and result["outcome"] != "pruned":  # or interrupted, which looks the same from here
        remove_checkpoint(run, job["id"])
    return result


def _train_within_memory(
    config: TrialConfig, data: Data, splits: Splits, report: Callable[[dict[str, Any]], bool],
    weights: WeightSource | None, run: UPath, job: dict[str, Any],
) -> Trained:  # fmt: skip
    """train(), halving the micro-batch while memory runs out: the effective batch stays what the sampler asked for."""
    checkpoint = run / "checkpoints" / job["id"] / "state.safetensors"
    # without a GPU slot of its own a trial must not take somebody else's
    device = "cpu" if torch.cuda.is_available() and not job.get("gpus") else None
    while True:
        try:
            return train(
                config, data, splits, report, weights=weights, checkpoint=checkpoint,
                deadline=job.get("deadline"), device=device, tick=getattr(report, "alive", lambda: None),
            )  # fmt: skip
        except Damaged:  # the trial starts anew; on every rank, because all of them read the same file
            remove_checkpoint(run, job["id"])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or (dist.is_initialized() and dist.get_world_size() > 1):
                raise
            if config.accumulate >= config.batch_size:
                raise torch.OutOfMemoryError(str(error)) from error
            config = dataclasses.replace(config, accumulate=2 * config.accumulate)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@functools.lru_cache(maxsize=2)
def _open(run: str, *where: tuple[str, Any]) -> tuple[Data, Splits]:
    """The data and splits of a run; a lane opens them once. A node without the prepared data prepares it itself.

    Raises UserError when its images are no longer the run's: the splits would mean other images.
    """
    data_spec = dict(where)
    try:
        data = open_prepared(UPath(run), data_spec["path"])
    except StorageLost:
        raise
    except UserError:
        folder = data_spec["data_dir"]
        data = prepare(data_spec["name"], Path(folder) if folder else None, size=data_spec["size"])
        expected = Path(data_spec["path"]).name
        if data.path.name != expected:  # which ends in the fingerprint
            raise UserError(
                f"the images have changed since {run} began: prepared again they are {data.path.name}, expected "
                f"{expected}; restore them, or start a new run"
            ) from None
    return data, load_splits(UPath(run))


def _write(run: UPath, job: dict[str, Any], config: TrialConfig, data: Data, splits: Splits, trained: Trained) -> None:
    state = {k: v.detach().cpu().contiguous() for k, v in trained.model.state_dict().items()}
    mean, std = (tuple(x.flatten().tolist()) for x in (trained.pixels.mean, trained.pixels.std))
    flops, latency_ms = _cost(trained.model, trained.pixels.mean.device, trained.image_size)
    info = CandidateInfo(
        id=job["id"],
        config=dataclasses.replace(config, accumulate=trained.accumulate),
        num_classes=len(data.classes),
        mean=mean,
        std=std,
        image_size=trained.image_size,
        precision=trained.precision,
        outcome=trained.outcome,
        metrics=trained.metrics,
        tune_and_select_shared=splits.shared,
        curve=tuple(trained.curve),
        params=sum(p.numel() for p in trained.model.parameters()),
        flops=flops,
        latency_ms=latency_ms,
        seconds=round(trained.seconds, 3),
        node=job.get("node", platform.node()),
        resumed_after_epochs=tuple(trained.resumed),
        split_fingerprint=splits.fingerprint,
        finished=time.time(),
    )
    write_candidate(run, info, trained.probs.get("select"), trained.probs.get("tune"), save_safetensors(state))


@torch.no_grad()
def _cost(model: nn.Module, device: torch.device, size: int) -> tuple[int, float]:
    """FLOPs (two per multiply-add) and the median milliseconds of one image's forward pass."""
    x = torch.zeros(1, 3, size, size, device=device)
    with FlopCounterMode(display=False) as counter:
        model(x)
    times = []
    for _ in range(LATENCY_REPEATS):
        start = time.perf_counter()
        model(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return counter.get_total_flops(), round(1000 * sorted(times)[LATENCY_REPEATS // 2], 3)
