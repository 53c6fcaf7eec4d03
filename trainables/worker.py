"""Lanes: one Ray Train run per device group, started once, that trains one trial after another.

Ray's documented pattern starts a Ray Train run for every trial: a handful of processes that import torch afresh, 12 to
19 s a trial on two cores. A lane pays that once. It belongs to the process that calls `run_in_lane` (Tune's reused
actor):

    Tune actor                         mailbox (async actor, no CPU)          Ray Train workers, ranks 0 .. N-1
    run_in_lane(target, spec, job) --> submit(job) ......... next_job() <---- target(job, report)
    report(metrics)                <-- read() .............. post()     <---- report(metrics) -> abandon?
    result                         <-- read() .............. finish()   <---- the returned dict

Whoever owns it takes the lane along when it dies: Ray ends the actors of a dead owner.

A job is abandoned when the next one is submitted; its `report` then answers True on all ranks at the same epoch: the
mailbox gives every rank the answer that it gave the first. No collective is needed, so an idle lane can wait for ever.
A lane that dies is started again with the same job; going on from the last epoch is the target's matter (checkpoint).
"""

import asyncio
import itertools
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Job = dict[str, Any]
Target = Callable[[Job, Callable[[dict[str, Any]], bool]], dict[str, Any]]

READ_SECONDS = 0.5  # how long a read waits for news; a dead lane is noticed after at most so long
ALIVE_SECONDS = 1.0  # signs of life are sent at most so often
KILL_SECONDS = 60.0
MAX_RESTARTS = 3
HANG_SECONDS = 1800.0
# Ray Train reads these in the process that calls fit() and hands them on to its controller and workers.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default, 2 s, is how late a dead worker would be noticed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to the driver
}


@dataclass(frozen=True)
class LaneSpec:
    """What one lane takes: `workers` processes (DDP ranks) with `cpus` CPUs and `gpus` GPUs each."""

    workers: int = 1
    cpus: float = 1
    gpus: float = 0


class LaneLost(Exception):
    """The lane's processes are gone; its job has to be submitted to a new one."""


