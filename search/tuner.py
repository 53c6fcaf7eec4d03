"""Ray Tune assembly: a sweep object decides, Tune places and retries, lanes train.

Nothing is decided here. Tune's searcher and scheduler are thin adapters that pass on what the sweep says, and Tune's
own experiment state goes to a temporary folder: what matters lies in the study and the candidates.
"""

import json
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
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from trainables.worker import NOT_STARTED, LaneSpec, Metrics, Target, run_in_lane

TICK_S = 0.5
NOTICE_S = 30.0  # until a cluster has noticed that a machine is gone
MAX_LOSSES = 5  # lanes lost under one job in a row, without an epoch between

STOPPING = "stopping when the running epochs have ended; Ctrl-C again: at once"

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a header box even when silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also spares the advice to restore an experiment
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no snapshots of the experiment
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # how many trials there are at a time is decided here
}


class Sweep(Protocol):
    """What is searched, and how; see search/sweep.py. All of it is called from the thread of run_trials."""

    stopping: bool  # True, also set by Ctrl-C: nothing new is started, and `report` stops the running trials

    def next(self) -> dict[str, Any] | None:
        """The next job: JSON-able, with at least "id". None: nothing to start now. An id may come again after its end,
        when the sweep goes on with a trial that it stopped."""

    def has_more(self) -> bool:
        """Whether `next` may have something, now or when a running job has ended."""

    def report(self, id: str, metrics: Metrics) -> bool:
        """An epoch's metrics; True stops the trial: for its scores, or because the sweep is stopping and the trial has
        not just ended its last epoch. An epoch may be reported again after a fault."""

    def finish(self, id: str, result: dict[str, Any]) -> None:
        """A job's end, told exactly once; `result` always has an "outcome"."""

    def tick(self) -> None:
        """Called about twice a second."""


def run_trials(sweep: Sweep, target: Target, spec: LaneSpec, lanes: int | Callable[[], int]) -> None:
    """Run the sweep's jobs in lanes of size `spec` until it has no more; Ray must be connected.

    `lanes` is how many there are; a function is asked twice a second, so that machines that join get trials. A job
    whose lane was lost, alone or with its machine, goes first to whichever lane is free next. Where machines may go, a
    lost lane is not replaced before the cluster would have noticed that its machine is gone: the new one would wait for
    room while the others run out of trials.

    Besides the target's own outcomes (see run_in_lane) a job can end as "pruned": the sweep stopped it; "interrupted":
    the sweep is stopping, its checkpoint stays; "lost node": its lanes were lost again and again.

    The first Ctrl-C sets `sweep.stopping`: running trials get to the end of their epoch, however long that takes. The
    second raises KeyboardInterrupt at once. An exception of the sweep ends all trials at once, and is raised here
    unchanged.
    """

    def train_trial(config: dict[str, Any]) -> None:
        # The thread that sits in tune.report must leave before its actor can be reused; the default wait is 2 s.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
        result = run_in_lane(target, spec, json.loads(config["job"]), lambda metrics: _tell(metrics=metrics))
        _tell(result=result)

    os.environ.update(TUNE_ENVIRONMENT)
    bridge = _Bridge(sweep, lanes, NOTICE_S) if callable(lanes) else _Bridge(sweep, lambda: lanes)
    with _ctrl_c_stops(sweep), _quiet(), tempfile.TemporaryDirectory(prefix="tune-") as folder:
        try:
            # tune.run rather than Tuner, which would pickle the sweep for a restore that is never used.
            tune.run(
                # The trial's own process only waits for its lane; a CPU slot for it would starve the lane's workers.
                tune.with_resources(train_trial, {"memory": 1}),
                name="sweep",
                num_samples=-1,
                search_alg=_Searcher(bridge),
                scheduler=_Scheduler(bridge),
                reuse_actors=True,
                raise_on_failed_trial=False,
                storage_path=folder,
                trial_dirname_creator=lambda trial: trial.trial_id,
                verbose=0,
            )
        finally:
            bridge.interrupt()
    if bridge.error:
        raise bridge.error


def _tell(**message: Any) -> None:
    """From the trial to _Bridge.hear; as text, because Tune takes nested results apart."""
    tune.report({"message": json.dumps(message)})


