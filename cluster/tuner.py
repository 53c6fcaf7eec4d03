"""Ray Tune assembly: a source of jobs decides, Tune places and retries, lanes train.

Nothing is decided here. Tune's searcher and scheduler are thin adapters that pass on what the source says, and Tune's
own experiment state goes to a temporary folder: what matters lies in the study and the candidates.
"""

import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback, PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster.connect import room_on_head, waiter
from cluster.lane import Lane, LaneLost, LaneSpec, run_in_lane
from cluster.pool import LanePool, Places
from cluster.ranks import Target
from trainables.errors import UserError
from trainables.job import Metrics, Outcome, Result

TICK_S = 0.5
NOTICE_S = 30.0  # until a cluster has noticed that a machine is gone
MOST_LOSSES = 5  # lanes lost under one job in a row, without a new epoch, or a new part of one, between
MOST_BARREN = 6  # lanes lost and bugs in a row, of any jobs, without one epoch between: nothing will ever train

STOPPING = "stopping when the running epochs have ended; Ctrl-C again: at once"

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a header box even when silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also spares the advice to restore an experiment
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no snapshots of the experiment
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # how many trials there are at a time is decided here
}


class Numbered(Protocol):
    """A job: cluster.ranks.Work with a name, and the time.time() after which it need not begin."""

    @property
    def id(self) -> str: ...
    @property
    def deadline(self) -> float | None: ...


class JobSource(Protocol):
    """Where jobs come from, and who hears how they went. All of it is called from the thread of run_trials."""

    stopping: bool  # True, also set by Ctrl-C: nothing new is started, and `report` stops the running trials

    def next(self) -> Any | None:
        """The next job. None: nothing to start now. An id may come again after its end, when a trial is continued."""

    def has_more(self) -> bool:
        """Whether `next` may have something, now or when a running job has ended."""

    def report(self, id: str, metrics: Metrics) -> bool:
        """An epoch's metrics; True stops the trial: for its scores, or because everything is stopping and the trial has
        not just ended its last epoch. An epoch may be reported again after a fault."""

    def finish(self, id: str, result: Result) -> None:
        """A job's end, told exactly once."""

    def tick(self) -> None:
        """Called about twice a second."""


@dataclass(frozen=True)
class Lost:
    """What a trial says when its lane died: the reason, all that Ray said, and whether the lane ever ran; the job's
    result when that is to blame."""

    error: str
    details: str = ""
    started: bool = True
    fault: Result | None = None


Message = Metrics | Result | Lost


def run_trials(
    source: JobSource, target: Target, spec: LaneSpec | Callable[[], LaneSpec], lanes: int | Callable[[], Places]
) -> None:
    """Run the source's jobs in lanes of size `spec` until it has no more; Ray must be connected.

    `spec` may be a function: a lane is of the size that it names when the lane starts.

    `lanes` is how many there are, wherever Ray finds room; or a function that is asked twice a second how many each
    machine holds, so that machines that join get trials. A job whose lane was lost, alone or with its machine, goes
    first to whichever lane is free next. Where machines may go, a lost lane is not replaced on its machine before the
    cluster would have noticed that the machine is gone: the new one would wait for room.

    Besides the target's own outcomes (see run_in_lane) a job can end as pruned: the source stopped it; interrupted:
    everything is stopping, its checkpoint stays; lost node: its lanes were lost again and again.

    The first Ctrl-C sets `source.stopping`: running trials get to the end of their epoch, however long that takes. The
    second raises KeyboardInterrupt at once. An exception of the source ends all trials at once, and is raised here
    unchanged. Raises UserError when lanes die or jobs fail in a row without an epoch, which no waiting changes.
    """

    def train_trial(config: dict[str, Any]) -> None:
        # The thread that sits in tune.report must leave before its actor can be reused; the default wait is 2 s.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
        try:
            _tell(run_in_lane(config["lane"], config["job"], _tell))
        except LaneLost as loss:
            _tell(Lost(str(loss), loss.details, loss.started, loss.fault))

    os.environ.update(TUNE_ENVIRONMENT)
    places: Callable[[], Places] = lanes if callable(lanes) else lambda: {None: lanes}
    sizes: Callable[[], LaneSpec] = spec if callable(spec) else lambda: spec
    pool = LanePool(partial(Lane, target), sizes, places, NOTICE_S if callable(lanes) else 0.0)
    bridge = _Bridge(source, pool, room_on_head())
    with _ctrl_c_stops(source), _quiet(), tempfile.TemporaryDirectory(prefix="tune-") as folder:
        gently = False
        try:
            # tune.run rather than Tuner, which would pickle the source for a restore that is never used.
            tune.run(
                # The trial's own process only waits for its lane; a CPU slot for it would starve the lane's workers.
                tune.with_resources(
                    train_trial, lambda config: PlacementGroupFactory([waiter(on_head=config["on_head"])])
                ),
                name="sweep",
                num_samples=-1,
                search_alg=_Searcher(bridge),
                scheduler=_Scheduler(bridge),
                callbacks=[_Forgetful()],
                reuse_actors=True,
                raise_on_failed_trial=False,
                storage_path=folder,
                trial_dirname_creator=lambda trial: trial.trial_id,
                verbose=0,
            )
            gently = bridge.error is None
        finally:
            bridge.interrupt()
            pool.close(gently)
    if bridge.error:
        raise bridge.error


