"""python -m search.run : one command from images to an ensemble.

plan (plan.py) -> open the run directory -> connect -> sweep -> leaderboard and first ensemble.
"""

import importlib.metadata
import inspect
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import tyro
from rich.console import Console
from rich.table import Table
from upath import UPath

from cluster.capacity import Lanes, connected
from cluster.connect import in_cluster
from cluster.metrics import SweepMetrics
from cluster.tuner import run_trials
from ensemble.file import Ensemble, write_ensemble
from ensemble.report.write import PAGE, summary, write_report
from ensemble.running import EnsembleSoFar
from ensemble.select import Select, choose_from, open_pool, show
from ensemble.show import make_console
from search.board import LiveBoard
from search.budget import Budget, WeightStore, parse_keep
from search.config import SearchConfig, Task
from search.plan import Plan, checked, make_plan, make_task, with_budget
from search.study.objective import Contribution
from search.study.open import fetch_study, open_study, store_study
from search.study.warm_start import add_earlier, enqueue_first
from search.sweep import Sweep
from search.timing import SECONDS_USED
from trainables.config import TrialConfig
from trainables.data.share import share_data
from trainables.data.splits import save_splits
from trainables.errors import UserError, exit_on_user_error
from trainables.job import DataSource
from trainables.run_directory import (
    DataInfo,
    RunInfo,
    SplitSizes,
    list_candidates,
    lock_run,
    read_run,
    refuse_links,
    remove_temporaries,
    to_json,
)
from trainables.storage import hide_password, is_local, write_array, write_json
from trainables.trial import run_trial

LIBRARIES = ("torch", "timm", "ray", "optuna")
# Share of --minutes, and most seconds, kept for predictions, selection and summary: without and with a test part
RESERVES = ((0.05, 60.0), (0.15, 300.0))
LEADERBOARD_ROWS = 10
LEADERBOARD_METRICS = {"tune_accuracy", "select_accuracy", "select_log_loss"}
TRACEBACK_LINES = 8  # of a trial that failed through a bug; the study keeps all of them