class _Bridge:
    """The sweep behind Tune's searcher and scheduler: knows jobs by Tune's trial ids, and never raises into Tune."""

    def __init__(self, sweep: Sweep, lanes: Callable[[], int], notice_s: float = 0.0) -> None:
        self.sweep, self.lanes, self.notice_s = sweep, lanes, notice_s
        self.left, self.left_until = 0, -math.inf  # lanes that a loss has left for sure, and how long that counts
        self.room, self.counted = 0, -math.inf  # how many lanes there are, and when that was asked
        self.running: dict[str, dict[str, Any]] = {}  # Tune's trial id -> the job
        self.again: list[dict[str, Any]] = []  # jobs whose lane was lost
        self.losses: Counter[str] = Counter()  # by the job's id, since its last epoch
        self.error: Exception | None = None
        self.ticked = 0.0
        self.told = False  # that it is stopping

    def next(self, trial_id: str) -> dict[str, Any] | None:
        self._count_lanes()
        room = min(self.room, self.left) if time.monotonic() < self.left_until else self.room
        if self.sweep.stopping or len(self.running) >= room:
            return None
        job = self.again.pop(0) if self.again else self._ask(self.sweep.next)
        if job is not None:
            self.running[trial_id] = job
        return job

    def has_more(self) -> bool:
        if self.sweep.stopping:
            return False
        return bool(self.running) or bool(self.again) or bool(self._ask(self.sweep.has_more))

    def hear(self, trial_id: str, message: dict[str, Any]) -> bool:
        """A trial's metrics or its result; True ends it."""
        if trial_id not in self.running:
            return True
        id = self.running[trial_id]["id"]
        if "result" in message:
            self.finish(trial_id, message["result"])
            return True
        self.losses.pop(id, None)
        if self._ask(self.sweep.report, id, message["metrics"]):
            self.finish(trial_id, {"outcome": "interrupted" if self.sweep.stopping else "pruned"})
        return trial_id not in self.running

    def finish(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self.running:
            self._ask(self.sweep.finish, self.running.pop(trial_id)["id"], result)

    def lose(self, trial_id: str, error: str) -> None:
        """The lane died, or the Tune actor that owned it."""
        if trial_id not in self.running:
            return
        id = self.running[trial_id]["id"]
        if NOT_STARTED in error:  # other jobs of the cluster have the room now
            print(f"{id} waits: {error}", file=sys.stderr, flush=True)
        else:
            self.losses[id] += 1
        if self.losses[id] > MAX_LOSSES:
            self.finish(trial_id, {"outcome": "lost node", "error": error})
        else:
            self.again.append(self.running.pop(trial_id))
        self.left, self.left_until = len(self.running), time.monotonic() + self.notice_s

    def interrupt(self) -> None:
        """Whatever has not ended goes on next time."""
        for job in [*self.running.values(), *self.again]:
            self._ask(self.sweep.finish, job["id"], {"outcome": "interrupted"})
        self.running, self.again = {}, []

    def tick(self) -> None:
        """Called at every step of Tune's loop."""
        if time.monotonic() - self.ticked > TICK_S:
            self.ticked = time.monotonic()
            self._ask(self.sweep.tick)
        self._count_lanes()  # also while all of them are busy: it notices that Ray has died
        if self.sweep.stopping and not (self.told or self.error):
            self.told = True
            print(STOPPING, file=sys.stderr, flush=True)

    def _count_lanes(self) -> None:
        if time.monotonic() - self.counted > TICK_S:
            self.counted, self.room = time.monotonic(), self._ask(self.lanes) or 0

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:  # Tune would wrap it, or take it for the trial's
            self.error = self.error or error
            self.sweep.stopping = True
            return None


class _Searcher(Searcher):
    """Passes on the next job, as text: Tune would look for search spaces inside a dict."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        job = self.bridge.next(trial_id)
        if job is not None:
            return {"job": json.dumps(job)}
        return None if self.bridge.has_more() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass  # told by _Scheduler

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Scheduler(FIFOScheduler):
    """Passes on what trials say, and stops them when the sweep wants that."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called at every step of Tune's loop, which takes at most 0.1 s; Tune starts pending trials by itself."""
        self.bridge.tick()
        if self.bridge.sweep.stopping:
            for trial in list(tune_controller.get_live_trials()):
                begun = trial.status != Trial.PENDING  # one that waits for its place has no epoch to end
                if not trial.is_finished() and (self.bridge.error or not begun):
                    tune_controller.stop_trial(trial)
        return None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        ended = self.bridge.hear(trial.trial_id, json.loads(result["message"]))
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        self.bridge.finish(trial.trial_id, {"outcome": "interrupted"})

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self.bridge.finish(trial.trial_id, {"outcome": "interrupted"})

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The lane was lost, or its Tune actor (what the target does wrong comes as a result)."""
        lines = str(trial.get_error() or "the trial's Tune actor was lost").strip().splitlines()
        self.bridge.lose(trial.trial_id, lines[-1])


@contextmanager
def _ctrl_c_stops(sweep: Sweep) -> Iterator[None]:
    """The first SIGINT stops the sweep, the second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        sweep.stopping = True
        # not what was there before: a shell's background job starts with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own messages would tear the board apart; errors reach the sweep through finish()."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
