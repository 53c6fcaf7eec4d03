"""Retrain an ensemble's members on everything that is labelled: train + tune + select.

    python -m search.refit

takes the newest run's newest ensemble and writes a run directory of its own, <run>-refit, whose ensemble has the same
members with the same weights: the selection stays untouched, and no split is left to score it on. `ensemble.predict`,
`ensemble.serve` and `ensemble.report` take it like any other. Running the same command again goes on where it stopped.
"""

import dataclasses
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import Progress
from upath import UPath

from cluster.connect import in_cluster
from ensemble.ensemble import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.report import summary, write_report
from ensemble.show import make_console
from search.config import SearchConfig
from search.lanes import Lanes, connected
from search.lock import lock_run
from search.tuner import run_trials
from trainables.backbones import find_weights
from trainables.candidate import is_local, open_run, read_json, read_run, remove_temporaries, write_json
from trainables.config import TrialConfig
from trainables.errors import UserError, exit_on_user_error
from trainables.share import open_shared, share_data
from trainables.splits import load_splits, save_splits
from trainables.trial import run_trial

REUSED = ("workers_per_trial", "gpus_per_trial", "cpus_per_trial")


@dataclass(frozen=True)
class Refit:
    """Retrain an ensemble's members on train + tune + select. Repeating the command goes on where it stopped."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: the newest under runs/."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""


class Jobs:
    """The members that are still to be trained, as what search.tuner.run_trials asks; a failed one is not repeated."""

    def __init__(self, jobs: list[dict[str, Any]], progress: Progress) -> None:
        self.waiting, self.progress = list(jobs), progress
        self.bars = {job["id"]: progress.add_task(_label(job), total=job["config"]["epochs"]) for job in jobs}
        self.epochs = {job["id"]: job["config"]["epochs"] for job in jobs}
        self.stopping = False
        self.errors: list[str] = []

    def next(self) -> dict[str, Any] | None:
        return self.waiting.pop(0) if self.waiting else None

    def has_more(self) -> bool:
        return bool(self.waiting)

    def report(self, id: str, metrics: dict[str, Any]) -> bool:
        self.progress.update(self.bars[id], completed=metrics["epoch"])
        return self.stopping and metrics["epoch"] < self.epochs[id]

    def finish(self, id: str, result: dict[str, Any]) -> None:
        seconds = f" after {result['seconds']:.0f} s" if "seconds" in result else ""
        self.progress.console.print(f"{id} {result['outcome']}{seconds}")
        if result["outcome"] not in ("finished", "interrupted"):
            self.errors.append(f"{id} {result['outcome']}: {result.get('error', 'no reason given')}")

    def tick(self) -> None:
        pass  # the progress bars draw themselves


def refit(args: Refit) -> tuple[UPath, Ensemble]:
    """Train what is missing and write the ensemble; returns its run directory and it.

    Raises UserError for an ensemble that cannot be retrained, and when a member failed or the refit was stopped.
    """
    source, name = open_run(args.run), args.ensemble
    if "refit_of" in read_run(source):  # the newest run is the refit itself: go on with it
        origin = read_run(source)["refit_of"]
        source, name = open_run(origin["run"]), origin["ensemble"]
    info, ensemble = read_run(source), read_ensemble(source, name)
    target = UPath(f"{source}-refit").absolute()
    jobs = [_job(source, target, info, member) for member in _to_train(ensemble)]
    _open_target(target, source, info, ensemble)
    lock = lock_run(target)
    remove_temporaries(target)
    missing = [job for job in jobs if not (target / "candidates" / job["id"] / "candidate.json").exists()]
    console = make_console()
    images = len(load_splits(target).train)
    console.print(f"{ensemble.name} of {source}: {len(missing)} of {len(jobs)} members to train on all {images} images")
    if missing:
        _train(missing, _lane_config(info), Progress(console=console))
    refitted = _refitted(ensemble)
    write_ensemble(target, refitted)
    if lock is not None:
        lock.release()
    return target, refitted


def _train(jobs: list[dict[str, Any]], config: SearchConfig, progress: Progress) -> None:
    with connected(), progress:
        lanes = Lanes(config)
        for job in jobs:
            job["gpus"] = lanes.spec.gpus
        going = Jobs(jobs, progress)
        run_trials(going, run_trial, lanes.spec, lambda: lanes.now(wanted=len(jobs)))
    if going.stopping:
        raise UserError("stopped before all members were trained; the same command goes on")
    if going.errors:
        raise UserError(f"{len(going.errors)} members could not be retrained ({going.errors[0]})")


def _open_target(target: UPath, source: UPath, info: dict[str, Any], ensemble: Ensemble) -> None:
    """Create the refit's run directory, run.json last; refuses one of another ensemble."""
    origin = {"run": str(source), "ensemble": ensemble.name, "created": ensemble.created}
    if (target / "run.json").exists():
        if read_json(target / "run.json").get("refit_of") != origin:
            raise UserError(f"{target} holds the refit of another ensemble; remove it first")
        return
    splits = load_splits(source).undivided()
    if in_cluster() or not is_local(target):
        share_data(target, open_shared(source, info["data"]["path"]))
    save_splits(target, splits)
    sizes = {"train": len(splits.train), "tune": 0, "select": 0, "shared": False}
    write_json(
        target / "run.json",
        {
            **info,
            "refit_of": origin,
            "split_fingerprint": splits.fingerprint,
            "splits": {**info.get("splits", {}), **sizes},
            "command": shlex.join(sys.argv),
            "created": time.time(),
        },
    )


