"""Lanes: one Ray Train run per device group, started once, that trains one trial after another.

A Ray Train run costs some 15 s and eight processes to start, so a run per trial would cost more than most trials. A
lane is a run whose training loop takes job after job from a mailbox. It belongs to the reused Ray Tune actor that
started it:

    Tune actor (run_in_lane) <--> Mailbox (a small actor) <--> the ranks of a TorchTrainer run (_serve)

Every rank calls the target with the same job, and all ranks meet in the mailbox at each report and at the job's end, so
that they abandon a trial together. At a report where the sweep may stop the trial they wait for its verdict; at others
they go on at once. A lane that hangs or breaks is closed, and the job ends as a bug; one that dies, alone or with its
machine, is lost, and the job goes to whichever lane is free next (tuner.py). Continuing from the job's last checkpoint
is the target's matter.
"""

import asyncio
import ctypes
import dataclasses
import gc
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from trainables.job import Metrics, Outcome, Reporter, Result

# torch and ray.train are imported where they are used: the mailbox's process imports this module and needs neither.

START_S = 300.0  # that a lane waits for room, and then for its ranks: another may have to give its place back first
ALONE_S = 20.0  # a rank that raised waits this long for the others: they are probably stuck in a collective
LISTEN_S = 1.0  # how often a waiting Tune actor looks whether its lane still lives
BEAT_S = 1.0

TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default 2 s delays every start, end and fault
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # torch imports slowly on a busy machine; the default is 60
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per lane
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# glibc hands large blocks back to the kernel at every step and gets them again full of zeros; kept, they make a step on
# a CPU a fifth shorter. One arena, because only the first keeps blocks above 64 MiB. _serve trims after each trial.
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


class Work(Protocol):
    """What a lane needs to know of a job, a frozen dataclass: trainables.job.Job is one."""

    @property
    def hang_s(self) -> float:
        """Seconds without a report or a sign of life after which it counts as hung."""

    @property
    def stops_at(self) -> tuple[int, ...]:
        """Epochs at whose report the trial may be stopped, so that it waits for the verdict."""

    @property
    def node(self) -> str:
        """The machine that it runs on; the lane fills it in."""


Target = Callable[[Any, Reporter], Result]


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


# --- what ranks and Tune actor say to each other ---------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A rank has started: its actor's handle."""

    rank: Any


@dataclass(frozen=True)
class Reported:
    """An epoch's metrics; of ranks other than 0 None. `awaited`: the ranks wait for the verdict."""

    metrics: Metrics | None
    awaited: bool = False


@dataclass(frozen=True)
class Returned:
    """The target returned."""

    result: Result


@dataclass(frozen=True)
class Raised:
    """The target raised: what stands for its result."""

    result: Result


@dataclass(frozen=True)
class Broken:
    """The ranks no longer agree, so the lane is of no more use."""

    result: Result


@dataclass(frozen=True)
class Silence:
    """Nothing has come; seconds since any rank was heard of."""

    seconds: float


GO_ON, ABANDON, BREAK = "go on", "abandon", "broken"  # what ranks that meet are told