def run_sweep(config: SearchConfig) -> Ensemble | None:
    """Run (or go on with) the sweep of `config`; returns its ensemble, or None when no trial has finished.

    Raises UserError, before anything is written or started, for whatever the user can fix.
    """
    began = time.time()
    console = make_console()
    asked, config = config, with_budget(config)
    plan = make_plan(config)
    if config != asked:
        console.print(f"no budget was given, so this sweep takes {config.minutes:g} minutes in all; see --minutes")
    for name in plan.missing:
        instead = "it starts from random ones" if name in plan.backbones else "this sweep runs without it"
        console.print(f"{name}: no pretrained weights found here, so {instead}", style="yellow")
    if config.storage:  # one that cannot be opened is told before anything is written
        open_study(config.storage, plan.study, config.objective, config.sampler, config.pruner, config.seed)
    try:
        _open_run(plan, config)
        lock = lock_run(plan.run)
    except OSError as error:
        raise UserError(f"run directory {plan.run} cannot be written ({error}); name another with --run") from error
    remove_temporaries(plan.run)
    file = None if config.storage else fetch_study(plan.run)
    storage = config.storage or f"sqlite:///{file}"
    study = open_study(storage, plan.study, config.objective, config.sampler, config.pruner, config.seed)
    add_earlier(study, plan.earlier)
    used = float(study.user_attrs.get(SECONDS_USED, 0.0))
    deadline = None
    if config.minutes is not None:
        share, most = RESERVES[plan.data.test_images > 0]
        reserve = min(share * 60 * config.minutes, most)
        deadline = began + 60 * config.minutes - used - reserve
    folder = str(config.data_dir.resolve()) if config.data_dir else None
    source = DataSource(
        str(plan.data.path), config.data, folder, config.stored_size, config.fit, config.group_by,
        not config.ignore_twins, config.labels,
    )  # fmt: skip
    live = EnsembleSoFar(plan.run, config.top_k)
    board = LiveBoard(live, plan.trials, deadline, plan.splits.shared)
    budget = Budget(
        trials=plan.trials, began=began, deadline=deadline,
        device_seconds=None if config.device_hours is None else 3600 * config.device_hours,
        target_accuracy=config.target_accuracy, plateau=config.stop_on_plateau, final_seeds=config.final_seeds,
    )  # fmt: skip
    tune_labels = np.asarray(plan.data.labels)[plan.splits.tune]
    sweep = Sweep(
        study, plan.run, source, budget, plan.backbones, board,
        promote=config.pruner == "promote", live=live,
        contribution=Contribution(tune_labels, config.top_k) if config.objective == "ensemble" else None,
        store=WeightStore(plan.run, parse_keep(config.keep_weights)) if config.keep_weights else None,
        save=(lambda: store_study(plan.run, file)) if file and not is_local(plan.run) else lambda: None,
    )  # fmt: skip
    board.earlier = len(sweep.tried) - len(sweep.waiting)
    if sweep.has_more():
        _print_start(console, plan, config, sweep)
        with connected() as dashboard:
            lanes = Lanes(config.lane_request(), console.print)
            spec = lanes.spec
            sweep.gpus = spec.gpus

            def lanes_now() -> int:
                count = lanes.now(wanted=plan.trials and plan.trials - len(sweep.tried))
                sweep.time.place(max(1, count), devices=spec.workers * (spec.gpus or 1))
                return count

            def task() -> Task:
                left = sweep.time.left()
                return make_task(
                    plan.backbones, plan.splits, plan.data, plan.costs, None if left == math.inf else left,
                    "cuda" if spec.gpus else "cpu",
                )  # fmt: skip

            def propose(trial: optuna.Trial) -> TrialConfig:
                now = task()
                return checked(plan.space.suggest(trial, now), now)

            sweep.propose_with(propose, plan.costs)
            enqueue_first(study, plan.space.first(task()), list(plan.backbones))
            board.links = [f"Ray dashboard {dashboard}"] if dashboard else []
            board.links.append(f"study: optuna-dashboard {storage if file else '(as in --storage)'}")
            board.metrics = SweepMetrics(plan.run.name)
            console.print("\n".join([_at_a_time(lanes), *board.links]), markup=False)
            _print_first(console, plan, task(), sweep)
            with board:
                while sweep.has_more() and not sweep.stopping:
                    run_trials(sweep, run_trial, spec, lanes_now)
        sweep.remove_stale_checkpoints()
    if not sweep.stopping:
        sweep.close()
    ensemble = _conclude(console, plan, config, sweep, began)
    if lock is not None:
        lock.release()
    return ensemble


def _open_run(plan: Plan, config: SearchConfig) -> None:
    """Create the run directory, run.json last; or make sure that an existing one is of the same data and splits."""
    refuse_links(plan.run)
    path = plan.run / "run.json"
    begun = read_run(plan.run) if path.exists() else None
    if begun is not None:
        _check_continues(plan, config, begun)
    splits, data = plan.splits, plan.data
    if in_cluster() or not is_local(plan.run):
        share_data(plan.run, data)  # of an old run, too: it may have begun on one machine, without a copy
    if begun is not None:
        return
    save_splits(plan.run, splits)
    write_array(plan.run / "select_labels.npy", np.asarray(data.labels)[splits.select])
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    info = RunInfo(
        classes=data.classes,
        split_fingerprint=splits.fingerprint,
        splits=SplitSizes(
            len(splits.train), len(splits.tune), len(splits.select), test=data.test_images, shared=splits.shared
        ),
        data=DataInfo(
            name=config.data,
            fingerprint=data.fingerprint,
            folder=data.path.name,
            size=(data.images.shape[1], data.images.shape[2]),
            stored_size=config.stored_size,
            fit=data.fit,
            white=data.white,
            group_by=config.group_by,
            twins=not config.ignore_twins,
            mean=data.mean,
            std=data.std,
        ),
        search={**options, "storage": config.storage and hide_password(config.storage)},
        space=plan.space.name,
        backbones=tuple(sorted(plan.backbones)),
        study=plan.study,
        command=hide_password(shlex.join(sys.argv)),
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        created=time.time(),
    )
    write_json(path, to_json(info))


