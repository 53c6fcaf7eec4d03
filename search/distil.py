"""Teach one network what an ensemble knows: most of its accuracy at one network's cost.

    python -m search.distil --backbone tf_efficientnet_lite0

takes the newest run's ensemble, and trains the network in lanes, as a sweep does, on the labels and on what the
ensemble says of every view that the network learns from. The result is an ordinary candidate of the run, with its own
scores on the run's splits, and an ensemble of one, `distilled-<backbone>`, that `ensemble.predict` and the others take
with --ensemble. The same network without a teacher is trained beside it, to tell what the teacher was good for.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import Progress
from rich.table import Table
from upath import UPath

from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.pool import Pool, load_pool
from ensemble.predict import find_images, images_at_a_time, stored_form
from ensemble.risk import calibrate, measure
from ensemble.select import describe, where
from ensemble.show import make_console
from search.refit import exit_on_ctrl_c, lane_config, train_all
from search.spaces.auto import usual_tuning
from trainables.command import progress
from trainables.config import TrialConfig
from trainables.data.dataset import default_cache
from trainables.data.decode import read_images
from trainables.data.splits import load_splits
from trainables.errors import UserError, exit_on_user_error
from trainables.job import DataSource, Job, Lesson, LessonMember
from trainables.models.backbones import check_backbone, plain_name
from trainables.models.latency import measure_latencies
from trainables.models.speed import native_size
from trainables.models.weights import find_weights
from trainables.run.latencies import write_latencies
from trainables.run.lease import Lease
from trainables.run_directory import RunInfo, list_candidates, lock_run, open_runs, read_run, safe_id
from trainables.storage import exists, is_local, write_array, write_json


@dataclass(frozen=True)
class Distil:
    """Teach one network what an ensemble knows. Repeating the command goes on where it stopped."""

    backbone: str
    """The network: a timm name. It is trained as the run's best candidate of that backbone was, else as usual."""
    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of the ensemble that teaches; default: the run's."""
    epochs: int | None = None
    """Epochs of the whole network; default: twice those of the run's best candidate of that backbone, or 16. Teaching
    pays when it is patient."""
    image_size: int | None = None
    """Side in pixels; default: that candidate's, or the native one."""
    share: float = 0.7
    """Of the teacher's answer in what an image's target is, 0 to 1; the rest is the label."""
    softness: float = 1.0
    """Above 1 the teacher's answers say more of the classes that it does not choose."""
    unlabelled: Path | None = None
    """Folder of images without labels, on which the network learns from the teacher alone."""
    control: bool = True
    """Also train the same network without a teacher."""
    name: str = ""
    """Of the candidate and its ensemble; default: distilled-<backbone>."""
    data_dir: Path | None = None
    """Where the images lie; needed when neither this machine's cache nor the run has them."""
    weights_dir: Path | None = None
    """Folder with pretrained weights, as for search.run."""
    json: Path | None = None
    """File to write the table to as JSON."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"--share is {self.share}, expected above 0, at most 1")
        if not self.softness > 0:
            raise UserError(f"--softness is {self.softness}, expected above 0")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"--epochs is {self.epochs}, expected at least 1")


def distil(args: Distil) -> tuple[UPath, dict[str, Any]]:
    """Train what is missing; returns the run, and the table as plain JSON.

    `ensemble`, `best_single`, `distilled` and, unless left away, `control`: `accuracy`, its `interval`, `log_loss`,
    `latency_ms`, `params`, on the select split. Raises UserError, before anything is written, for a run or an ensemble
    that cannot teach.
    """
    args = dataclasses.replace(args, backbone=plain_name(args.backbone))
    check_backbone(args.backbone)
    runs = open_runs(args.run)
    run, info = runs[0], read_run(runs[0])
    ensemble = read_ensemble(run, args.ensemble)
    _check(run, info, ensemble)
    name = safe_id(args.name or f"distilled-{args.backbone}", "--name")
    config = student(args, run)
    plain = f"{name}-without-teacher"
    weights = find_weights(args.backbone, args.weights_dir) if config.pretrained else None
    members = [
        LessonMember(str(member.candidate(runs).path), member.weight, member.temperature) for member in ensemble.members
    ]
    lesson = Lesson(tuple(members), ensemble.name, ensemble.temperature, args.softness, args.share)
    wanted = [Job(name, config, str(run), _source(args, info), weights, lesson=lesson)]
    if args.control:
        wanted.append(dataclasses.replace(wanted[0], id=plain, lesson=None))
    for job in wanted:
        _check_free(run, job)
    if args.unlabelled is not None:
        find_images(args.unlabelled)  # says so where there are none
    lock = lock_run(run) if is_local(run) else Lease(run)
    if args.unlabelled is not None:
        taught = dataclasses.replace(lesson, unlabelled=_unlabelled(run, args.unlabelled))
        wanted[0] = dataclasses.replace(wanted[0], lesson=taught)
    missing = [job for job in wanted if not exists(run / "candidates" / job.id / "candidate.json")]
    console = make_console()
    if missing:
        console.print(
            f"{ensemble.name} of {run} teaches {args.backbone}: {config.epochs} epochs at {config.image_size} px"
        )
        train_all(missing, lane_config(info), Progress(console=console))
        write_latencies(run, measure_latencies(list_candidates(run), stored_form(run).shape, len(info.classes)))
    pool = load_pool(runs)
    taught_ensemble, table = conclude(pool, ensemble, name, plain if args.control else None)
    write_ensemble(run, taught_ensemble, default=False)
    if args.json is not None:
        write_json(UPath(args.json), table)
    if lock is not None:
        lock.release()
    return run, table


def student(args: Distil, run: UPath) -> TrialConfig:
    """The configuration of the network that learns: that of the run's best one of its backbone that was trained as a
    whole, for twice as many epochs; or the default space's usual one."""
    tuned = [
        c for c in list_candidates(run)
        if c.info.config is not None and c.info.config.backbone == args.backbone and c.info.config.epochs
        and not c.info.taught_by and "tune_log_loss" in c.info.metrics
    ]  # fmt: skip
    best = min(tuned, key=lambda c: (c.info.metrics["tune_log_loss"], c.id), default=None)
    if best is not None and best.info.config is not None:
        config = dataclasses.replace(best.info.config, epochs=2 * best.info.config.epochs)
    else:
        config = usual_tuning(args.backbone, native_size(args.backbone), 16)
    changes: dict[str, Any] = {"seed": 0, "label_smoothing": 0.0, "patience": 0}  # the teacher's answers are soft
    if args.epochs is not None:
        changes["epochs"] = args.epochs
    if args.image_size is not None:
        changes |= {"image_size": args.image_size, "progressive": ()}
    return dataclasses.replace(config, **changes)