def _tell(message: Message) -> None:
    """From the trial to _Bridge.hear; in a tuple, because Tune takes nested dicts apart."""
    tune.report({"message": (message,)})


@dataclass(frozen=True)
class _Running:
    job: Numbered
    lane: Any  # cluster.lane.Lane, or what stands for it
    on_head: bool  # whether the process that waits is there


class _Bridge:
    """The source behind Tune's searcher and scheduler: knows jobs by Tune's trial ids, and never raises into Tune."""

    def __init__(self, source: JobSource, pool: LanePool, room_on_head: int = 0) -> None:
        self.source, self.pool, self.room_on_head = source, pool, room_on_head
        self.looked = -math.inf  # when the pool last counted machines
        self.running: dict[str, _Running] = {}  # by Tune's trial id
        self.again: list[Numbered] = []  # jobs whose lane was lost
        self.losses: Counter[str] = Counter()  # by the job's id, since its last new epoch
        self.epochs: dict[str, float] = {}  # the latest of every job
        self.barren = 0
        self.error: Exception | None = None
        self.ticked = 0.0
        self.warned = False  # that it is stopping

    def next(self, trial_id: str) -> _Running | None:
        self._look()
        if self.source.stopping or not self.pool.has_room():
            return None
        job = self.again.pop(0) if self.again else self._ask(self.source.next)
        if job is None:
            return None
        lane = self._ask(self.pool.take)
        if lane is None:  # Ray has died
            self.again.append(job)
            return None
        on_head = sum(running.on_head for running in self.running.values()) < self.room_on_head
        self.running[trial_id] = _Running(job, lane, on_head)
        return self.running[trial_id]

    def has_more(self) -> bool:
        if self.source.stopping:
            return False
        return bool(self.running) or bool(self.again) or bool(self._ask(self.source.has_more))

    def hear(self, trial_id: str, message: Message) -> bool:
        """A trial's metrics, its result or the loss of its lane; True ends it."""
        if trial_id not in self.running:
            return True
        if isinstance(message, Result):
            self.finish(trial_id, message)
            return True
        if isinstance(message, Lost):
            self.lose(trial_id, message)
            return True
        id, epoch = self.running[trial_id].job.id, message.get("epoch", 0)
        self.barren = 0
        if epoch > self.epochs.get(id, -1):  # a repeated one is no progress
            self.epochs[id] = epoch
            self.losses.pop(id, None)
        if self._ask(self.source.report, id, message):
            self.finish(trial_id, Result(Outcome.INTERRUPTED if self.source.stopping else Outcome.PRUNED))
        return trial_id not in self.running

    def finish(self, trial_id: str, result: Result) -> None:
        if trial_id not in self.running:
            return
        if result.outcome is Outcome.BUG:
            self._break_circuit(result.error)
        elif result.outcome is not Outcome.INTERRUPTED:
            self.barren = 0
        running = self.running.pop(trial_id)
        self.pool.give_back(running.lane)
        self._ask(self.source.finish, running.job.id, result)

    def lose(self, trial_id: str, loss: Lost) -> None:
        """The lane can no longer be used, or the Tune actor that waited for it has died."""
        if trial_id not in self.running:
            return
        job, lane = self.running[trial_id].job, self.running[trial_id].lane
        if loss.fault:
            self._ask(self.pool.give_up, lane)
            self.finish(trial_id, loss.fault)
            return
        first = self._ask(self.pool.lose, lane)
        if loss.started:
            self.losses[job.id] += 1
            if first:  # the lanes of a lost machine are lost together: one failure
                self._break_circuit(loss.error)
        else:  # other jobs of the cluster have the room now
            print(f"{job.id} waits: {loss.error}", file=sys.stderr, flush=True)
        if self.losses[job.id] > MOST_LOSSES:
            self.finish(trial_id, Result(Outcome.LOST_NODE, error=loss.error, traceback=loss.details))
        else:
            self.again.append(job)
            del self.running[trial_id]

    def interrupt(self) -> None:
        """Whatever has not ended is continued next time."""
        for job in [*(running.job for running in self.running.values()), *self.again]:
            self._ask(self.source.finish, job.id, Result(Outcome.INTERRUPTED))
        self.running, self.again = {}, []

    def tick(self) -> None:
        """Called at every step of Tune's loop."""
        if time.monotonic() - self.ticked > TICK_S:
            self.ticked = time.monotonic()
            self._ask(self.source.tick)
            late = [job for job in self.again if job.deadline is not None and time.time() > job.deadline]
            for job in late:  # no machine had room for it in time
                self.again.remove(job)
                self._ask(self.source.finish, job.id, Result(Outcome.INTERRUPTED))
        self._look()  # also while all lanes are busy: it notices that Ray has died
        if self.source.stopping and not (self.warned or self.error):
            self.warned = True
            print(STOPPING, file=sys.stderr, flush=True)

    def _break_circuit(self, reason: str) -> None:
        """Count a failure without an epoch; too many in a row end everything, instead of thousands more."""
        self.barren += 1
        if self.barren >= MOST_BARREN and self.error is None:
            self.source.stopping = True
            self.error = UserError(
                f"{self.barren} trials in a row failed before an epoch had ended, the last: {reason}"
            )

    def _look(self) -> None:
        if time.monotonic() - self.looked > TICK_S:
            self.looked = time.monotonic()
            self._ask(self.pool.look)

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:  # Tune would wrap it, or take it for the trial's
            self.error = self.error or error
            self.source.stopping = True
            return None


