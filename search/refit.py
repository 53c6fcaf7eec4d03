"""Retrain an ensemble's members on everything that is labelled: train + tune + select.

    python -m search.refit

takes the newest run's newest ensemble and writes a run directory of its own, <run>-refit, whose ensemble has the same
members with the same weights: the selection stays untouched, and no split is left to score it on. `ensemble.predict`,
`ensemble.serve` and `ensemble.report` take it like any other. Running the same command again goes on where it stopped.
"""

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress
from upath import UPath

from cluster.capacity import Lanes
from cluster.connect import in_cluster
from cluster.tuner import run_trials
from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.report.write import summary, write_report
from ensemble.show import make_console
from search.config import SearchConfig
from trainables.config import TrialConfig
from trainables.data.dataset import default_cache
from trainables.data.share import open_run_data, share_data
from trainables.data.splits import load_splits, save_splits
from trainables.errors import UserError, exit_on_user_error
from trainables.job import DataSource, Job, Metrics, Outcome, Result
from trainables.models.weights import find_weights
from trainables.run.lease import Lease
from trainables.run_directory import (
    RefitOf,
    RunInfo,
    SplitSizes,
    lock_run,
    open_run,
    open_runs,
    read_run,
    refuse_links,
    remove_temporaries,
    to_json,
)
from trainables.storage import hide_password, is_local, write_json
from trainables.trial import run_trial

REUSED = ("workers_per_trial", "gpus_per_trial", "cpus_per_trial")


@dataclass(frozen=True)
class Refit:
    """Retrain an ensemble's members on train + tune + select. Repeating the command goes on where it stopped."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    data_dir: Path | None = None
    """Where the images lie; needed when neither this machine's cache nor the run has them."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Table of the images, as for search.run; needed as --data-dir is."""
    weights_dir: Path | None = None
    """Folder with pretrained weights, as for search.run."""


class Jobs:
    """The members that are still to be trained, as what cluster.tuner.run_trials asks; a failed one is not repeated."""

    def __init__(self, jobs: list[Job], progress: Progress) -> None:
        self.waiting, self.progress = list(jobs), progress
        self.epochs = {job.id: job.config.all_epochs for job in jobs}
        self.bars = {
            job.id: progress.add_task(f"{job.id} {job.config.backbone}", total=max(1, job.config.all_epochs))
            for job in jobs
        }
        self.stopping = False
        self.errors: list[str] = []

    def next(self) -> Job | None:
        return self.waiting.pop(0) if self.waiting else None

    def has_more(self) -> bool:
        return bool(self.waiting)

    def report(self, id: str, metrics: Metrics) -> bool:
        self.progress.update(self.bars[id], completed=max(1, metrics["epoch"]))  # a probe's is 0
        return self.stopping and metrics["epoch"] < self.epochs[id]

    def finish(self, id: str, result: Result) -> None:
        seconds = "" if result.seconds is None else f" after {result.seconds:.0f} s"
        self.progress.console.print(f"{id} {result.outcome}{seconds}")
        if result.outcome not in (Outcome.FINISHED, Outcome.INTERRUPTED):
            self.errors.append(f"{id} {result.outcome}: {result.error or 'no reason given'}")

    def tick(self) -> None:
        pass  # the progress bars draw themselves


def refit(args: Refit) -> tuple[UPath, Ensemble]:
    """Train what is missing and write the ensemble; returns its run directory and it.

    Raises UserError for an ensemble that cannot be retrained, and when a member failed or the refit was stopped.
    """
    (source, *others), name = open_runs(args.run), args.ensemble
    refit_of = read_run(source).refit_of
    if refit_of is not None:  # the newest run is the refit itself: continue with it
        source, name = _refitted_run(source), refit_of.ensemble
    runs, info = [source, *others], read_run(source)
    ensemble = read_ensemble(source, name)
    target = UPath(f"{source}-refit").absolute()
    jobs = [_job(runs, target, info, member, args) for member in _to_train(ensemble)]
    _open_target(target, source, info, ensemble)
    lock = lock_run(target) if is_local(target) else Lease(target)
    remove_temporaries(target)
    missing = [job for job in jobs if not (target / "candidates" / job.id / "candidate.json").exists()]
    console = make_console()
    images = len(load_splits(target).train)
    console.print(f"{ensemble.name} of {source}: {len(missing)} of {len(jobs)} members to train on all {images} images")
    if missing:
        train_all(missing, lane_config(info), Progress(console=console))
    refitted = _refitted(ensemble)
    write_ensemble(target, refitted)
    if lock is not None:
        lock.release()
    return target, refitted


def _refitted_run(target: UPath) -> UPath:
    """The run that `target` is the refit of: its neighbour by name, because no path in a file is followed."""
    if not target.name.endswith("-refit"):
        raise UserError(f"{target} is a refit that was renamed; name the run that it is of with --run")
    return open_run(target.parent / target.name.removesuffix("-refit"))


