"""python -m search.run : one command from images to an ensemble.

plan (plan.py) -> open the run directory -> connect -> sweep -> leaderboard and first ensemble.
"""

import importlib.metadata
import inspect
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import tyro
from filelock import FileLock
from rich.console import Console

from cluster.capacity import Lanes
from cluster.connect import in_cluster
from cluster.metrics import SweepMetrics
from cluster.pool import Places
from cluster.tasks import call_on_workers
from cluster.tuner import run_trials
from ensemble.file import Ensemble, as_before, write_ensemble
from ensemble.report.write import PAGE, read_report, summary, write_report
from ensemble.running import EnsembleSoFar
from ensemble.select import Select, choose_from, open_pool, show
from ensemble.show import make_console
from search.board import LiveBoard, WatchedSweep
from search.budget import Budget, WeightStore, parse_keep
from search.config import SearchConfig, Task
from search.plan import Plan, checked, make_plan, make_task, with_budget
from search.refit import Refit, refit
from search.show import describe_lanes, print_first, print_leaderboard, print_missing, print_start, short_path
from search.study.mirror import Mirror, open_mirror
from search.study.objective import value_by
from search.study.proposals import with_backbones
from search.sweep import Sweep
from search.track.tracker import Tracker
from search.track.tracking import Tracking, make_trackers
from trainables.config import TrialConfig
from trainables.data.dataset import open_units
from trainables.data.share import share_data
from trainables.data.splits import Kept, kept_together, save_splits
from trainables.errors import UserError, exit_on_user_error
from trainables.job import DataSource
from trainables.models.latency import measure_latencies
from trainables.run.latencies import read_latencies, write_latencies
from trainables.run.lease import Lease
from trainables.run.records import Records, Spent
from trainables.run_directory import (
    FORMAT,
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
from trainables.storage import exists, hide_password, is_local, write_array, write_json
from trainables.trial import run_trial

LIBRARIES = ("torch", "timm", "ray", "optuna")
# Share of --minutes, and most seconds, kept for predictions, selection and summary: without and with a test part
RESERVES = ((0.05, 60.0), (0.15, 300.0))
TRACEBACK_LINES = 8  # of a trial that failed through a bug; the study keeps all of them


def run_sweep(config: SearchConfig) -> Ensemble | None:
    """Run (or go on with) the sweep of `config`; returns its ensemble, or None when no trial has finished.

    Raises UserError, before anything is written or started, for whatever the user can fix.
    """
    began = time.time()
    console = make_console()
    asked, config = config, with_budget(config)
    trackers = make_trackers(config.track)
    plan = make_plan(config)
    if config != asked:
        console.print(f"no budget was given, so this sweep takes {config.minutes:g} minutes in all; see --minutes")
    print_missing(console, plan)
    opened = _open(plan, config, trackers)
    try:
        ensemble, complete = _sweep(console, plan, config, opened, began)
    except BaseException:
        opened.tracking.leave()  # in a notebook the process lives on, and may continue the sweep
        raise
    opened.tracking.close(ensemble, complete)
    opened.lock.release()
    if config.refit and ensemble is not None and complete:
        _refit(console, plan, config, ensemble)
    return ensemble


def _sweep(
    console: Console, plan: Plan, config: SearchConfig, opened: "_Opened", began: float
) -> tuple[Ensemble | None, bool]:
    """Run the trials and conclude; returns the ensemble, and whether the sweep is complete."""
    budget = _make_budget(plan, config, opened.records.spent, began)
    live = EnsembleSoFar(plan.run, config.top_k, plan.goal)
    lanes = Lanes(config.lane_request(), console.print)

    def task(left: float) -> Task:
        return make_task(
            plan.backbones, plan.splits, plan.data, plan.costs, None if left == math.inf else left,
            "cuda" if lanes.spec.gpus else "cpu",
        )  # fmt: skip

    def suggest(trial: optuna.Trial, left: float) -> TrialConfig:
        now = task(left)
        return checked(plan.space.suggest(trial, now), now)

    tune_labels = np.asarray(plan.data.labels)[plan.splits.tune]
    valued, contribution = value_by(plan.goal, config.objective, tune_labels, config.top_k)
    sweep = Sweep(
        opened.records, plan.run, _source(plan, config), budget, plan.backbones, suggest,
        config.sampler, config.seed, valued, config.pruner, plan.earlier, plan.costs, live,
        contribution=contribution,
        store=WeightStore(plan.run, parse_keep(config.keep_weights)) if config.keep_weights else None,
        mirror=opened.mirror, tracking=opened.tracking, workers=config.workers_per_trial,
    )  # fmt: skip
    is_over = not sweep.has_more()
    if not is_over:
        print_start(console, plan, config, sweep)
        with lanes:
            first = task(sweep.time.left())
            sweep.proposals.enqueue(with_backbones(plan.space.first(first), list(plan.backbones)))
            links = [f"Ray dashboard {lanes.dashboard}"] if lanes.dashboard else []
            links.append(f"study: optuna-dashboard {'(as in --storage)' if config.storage else opened.mirror.url}")
            links += opened.tracking.places()
            console.print("\n".join([describe_lanes(lanes), *links]), markup=False)
            print_first(console, plan, first, sweep)
            earlier = len(sweep.tried) - len(sweep.waiting())
            metrics = SweepMetrics(plan.run.name)
            board = LiveBoard(live, plan.trials, budget.deadline, plan.splits.shared, earlier, links, metrics)

            def place_lanes() -> Places:
                if isinstance(opened.lock, Lease):
                    opened.lock.check()
                places = lanes.now(wanted=plan.trials and plan.trials - len(sweep.tried))
                devices = lanes.spec.workers * (lanes.spec.gpus or 1)
                sweep.time.place(max(1, lanes.count), devices, "cuda" if lanes.spec.gpus else "cpu")
                return places

            with board:
                while sweep.has_more() and not sweep.stopping:
                    run_trials(WatchedSweep(sweep, board), run_trial, lambda: lanes.spec, place_lanes)
        sweep.remove_stale_checkpoints()
    if not sweep.stopping:
        sweep.close()
    return _conclude(console, plan, config, sweep, began, is_over), not sweep.stopping


@dataclass(frozen=True)
class _Opened:
    """A run directory that this process alone works in.

    Attributes:
        records: of its trials.
        mirror: shows them to Optuna's tools.
        tracking: shows them to experiment trackers.
        lock: on the run directory.
    """

    records: Records
    mirror: Mirror
    tracking: Tracking
    lock: FileLock | Lease


def _open(plan: Plan, config: SearchConfig, trackers: Sequence[Tracker]) -> _Opened:
    """Open the run directory and its study; raises UserError before anything is written."""
    maximise = config.objective == "metric" and plan.goal.higher_is_better
    continued = exists(plan.run / "run.json")  # then a storage may be away for a while
    if config.storage and not continued:  # one that cannot be opened is told before anything is written
        open_mirror(plan.run, config.storage, plan.study, maximise, ())
    try:
        _open_run(plan, config)
        lock = lock_run(plan.run) if is_local(plan.run) else Lease(plan.run)
    except OSError as error:
        raise UserError(f"run directory {plan.run} cannot be written ({error}); name another with --run") from error
    remove_temporaries(plan.run)
    records = Records(plan.run)
    mirror = open_mirror(plan.run, config.storage, plan.study, maximise, records, patient=continued)
    tracking = Tracking(trackers, plan.run, records, "tune_accuracy" if maximise else "tune_log_loss")
    return _Opened(records, mirror, tracking, lock)


def _make_budget(plan: Plan, config: SearchConfig, spent: Spent, began: float) -> Budget:
    """What is left of the budget for trials, after what earlier processes used and what the end will take."""
    deadline = None
    if config.minutes is not None:
        share, most = RESERVES[plan.data.test_images > 0]
        reserve = min(share * 60 * config.minutes, most)
        deadline = began + 60 * config.minutes - spent.seconds - reserve
    return Budget(
        trials=plan.trials, began=began, deadline=deadline,
        device_seconds=None if config.device_hours is None else 3600 * config.device_hours,
        target_accuracy=config.target_accuracy, plateau=config.stop_on_plateau, final_seeds=config.final_seeds,
    )  # fmt: skip


def _source(plan: Plan, config: SearchConfig) -> DataSource:
    """What every job trains on."""
    folder = str(config.data_dir.resolve()) if config.data_dir else None
    return DataSource(
        str(plan.data.path), config.data, folder, config.stored_size, config.fit, config.group_by,
        not config.ignore_twins, config.labels,
    )  # fmt: skip


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
    kept = kept_together(data, config.split_seed) or Kept("", 0, 0, 0)
    if (units := open_units(data)) is not None:
        write_array(plan.run / "select_units.npy", units[splits.select])
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    info = RunInfo(
        classes=data.classes,
        format=FORMAT,
        split_fingerprint=splits.fingerprint,
        splits=SplitSizes(
            len(splits.train),
            len(splits.tune),
            len(splits.select),
            data.test_images,
            splits.shared,
            kept.why,
            kept.images,
            kept.leaks,
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
        search={key: hide_password(value) if isinstance(value, str) else value for key, value in options.items()},
        space=plan.space.name,
        backbones=tuple(sorted(plan.backbones)),
        study=plan.study,
        command=hide_password(config.command()),
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        created=time.time(),
    )
    write_json(path, to_json(info))


def _check_continues(plan: Plan, config: SearchConfig, begun: RunInfo) -> None:
    """Raise UserError unless the run that is there already is of the same data, backbones, space and objective."""
    if begun.split_fingerprint != plan.splits.fingerprint:
        raise UserError(f"{plan.run} holds a run on other data or splits ({begun.data.name}); name another with --run")
    if begun.format < FORMAT:
        raise UserError(
            f"{plan.run} was made by an earlier version, and its sweep cannot go on; its candidates can be selected "
            "from as before; name another run with --run"
        )
    asked = sorted(plan.backbones)
    if begun.backbones and sorted(begun.backbones) != asked:
        raise UserError(
            f"{plan.run} is a sweep over {', '.join(begun.backbones)}, not over {', '.join(asked)}; "
            "ask for the same backbones (and have their weights), or name another with --run"
        )
    for option, asked_for, usual in (("objective", config.objective, "metric"), ("metric", config.metric, "accuracy")):
        of_run = begun.search.get(option, usual)
        if asked_for != ("metric" if option == "objective" and of_run == "accuracy" else of_run):  # as it was called
            raise UserError(
                f"this run's {option} is {of_run}, not {asked_for}; use --{option} {of_run} or another --run"
            )
    was = (begun.space or plan.space.name, begun.search.get("scale", config.scale))
    if was != (plan.space.name, config.scale):
        raise UserError(
            f"{plan.run} is a sweep of space {was[0]} at scale {was[1]}, not of {plan.space.name} at "
            f"{config.scale}; ask for the same, or name another with --run"
        )


def _conclude(
    console: Console, plan: Plan, config: SearchConfig, sweep: Sweep, began: float, is_over: bool
) -> Ensemble | None:
    """Leaderboard, ensemble, test summary, and what to do next. is_over: there was nothing to do, as earlier starts had
    used the budget: then what was measured, and a report on the same ensemble, still hold."""
    print_leaderboard(console, plan.run)
    for failed in sweep.failures():
        console.print(f"{failed.id} failed: {failed.outcome}: {failed.error}", style="yellow", markup=False)
        for line in failed.traceback.strip().splitlines()[-TRACEBACK_LINES:]:
            console.print(f"    {line}", style="dim", markup=False)
    if sweep.stopping:
        console.print(f"stopped; the same command goes on: {config.command()}", markup=False)
    elif reason := sweep.enough():
        console.print(f"ended early: {reason}")
    if not list_candidates(plan.run):
        console.print("no trial has finished, so there is no ensemble")
        return None
    if not sweep.stopping and not (is_over and read_latencies(plan.run).candidates):
        shape, classes = plan.data.images.shape[1:], len(plan.data.classes)
        write_latencies(plan.run, measure_latencies(list_candidates(plan.run), shape, classes))
    args = Select(top_k=config.top_k, metric=config.metric, run=(str(plan.run),))
    pool = open_pool(args)
    ensemble = as_before(plan.run, choose_from(pool, args))
    write_ensemble(plan.run, ensemble)
    show(pool, ensemble)
    if sweep.stopping:
        console.print("the test part stays unread until the sweep is complete")
    else:
        found = read_report(plan.run, ensemble) if is_over else None
        if found is None:
            spread = None
            if in_cluster():
                console.print("the cluster's machines predict the test part")
                spread = partial(call_on_workers, config.lane_request(), console.print)
            found = write_report([plan.run], ensemble, spread)
        if "test" not in found:
            why = found["missing"].get("test", "the data set has no test part")
            console.print(f"{why}, so nothing is said about unseen images beyond the select split", markup=False)
        console.print("\n".join(summary(found)), style="bold")
        console.print(f"report: {short_path(plan.run / PAGE)}", markup=False)
    if is_over:
        console.print("nothing was left to do: with a larger --minutes or --trials the same command goes on")
    took = sweep.records.spent.seconds if is_over else time.time() - began
    console.print(f"\n{len(pool.candidates)} candidates in {short_path(plan.run)} after {took:.0f} s")
    console.print("next:")
    metric = "" if config.metric == "accuracy" else f"--metric {config.metric} "
    console.print(
        f"  python -m ensemble.select --top-k {config.top_k} {metric}--run {short_path(plan.run)}", markup=False
    )
    console.print(f"  python -m ensemble.predict --run {short_path(plan.run)} --images FOLDER", markup=False)
    return ensemble


def _refit(console: Console, plan: Plan, config: SearchConfig, ensemble: Ensemble) -> None:
    """Retrain the members on all labelled images, into <run>-refit. A sweep is complete without: nothing is raised."""
    if plan.splits.folds:
        console.print("the candidates are cross-fitted: their networks are trained on all labelled images already")
        return
    args = Refit((str(plan.run),), ensemble.name, config.data_dir, config.labels, config.weights_dir)
    try:
        refitted, _ = refit(args)
    except UserError as error:
        console.print(f"not refitted: {error}; python -m search.refit --run {short_path(plan.run)}", style="yellow")
        return
    console.print(f"refitted: {short_path(refitted)}; the claim is of the members before, which saw fewer images")
    console.print(f"  python -m ensemble.predict --run {short_path(refitted)} --images FOLDER", markup=False)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m search.run") -> None:
    with exit_on_user_error():
        description = inspect.getdoc(SearchConfig)
        config = tyro.cli(SearchConfig, description=description, prog=prog, args=arguments)
        try:
            run_sweep(config)
        except KeyboardInterrupt:  # the second Ctrl-C, or one before anything ran
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