def conclude(pool: Pool, ensemble: Ensemble, name: str, plain: str | None) -> tuple[Ensemble, dict[str, Any]]:
    """The ensemble of one that the student is, and the table."""
    places = {(pool.run_of(m), candidate.id): m for m, candidate in enumerate(pool.candidates)}
    if ("", name) not in places:
        raise UserError(f"{name} cannot be used: {pool.left_out.get(name, 'it was not trained')}")
    place, goal = places["", name], ensemble.goal
    probs = np.asarray(pool.probs[place])
    risk = calibrate(probs[None], pool.labels, ensemble.risk.level) if ensemble.risk is not None else None
    own = where(pool) | describe(probs, pool.labels, goal)
    scores: dict[str, Any] = {"claim": own, "select": own}
    if risk is not None:
        scores["risk"] = where(pool) | measure(risk, probs[None], pool.labels)
    taught = Ensemble(
        name=name, members=(Member(name, 1.0),), selector="distilled", split_fingerprint=pool.split_fingerprint,
        scores=scores, risk=risk, metric=goal.name, decision=goal.decide(probs[None], pool.labels),
        options={"taught_by": ensemble.name},
    )  # fmt: skip

    def row(members: Sequence[tuple[str, str]], score: dict[str, Any]) -> dict[str, Any]:
        infos = [pool.candidates[places[key]].info for key in members if key in places]
        sums = {
            key: sum(getattr(one, key) or np.nan for one in infos) if len(infos) == len(members) else np.nan
            for key in ("latency_ms", "params", "flops")
        }
        return score | {key: float(value) if np.isfinite(value) else None for key, value in sums.items()}

    single, together = ensemble.single(), ensemble.claim
    if together is None:  # written by hand, or by an earlier version: nothing is held out
        if lost := [m.id for m in ensemble.members if (m.run, m.id) not in places]:
            raise UserError(f"member {lost[0]} of ensemble {ensemble.name} cannot be used; select again")
        votes = [pool.probs[places[m.run, m.id]] for m in ensemble.members]
        fitted = describe(ensemble.predict(votes), pool.labels, goal, ensemble.decision)
        together = where(pool) | {"fitted": True} | fitted
    table = {
        "run": pool.runs[0].name, "device": pool.device,
        "ensemble": row([(m.run, m.id) for m in ensemble.members], together),
        "distilled": row([("", name)], own),
    }  # fmt: skip
    if single is not None and "accuracy" in ensemble.scores["best_single"]:
        table["best_single"] = row([(single.run, single.id)], ensemble.scores["best_single"])
    if plain is not None and ("", plain) in places:
        table["control"] = row(
            [("", plain)], where(pool) | describe(np.asarray(pool.probs[places["", plain]]), pool.labels, goal)
        )
    return taught, table


