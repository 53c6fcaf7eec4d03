"""run_trial: one job of the sweep, from the prepared data to the candidate on disk, with every outcome named.

This is what a lane runs (see worker.py). It knows the run directory; it knows neither Ray nor Optuna.
"""

import dataclasses
import functools
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from upath import UPath

from trainables.all_images import cross_fit, with_last_epochs
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.share import open_prepared
from trainables.data.splits import Splits, load_splits
from trainables.errors import UserError
from trainables.features import OutOfTime
from trainables.job import DataSource, Job, Outcome, Reporter, Result
from trainables.run_directory import CandidateInfo, read_candidate, remove_checkpoint, write_candidate
from trainables.storage import Damaged, StorageLost, exists
from trainables.train import Diverged, Trained
from trainables.training.memory import is_out_of_memory, take_share
from trainables.training.ranks import from_first

LATENCY_REPEATS = 5


def run_trial(job: Job, report: Reporter) -> Result:
    """Train one candidate and write it; called on every rank of a lane with the same job.

    Outcomes are finished, time (cut at the deadline, still a candidate), pruned, interrupted (no time left to begin),
    storage lost (the run directory or its images cannot be reached), out of memory, diverged or invalid. Any other
    exception is a bug, and the lane's matter; so is the MemoryError of one rank among several.
    """
    try:
        return _run_trial(job, report)
    except StorageLost as error:
        return Result(Outcome.STORAGE_LOST, error=str(error))


def _run_trial(job: Job, report: Reporter) -> Result:
    run = UPath(job.run)
    try:
        data, splits = _open(job.run, job.data)
    except UserError as error:  # the images are no longer the run's, or cannot be had: it is the same for all trials
        raise StorageLost(str(error)) from error
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    written = run / "candidates" / job.id
    if from_first(
        lambda: exists(written / "candidate.json")
    ):  # an earlier process got that far and died before it was heard
        info = read_candidate(written).info
        if not job.config.is_same(info.config):
            return Result(Outcome.INVALID, error=f"candidates/{job.id} is of another configuration than this trial's")
        return Result(Outcome(info.outcome), info.metrics, info.seconds)
    try:
        trained = _train_within_memory(job, data, splits, report)
        result = Result(trained.outcome, trained.metrics, trained.seconds)
        if trained.outcome.leaves_candidate and rank == 0:
            _write(job, data, splits, trained)
    except Diverged as error:
        result = Result(Outcome.DIVERGED, error=str(error))
    except StorageLost:
        raise
    except UserError as error:
        result = Result(Outcome.INVALID, error=str(error))
    except OutOfTime as error:
        return Result(Outcome.INTERRUPTED, error=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if world > 1:  # the other ranks wait in a collective: only the lane can end them, and name the outcome
            raise MemoryError(reason) from error
        result = Result(Outcome.OUT_OF_MEMORY, error=reason)
    if rank == 0 and result.outcome is not Outcome.PRUNED:  # or interrupted, which looks the same from here
        remove_checkpoint(run, job.id)
    return result


def _train_within_memory(job: Job, data: Data, splits: Splits, report: Reporter) -> Trained:
    """Train as the splits ask for. When memory runs out, activations are computed twice instead of being kept; when it
    still does, the micro-batch is halved, again and again: the effective batch stays as asked for."""
    config, run, recompute = job.config, UPath(job.run), False
    checkpoint = run / "checkpoints" / job.id / "state.safetensors"
    if splits.folds and job.lesson is not None:
        raise UserError("these images are too few for a select split, so what was taught could not be scored")
    taught: dict[str, Any] = {} if job.lesson is None else {"lesson": job.lesson}
    # without a GPU slot of its own a trial must not take somebody else's
    device = "cpu" if torch.cuda.is_available() and not job.gpus else None
    take_share(job.gpus)
    while True:
        try:
            return (cross_fit if splits.folds else with_last_epochs)(
                config, data, splits, report, weights=job.weights, checkpoint=checkpoint, deadline=job.deadline,
                device=device, tick=report.alive, recompute=recompute, **taught,
            )  # fmt: skip
        except Damaged:  # the trial starts anew; on every rank, because all of them read the same file
            remove_checkpoint(run, job.id)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # of one rank among several: the sweep has the trial run again, see Sweep.finish
            if not is_out_of_memory(error) or (dist.is_initialized() and dist.get_world_size() > 1):
                raise
            if recompute:
                if config.accumulate >= config.batch_size:
                    raise torch.OutOfMemoryError(str(error)) from error
                config = dataclasses.replace(config, accumulate=2 * config.accumulate)
            recompute = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@functools.lru_cache(maxsize=2)
def _open(run: str, source: DataSource) -> tuple[Data, Splits]:
    """The data and splits of a run; a lane opens them once. A node without the prepared data prepares it itself.

    Raises UserError when its images are no longer the run's: the splits would mean other images.
    """
    try:
        data = open_prepared(UPath(run), source.path)
    except StorageLost:
        raise
    except UserError:
        folder = source.data_dir
        data = prepare(
            source.name, Path(folder) if folder else None, size=source.size, fit=source.fit,
            group_by=source.group_by, twins=source.twins, labels=source.labels,
        )  # fmt: skip
        expected = Path(source.path).name
        if data.path.name != expected:  # which ends in the fingerprint
            raise UserError(
                f"the images have changed since {run} began: prepared again they are {data.path.name}, expected "
                f"{expected}; restore them, or start a new run"
            ) from None
    return data, load_splits(UPath(run))


def _write(job: Job, data: Data, splits: Splits, trained: Trained) -> None:
    state, before = (
        None if one is None else save_safetensors({k: v.detach().cpu().contiguous() for k, v in one.items()})
        for one in (trained.model.state_dict(), trained.before)
    )
    mean, std = (tuple(x.flatten().tolist()) for x in (trained.pixels.mean, trained.pixels.std))
    flops, latency_ms = _cost(trained.model, trained.pixels.mean.device, trained.image_size)
    info = CandidateInfo(
        id=job.id,
        config=dataclasses.replace(job.config, accumulate=trained.accumulate),
        num_classes=len(data.classes),
        mean=mean,
        std=std,
        image_size=trained.image_size,
        precision=trained.precision,
        outcome=trained.outcome.value,
        metrics=trained.metrics,
        tune_and_select_shared=splits.shared,
        curve=tuple(trained.curve),
        params=sum(p.numel() for p in trained.model.parameters()),
        flops=flops,
        latency_ms=latency_ms,
        seconds=round(trained.seconds, 3),
        node=job.node or platform.node(),
        device=trained.pixels.mean.device.type,
        resumed_after_epochs=tuple(trained.resumed),
        split_fingerprint=splits.fingerprint,
        finished=time.time(),
        refitted=trained.refitted,
        taught_by=job.lesson.name if job.lesson is not None else "",
    )
    write_candidate(UPath(job.run), info, trained.probs.get("select"), trained.probs.get("tune"), state, before)


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
