"""Lanes: one Ray Train run per device group, started once, that trains one trial after another.

A Ray Train run costs some 15 s and eight processes to start, so a run per trial would cost more than most trials. A
lane is a run whose training loop takes job after job from a mailbox. It belongs to the reused Ray Tune actor that
started it:

    Tune actor (run_in_lane) <--> Mailbox (a small actor) <--> the ranks of a TorchTrainer run (_serve)

Every rank calls the target with the same job, and all ranks meet in the mailbox at each report and at the job's end, so
that they abandon a trial together. A lane that hangs is started again and gets the same job; one that dies, alone or
with its machine, takes its Tune actor with it, and the job goes to whichever lane is free next (search/tuner.py). Going
on from the job's last checkpoint is the target's matter.
"""

import asyncio
import ctypes
import gc
import json
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

# torch and ray.train are imported where they are used: the mailbox's process imports this module and needs neither.

Job = dict[str, Any]
Metrics = dict[str, Any]


class Report(Protocol):
    """What a target reports with."""

    def __call__(self, metrics: Metrics) -> bool:
        """Tell an epoch's metrics (JSON-able; rank 0's travel). True: the trial is to be abandoned, return soon.

        All ranks call it at the same points and get the same answer.
        """

    def alive(self) -> None:
        """A sign of life within a long epoch, from any rank at any time; costs next to nothing."""


Target = Callable[[Job, Report], dict[str, Any]]

OUT_OF_MEMORY = "out of memory"  # the outcome
NOT_STARTED = "the lane did not start"  # what a LaneLost says then, and search.tuner reads
TRIES = 2  # lanes that a job gets when it hangs, or raises on a single rank
HANG_S = 1800.0  # default of job["hang_s"]
START_S = 300.0  # a lane may have to wait until another has given its resources back
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
# a CPU a fifth shorter. One arena, for blocks above 64 MiB are kept in the first alone. _serve trims after each trial.
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


def run_in_lane(target: Target, spec: LaneSpec, job: Job, report: Callable[[Metrics], Any]) -> dict[str, Any]:
    """Run one job in this process's lane, which is started if need be, and return the target's result.

    Args:
        target: importable function `target(job, report) -> result` with a JSON-able result, called on every rank; its
            job also has the "node" (address and id) that it runs on.
        spec: the lane's size; a lane of another size or target is closed first.
        job: JSON-able; `job["hang_s"]` seconds without a report or a sign of life count as a hang (default 1800).
        report: called with rank 0's metrics in order; after a restart an epoch may be reported again. When it raises or
            exits, as tune.report does in a trial that Tune stops, the job is abandoned and the exception goes on.

    Returns:
        Rank 0's dict, or `outcome` "bug" (with `error`, one line, and `traceback`) when the target raised, or hung or
        raised on a single rank twice; "out of memory" (likewise) when any rank raised MemoryError.

    Raises LaneLost when the lane died under this job, or did not start. It is not started again here: its machine may
    be gone, and then a lane elsewhere is the one to go on with the job.
    """
    fault: dict[str, Any] = {}
    for _ in range(TRIES):
        try:
            return _lane(target, spec).run(job, report)
        except LaneLost as loss:
            _close_lane()
            if loss.fault is None:
                raise
            fault = loss.fault
            if fault["outcome"] == OUT_OF_MEMORY:
                break
    return fault


