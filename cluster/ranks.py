"""What runs in a lane's ranks, and the mailbox where they meet each other and the Tune actor whose trial they train.

Every rank calls the target with the same job, and all ranks meet in the mailbox at each report and at the job's end, so
that they abandon a trial together. At a report where the sweep may stop the trial they wait for its verdict; at others
they go on at once. Who starts the ranks and listens to the mailbox is lane.py.
"""

import asyncio
import ctypes
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import cloudpickle
from ray.util.placement_group import get_current_placement_group, remove_placement_group

from trainables.job import Metrics, Outcome, Reporter, Result

# torch and ray.train are imported where they are used: the mailbox's process imports this module and needs neither.

CLOSE_S = 60.0  # that Ray Train may take to notice that its ranks are gone
ALONE_S = 20.0  # a rank that has ended early waits so long for the others: they are probably stuck in a collective
BEAT_S = 1.0


class Work(Protocol):
    """What a lane needs to know of a job, a frozen dataclass: trainables.job.Job is one."""

    @property
    def hang_s(self) -> float:
        """Seconds without a report or a sign of life after which it counts as hung."""

    @property
    def stops_at(self) -> tuple[int, ...]:
        """Epochs at whose report the trial may be stopped, so that it waits for the verdict."""

    @property
    def gpus(self) -> float:
        """Of each rank; the lane fills it in."""

    @property
    def node(self) -> str:
        """The machine that it runs on; the lane fills it in."""


Target = Callable[[Any, Reporter], Result]


# --- what ranks and Tune actor say to each other ---------------------------------------------------------------------


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
    """The ranks no longer agree, so the lane can no longer be used."""

    result: Result


@dataclass(frozen=True)
class Silence:
    """Nothing has come; seconds since any rank was heard of, and whether all of them have started."""

    seconds: float
    started: bool


@dataclass(frozen=True)
class Ended:
    """The lane is over: why, all that Ray said about it, and False when there was no room for its ranks."""

    error: str
    details: str = ""
    started: bool = True


def _early_end(event: Reported | Returned | Raised) -> Result | None:
    """How a rank has ended before its time: it raised, or has no use for the trial (no weights on its machine, its
    storage is away). One that has trained to the end waits for rank 0, which still predicts and writes."""
    if isinstance(event, Reported):
        return None
    whole = event.result.outcome.leaves_candidate or event.result.outcome is Outcome.PRUNED
    return None if isinstance(event, Returned) and whole else event.result


GO_ON, ABANDON, BREAK = "go on", "abandon", "broken"  # what ranks that meet are told


class Mailbox:
    """Where a lane's ranks meet each other and the Tune actor. A Ray actor; its methods interleave, none blocks.

    With it lives and dies the lane: Ray Train runs in a thread of its process, and the ranks belong to that run.
    """

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
        self.ranks: list[Any] = []  # actor handles of those that have started
        self.places: Any = None  # the placement group that they are in
        self.ended: asyncio.Future[Ended] = asyncio.Future()
        self.closed = False

    # called by the driver, which starts and ends lanes

    async def run(self, train: Callable[[Any], Ended]) -> None:
        """Call `train` with this actor's handle, in a thread: it runs the ranks until the lane ends."""
        try:
            ended = await asyncio.to_thread(train, ray.get_runtime_context().current_actor)
        except Exception as error:  # no torch on that machine, no room in /tmp
            ended = Ended(f"the lane did not start: {_first_line(error)}", details=traceback.format_exc())
        self.ended.set_result(ended)
        self.events.put_nowait((self.number, ended))

    async def close(self) -> None:
        """Kill the ranks, also those that are still to start, and return once Ray Train has noticed, so that their room
        is free again."""
        self.closed, self.waiting_job = True, None
        for rank in self.ranks:
            ray.kill(rank)
        await asyncio.wait([self.ended], timeout=CLOSE_S)
        if self.places is not None:
            # Ray Train's controller gives them back, and its cleaner when that was killed; but when both were, nobody.
            remove_placement_group(self.places)

    async def is_closed(self) -> bool:
        return self.closed

    # called by the Tune actor

    async def submit(self, job: Work) -> int:
        """Hand in a job; the one before, if any, is over. Returns its number; that of no job in a closed lane."""
        if self.closed:  # whoever hands it in came too late, and another lane may have the job by now
            return -1
        await self.abandon(self.number)
        self.events = asyncio.Queue()
        self.number += 1
        self.waiting_job = job
        self.heard = time.monotonic()
        self._deal()
        return self.number

    async def next_event(self, number: int, wait_s: float) -> Any:
        """The next event of job `number`, or Silence."""
        while number == self.number:
            try:
                of, event = await asyncio.wait_for(self.events.get(), wait_s)
            except TimeoutError:
                if self.ended.done():
                    return self.ended.result()
                silence = time.monotonic() - self.heard
                left = next((result for event in self.arrived.values() if (result := _early_end(event))), None)
                if left and silence > ALONE_S:
                    return Broken(left)
                return Silence(silence, started=len(self.ranks) == self.workers)
            if of == number:
                return event
        return Ended("the lane has another job")

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

    async def join(self, rank: Any, places: Any) -> None:
        """A rank has started: its actor's handle, and the placement group that it is in."""
        if self.closed:
            ray.kill(rank)
        self.heard = time.monotonic()
        self.ranks.append(rank)
        self.places = places

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
            disagreement = Result(Outcome.BUG, error=f"the ranks disagree: {sorted(kinds)}")
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


# --- in the ranks ----------------------------------------------------------------------------------------------------


def serve(pickled: bytes, mailbox: Any, threads: int, gpus: float) -> None:
    """The training loop of a lane's ranks: take a job, train it, take the next."""
    import torch
    from ray.train import get_context

    target: Target = cloudpickle.loads(pickled)
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    rank = get_context().get_world_rank()
    node = f"{ray.util.get_node_ip_address()} {ray.get_runtime_context().get_node_id()[:8]}"
    ray.get(mailbox.join.remote(ray.get_runtime_context().current_actor, get_current_placement_group()))
    gc.freeze()  # else each collection below looks at all of torch and Ray again, for a tenth of a second
    while True:
        number, job = ray.get(mailbox.take.remote(rank))
        job = dataclasses.replace(job, node=node, gpus=gpus)
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
        return Raised(Result(Outcome.BUG, error=_first_line(error), traceback=traceback.format_exc()))


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