def run_in_lane(
    target: Target,
    spec: LaneSpec,
    job: Job,
    report: Callable[[dict[str, Any]], Any],
    waiting: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Run one job in this process's lane, which is started when there is none yet.

    Args:
        target: an importable function; `target(job, report)` is called on every rank with the same job. All ranks call
            `report(metrics)` at the same points (an epoch's end) with JSON-able metrics, of which rank 0's travel; when
            it returns True (on all ranks together) the target must return promptly. `report.alive()` is the sign of
            life for long stretches without a report; it costs next to nothing.
        spec: the lane; a process has one lane, of one spec and target.
        job: JSON-able; `hang_seconds` (default 1800) is the longest silence allowed.
        report: called in this thread with rank 0's metrics, in order; after a restart some may come again. When it
            raises or exits, the job is abandoned: the target is told so once the next job is submitted.
        waiting: called about twice a second while the job has not begun; may raise or exit as `report` may.

    Returns:
        what rank 0 returned; {"outcome": "bug", "error", "traceback"} when the target raised or hung twice;
        {"outcome": "lost node", "error"} when the lane died four times under this job.
    """
    losses = hangs = 0
    while True:
        try:
            return _this_lane(target, spec).run(job, report, waiting)
        except TimeoutError:
            hangs += 1
            if hangs > 1:
                return {"outcome": "bug", "error": "training function hung"}
        except LaneLost as error:
            losses += 1
            if losses > MAX_RESTARTS:
                return {"outcome": "lost node", "error": f"the lane died {losses} times: {error}"}


_LANE: "Lane | None" = None


def _this_lane(target: Target, spec: LaneSpec) -> "Lane":
    global _LANE
    if _LANE is None or not _LANE.alive() or (_LANE.target, _LANE.spec) != (target, spec):
        if _LANE is not None:
            _LANE.kill()
        _LANE = Lane(target, spec)
    return _LANE


class Lane:
    """A running Ray Train run and the mailbox through which it gets its jobs. Construction does not wait for it."""

    def __init__(self, target: Target, spec: LaneSpec):
        self.target, self.spec = target, spec
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote(spec.workers)  # type: ignore[attr-defined]
        self._ticket = 0
        self._error = "it ended"
        self._thread = threading.Thread(target=self._fit, name="lane", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        os.environ.update(TRAIN_ENVIRONMENT)
        resources = {"CPU": self.spec.cpus} | ({"GPU": self.spec.gpus} if self.spec.gpus else {})
        with tempfile.TemporaryDirectory(prefix="lane-", ignore_cleanup_errors=True) as folder:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"target": self.target, "spec": self.spec, "mailbox": self.mailbox},
                scaling_config=ScalingConfig(
                    num_workers=self.spec.workers, use_gpu=self.spec.gpus > 0, resources_per_worker=resources
                ),
                # A lane is restarted whole, by run_in_lane, which also sees a dead controller; Train's own retries
                # would be counted over all trials.
                run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
            )
            try:
                trainer.fit()
            except Exception as error:  # whatever it was, the lane is over
                self._error = (str(error).strip().splitlines() or [repr(error)])[-1]

    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, job: Job, report: Callable[[dict[str, Any]], Any], waiting: Callable[[], Any]) -> dict[str, Any]:
        """Submit a job, relay its reports, return its result. Raises LaneLost, or TimeoutError when it hangs."""
        hang_seconds = float(job.get("hang_seconds", HANG_SECONDS))
        self._ticket += 1
        self._ask("submit", self._ticket, job)
        while True:
            news = self._ask("read", READ_SECONDS)
            for metrics in news["reports"]:
                report(metrics)
            if news["result"] is not None:
                if news["result"]["outcome"] == "bug" and self.spec.workers > 1:
                    self.kill()  # the other ranks may wait in a collective for the one that raised
                return news["result"]
            if not news["begun"]:
                waiting()
            if news["silence"] > hang_seconds:
                self.kill()
                raise TimeoutError
            if not self.alive():
                raise LaneLost(self._error)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.mailbox, method).remote(*arguments))
        except RayActorError as error:
            self.kill()
            raise LaneLost("its mailbox died") from error

    def kill(self) -> None:
        """End the lane's processes, whatever they are doing."""
        try:
            for worker in ray.get(self.mailbox.workers.remote(), timeout=KILL_SECONDS):
                ray.kill(worker)
        except (RayActorError, GetTimeoutError):
            pass
        ray.kill(self.mailbox)  # workers that joined unseen end at their next question
        self._thread.join(KILL_SECONDS)


@dataclass
class _Round:
    """A job as the ranks see it: they take jobs one after another, and each gets the same one."""

    ticket: int
    job: Job
    answers: list[bool] = field(default_factory=list)  # of report 0, 1, ...: abandon?
    left: int = 0  # ranks that are done with it


@ray.remote(num_cpus=0)
class Mailbox:
    """Between a lane's owner and its ranks. Questions that have no answer yet wait (nobody polls)."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.actors: list[Any] = []
        self.ticket = 0  # of the newest job; a round with another ticket is to be abandoned
        self.pending: Job | None = None
        self.rounds: dict[int, _Round] = {}
        self.reports: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        self.heard = time.monotonic()
        self.changed = asyncio.Condition()

    # The owner's side.

    async def submit(self, ticket: int, job: Job) -> None:
        async with self.changed:
            self.ticket, self.pending, self.reports, self.result = ticket, job, [], None
            self.changed.notify_all()

    async def read(self, timeout: float) -> dict[str, Any]:
        """The newest job's news: reports since the last read, its result, whether a rank has it, seconds of silence."""
        async with self.changed:
            try:
                async with asyncio.timeout(timeout):
                    await self.changed.wait_for(lambda: self.reports or self.result is not None)
            except TimeoutError:
                pass
            reports, self.reports = self.reports, []
            return {
                "reports": reports,
                "result": self.result,
                "begun": self.pending is None,
                "silence": time.monotonic() - self.heard if self.rounds else 0.0,
            }

    async def workers(self) -> list[Any]:
        return self.actors

    # The ranks' side.

    async def join(self, actor: Any) -> None:
        self.actors.append(actor)

    async def next_job(self, number: int) -> Job:
        """The job of round `number`; the rank that asks is done with the round before."""
        async with self.changed:
            if previous := self.rounds.get(number - 1):
                previous.left += 1
                if previous.left == self.ranks:
                    del self.rounds[number - 1]
            await self.changed.wait_for(lambda: number in self.rounds or self.pending is not None)
            if number not in self.rounds:
                assert self.pending is not None
                self.rounds[number] = _Round(self.ticket, self.pending)
                self.pending = None
            self.heard = time.monotonic()
            return self.rounds[number].job

    async def post(self, number: int, index: int, metrics: dict[str, Any] | None) -> bool:
        """Report `index` of a round, with rank 0's metrics; the same answer to every rank: abandon it?"""
        async with self.changed:
            self.heard = time.monotonic()
            round = self.rounds[number]
            if index == len(round.answers):
                round.answers.append(round.ticket != self.ticket)
            if metrics is not None and round.ticket == self.ticket:
                self.reports.append(metrics)
                self.changed.notify_all()
            return round.answers[index]

    async def alive(self) -> None:
        self.heard = time.monotonic()

    async def finish(self, number: int, result: dict[str, Any]) -> None:
        async with self.changed:
            if self.rounds[number].ticket == self.ticket and self.result is None:
                self.result = result
                self.changed.notify_all()


class Report:
    """What a target reports with; see run_in_lane."""

    def __init__(self, mailbox: Any, number: int, rank: int):
        self._mailbox, self._number, self._rank = mailbox, number, rank
        self._index = itertools.count()
        self._last = time.monotonic()

    def __call__(self, metrics: dict[str, Any]) -> bool:
        mine = _plain(metrics) if self._rank == 0 else None
        return ray.get(self._mailbox.post.remote(self._number, next(self._index), mine))

    def alive(self) -> None:
        if time.monotonic() - self._last > ALIVE_SECONDS:
            self._last = time.monotonic()
            self._mailbox.alive.remote()


def _work(config: dict[str, Any]) -> None:
    """What Ray Train runs on every rank: one job after another, until the lane is killed."""
    import ray.train.torch
    import torch

    target, spec, mailbox = config["target"], config["spec"], config["mailbox"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(max(1, int(spec.cpus)))
    if spec.gpus:
        torch.cuda.set_device(ray.train.torch.get_device())  # ranks of one node see each other's GPUs
    ray.get(mailbox.join.remote(ray.get_runtime_context().current_actor))
    for number in itertools.count():
        job = ray.get(mailbox.next_job.remote(number))
        try:
            result = _plain(target(job, Report(mailbox, number, rank)))
        except (Exception, SystemExit) as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            bug = {"outcome": "bug", "error": line, "traceback": traceback.format_exc()}
            ray.get(mailbox.finish.remote(number, bug))
            if spec.workers > 1:
                raise
            continue
        if rank == 0:
            ray.get(mailbox.finish.remote(number, result))


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON would bring it back; a TypeError here is a bug of the target that gave it."""
    return json.loads(json.dumps(value))