class _Searcher(Searcher):
    """Passes on the next job."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        running = self.bridge.next(trial_id)
        if running is not None:
            return {"job": running.job, "lane": running.lane.name, "on_head": running.on_head}
        return None if self.bridge.has_more() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # told by _Scheduler

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Scheduler(FIFOScheduler):
    """Passes on what trials say, and stops them when the source wants that."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bridge = bridge

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called at every step of Tune's loop, which takes at most 0.1 s; Tune starts pending trials by itself."""
        self.bridge.tick()
        if self.bridge.source.stopping:
            for trial in list(tune_controller.get_live_trials()):
                begun = trial.status != Trial.PENDING  # one that waits for its place has no epoch to end
                if not trial.is_finished() and (self.bridge.error or not begun):
                    tune_controller.stop_trial(trial)
        return None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        (message,) = result["message"]
        return TrialScheduler.STOP if self.bridge.hear(trial.trial_id, message) else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self.bridge.finish(trial.trial_id, Result(Outcome.INTERRUPTED))

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self.bridge.finish(trial.trial_id, Result(Outcome.INTERRUPTED))

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The Tune actor died, perhaps with its machine (what the target does wrong comes as a result)."""
        text = str(trial.get_error() or "the trial's Tune actor was lost").strip()
        self.bridge.lose(trial.trial_id, Lost(text.splitlines()[-1], text))


class _Forgetful(Callback):
    """Takes out of a result the times and ids that Tune adds: of every number in it Tune keeps statistics for as long
    as it runs, 2 KiB each, two thirds of all that it keeps of a trial."""

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        for key in [key for key, value in result.items() if isinstance(value, int | float)]:
            del result[key]


@contextmanager
def _ctrl_c_stops(source: JobSource) -> Iterator[None]:
    """The first SIGINT stops everything gently, the second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        source.stopping = True
        # not what was there before: a shell's background job starts with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own messages would tear the board apart; errors reach the source through finish()."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