def train_all(jobs: list[Job], config: SearchConfig, progress: Progress) -> None:
    training = Jobs(jobs, progress)
    with Lanes(config.lane_request()) as lanes, progress:
        run_trials(training, run_trial, lambda: lanes.spec, lambda: lanes.now(wanted=len(jobs)))
    if training.stopping:
        raise UserError("stopped before all members were trained; the same command goes on")
    if training.errors:
        raise UserError(f"{len(training.errors)} members could not be retrained ({training.errors[0]})")


def _open_target(target: UPath, source: UPath, info: RunInfo, ensemble: Ensemble) -> None:
    """Create the refit's run directory, run.json last; refuses one of another ensemble."""
    refuse_links(target)
    origin = RefitOf(str(source), ensemble.name, ensemble.created)
    if (target / "run.json").exists():
        if read_run(target).refit_of != origin:
            raise UserError(f"{target} holds the refit of another ensemble; remove it first")
        return
    splits = load_splits(source).undivided()
    if in_cluster() or not is_local(target):
        share_data(target, open_run_data(source, info)[0])
    save_splits(target, splits)
    refitted = dataclasses.replace(
        info,
        refit_of=origin,
        split_fingerprint=splits.fingerprint,
        splits=SplitSizes(train=len(splits.train), test=info.splits.test),
        command=hide_password(shlex.join(sys.argv)),
        created=time.time(),
    )
    write_json(target / "run.json", to_json(refitted))


def _to_train(ensemble: Ensemble) -> list[Member]:
    """The members, and the best single model, which a report compares them with."""
    single = ensemble.single()
    if single is None or any((member.id, member.run) == (single.id, single.run) for member in ensemble.members):
        return list(ensemble.members)
    return [*ensemble.members, single]


def _job(runs: list[UPath], target: UPath, info: RunInfo, member: Member, args: Refit) -> Job:
    """What a lane needs to train one member anew."""
    old = member.candidate(runs).info
    if old.config is None or old.soup or old.taught_by or not info.data.folder:
        what = "only brought predictions, or its run does not say of which images"
        if old.soup or old.taught_by:
            what = "is a soup" if old.soup else "was taught by an ensemble"
        raise UserError(f"member {member.id} cannot be retrained: it {what}; select again with --exclude {member.id}")
    config = without_validation(old.config, old.curve)
    weights = find_weights(config.backbone, args.weights_dir) if config.pretrained else None
    folder = str(args.data_dir.resolve()) if args.data_dir else None
    data = DataSource(
        str(default_cache() / "data" / info.data.folder), info.data.name, folder, info.data.stored_size, info.data.fit,
        info.data.group_by, info.data.twins, args.labels,
    )  # fmt: skip
    return Job(_new_id(member), config, str(target), data, weights)


def without_validation(config: TrialConfig, curve: Sequence[dict[str, float]]) -> TrialConfig:
    """The config that trains the same way when no tune split is left to watch.

    Early stopping becomes as many epochs as were best on the tune split, and the plateau schedule a cosine.
    """
    epochs = config.all_epochs
    if config.patience and curve:
        epochs = int(min(curve, key=lambda row: row["tune_log_loss"])["epoch"])
    freeze_epochs = min(config.freeze_epochs, epochs)
    return dataclasses.replace(
        config,
        epochs=epochs - freeze_epochs,
        freeze_epochs=freeze_epochs,
        patience=0,
        schedule="cosine" if config.schedule == "plateau" else config.schedule,
    )


def _refitted(ensemble: Ensemble) -> Ensemble:
    """The same ensemble over the retrained members; its select scores say that they were measured before."""
    before = {name: {**score, "before_refit": True} for name, score in ensemble.scores.items()}
    if (single := ensemble.single()) is not None:
        before["best_single"] |= {"id": _new_id(single), "run": ""}
    members = tuple(dataclasses.replace(member, id=_new_id(member), run="") for member in ensemble.members)
    return dataclasses.replace(ensemble, members=members, scores=before, frontier=(), insight={}, created=time.time())


def _new_id(member: Member) -> str:
    """Members of several runs may share an id."""
    return f"{Path(member.run).name}-{member.id}" if member.run else member.id


def lane_config(info: RunInfo) -> SearchConfig:
    """The sweep's own resources for a trial; raises UserError when run.json does not hold any that make sense."""
    try:
        return SearchConfig(**{key: info.search[key] for key in REUSED if key in info.search})
    except TypeError:
        raise UserError("run.json does not say what a trial takes (search.cpus_per_trial, ...)") from None


@contextlib.contextmanager
def exit_on_ctrl_c() -> Iterator[None]:
    """End with one line after the second Ctrl-C, or one before anything ran."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m search.refit") -> None:
    with exit_on_user_error():
        args = tyro.cli(Refit, description=Refit.__doc__, prog=prog, args=arguments)
        with exit_on_ctrl_c():
            run, ensemble = refit(args)
        print(f"{len(ensemble.members)} members retrained; ensemble {ensemble.name} in {run}")
        if read_run(run).splits.test:
            print("\n".join(summary(write_report([run], ensemble))))
        print(f"next:\n  python -m ensemble.predict --run {run} --images FOLDER")


if __name__ == "__main__":
    main()
