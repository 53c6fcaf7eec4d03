"""What a command line asks for, with everything checked that can be wrong: before anything is written or started."""

import os
import uuid
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from upath import UPath

from cluster.connect import in_cluster
from ensemble.selection.goal import Goal, read_goal
from search.config import SearchConfig, Task
from search.costs import Costs
from search.spaces import Space, known_spaces, load_space
from search.study.warm_start import read_earlier
from trainables.config import TrialConfig
from trainables.data.dataset import Data, read_meta
from trainables.data.prepare import prepare
from trainables.data.share import open_run_data
from trainables.data.splits import Splits, notes_on, split_data
from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.backbones import check_backbone, check_image_size, check_resizing, plain_name
from trainables.models.classic import NETWORKS
from trainables.models.licences import is_restricted
from trainables.models.speed import gflops, native_size, training_rate
from trainables.models.weights import find_weights
from trainables.run_directory import RUNS, RunInfo, read_run, study_name
from trainables.storage import exists, reach

TRIED_PROPOSALS = 20
GPU_RATE = 4000.0  # 1e9 operations per second of training, of a GPU that is not here to be measured
MOST_LANES = 8  # on a machine without GPUs, see cluster.capacity


@dataclass(frozen=True)
class Plan:
    """Everything that can be wrong has been checked: the sweep can start."""

    run: UPath
    data: Data
    splits: Splits
    space: Space
    backbones: dict[str, WeightSource | None]
    trials: int | None
    study: str  # its name in the study's storage
    missing: list[str]  # backbones whose pretrained weights were not found
    earlier: list[FrozenTrial]  # of --warm-start
    costs: Costs  # of the backbones with pretrained weights
    left_out: list[str]  # backbones of the space that it does not want for these images and this budget
    restricted: list[str]  # those that --weights-licence leaves out
    notes: list[str]  # on the splits
    goal: Goal = field(default_factory=Goal)  # what --metric names


def with_budget(config: SearchConfig) -> SearchConfig:
    """The config with the space's own minutes when it names no budget. Raises UserError for an unknown space."""
    if config.trials or config.minutes or config.device_hours or config.target_accuracy or config.stop_on_plateau:
        return config
    space = load_space(_auto_space(config) if config.space == "auto" else config.space, config.scale)
    return replace(config, minutes=space.minutes)


def make_plan(config: SearchConfig) -> Plan:
    """Load the space, find the weights, prepare and split the data; raises UserError for what the user can fix."""
    space = load_space(_auto_space(config) if config.space == "auto" else config.space, config.scale)
    wanted = {plain_name(name): start for name, start in space.backbones.items()}
    if config.backbones:
        # in one order however they are named, for Optuna wants the same choices when a sweep goes on
        names = sorted({plain_name(name) for name in config.backbones})
        wanted = {b: "scratch" if config.from_scratch or b in NETWORKS else "pretrained" for b in names}
    for name in wanted:
        check_backbone(name)
    restricted = []
    if config.weights_licence == "permissive" and not config.backbones:
        restricted = [name for name, start in wanted.items() if start == "if found" and is_restricted(name)]
        wanted = {name: start for name, start in wanted.items() if name not in restricted}
    backbones: dict[str, WeightSource | None] = {}
    missing = []
    for name, start in wanted.items():
        try:
            backbones[name] = None if start == "scratch" else find_weights(name, config.weights_dir)
        except UserError:
            if start == "pretrained":
                raise
            missing.append(name)
            if start == "or scratch":
                backbones[name] = None
    if not backbones:
        raise UserError(f"none of the backbones of space {space.name} has weights here; see --weights-dir, --backbones")
    data = prepare(
        config.data, config.data_dir, size=config.stored_size, fit=config.fit,
        group_by=config.group_by, twins=not config.ignore_twins, labels=config.labels,
    )  # fmt: skip
    run = reach(config.run or f"{RUNS}/{data.name}-{space.name}{'-tiny' if config.scale == 'tiny' else ''}")
    if in_cluster() and not run.is_absolute():
        raise UserError(
            f"run directory {run} would lie in the job's copy of the sources, which is deleted; "
            "name one that all nodes see: --run /shared/NAME or --run s3://BUCKET/NAME"
        )
    run = run.absolute()
    info = read_run(run) if exists(run / "run.json") else None
    if info is not None and _is_of_before(info, data, config):
        data, splits = open_run_data(run, info)
        notes = ["this run began when images were split by other rules, and keeps the splits that it has"]
    else:
        splits = split_data(data, config.split_seed)
        notes = notes_on(data, splits, config.split_seed)
    costs = _costs(backbones, splits, config)
    begun = () if info is None else info.backbones
    task = make_task(backbones, splits, data, costs, config.minutes and 60 * config.minutes)
    taking_part = list(backbones)
    if not config.backbones:
        taking_part = [name for name in backbones if (name in begun if begun else space.takes(task, name))]
    if not taking_part:  # the time is too short for any: then the cheapest
        taking_part = [min(costs.gflops, key=costs.gflops.__getitem__)] if costs.gflops else list(backbones)
    left_out = [name for name in backbones if name not in taking_part]
    backbones = {name: backbones[name] for name in taking_part}
    task = replace(task, backbones=backbones)
    _check_space(space, task)
    # unique, for a database may hold the studies of many runs
    study = study_name(run) if info is not None else f"{run.name}-{uuid.uuid4().hex[:8]}"
    other_budget = config.minutes or config.device_hours or config.target_accuracy or config.stop_on_plateau
    trials = config.trials or (None if other_budget else space.trials)
    goal = read_goal(config.metric, list(data.classes))
    metric = "tune_accuracy" if config.objective == "metric" and goal.higher_is_better else "tune_log_loss"

    def propose(trial: optuna.Trial) -> TrialConfig:
        return space.suggest(trial, task)

    earlier = [t for old in config.warm_start for t in read_earlier(old, metric, propose)]
    return Plan(
        run, data, splits, space, backbones, trials, study, missing, earlier, costs, left_out, restricted, notes, goal
    )