def _check(run: UPath, info: RunInfo, ensemble: Ensemble) -> None:
    if info.refit_of is not None:
        raise UserError(f"{run} is a refit, which has no select split; distil the run that it is of")
    if ensemble.stack is not None:
        raise UserError(f"ensemble {ensemble.name} is stacked and cannot teach; select with --selector greedy first")
    if load_splits(run).folds:
        raise UserError(f"{run} has too few images for a select split of its own, so a student could not be scored")
    if not info.data.folder:
        raise UserError(f"{run} does not say which images it is of, so nothing can be trained on them")


def _check_free(run: UPath, job: Job) -> None:
    """Raise UserError where the job's name is another candidate's."""
    known = {candidate.id: candidate.info for candidate in list_candidates(run)}
    if job.id not in known:
        return
    taught_by = job.lesson.name if job.lesson is not None else ""
    if not job.config.is_same(known[job.id].config) or known[job.id].taught_by != taught_by:
        raise UserError(f"candidate {job.id} of {run} was trained in another way; name this one with --name")


def _source(args: Distil, info: RunInfo) -> DataSource:
    folder = str(args.data_dir.resolve()) if args.data_dir else None
    return DataSource(
        str(default_cache() / "data" / info.data.folder), info.data.name, folder, info.data.stored_size, info.data.fit,
        info.data.group_by, info.data.twins,
    )  # fmt: skip


def _unlabelled(run: UPath, folder: Path) -> str:
    """Decode a folder's images into the form of the run's, once; returns the path of the array in the run directory."""
    images, canvas = find_images(folder), stored_form(run)
    asked = hashlib.sha256("\n".join(f"{p} {p.stat().st_size}" for p in images.values()).encode()).hexdigest()[:16]
    path = run / f"unlabelled-{asked}.npy"
    if not exists(path):
        files, step = list(images.values()), images_at_a_time(canvas)
        parts = []
        with progress("decoding", len(files)) as advance:
            for start in range(0, len(files), step):
                some = files[start : start + step]
                read = read_images(some, canvas, lambda where, why: print(f"{where}: {why}", file=sys.stderr))
                parts += [pixels for _, pixels in read if pixels is not None]
                advance(len(some))
        if not parts:
            raise UserError(f"none of the images below {folder} can be read")
        write_array(path, np.stack(parts))
    return str(path)


def _print(run: UPath, table: dict[str, Any]) -> None:
    shown = Table(title=f"{run.name}, select split ({table['distilled']['images']} images)", title_justify="left")
    for heading in ("", "accuracy", "95 % interval", "log-loss", "ms per image", "parameters"):
        shown.add_column(heading, justify="right" if heading else "left")
    names = {"ensemble": "ensemble", "best_single": "best single", "distilled": "distilled",
             "control": "the same without a teacher"}  # fmt: skip
    for key, told in names.items():
        if key not in table:
            continue
        score = table[key]
        low, high = score["interval"]
        shown.add_row(
            told, f"{score['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", f"{score['log_loss']:.4f}",
            "?" if score["latency_ms"] is None else f"{score['latency_ms']:.1f}",
            "?" if score["params"] is None else f"{score['params'] / 1e6:.2f} M",
        )  # fmt: skip
    make_console().print(shown)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m search.distil") -> None:
    with exit_on_user_error():
        args = tyro.cli(Distil, description=Distil.__doc__, prog=prog, args=arguments)
        with exit_on_ctrl_c():
            run, table = distil(args)
        _print(run, table)
        name = args.name or f"distilled-{plain_name(args.backbone)}"
        print(f"next:\n  python -m ensemble.predict --run {run} --ensemble {name} --images FOLDER")


if __name__ == "__main__":
    main()
