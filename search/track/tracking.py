"""--track: experiment trackers are told of every trial that has ended.

The records are the truth, and a tracker only shows them. Each has a thread of its own, which sends it what it lacks and
notes in tracking/<tracker>.json what it has. A tracker that is away is tried again every AGAIN_S seconds, once more at
the end, and when the same command is given again; the sweep never waits for it.
"""

import hashlib
import re
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from upath import UPath

from ensemble.file import Ensemble
from search.config import Track
from search.track.mlflow import MlflowTracker
from search.track.tensorboard import TensorBoardTracker
from search.track.tracker import EndedTrial, SweepEnd, SweepInfo, Tracker, Value
from search.track.wandb import WandbTracker
from trainables.command import progress
from trainables.errors import UserError
from trainables.run.records import Stage, TrialRecord
from trainables.run_directory import read_candidate, read_run, study_name
from trainables.storage import Damaged, exists, hide_password, is_link, parse, read_bytes, read_json, write_json

FOLDER = "tracking"
AGAIN_S = 30.0  # after which a tracker that could not be reached is tried again
STUCK_S = 60.0  # that the end of a sweep waits for a tracker that does not move,
MODEL_S = 600.0  # and for one that is sent a model
LARGEST_FILE = 256 * 2**20  # bytes of a report that is sent
TRACKERS: dict[Track, Callable[[], Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


@dataclass(frozen=True)
class Sent:
    """tracking/<tracker>.json: what a tracker has.

    Attributes:
        run: its key of the sweep's run.
        trials: numbers of the trials there, as (first, last) of each stretch without a gap.
        model: the digest of the ensemble that is registered there as a model.
    """

    run: str = ""
    trials: tuple[tuple[int, int], ...] = ()
    model: str = ""

    def has(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.trials)


class Feed:
    """One tracker, and the thread that sends it what it lacks.

    Args:
        tracker: which.
        sweep: what is tracked.
        records: of the sweep's trials so far.
        metric: the name of the scores in them, such as tune_accuracy.
    """

    def __init__(self, tracker: Tracker, sweep: SweepInfo, records: Iterable[TrialRecord], metric: str) -> None:
        self.tracker, self.sweep, self.metric = tracker, sweep, metric
        self.ended = [record for record in records if record.stage is Stage.ENDED and record.config is not None]
        self.waiting = deque(self.ended)
        self.sent: set[int] = set()
        self.run: str | None = None  # the tracker's key of the sweep's run; None before it was opened
        self.is_open = False
        self.end: SweepEnd | None = None
        self.model = self._remembered().model
        self.problem = ""
        self.is_told = self.is_concluded = False
        self.steps = 0  # that have succeeded: while they grow it is not stuck
        self.change = threading.Condition()
        self.thread = threading.Thread(target=self._work, name=f"track {tracker.name}", daemon=True)
        self.thread.start()

    def add(self, record: TrialRecord) -> None:
        """Let it have a trial that has ended. Never waits."""
        with self.change:
            self.ended.append(record)
            self.waiting.append(record)
            self.change.notify()

    def conclude(self, end: SweepEnd) -> None:
        """Let it have the end, after all that it lacks; then the thread ends. Never waits, `join` does."""
        with self.change:
            self.end = end
            self.change.notify()

    def join(self) -> None:
        """Wait until it has everything, cannot be reached, or has not moved for STUCK_S (with a model MODEL_S)."""
        assert self.end is not None
        patience = STUCK_S if self.end.model is None else MODEL_S
        steps, moved = self.steps, time.monotonic()
        with progress(f"sending trials to {self.tracker.name}", len(self.waiting)) as advance:
            while self.thread.is_alive() and time.monotonic() - moved < patience:
                self.thread.join(0.1)
                if self.steps > steps:
                    advance(self.steps - steps)
                    steps, moved = self.steps, time.monotonic()
        if self.waiting or not self.is_concluded:
            what = "trials" if self.is_concluded else "trials and the end"
            print(
                f"{self.tracker.name} lacks {len(self.waiting)} of {len(self.ended)} {what}; the same command sends "
                f"them: {self.problem or 'it does not answer'}",
                file=sys.stderr,
            )
            self.is_told = True

    def _work(self) -> None:
        end: SweepEnd | None = None
        while True:
            try:
                self._send()
                if end is not None:
                    self.tracker.conclude(end)
                    self.is_concluded = True
                    if end.model is not None:
                        self.model = end.digest
                        self._remember()
                if not self.waiting:
                    self.problem = ""
            except Exception as error:  # every library has its own, and none may harm the sweep
                self._note(error)
            if end is not None:
                return
            with self.change:
                if self.problem:
                    self.change.wait_for(lambda: self.end is not None, AGAIN_S)
                else:
                    self.change.wait_for(lambda: self.end is not None or bool(self.waiting))
                end = self.end

    def _send(self) -> None:
        """Send what it lacks. A trial that alone is refused is left for the next time; raises when all would be."""
        if not self.is_open:
            self._open()
        refused = 0
        while len(self.waiting) > refused:
            record = self.waiting[0]
            try:
                if record.number not in self.sent:
                    self.tracker.add(ended_trial(self.sweep.run, record, self.metric))
            except Exception as error:
                with self.change:
                    self.waiting.rotate(-1)
                self._note(error)
                self._open()  # which fails, too, when the tracker is away
                refused += 1
                continue
            self.sent.add(record.number)
            self._remember()
            with self.change:
                self.waiting.popleft()
            self.steps += 1

    def _open(self) -> None:
        """Open the sweep's run there; where that is a new one, all trials are sent."""
        known = self._remembered() if self.run is None else Sent(self.run, stretches(self.sent))
        run = self.tracker.open(self.sweep, known.run)
        with self.change:
            if run != self.run:
                self.sent = {record.number for record in self.ended if run == known.run and known.has(record.number)}
                self.waiting = deque(record for record in self.ended if record.number not in self.sent)
                self.model = known.model if run == known.run else ""
                self.run = run
        self.is_open = True
        self.steps += 1

    def _note(self, error: Exception) -> None:
        self.is_open = False  # a server that is back may be another one
        self.problem = hide_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]
        if not self.is_told:
            print(f"{self.tracker.name} failed, the sweep continues: {self.problem}", file=sys.stderr)
            self.is_told = True

    @property
    def memory(self) -> UPath:
        return self.sweep.run / FOLDER / f"{self.tracker.name}.json"

    def _remembered(self) -> Sent:
        try:
            is_there = exists(self.memory) and not is_link(self.memory)
            return parse(read_json(self.memory), Sent, self.memory) if is_there else Sent()
        except Damaged:  # then it is sent everything, which no tracker shows twice
            return Sent()

    def _remember(self) -> None:
        write_json(self.memory, asdict(Sent(self.run or "", stretches(self.sent), self.model)))


class Tracking:
    """All trackers of a sweep.

    Args:
        trackers: which.
        run: the run directory, which has its run.json.
        records: of its trials so far.
        metric: the name of the scores in them, such as tune_accuracy.
    """

    def __init__(self, trackers: Sequence[Tracker], run: UPath, records: Iterable[TrialRecord], metric: str) -> None:
        self.sweep, records = describe_sweep(run), list(records)
        self.feeds = [Feed(tracker, self.sweep, records, metric) for tracker in trackers]

    def places(self) -> list[str]:
        """A line for each tracker that says where it is."""
        return [f"{feed.tracker.name}: {feed.tracker.where(self.sweep)}" for feed in self.feeds]

    def add(self, record: TrialRecord) -> None:
        """Let all have a trial that has ended. Never waits."""
        for feed in self.feeds:
            feed.add(record)

    def close(self, ensemble: Ensemble | None, complete: bool) -> None:
        """Let all catch up and have the end; `complete`: the sweep is not to be continued.

        Returns when each has everything, or cannot be reached now.
        """
        if not self.feeds:
            return
        with tempfile.TemporaryDirectory(prefix="ninefold-model-") as folder:
            end = sweep_end(self.sweep.run, ensemble, self.feeds[0].ended, complete)
            if ensemble is not None and any(feed.tracker.registers and feed.model != end.digest for feed in self.feeds):
                end = replace(end, model=self._export(ensemble, Path(folder)))
            for feed in self.feeds:
                feed.conclude(end)
            for feed in self.feeds:
                feed.join()

    def _export(self, ensemble: Ensemble, folder: Path) -> Path | None:
        """The ensemble as a model in this folder, or None and a word why it cannot be one."""
        from ensemble.export import export  # torch, which a sweep's driver has no other need of

        try:
            return export([self.sweep.run], ensemble, folder / "model", "mlflow").path
        except UserError as error:
            print(f"the ensemble is not registered as a model: {error}", file=sys.stderr)
            return None

    def leave(self) -> None:
        """Let all have what there is, as of a sweep that is to be continued, and do not wait for it."""
        for feed in self.feeds:
            feed.conclude(sweep_end(self.sweep.run, None, feed.ended, complete=False))


def make_trackers(names: Iterable[Track]) -> list[Tracker]:
    """The trackers of these names. Raises UserError when a library is missing, or nobody is logged in."""
    return [TRACKERS[name]() for name in dict.fromkeys(names)]


def describe_sweep(run: UPath) -> SweepInfo:
    """The sweep of a run directory, from its run.json, which stays as it is however often the sweep is continued."""
    info = read_run(run)
    key = re.sub(r"[^\w.-]", "-", study_name(run), flags=re.ASCII)[-100:]
    options = {"data": info.data.name, "split_fingerprint": info.split_fingerprint, "command": info.command}
    return SweepInfo(key, run.name, run, _plain(info.search | options))


def ended_trial(run: UPath, record: TrialRecord, metric: str) -> EndedTrial:
    """What a tracker shows of a trial, from its record and, where it left one, its candidate."""
    assert record.config is not None
    assert record.outcome is not None
    curve: list[dict[str, float]] = [{"epoch": epoch, metric: score} for epoch, score in record.scores]
    scores: dict[str, float] = {}
    if record.outcome.leaves_candidate:
        try:
            info = read_candidate(run / "candidates" / record.id).info
            costs = {"parameters": info.params, "flops": info.flops}
            scores = info.metrics | {name: float(value) for name, value in costs.items() if value is not None}
            curve = list(info.curve) or curve
        except Damaged:  # somebody has deleted it; the record is there
            scores = {} if record.value is None else {metric: record.value}
    if record.seconds is not None:
        scores = scores | {"seconds": record.seconds}
    return EndedTrial(
        record.id, _plain(record.config.to_dict()), record.outcome, hide_password(record.error), tuple(curve), scores,
        record.began, record.ended,
    )  # fmt: skip


def sweep_end(run: UPath, ensemble: Ensemble | None, ended: Sequence[TrialRecord], complete: bool) -> SweepEnd:
    """What a tracker shows of a sweep's end: the ensemble's claim, and what the report says of the test part."""
    at = max((record.ended for record in ended), default=0.0)
    if ensemble is None or not complete:
        return SweepEnd(complete, len(ended), {}, {}, at)
    scores = {}
    if ensemble.claim is not None:
        scores = flat_scores(f"{ensemble.claim.get('split', 'select')}_claim", ensemble.claim)
    report = run / "report.json"
    if exists(report):
        test = read_json(report).get("test", {})
        for name in ("ensemble", "best_single"):
            scores |= flat_scores(f"test_{name}", test.get(name, {}))
    names = (f"ensembles/{ensemble.name}.json", "report.html", "report.json")
    paths = {name.rpartition("/")[2]: run / name for name in names}
    files = {name: path for name, path in paths.items() if exists(path) and not is_link(path)}
    texts = {name: read_bytes(path, LARGEST_FILE).decode() for name, path in files.items()}
    digest = hashlib.sha256(texts.get(f"{ensemble.name}.json", "").encode()).hexdigest()
    return SweepEnd(complete, len(ended), scores, texts, at, digest=digest)


def flat_scores(name: str, score: dict[str, Any]) -> dict[str, float]:
    """The numbers of a score of an ensemble's file, each with `name` before it: <name>_accuracy, <name>_low, ..."""
    found: dict[str, float] = {}
    for key, value in score.items():
        if key == "interval":
            found |= {f"{name}_low": float(value[0]), f"{name}_high": float(value[1])}
        elif isinstance(value, dict):
            found |= flat_scores(f"{name}_{key}", value)
        elif isinstance(value, int | float):
            found[f"{name}_{key}"] = float(value)
    return found


def stretches(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers as (first, last) of each stretch without a gap: 0, 1, 2, 5 are (0, 2), (5, 5)."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def _plain(values: dict[str, Any]) -> dict[str, Value]:
    """Options or hyperparameters as trackers take them: no lists, nothing that is not set, and no passwords."""
    plain: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = ", ".join(str(one) for one in value)
        if value is not None and value != "":
            plain[name] = value if isinstance(value, int | float) else hide_password(str(value))
    return plain
