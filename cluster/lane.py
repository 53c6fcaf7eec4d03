"""Lanes: one Ray Train run per device group, started once, that trains one trial after another.

A Ray Train run costs some 15 s and eight processes to start, so a run per trial would cost more than most trials. A
lane is a run whose training loop takes job after job from a mailbox. It belongs to the reused Ray Tune actor that
started it, and this file is what happens in that actor; ranks.py is what happens at the lane's other end:

    Tune actor (run_in_lane) <--> Mailbox (a small actor) <--> the ranks of a TorchTrainer run (serve)

A lane that hangs or breaks is closed, and the job ends as a bug; one that dies, alone or with its machine, is lost, and
the job goes to whichever lane is free next (tuner.py). Continuing from the job's last checkpoint is up to the target.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.ranks import Broken, Joined, Mailbox, Raised, Reported, Returned, Silence, Target, Work, serve
from trainables.job import Metrics, Outcome, Result

START_S = 300.0  # that a lane waits for room, and then for its ranks: another may have to give its place back first
NODE_LABEL = "ray.io/node-id"  # which Ray gives to every machine
LISTEN_S = 1.0  # how often a waiting Tune actor looks whether its lane still lives

TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default 2 s delays every start, end and fault
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # torch imports slowly on a busy machine; the default is 60
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per lane
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# glibc hands large blocks back to the kernel at every step and gets them again full of zeros; kept, they make a step on
# a CPU a fifth shorter. One arena, because only the first keeps blocks above 64 MiB. Ranks trim it after each trial.
MEMORY_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


@dataclass(frozen=True)
class LaneSpec:
    """A lane's size: `workers` ranks, each with `cpus` CPU slots (its torch threads) and `gpus` GPUs."""

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank takes of Ray's resources."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def run_in_lane(target: Target, spec: LaneSpec, job: Work, report: Callable[[Metrics], Any]) -> Result:
    """Run one job in this process's lane, which is started if need be, and return the target's result.

    Args:
        target: importable function `target(job, report) -> Result`, called on every rank.
        spec: the lane's size; a lane of another size or target is closed first.
        job: what to run.
        report: called with rank 0's metrics in order. When it raises or exits, as tune.report does in a trial that Tune
            stops, the job is abandoned and the exception continues.

    Returns rank 0's result; a bug (with `error`, one line, and `traceback`) when the target raised, or hung or raised
    on a single rank; out of memory when any rank raised MemoryError.

    Raises LaneLost when the lane died under this job, or did not start. It is not started again here: its machine may
    be gone, and then a lane elsewhere is the one to continue the job.
    """
    try:
        return _lane(target, spec).run(job, report)
    except LaneLost as loss:
        _close_lane()
        if loss.fault is None:
            raise
        return loss.fault


class LaneLost(Exception):
    """The lane died, or had to be given up, under a job.

    Attributes:
        fault: the job's result when the target is to blame.
        started: False when the lane never ran, because there was no room for it.
        details: all that Ray said about it.
    """

    def __init__(self, message: str, fault: Result | None = None, started: bool = True, details: str = "") -> None:
        super().__init__(message)
        self.fault, self.started, self.details = fault, started, details