def _is_of_before(info: RunInfo, data: Data, config: SearchConfig) -> bool:
    """Whether a run began on these images when they were split by other rules; it keeps the splits that it has."""
    if info.search.get("split_seed", 0) != config.split_seed:
        return False
    if info.data.fingerprint == read_meta(data.path).content != data.fingerprint:
        return True
    return (
        info.data.fingerprint == data.fingerprint
        and info.split_fingerprint != split_data(data, config.split_seed).fingerprint
    )


def make_task(
    backbones: dict[str, WeightSource | None], splits: Splits, data: Data, costs: Costs, left: float | None,
    device: Literal["cuda", "cpu"] = "cpu",
) -> Task:  # fmt: skip
    """What a space is told, for trials on `device` with `left` seconds (None: no limit) to go."""
    side = min(data.images.shape[1:3])
    counts = np.bincount(np.asarray(data.labels), minlength=len(data.classes))
    return Task(
        backbones, len(data.classes), costs.images, len(splits.train), side, device, left, costs.table(),
        splits.trainings, float(counts.max() / counts.min()),
    )  # fmt: skip


def _costs(backbones: dict[str, WeightSource | None], splits: Splits, config: SearchConfig) -> Costs:
    """What pretrained backbones are guessed to cost here, before the first trial has shown it."""
    pretrained = [name for name, weights in backbones.items() if weights is not None]
    native = {name: native_size(name) for name in pretrained}
    work = {name: gflops(name, native[name]) for name in pretrained}
    if not pretrained:
        rate = 1.0
    elif torch.cuda.is_available():
        rate = training_rate("cuda")
    elif in_cluster():  # this may be a machine without GPUs
        rate = GPU_RATE
    else:
        rate = training_rate("cpu", max(1, round(config.cpus_per_trial or (os.cpu_count() or 1) / MOST_LANES)))
    images = len(np.unique(np.concatenate([splits.train, splits.tune, splits.select])))
    return Costs(native, work, rate, images, len(splits.train), splits.trainings)


def checked(trial: TrialConfig, task: Task) -> TrialConfig:
    """The proposal, or a UserError that says why it cannot be trained: before it costs a device."""
    if trial.batch_size > task.train_images and not trial.is_probe:  # which has no batches
        raise UserError(f"batch_size {trial.batch_size} is larger than the train split ({task.train_images} images)")
    if trial.pretrained and task.backbones.get(trial.backbone) is None:
        raise UserError(f"{trial.backbone} is to start from pretrained weights, but none were asked for or found")
    check_image_size(trial)
    if trial.pretrained:
        check_resizing(trial.backbone, trial.image_size)
    return trial


def _check_space(space: Space, task: Task) -> None:
    """Raise the UserError of a space that proposes nothing that could be trained, before anything is written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    error = None
    for _ in range(TRIED_PROPOSALS):
        try:
            checked(space.suggest(study.ask(), task), task)  # type: ignore[arg-type]
            return
        except UserError as refused:
            error = refused
    assert error is not None
    raise error


def _auto_space(config: SearchConfig) -> str:
    if config.run and exists(reach(config.run) / "run.json"):
        begun = read_run(reach(config.run))
        if begun.space:  # a run that continues on another machine keeps its space
            # a file is imported only when the user names it: the run may be somebody else's
            if begun.space not in known_spaces() or str(begun.search.get("space")).endswith(".py"):
                raise UserError(
                    f"{config.run} is a sweep of a space of its own, {begun.space}; name its file with --space"
                )
            return begun.space
    if config.data == "digits":
        return "dry_run"
    return "auto"
