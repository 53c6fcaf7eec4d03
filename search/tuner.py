"""Ray Tune assembly: a sweep object decides, Tune places and retries, lanes train.

Nothing is decided here. Tune's searcher and scheduler are thin adapters that pass on what the sweep says, and Tune's
own experiment state goes to a temporary folder: what matters lies in the study and the candidates.
"""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from trainables.worker import LaneSpec, Metrics, Target, run_in_lane

TICK_S = 0.5
FINAL = "final"  # key of the last report of a trial, which carries the result

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a header box even when silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also spares the advice to restore an experiment
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no snapshots of the experiment
}


class Sweep(Protocol):
    """What is searched, and how; see search/study.py."""

    stopping: bool  # once True nothing new is started and running trials are stopped

    def next(self) -> dict[str, Any] | None:
        """The next job: JSON-able, with at least "id" and "config". None: nothing more to start, ever."""

    def report(self, id: str, metrics: Metrics) -> bool:
        """An epoch's metrics; True stops the trial. An epoch may be reported again after a fault."""

    def finish(self, id: str, result: dict[str, Any] | None, error: str | None) -> None:
        """Called exactly once per job: with its result, which has an "outcome", or with the error that Tune met."""

    def tick(self) -> None:
        """Called about every half second."""


def run_trials(sweep: Sweep, target: Target, spec: LaneSpec, lanes: int, max_failures: int = 3) -> bool:
    """Run the sweep's jobs in `lanes` lanes of size `spec` until nothing is left to do; Ray must be connected.

    A trial that the sweep stops gets the result {"outcome": "pruned"}; those that run when the sweep is stopping, or at
    Ctrl-C, get {"outcome": "interrupted"} and keep their checkpoints. A Tune actor that dies is replaced, and its job
    begun again, up to `max_failures` times per job.

    Returns True when Ctrl-C ended it. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def train_trial(config: dict[str, Any]) -> None:
        result = run_in_lane(target, spec, json.loads(config["job"]), tune.report)
        tune.report({FINAL: json.dumps(result)})

    os.environ.update(TUNE_ENVIRONMENT)
    with _ctrl_c() as interrupted, _quiet(), tempfile.TemporaryDirectory(prefix="tune-") as folder:
        scheduler = _Scheduler(sweep, interrupted)
        # tune.run rather than Tuner, which would pickle the sweep for a restore that is never used.
        tune.run(
            # The trial's own process only waits for its lane; a CPU slot for it would starve the lane's workers.
            tune.with_resources(train_trial, {"memory": 1}),
            name="sweep",
            num_samples=-1,
            search_alg=_Searcher(scheduler),
            scheduler=scheduler,
            max_concurrent_trials=lanes,
            reuse_actors=True,
            max_failures=max_failures,
            raise_on_failed_trial=False,
            storage_path=folder,
            trial_dirname_creator=lambda trial: trial.trial_id,
            verbose=0,
        )
        return interrupted.is_set()


class _Searcher(Searcher):
    """Passes on the sweep's next job, as JSON text: Tune would look for search spaces inside a dict."""

    def __init__(self, scheduler: "_Scheduler") -> None:
        super().__init__()
        self.scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        job = None if self.scheduler.stopping else self.scheduler.sweep.next()
        return {"job": json.dumps(job)} if job else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass  # the study is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Scheduler(FIFOScheduler):
    """Passes on reports and ends of trials, and the sweep's decisions about them."""

    def __init__(self, sweep: Sweep, interrupted: threading.Event) -> None:
        super().__init__()
        self.sweep = sweep
        self.interrupted = interrupted
        self.finished: set[str] = set()
        self.ticked = 0.0

    @property
    def stopping(self) -> bool:
        return self.sweep.stopping or self.interrupted.is_set()

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Tune calls this once per step of its loop, which takes at most 0.1 s."""
        if time.monotonic() - self.ticked > TICK_S:
            self.ticked = time.monotonic()
            self.sweep.tick()
        if not self.stopping:
            return super().choose_trial_to_run(tune_controller)
        for trial in tune_controller.get_trials():
            if not trial.is_finished():
                tune_controller.stop_trial(trial)
        return None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        if FINAL in result:
            self._finish(trial, json.loads(result[FINAL]))
            return TrialScheduler.STOP
        if self.sweep.report(_id(trial), result):
            self._finish(trial, {"outcome": "pruned"})
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        self._finish(trial, {"outcome": "interrupted"})

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._finish(trial, {"outcome": "interrupted"})

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._finish(trial, None, str(trial.get_error() or "the trial's Tune actor was lost"))

    def _finish(self, trial: Trial, result: dict[str, Any] | None, error: str | None = None) -> None:
        if trial.trial_id not in self.finished:
            self.finished.add(trial.trial_id)
            self.sweep.finish(_id(trial), result, error)


def _id(trial: Trial) -> str:
    return json.loads(trial.config["job"])["id"]


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets; the second one acts as before."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
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
