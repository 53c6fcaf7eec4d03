"""run_trials(): Ray Tune runs what a sweep decides.

Thin adapters only. Tune places trials, reuses their actors (each owns a lane, see trainables/worker.py), stops them and
retries lost ones; what to run, when to stop and what to remember is the sweep's (search/study.py). Tune's own state on
disk is thrown away: the study and the candidates are the only state that matters.
"""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from trainables.worker import LaneSpec, Target, run_in_lane

MAX_ACTOR_LOSSES = 3
# Read by Tune in the driver.
DRIVER_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no box of Tune's before the first trial
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial is told to the sweep
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # no snapshots of the experiment
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would kill the trials in mid-epoch; see _interruptible
}


class Sweep(Protocol):
    """What decides. All methods are called from the thread of run_trials."""

    stopping: bool
    """Once True, nothing new is started and running trials end at their next report. Set by Ctrl-C, too."""

    def next(self) -> dict[str, Any] | None:
        """The next job, JSON-able, with "id"; None when there will never be another."""

    def report(self, id: str, metrics: dict[str, Any]) -> bool:
        """An epoch's metrics; True stops the trial as pruned."""

    def finish(self, id: str, result: dict[str, Any]) -> None:
        """A trial's end, told exactly once; result["outcome"] is always there."""

    def tick(self) -> None:
        """Called several times a second."""


def run_trials(sweep: Sweep, target: Target, spec: LaneSpec, lanes: int) -> None:
    """Run the sweep's jobs in `lanes` lanes of `spec`, until it has no more or is stopping. Ray must be connected.

    `target` is called as trainables.worker.run_in_lane describes. Outcomes beyond the target's own: "pruned" after
    sweep.report() returned True; "interrupted" when the sweep stopped under it (its checkpoint stays); "lost node" when
    its processes died again and again; "bug" when it raised or hung, or the machinery failed.

    The first Ctrl-C sets sweep.stopping: trials end at the end of their epoch. The second raises KeyboardInterrupt at
    once. What the sweep itself raises ends the run, too, and comes out unchanged.
    """
    bridge = _Bridge(sweep)

    def trial(config: dict[str, Any]) -> None:
        # One report per step of Tune: it returns when the driver has decided, and exits when it said stop.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
        result = run_in_lane(
            target,
            spec,
            json.loads(config["job"]),
            report=lambda metrics: tune.report({"message": json.dumps({"metrics": metrics})}),
            waiting=lambda: tune.report({"message": "{}"}),
        )
        tune.report({"message": json.dumps({"result": result})})

    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as folder:
        os.environ.update(DRIVER_ENVIRONMENT)
        with _interruptible(sweep):
            try:
                tune.run(
                    # Tune's actor only relays: no CPU. An empty request would be made one CPU, so: a byte of memory.
                    tune.with_resources(trial, {"memory": 1}),
                    search_alg=_Searcher(bridge),
                    scheduler=_Scheduler(bridge),
                    callbacks=[_Ticker(bridge)],
                    num_samples=-1,
                    max_concurrent_trials=lanes,
                    reuse_actors=True,
                    max_failures=MAX_ACTOR_LOSSES,
                    raise_on_failed_trial=False,
                    storage_path=folder,
                    name="sweep",
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    verbose=0,
                )
            finally:
                bridge.close()
    if bridge.error is not None:
        raise bridge.error


class _Bridge:
    """The sweep as Tune's hooks see it: by Tune's trial ids, and never raising into Tune's loop."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.error: Exception | None = None
        self._running: dict[str, str] = {}  # Tune's trial id -> the job's

    def next(self, trial_id: str) -> dict[str, Any] | None:
        if self.sweep.stopping:
            return None
        job = self._guard(self.sweep.next)
        if job is not None:
            self._running[trial_id] = job["id"]
        return job

    def message(self, trial_id: str, message: dict[str, Any]) -> bool:
        """What a trial says: metrics, a result, or nothing (it still waits for its lane). True: stop it."""
        if trial_id not in self._running:
            return True
        if "result" in message:
            self.finish(trial_id, message["result"])
            return True
        if "metrics" in message and self._guard(self.sweep.report, self._running[trial_id], message["metrics"]):
            self.finish(trial_id, {"outcome": "pruned"})
            return True
        if self.sweep.stopping:
            self.finish(trial_id, {"outcome": "interrupted"})
            return True
        return False

    def finish(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._running:
            self._guard(self.sweep.finish, self._running.pop(trial_id), result)

    def tick(self) -> None:
        self._guard(self.sweep.tick)

    def close(self) -> None:
        for trial_id in list(self._running):
            self.finish(trial_id, {"outcome": "interrupted"})

    def _guard(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            # Tune would wrap it, or take it for the trial's failure.
            self.error = self.error or error
            self.sweep.stopping = True
            return None


class _Searcher(Searcher):
    def __init__(self, bridge: _Bridge):
        super().__init__()
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        job = self._bridge.next(trial_id)
        return Searcher.FINISHED if job is None else {"job": json.dumps(job)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass  # told by _Scheduler

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        pass


class _Scheduler(FIFOScheduler):
    def __init__(self, bridge: _Bridge):
        super().__init__()
        self._bridge = bridge

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = self._bridge.message(trial.trial_id, json.loads(result.get("message", "{}")))
        return self.STOP if stop else self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune's actor failed, not the target: the trial is tried again, on a new actor, or given up here."""
        if trial.should_recover():
            return
        error = trial.get_pickled_error()
        outcome = "lost node" if isinstance(error, RayActorError) else "bug"
        lines = str(error).strip().splitlines() or ["unknown"]
        self._bridge.finish(trial.trial_id, {"outcome": outcome, "error": lines[-1], "traceback": str(error)})

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        return None  # Tune starts pending trials by itself; FIFOScheduler would walk over all past trials at every step


class _Ticker(tune.Callback):
    def __init__(self, bridge: _Bridge):
        self._bridge = bridge

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self._bridge.tick()


@contextmanager
def _interruptible(sweep: Sweep) -> Iterator[None]:
    """In the main thread, the first Ctrl-C stops the sweep and the second raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: Any) -> None:
        sweep.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