class LaneLost(Exception):
    """The lane died, or had to be given up, under a job: `fault` is a job's result when the target is to blame."""

    def __init__(self, message: str, fault: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.fault = fault


class Mailbox:
    """Where a lane's ranks meet each other and the Tune actor. A Ray actor; its methods interleave, none blocks."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.number = 0  # of the job submitted last
        self.waiting_job: Job | None = None
        self.idle: set[int] = set()
        self.dealt: asyncio.Future[tuple[int, Job]] = asyncio.Future()
        self.arrived: dict[int, tuple[str, Any]] = {}
        self.settled: asyncio.Future[str] = asyncio.Future()
        self.abandoned = 0  # number of the last job given up
        self.events: asyncio.Queue[tuple[int, str, Any]] = asyncio.Queue()
        self.heard = time.monotonic()

    # called by the Tune actor

    async def submit(self, job: Job) -> int:
        self.number += 1
        self.waiting_job = job
        self.heard = time.monotonic()
        self._deal()
        return self.number

    async def next_event(self, number: int, wait_s: float) -> tuple[str, Any]:
        """The next event of job `number`, or ("silence", seconds since a rank was heard of)."""
        while True:
            try:
                of, kind, payload = await asyncio.wait_for(self.events.get(), wait_s)
            except TimeoutError:
                silence = time.monotonic() - self.heard
                raised = [payload for kind, payload in self.arrived.values() if kind == "raised"]
                if raised and silence > ALONE_S:
                    return "broken", raised[0]
                return "silence", silence
            if of == number or kind == "joined":
                return kind, payload

    async def abandon(self, number: int) -> None:
        self.abandoned = number
        if number == self.number:
            self.waiting_job = None

    # called by the ranks

    async def join(self, worker: Any) -> None:
        self.heard = time.monotonic()
        self.events.put_nowait((0, "joined", worker))

    async def take(self, rank: int) -> tuple[int, Job]:
        """The next job and its number, the same for all ranks, once all of them ask."""
        self.idle.add(rank)
        dealt = self.dealt
        self._deal()
        return await dealt

    async def meet(self, rank: int, number: int, kind: str, payload: Any) -> str:
        """Wait for all ranks; all get the same answer: "go on", "abandon", or "broken" when they disagree.

        `kind` is "reported", "returned" or "raised"; `payload` metrics, result, or outcome, error and traceback.
        """
        self.heard = time.monotonic()
        self.arrived[rank] = (kind, payload)
        settled = self.settled
        if len(self.arrived) == self.workers:
            arrived, self.arrived = self.arrived, {}
            self.settled = asyncio.Future()
            settled.set_result(self._settle(number, arrived))
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

    def _settle(self, number: int, arrived: dict[int, tuple[str, Any]]) -> str:
        kinds = {kind for kind, _ in arrived.values()}
        raised = [payload for kind, payload in arrived.values() if kind == "raised"]
        out_of_memory = [payload for payload in raised if payload["outcome"] == OUT_OF_MEMORY]
        # together, too, ranks may run out of memory in the middle of different collectives
        if len(kinds) > 1 or (out_of_memory and self.workers > 1):
            disagreement = _bug(f"the ranks disagree: {sorted(kinds)}")
            self.events.put_nowait((number, "broken", [*out_of_memory, *raised, disagreement][0]))
            return "broken"
        self.events.put_nowait((number, *arrived[0]))
        return "abandon" if number != self.number or number == self.abandoned else "go on"


class Lane:
    """A Ray Train run that serves jobs, seen from the Tune actor that owns it: when that dies, all of it dies."""

    def __init__(self, target: Target, spec: LaneSpec) -> None:
        self.target = target
        self.spec = spec
        self.ranks: list[Any] = []  # actor handles of those that have started
        self.mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote(spec.workers)
        self.end = ""
        self.thread = threading.Thread(target=self._fit, name="lane", daemon=True)
        self.thread.start()

    def run(self, job: Job, report: Callable[[Metrics], Any]) -> dict[str, Any]:
        """See run_in_lane; raises LaneLost when the lane cannot bring this job to its end."""
        try:
            number = ray.get(self.mailbox.submit.remote(job))
            try:
                return self._follow(number, job.get("hang_s", HANG_S), report)
            finally:  # tune.report leaves by SystemExit when Tune stops the trial
                self.mailbox.abandon.remote(number)
        except RayError as error:
            raise LaneLost(f"the lane's mailbox is gone: {_first_line(error)}") from None

    def _follow(self, number: int, hang_s: float, report: Callable[[Metrics], Any]) -> dict[str, Any]:
        while True:
            kind, payload = ray.get(self.mailbox.next_event.remote(number, LISTEN_S))
            if kind == "reported":
                report(payload)
            elif kind in ("returned", "raised"):
                return payload
            elif kind == "broken":
                raise LaneLost(payload["error"], fault=payload)
            elif kind == "joined":
                self.ranks.append(payload)
            elif not self.thread.is_alive():
                raise LaneLost(self.end)
            elif len(self.ranks) < self.spec.workers:
                if payload > START_S:
                    raise LaneLost(f"{NOT_STARTED} within {START_S:g} s: does the cluster have {self.spec}?")
            elif payload > hang_s:
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
        resources = {"CPU": spec.cpus, "GPU": spec.gpus} if spec.gpus else {"CPU": spec.cpus}
        # Ray Train insists on a folder, although nothing is kept there: checkpoints are files of the run directory.
        with tempfile.TemporaryDirectory(prefix="lane-") as folder:
            trainer = TorchTrainer(
                lambda: _serve(target, mailbox, max(1, int(spec.cpus))),
                scaling_config=ScalingConfig(
                    num_workers=spec.workers, use_gpu=spec.gpus > 0, resources_per_worker=resources
                ),
                run_config=RunConfig(  # type: ignore[call-arg]  # type checkers see Train V1's
                    storage_path=folder,
                    worker_runtime_env={"env_vars": MEMORY_ENVIRONMENT},
                    failure_config=FailureConfig(max_failures=0),  # restarts are counted per job, above
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                trainer.fit()
                self.end = "the lane ended by itself"
            except Exception as error:
                self.end = f"the lane died: {_first_line(error)}"


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
        kind, payload = _run_target(target, {**job, "node": node}, _Report(mailbox, rank, number))
        if ray.get(mailbox.meet.remote(rank, number, kind, payload)) == "broken":
            raise RuntimeError("the ranks of this lane disagree")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises, and so ends the lane, when the trial left the device in a broken state
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # other lanes may share this GPU
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # and this memory


def _run_target(target: Target, job: Job, report: Report) -> tuple[str, Any]:
    """How the job ended on this rank ("returned" or "raised"), with the result or what stands for it."""
    try:
        return "returned", _plain(target(job, report))
    except MemoryError as error:
        return "raised", {**_bug(_first_line(error), traceback.format_exc()), "outcome": OUT_OF_MEMORY}
    except Exception as error:
        return "raised", _bug(_first_line(error), traceback.format_exc())


class _Report:
    def __init__(self, mailbox: Any, rank: int, number: int) -> None:
        self._mailbox, self._rank, self._number = mailbox, rank, number
        self._beaten = time.monotonic()

    def __call__(self, metrics: Metrics) -> bool:
        payload = _plain(metrics) if self._rank == 0 else None
        answer = ray.get(self._mailbox.meet.remote(self._rank, self._number, "reported", payload))
        if answer == "broken":
            raise SystemExit("the ranks of this lane disagree")  # past the target's own `except Exception`
        return answer == "abandon"

    def alive(self) -> None:
        if time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            self._mailbox.beat.remote()


def _bug(error: str, traceback: str = "") -> dict[str, Any]:
    return {"outcome": "bug", "error": error, "traceback": traceback}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON brings it back; what JSON cannot hold is an error here, where it shows as the target's."""
    return json.loads(json.dumps(value))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