class Mailbox:
    """Where a lane's ranks meet each other and the Tune actor. A Ray actor; its methods interleave, none blocks."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.number = 0  # of the job submitted last
        self.waiting_job: Work | None = None
        self.idle: set[int] = set()
        self.dealt: asyncio.Future[tuple[int, Work]] = asyncio.Future()
        self.arrived: dict[int, Reported | Returned | Raised] = {}
        self.settled: asyncio.Future[str] = asyncio.Future()
        self.verdict: asyncio.Future[str] | None = None  # of the Tune actor, while the ranks wait for it
        self.abandoned = 0  # number of the last job given up
        self.events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.heard = time.monotonic()

    # called by the Tune actor

    async def submit(self, job: Work) -> int:
        self.number += 1
        self.waiting_job = job
        self.heard = time.monotonic()
        self._deal()
        return self.number

    async def next_event(self, number: int, wait_s: float) -> Any:
        """The next event of job `number`, or Silence."""
        while True:
            try:
                of, event = await asyncio.wait_for(self.events.get(), wait_s)
            except TimeoutError:
                silence = time.monotonic() - self.heard
                raised = [event.result for event in self.arrived.values() if isinstance(event, Raised)]
                return Broken(raised[0]) if raised and silence > ALONE_S else Silence(silence)
            if of == number or isinstance(event, Joined):
                return event

    async def proceed(self, number: int) -> None:
        """The verdict on the report that the ranks wait at: the trial goes on."""
        if number == self.number:
            self._decide(GO_ON)

    async def abandon(self, number: int) -> None:
        self.abandoned = number
        if number == self.number:
            self.waiting_job = None
            self._decide(ABANDON)

    # called by the ranks

    async def join(self, rank: Any) -> None:
        self.heard = time.monotonic()
        self.events.put_nowait((0, Joined(rank)))

    async def take(self, rank: int) -> tuple[int, Work]:
        """The next job and its number, the same for all ranks, once all of them ask."""
        self.idle.add(rank)
        dealt = self.dealt
        self._deal()
        return await dealt

    async def meet(self, rank: int, number: int, event: Reported | Returned | Raised) -> str:
        """Wait for all ranks, and at an awaited report for the verdict; all get the same answer."""
        self.heard = time.monotonic()
        self.arrived[rank] = event
        settled = self.settled
        if len(self.arrived) == self.workers:
            arrived, self.arrived = self.arrived, {}
            self.settled = asyncio.Future()
            self._settle(number, arrived, settled)
        return await settled

    async def beat(self) -> None:
        self.heard = time.monotonic()

    def _deal(self) -> None:
        if self.waiting_job is not None and len(self.idle) == self.workers:
            self.heard = time.monotonic()
            self.dealt.set_result((self.number, self.waiting_job))
            self.dealt = asyncio.Future()
            self.waiting_job = None
            self.idle.clear()

    def _settle(
        self, number: int, arrived: dict[int, Reported | Returned | Raised], settled: "asyncio.Future[str]"
    ) -> None:
        kinds = {type(event).__name__.lower() for event in arrived.values()}
        raised = [event.result for event in arrived.values() if isinstance(event, Raised)]
        out_of_memory = [result for result in raised if result.outcome is Outcome.OUT_OF_MEMORY]
        # together, too, ranks may run out of memory in the middle of different collectives
        if len(kinds) > 1 or (out_of_memory and self.workers > 1):
            disagreement = _bug(f"the ranks disagree: {sorted(kinds)}")
            self.events.put_nowait((number, Broken([*out_of_memory, *raised, disagreement][0])))
            settled.set_result(BREAK)
            return
        event = arrived[0]
        self.events.put_nowait((number, event))
        if number != self.number or number == self.abandoned:
            settled.set_result(ABANDON)
        elif isinstance(event, Reported) and event.awaited:
            self.verdict = settled
        else:
            settled.set_result(GO_ON)

    def _decide(self, answer: str) -> None:
        self.heard = time.monotonic()  # waiting for the driver is no hanging
        if self.verdict is not None:
            self.verdict.set_result(answer)
            self.verdict = None


class Lane:
    """A Ray Train run that serves jobs, seen from the Tune actor that owns it: when that dies, all of it dies."""

    def __init__(self, target: Target, spec: LaneSpec) -> None:
        self.target = target
        self.spec = spec
        self.ranks: list[Any] = []  # actor handles of those that have started
        _wait_for_room(spec)
        self.mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote(spec.workers)
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
                case Joined(rank):
                    self.ranks.append(rank)
                case Silence() if not self.thread.is_alive():
                    raise self.end or LaneLost("the lane ended by itself")
                case Silence(seconds) if len(self.ranks) < self.spec.workers:
                    if seconds > START_S:
                        raise LaneLost(f"the lane's ranks did not start within {START_S:g} s", started=False)
                case Silence(seconds) if seconds > hang_s:
                    hung = f"training function hung: no sign of life for {hang_s:g} s"
                    raise LaneLost(hung, fault=_bug(hung))

    def close(self) -> None:
        """Kill the ranks and wait for Ray Train to notice, so that their resources are free again.

        Raises RuntimeError when it does not within a minute; Tune then replaces this actor, and with it the lane dies.
        """
        for rank in self.ranks:
            ray.kill(rank)
        ray.kill(self.mailbox)
        self.thread.join(60)
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
                lambda: _serve(target, mailbox, max(1, int(spec.cpus))),
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


# --- in the ranks ----------------------------------------------------------------------------------------------------


def _serve(target: Target, mailbox: Any, threads: int) -> None:
    """The training loop of a lane's ranks: take a job, train it, take the next."""
    import torch
    from ray.train import get_context

    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    rank = get_context().get_world_rank()
    node = f"{ray.util.get_node_ip_address()} {ray.get_runtime_context().get_node_id()[:8]}"
    ray.get(mailbox.join.remote(ray.get_runtime_context().current_actor))
    gc.freeze()  # else each collection below looks at all of torch and Ray again, for a tenth of a second
    while True:
        number, job = ray.get(mailbox.take.remote(rank))
        job = dataclasses.replace(job, node=node)
        end = _run_target(target, job, _Reporter(mailbox, rank, number, job.stops_at))
        if ray.get(mailbox.meet.remote(rank, number, end)) == BREAK:
            raise RuntimeError("the ranks of this lane disagree")
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # raises, and so ends the lane, when the trial left the device in a broken state
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # other lanes may share this GPU
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # and this memory


def _run_target(target: Target, job: Work, report: Reporter) -> Returned | Raised:
    """How the job ended on this rank."""
    try:
        result = target(job, report)
        if not isinstance(result, Result):
            raise TypeError(f"the target returned {type(result).__name__}, expected a Result")
        return Returned(result)
    except MemoryError as error:
        return Raised(Result(Outcome.OUT_OF_MEMORY, error=_first_line(error), traceback=traceback.format_exc()))
    except Exception as error:
        return Raised(_bug(_first_line(error), traceback.format_exc()))


class _Reporter:
    def __init__(self, mailbox: Any, rank: int, number: int, stops_at: tuple[int, ...]) -> None:
        self._mailbox, self._rank, self._number, self._stops_at = mailbox, rank, number, stops_at
        self._beaten = time.monotonic()

    def __call__(self, metrics: Metrics) -> bool:
        event = Reported(metrics if self._rank == 0 else None, awaited=metrics.get("epoch") in self._stops_at)
        answer = ray.get(self._mailbox.meet.remote(self._rank, self._number, event))
        if answer == BREAK:
            raise SystemExit("the ranks of this lane disagree")  # past the target's own `except Exception`
        return bool(answer == ABANDON)

    def alive(self) -> None:
        if time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            self._mailbox.beat.remote()


def _bug(error: str, traceback: str = "") -> Result:
    return Result(Outcome.BUG, error=error, traceback=traceback)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _last_line(error: BaseException) -> str:
    """Ray puts its own words first and the cause last."""
    text = str(error).strip().splitlines()
    return text[-1].strip() if text else type(error).__name__