def _check_continues(plan: Plan, config: SearchConfig, begun: RunInfo) -> None:
    """Raise UserError unless the run that is there already is of the same data, backbones and space."""
    if begun.split_fingerprint != plan.splits.fingerprint:
        raise UserError(f"{plan.run} holds a run on other data or splits ({begun.data.name}); name another with --run")
    asked = sorted(plan.backbones)
    if begun.backbones and sorted(begun.backbones) != asked:
        raise UserError(
            f"{plan.run} is a sweep over {', '.join(begun.backbones)}, not over {', '.join(asked)}; "
            "ask for the same backbones (and have their weights), or name another with --run"
        )
    was = (begun.space or plan.space.name, begun.search.get("scale", config.scale))
    if was != (plan.space.name, config.scale):
        raise UserError(
            f"{plan.run} is a sweep of space {was[0]} at scale {was[1]}, not of {plan.space.name} at "
            f"{config.scale}; ask for the same, or name another with --run"
        )


def _conclude(console: Console, plan: Plan, config: SearchConfig, sweep: Sweep, began: float) -> Ensemble | None:
    """Leaderboard, ensemble, test summary, and what to do next."""
    _print_leaderboard(console, plan.run)
    for id, error, trace in sweep.failures():
        console.print(f"{id} failed: {error}", style="yellow", markup=False)
        for line in trace.strip().splitlines()[-TRACEBACK_LINES:]:
            console.print(f"    {line}", style="dim", markup=False)
    command = f"python -m search.run {shlex.join(sys.argv[1:])}".strip()
    if sweep.stopping:
        console.print(f"stopped; the same command goes on: {command}")
    elif reason := sweep.enough():
        console.print(f"ended early: {reason}")
    if not list_candidates(plan.run):
        console.print("no trial has finished, so there is no ensemble")
        return None
    args = Select(top_k=config.top_k, run=(str(plan.run),))
    pool = open_pool(args)
    ensemble = choose_from(pool, args)
    write_ensemble(plan.run, ensemble)
    show(pool, ensemble)
    if sweep.stopping:
        console.print("the test part stays unread until the sweep is complete")
    else:
        found = write_report([plan.run], ensemble, sweep.study)
        if "test" not in found:
            why = found["missing"].get("test", "the data set has no test part")
            console.print(f"{why}, so nothing is said about unseen images beyond the select split", markup=False)
        console.print("\n".join(summary(found)), style="bold")
        console.print(f"report: {_shown(plan.run / PAGE)}", markup=False)
    console.print(f"\n{len(pool.candidates)} candidates in {_shown(plan.run)} after {time.time() - began:.0f} s")
    console.print("next:")
    console.print(f"  python -m ensemble.select --top-k {config.top_k} --run {_shown(plan.run)}", markup=False)
    console.print(f"  python -m ensemble.predict --run {_shown(plan.run)} --images FOLDER", markup=False)
    return ensemble


def _print_start(console: Console, plan: Plan, config: SearchConfig, sweep: Sweep) -> None:
    s = plan.splits
    shared = " (too few images to keep tune and select apart: they are the same)" if s.shared else ""
    console.print(
        f"{config.data}: {len(s.train)} train, {len(s.tune)} tune, {len(s.select)} select, "
        f"{plan.data.test_images} test images{shared}, {len(plan.data.classes)} classes"
    )
    for note in plan.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"space {plan.space.name} over {', '.join(plan.backbones)}; run directory {_shown(plan.run)}")
    if sweep.counted:
        console.print(f"going on with {sweep.counted} trials, {len(sweep.interrupted)} of them cut in the middle")


