"""What a sweep prints before its first trial and after its last; between them the board speaks (board.py)."""

from pathlib import Path

import numpy as np
import optuna
from rich.console import Console
from rich.table import Table
from upath import UPath

from cluster.capacity import Lanes
from search.config import SearchConfig, Task
from search.plan import Plan
from search.sweep import Sweep
from trainables.run_directory import list_candidates, stored_type

LEADERBOARD_ROWS = 10
LEADERBOARD_METRICS = {"tune_accuracy", "select_accuracy", "select_log_loss"}


def print_missing(console: Console, plan: Plan) -> None:
    for name in plan.missing:
        if name in plan.backbones:
            console.print(f"{name}: no pretrained weights found here, so it starts from random ones", style="yellow")
    without = [name for name in plan.missing if name not in plan.backbones]
    if without:
        console.print(
            f"without backbones whose weights are not found here, which is fine: {', '.join(without)} "
            "(to have them: python -m search.fetch)", style="yellow",
        )  # fmt: skip
    if plan.restricted:
        console.print(f"without weights of restricted licences (--weights-licence any): {', '.join(plan.restricted)}")


def print_start(console: Console, plan: Plan, config: SearchConfig, sweep: Sweep) -> None:
    s = plan.splits
    parts = f"{len(s.train)} train, {len(s.tune)} tune, {len(s.select)} select, "
    if s.folds:
        parts = f"{len(s.train)} images, each predicted by networks that have not seen it ({len(s.folds)} folds), "
    classes = len(plan.data.classes)
    console.print(f"{config.data}: {parts}{plan.data.test_images} test images, {classes} classes")
    if stored_type(len(s.select) * classes) is np.float16:
        console.print(f"predictions are stored as float16: {len(s.select):,} images x {classes:,} classes")
    for note in plan.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"space {plan.space.name} over {', '.join(plan.backbones)}; run directory {short_path(plan.run)}")
    if sweep.counted:
        console.print(f"going on with {sweep.counted} trials, {len(sweep.interrupted)} of them cut in the middle")


def print_first(console: Console, plan: Plan, task: Task, sweep: Sweep) -> None:
    """What the space tries first, and what each is expected to take."""
    first = [params for params in plan.space.first(task) if params.get("backbone") in plan.backbones]
    if not first or sweep.counted:
        return
    left = "" if task.left is None else f", with {task.left:.0f} s left"
    table = Table(title=f"tried first{left}; a trial computes about {plan.costs.rate:.0f} GFLOP/s here")
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


def print_leaderboard(console: Console, run: UPath) -> None:
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
    for heading in ("tune acc.", "select acc.", "select log-loss", "epochs", "lr", "params", "ms/image", "training, s"):
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


def describe_lanes(lanes: Lanes) -> str:
    spec = lanes.spec
    each = f"{spec.cpus:g} CPUs" + (f" and {spec.gpus:g} GPUs" if spec.gpus else "")
    each = f"{spec.workers} x {each} each" if spec.workers > 1 else f"{each} each"
    return f"{lanes.count} trial{'s' * (lanes.count > 1)} at a time, {each}"


def short_path(run: UPath) -> str:
    """The run's path as a person would type it."""
    try:
        return str(Path(str(run)).relative_to(Path.cwd()))
    except ValueError:
        return str(run)
