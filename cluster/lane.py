"""Lanes: one Ray Train run per device group, started once, that trains one trial after another.

A Ray Train run costs some 15 s and eight processes to start, so a run per trial would cost more than most trials. A
lane is a run whose training loop takes job after job from a mailbox:

    Tune actor (run_in_lane) <--> Mailbox (an actor) <--> the ranks of a TorchTrainer run (serve)

Lanes belong to the driver (pool.py), which lends one to each trial. A lane is whole on its machine: its mailbox, Ray
Train's controller and the ranks, so it dies with that machine and with no other. The Tune actors only wait, and are
small. A lane that hangs or breaks ends its job as a bug; one that dies, alone or with its machine, is lost, and the job
goes to whichever lane is free next (tuner.py). Continuing from the job's last checkpoint is up to the target.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.ranks import Broken, Ended, Mailbox, Raised, Reported, Returned, Silence, Target, Work, serve
from trainables.job import Metrics, Outcome, Result

START_S = 300.0  # that a lane waits for room, and then for its ranks: another may have to give its place back first
NODE_LABEL = "ray.io/node-id"  # which Ray gives to every machine
LOOK_S = 2.0  # how often a lane that waits for room looks whether it is still wanted
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


# --- in the driver ---------------------------------------------------------------------------------------------------


class Lane:
    """A Ray Train run that serves jobs, as its driver sees it; with the driver it ends. Nothing here blocks for long.

    Attributes:
        name: of its mailbox, by which run_in_lane finds it from any process of the same Ray job.
        machine: Ray's id of the one that all of it is on; None: the ranks lie where Ray finds room, the mailbox here.
        spec: its size.
    """

    def __init__(self, target: Target, spec: LaneSpec, machine: str | None = None) -> None:
        self.name = f"lane-{secrets.token_hex(8)}"
        self.machine, self.spec = machine, spec
        where = {NODE_LABEL: machine or ray.get_runtime_context().get_node_id()}
        actor: Any = ray.remote(num_cpus=0, label_selector=where)(Mailbox)
        self._mailbox = actor.options(name=self.name).remote(spec.workers)
        # Only the ranks open it: it imports torch, and much else. Not ray.put: when Ray dies on this machine, it ends a
        # process that owns objects at once, before that can say why.
        pickled = cloudpickle.dumps(target)
        self._run: Any = self._mailbox.run.remote(partial(_train, pickled, spec, machine))
        self._closed: Any = None

    @property
    def has_ended(self) -> bool:
        """Whether its ranks are gone, or were never started."""
        return bool(ray.wait([self._run], timeout=0)[0])

    def close(self) -> None:
        """Begin to end its ranks; `is_closed` says when their room is free again."""
        self._closed = self._mailbox.close.remote()

    def is_closed(self, wait_s: float = 0.0) -> bool:
        """Whether all of it has ended after `close`, waiting for that up to `wait_s`."""
        if not ray.wait([self._closed], timeout=wait_s)[0]:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """End its mailbox, and with it what is left of the lane."""
        ray.kill(self._mailbox)


# --- in the mailbox's process ----------------------------------------------------------------------------------------


def _train(target: bytes, spec: LaneSpec, machine: str | None, mailbox: Any) -> Ended:
    """Run Ray Train until the lane's end, on `machine` if one is named."""
    here = {NODE_LABEL: machine} if machine else None
    # Waited for here: in Ray Train it would count as a lane that does not start, and other jobs may hold the room long.
    group = placement_group([spec.bundle] * spec.workers, bundle_label_selector=[here] * spec.workers if here else None)
    try:
        end, room = time.monotonic() + START_S, False
        while not room and time.monotonic() < end and not ray.get(mailbox.is_closed.remote()):
            room = group.wait(LOOK_S)
    finally:
        remove_placement_group(group)
    if ray.get(mailbox.is_closed.remote()):
        return Ended("the lane was closed before it started", started=False)
    if not room:
        return Ended(f"no room for a lane within {START_S:g} s: other jobs have it", started=False)

    os.environ.update({key: os.environ.get(key, value) for key, value in TRAIN_ENVIRONMENT.items()})
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train insists on a folder, although nothing is kept there: checkpoints are files of the run directory.
    with tempfile.TemporaryDirectory(prefix="lane-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            lambda: serve(target, mailbox, max(1, int(spec.cpus)), spec.gpus),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=spec.workers, use_gpu=spec.gpus > 0, resources_per_worker=spec.bundle, label_selector=here
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
            return Ended(f"the lane died: {_last_line(error)}", details=str(error))
    return Ended("the lane ended by itself")


# --- in the Tune actor -----------------------------------------------------------------------------------------------


def run_in_lane(name: str, job: Work, report: Callable[[Metrics], Any]) -> Result:
    """Run one job in a lane and return the target's result.

    Args:
        name: the lane's.
        job: what to run; whatever the lane has run before is abandoned.
        report: called with rank 0's metrics in order. When it raises or exits, as tune.report does in a trial that Tune
            stops, the job is abandoned and the exception continues.

    Returns rank 0's result; a bug (with `error`, one line, and `traceback`) when the target raised; out of memory when
    any rank raised MemoryError.

    Raises LaneLost when the lane can no longer be used: it died under this job, or did not start, or the target hung or
    raised on a single rank, and then with the job's result.
    """
    try:
        mailbox: Any = ray.get_actor(name)
        number: int = ray.get(mailbox.submit.remote(job), timeout=START_S)
        try:
            return _follow(mailbox, number, job.hang_s, report)
        finally:  # tune.report leaves by SystemExit when Tune stops the trial
            mailbox.abandon.remote(number)
    except GetTimeoutError:
        raise LaneLost(f"the lane's mailbox did not start within {START_S:g} s", started=False) from None
    except (RayError, ValueError) as error:  # ValueError: there is no actor of that name
        raise LaneLost(f"the lane's mailbox is gone: {_last_line(error)}", details=str(error)) from None


def _follow(mailbox: Any, number: int, hang_s: float, report: Callable[[Metrics], Any]) -> Result:
    while True:
        event = ray.get(mailbox.next_event.remote(number, LISTEN_S))
        match event:
            case Reported(metrics, awaited):
                report(metrics or {})
                if awaited:
                    mailbox.proceed.remote(number)
            case Returned(result) | Raised(result):
                return result
            case Broken(result):
                raise LaneLost(result.error, fault=result)
            case Ended(error, details, started):
                raise LaneLost(error, started=started, details=details)
            case Silence(seconds, started=False):
                if seconds > 2 * START_S:  # for room, and then for its ranks
                    raise LaneLost(f"the lane's ranks did not start within {START_S:g} s", started=False)
            case Silence(seconds) if seconds > hang_s:
                hung = f"training function hung: no sign of life for {hang_s:g} s"
                raise LaneLost(hung, fault=Result(Outcome.BUG, error=hung))


def _last_line(error: BaseException) -> str:
    """Ray puts its own words first and the cause last."""
    text = str(error).strip().splitlines()
    return text[-1].strip() if text else type(error).__name__