def _to_train(ensemble: Ensemble) -> list[Member]:
    """The members, and the best single model, which a report compares them with."""
    single = ensemble.scores.get("best_single")
    if single is None or any(member.id == single["id"] and member.run == single["run"] for member in ensemble.members):
        return list(ensemble.members)
    return [*ensemble.members, Member(single["id"], 0.0, single["run"])]


def _job(source: UPath, target: UPath, info: dict[str, Any], member: Member) -> dict[str, Any]:
    """What a lane needs to train one member anew."""
    candidate = member.candidate(source)
    if "config" not in candidate.info or "soup" in candidate.info or "search" not in info:
        what = "is a soup" if "soup" in candidate.info else "only brought predictions, or its run does not say how"
        raise UserError(f"member {member.id} cannot be retrained: it {what}; select without it")
    config = without_validation(TrialConfig.from_dict(candidate.info["config"]), candidate.info.get("curve", []))
    search, data = info["search"], info["data"]
    weights = find_weights(config.backbone, search.get("weights_dir")) if config.pretrained else None
    return {
        "run": str(target),
        "id": _new_id(member),
        "config": config.to_dict(),
        "weights": weights and asdict(weights),
        "data": {
            "path": data["path"], "name": data["name"], "size": search["stored_size"],
            "data_dir": str(Path(search["data_dir"]).resolve()) if search["data_dir"] else None,
        },
        "deadline": None,
    }  # fmt: skip


def without_validation(config: TrialConfig, curve: list[dict[str, Any]]) -> TrialConfig:
    """The config that trains the same way when no tune split is left to watch.

    Early stopping becomes as many epochs as were best on the tune split, and the plateau schedule a cosine.
    """
    epochs = config.epochs
    if config.patience and curve:
        epochs = int(min(curve, key=lambda row: row["tune_log_loss"])["epoch"])
    return dataclasses.replace(
        config,
        epochs=epochs,
        freeze_epochs=min(config.freeze_epochs, epochs),
        patience=0,
        schedule="cosine" if config.schedule == "plateau" else config.schedule,
    )


def _refitted(ensemble: Ensemble) -> Ensemble:
    """The same ensemble over the retrained members; its select scores say that they were measured before."""
    before = {name: {**score, "before_refit": True} for name, score in ensemble.scores.items()}
    if "best_single" in before:
        single = Member(before["best_single"]["id"], 1.0, before["best_single"]["run"])
        before["best_single"] |= {"id": _new_id(single), "run": ""}
    members = tuple(dataclasses.replace(member, id=_new_id(member), run="") for member in ensemble.members)
    return dataclasses.replace(ensemble, members=members, scores=before, frontier=(), insight={}, created=time.time())


def _new_id(member: Member) -> str:
    """Members of several runs may share an id."""
    return f"{Path(member.run).name}-{member.id}" if member.run else member.id


def _lane_config(info: dict[str, Any]) -> SearchConfig:
    """The sweep's own resources for a trial."""
    return SearchConfig(**{key: info["search"][key] for key in REUSED})


def _label(job: dict[str, Any]) -> str:
    return f"{job['id']} {job['config']['backbone']}"


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Refit, description=Refit.__doc__, prog="python -m search.refit")
        try:
            run, ensemble = refit(args)
        except KeyboardInterrupt:  # the second Ctrl-C, or one before anything ran
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        print(f"{len(ensemble.members)} members retrained; ensemble {ensemble.name} in {run}")
        if read_run(run)["splits"].get("test"):
            print("\n".join(summary(write_report(run, ensemble))))
        print(f"next:\n  python -m ensemble.predict --run {run} --images FOLDER")


if __name__ == "__main__":
    main()