def _print_first(console: Console, plan: Plan, task: Task, sweep: Sweep) -> None:
    """What the space tries first, and what each is expected to take."""
    first = [params for params in plan.space.first(task) if params.get("backbone") in plan.backbones]
    if not first or sweep.counted:
        return
    left = "" if task.left is None else f" of {task.left:.0f} s for each"
    table = Table(title=f"tried first{left}; a lane trains at about {plan.costs.rate:.0f} GFLOP/s")
    for heading in ("backbone", "how"):
        table.add_column(heading)
    for heading in ("pixels", "epochs", "about, s"):
        table.add_column(heading, justify="right")
    for params in first:
        config = plan.space.suggest(optuna.trial.FixedTrial(params), task)  # type: ignore[arg-type]
        how = "probe" if config.is_probe else "tuned" if config.pretrained else "from scratch"
        speed = sweep.time.seconds(config)
        seconds = "" if speed is None else f"{speed.start + config.epochs * speed.epoch:.0f}"
        table.add_row(config.backbone, how, str(config.image_size), str(config.all_epochs or ""), seconds)
    console.print(table)
    if plan.left_out:
        console.print(f"left out for these images and this budget: {', '.join(plan.left_out)}")


def _print_leaderboard(console: Console, run: UPath) -> None:
    # candidates that other tools have added need not have all of this
    scored = [c.info for c in list_candidates(run) if c.info.metrics.keys() >= LEADERBOARD_METRICS and c.info.config]
    rows = sorted(scored, key=lambda info: info.metrics["select_log_loss"])
    if not rows:
        return
    table = Table(
        title=f"leaderboard: {min(len(rows), LEADERBOARD_ROWS)} of {len(rows)} candidates, by select log-loss"
    )
    for heading in ("candidate", "backbone"):
        table.add_column(heading)
    for heading in ("tune acc.", "select acc.", "select log-loss", "epochs", "lr", "params", "ms/image", "seconds"):
        table.add_column(heading, justify="right")
    for info in rows[:LEADERBOARD_ROWS]:
        m, c = info.metrics, info.config
        assert c is not None
        table.add_row(
            info.id, c.backbone, f"{m['tune_accuracy']:.2%}", f"{m['select_accuracy']:.2%}",
            f"{m['select_log_loss']:.4f}", str(len(info.curve)), f"{c.lr:.1e}", f"{(info.params or 0) / 1e6:.2f} M",
            f"{info.latency_ms or 0:.1f}", f"{info.seconds or 0:.0f}",
        )  # fmt: skip
    console.print(table)


def _at_a_time(lanes: Lanes) -> str:
    spec = lanes.spec
    each = f"{spec.cpus:g} CPUs" + (f" and {spec.gpus:g} GPUs" if spec.gpus else "")
    each = f"{spec.workers} x {each} each" if spec.workers > 1 else f"{each} each"
    return f"{lanes.count} trial{'s' * (lanes.count > 1)} at a time, {each}"


def _shown(run: UPath) -> str:
    """The run's path as a person would type it."""
    try:
        return str(Path(str(run)).relative_to(Path.cwd()))
    except ValueError:
        return str(run)


def main() -> None:
    with exit_on_user_error():
        description = inspect.getdoc(SearchConfig)
        config = tyro.cli(SearchConfig, description=description, prog="python -m search.run")
        try:
            run_sweep(config)
        except KeyboardInterrupt:  # the second Ctrl-C, or one before anything ran
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        except optuna.exceptions.StorageInternalError as error:
            reason = hide_password(str(error.__cause__ or error).splitlines()[0])
            raise UserError(f"the study's storage failed: {reason}; the same command goes on") from None


if __name__ == "__main__":
    main()