class Lane:
    """A Ray Train run that serves jobs, seen from the Tune actor that owns it: when that dies, all of it dies."""

    def __init__(self, target: Target, spec: LaneSpec) -> None:
        self.target = target
        self.spec = spec
        self.ranks: list[Any] = []  # actor handles of those that have started
        self.places: Any = None  # the placement group that they are in
        _wait_for_room(spec)
        here = {NODE_LABEL: ray.get_runtime_context().get_node_id()}  # where Ray Train has its controller, too
        self.mailbox: Any = ray.remote(num_cpus=0, label_selector=here)(Mailbox).remote(spec.workers)
        self.end: LaneLost | None = None
        self.thread = threading.Thread(target=self._fit, name="lane", daemon=True)
        self.thread.start()

    def run(self, job: Work, report: Callable[[Metrics], Any]) -> Result:
        """See run_in_lane; raises LaneLost when the lane cannot bring this job to its end."""
        try:
            number = ray.get(self.mailbox.submit.remote(job))
            try:
                return self._follow(number, job.hang_s, report)
            finally:  # tune.report leaves by SystemExit when Tune stops the trial
                self.mailbox.abandon.remote(number)
        except RayError as error:
            raise LaneLost(f"the lane's mailbox is gone: {_last_line(error)}", details=str(error)) from None

    def _follow(self, number: int, hang_s: float, report: Callable[[Metrics], Any]) -> Result:
        while True:
            event = ray.get(self.mailbox.next_event.remote(number, LISTEN_S))
            match event:
                case Reported(metrics, awaited):
                    report(metrics or {})
                    if awaited:
                        self.mailbox.proceed.remote(number)
                case Returned(result) | Raised(result):
                    return result
                case Broken(result):
                    raise LaneLost(result.error, fault=result)
                case Joined(rank, places):
                    self.ranks.append(rank)
                    self.places = places
                case Silence() if not self.thread.is_alive():
                    raise self.end or LaneLost("the lane ended by itself")
                case Silence(seconds) if len(self.ranks) < self.spec.workers:
                    if seconds > START_S:
                        raise LaneLost(f"the lane's ranks did not start within {START_S:g} s", started=False)
                case Silence(seconds) if seconds > hang_s:
                    hung = f"training function hung: no sign of life for {hang_s:g} s"
                    raise LaneLost(hung, fault=Result(Outcome.BUG, error=hung))

    def close(self) -> None:
        """Kill the ranks and wait for Ray Train to notice, so that their resources are free again.

        Raises RuntimeError when it does not within a minute; Tune then replaces this actor, and with it the lane dies.
        """
        for rank in self.ranks:
            ray.kill(rank)
        ray.kill(self.mailbox)
        self.thread.join(60)
        if self.places is not None:
            # Ray Train's controller gives them back, and its cleaner when that was killed; but when both were, nobody.
            remove_placement_group(self.places)
        if self.thread.is_alive():
            raise RuntimeError("a lane could not be closed")

    def _fit(self) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in TRAIN_ENVIRONMENT.items()})
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        spec, target, mailbox = self.spec, self.target, self.mailbox
        # Ray Train insists on a folder, although nothing is kept there: checkpoints are files of the run directory.
        with tempfile.TemporaryDirectory(prefix="lane-") as folder:
            trainer = TorchTrainer(
                lambda: serve(target, mailbox, max(1, int(spec.cpus)), spec.gpus),
                scaling_config=ScalingConfig(
                    num_workers=spec.workers, use_gpu=spec.gpus > 0, resources_per_worker=spec.bundle
                ),
                run_config=RunConfig(  # type: ignore[call-arg]  # type checkers see Train V1's
                    storage_path=folder,
                    worker_runtime_env={"env_vars": MEMORY_ENVIRONMENT},
                    # Losses are counted per job (tuner.py). Without a limit a controller would try to start for ever.
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                trainer.fit()
            except Exception as error:
                self.end = LaneLost(f"the lane died: {_last_line(error)}", details=str(error))


def _wait_for_room(spec: LaneSpec) -> None:
    """Return once the cluster has room for such a lane; raises LaneLost when it has none for START_S seconds.

    Ray Train's own wait would count as a lane that does not start, and other jobs may hold the room for hours.
    """
    group = placement_group([spec.bundle] * spec.workers)
    try:
        if not group.wait(START_S):
            raise LaneLost(f"no room for a lane within {START_S:g} s: other jobs have it", started=False)
    finally:
        remove_placement_group(group)


_running: Lane | None = None


def _lane(target: Target, spec: LaneSpec) -> Lane:
    global _running
    if _running and not (_running.thread.is_alive() and _running.target == target and _running.spec == spec):
        _close_lane()
    if _running is None:
        _running = Lane(target, spec)
    return _running


def _close_lane() -> None:
    global _running
    lane, _running = _running, None
    if lane:
        lane.close()


def _last_line(error: BaseException) -> str:
    """Ray puts its own words first and the cause last."""
    text = str(error).strip().splitlines()
    return text[-1].strip() if text else type(error).__name__
