"""The live board: what runs, what has finished, the best single model and the ensemble so far.

On a terminal it is one screen that is redrawn at most twice a second; elsewhere (a job's log, CI) one plain line per
finished trial, and one a minute on how all of it stands.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ensemble.running import EnsembleSoFar
from search.sweep import Sweep
from trainables.config import TrialConfig
from trainables.job import Job, Metrics, Result

if TYPE_CHECKING:  # it imports Ray
    from cluster.metrics import SweepMetrics

REDRAW_SECONDS = 0.5
PLAIN_SECONDS = 60.0
PUBLISH_SECONDS = 5.0
SPARKS = "▁▂▃▄▅▆▇█"


class Board(Protocol):
    """Who watches a sweep; nothing depends on what it does."""

    def started(self, id: str, config: TrialConfig) -> None: ...
    def epoch(self, id: str, metrics: Metrics) -> None: ...
    def ended(self, id: str, how: str, result: Result) -> None: ...
    def refresh(self) -> None: ...


class WatchedSweep:
    """A `cluster.tuner.JobSource`: what the sweep decides, and a board that sees all of it."""

    def __init__(self, sweep: Sweep, board: Board) -> None:
        self.sweep, self.board = sweep, board

    @property
    def stopping(self) -> bool:
        return self.sweep.stopping

    @stopping.setter
    def stopping(self, value: bool) -> None:
        self.sweep.stopping = value

    def has_more(self) -> bool:
        return self.sweep.has_more()

    def next(self) -> Job | None:
        job = self.sweep.next()
        if job is not None:
            self.board.started(job.id, job.config)
        return job

    def report(self, id: str, metrics: Metrics) -> bool:
        self.board.epoch(id, metrics)
        return self.sweep.report(id, metrics)

    def finish(self, id: str, result: Result) -> None:
        self.board.ended(id, self.sweep.finish(id, result), result)

    def tick(self) -> None:
        self.sweep.tick()
        self.board.refresh()


class LiveBoard:
    """A board for people.

    Args:
        ensemble: the sweep's, which adds the candidates to it.
        trials, deadline: the budget's; None: no such limit.
        shared: whether the select split is the tune split, too.
        earlier: trials that ended in earlier starts of the command.
        links: lines that say where else to look.
        metrics: gets the sweep's figures every few seconds.
    """

    def __init__(
        self, ensemble: EnsembleSoFar, trials: int | None, deadline: float | None, shared: bool, earlier: int = 0,
        links: Sequence[str] = (), metrics: "SweepMetrics | None" = None,
    ) -> None:  # fmt: skip
        self.console = Console(highlight=False)
        self.ensemble, self.trials, self.deadline, self.shared = ensemble, trials, deadline, shared
        self.earlier, self.links, self.metrics = earlier, links, metrics
        self.published = 0.0
        self.began = self.drawn = time.time()
        self.running: dict[str, tuple[TrialConfig, float, Metrics]] = {}
        self.recent: list[str] = []
        self.ends: dict[str, str] = {}  # how trials ended last: one that waited at a rung may go on
        self.states: set[str] = set()
        self.live: Live | None = None

    def __enter__(self) -> "LiveBoard":
        if self.console.is_terminal:
            self.live = Live(self._screen(), console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    def started(self, id: str, config: TrialConfig) -> None:
        self.running[id] = (config, time.time(), {})
        self.ends.pop(id, None)

    def epoch(self, id: str, metrics: Metrics) -> None:
        if id in self.running:
            config, since, _ = self.running[id]
            self.running[id] = (config, since, metrics)

    def ended(self, id: str, how: str, result: Result) -> None:
        config, since, last = self.running.pop(id, (None, time.time(), {}))
        self.ends[id] = how
        line = f"{id} {config.backbone if config else '':<24} {how:<10} {time.time() - since:6.1f} s"
        if "select_accuracy" in result.metrics:
            _, best, loss = self.ensemble.curve[-1]
            members = len(self.ensemble.members)
            line += (
                f"  select {result.metrics['select_accuracy']:.2%}   ensemble of {members}: select, fitted, {best:.2%},"
                f" log-loss {loss:.4f}"
            )
        elif "tune_accuracy" in last:
            line += f"  tune {last['tune_accuracy']:.2%} after epoch {last['epoch']}"
        if how == "waiting":
            line += ", goes on when it is among the best"
        if result.error:
            line += f"  {result.error.splitlines()[0][:120]}"
        if self.live is None:
            print(line, flush=True)
        self.recent = [*self.recent, line][-6:]

    def refresh(self) -> None:
        self._publish()
        if time.time() - self.drawn < (PLAIN_SECONDS if self.live is None else REDRAW_SECONDS):
            return
        self.drawn = time.time()
        if self.live is None:
            print(self._summary().replace("\n", "; "), flush=True)
        else:
            self.live.update(self._screen(), refresh=True)

    def _publish(self) -> None:
        if self.metrics is None or time.time() - self.published < PUBLISH_SECONDS:
            return
        self.published = time.time()
        best, curve = self.ensemble.best_single, self.ensemble.curve
        states = Counter(self.ends.values())
        self.states |= states.keys()  # one that no trial is in any longer is 0
        self.metrics.publish(
            {**{state: states[state] for state in self.states}, "running": len(self.running)},
            best_select_accuracy=best[1] if best else None,
            ensemble_select_accuracy=curve[-1][1] if curve else None,
            images_per_second=sum(metrics.get("images_per_second", 0.0) for *_, metrics in self.running.values()),
        )

    def _screen(self) -> Group:
        running = Table(title="running", title_justify="left", expand=False)
        for heading in ("trial", "backbone", "epoch", "tune accuracy", "images/s", "seconds"):
            running.add_column(heading, justify="left" if heading in ("trial", "backbone") else "right")
        for id, (config, since, metrics) in sorted(self.running.items()):
            running.add_row(
                id,
                config.backbone,
                f"{metrics.get('epoch', 0)}/{config.all_epochs}",
                f"{metrics['tune_accuracy']:.2%}" if "tune_accuracy" in metrics else "",
                f"{metrics['images_per_second']:.0f}" if "images_per_second" in metrics else "",
                f"{time.time() - since:.0f}",
            )
        return Group(*[Text(line) for line in self.links], running, Text("\n".join(self.recent)), Text(self._summary()))

    def _summary(self) -> str:
        before = [f"{self.earlier} from earlier starts"] if self.earlier else []
        states = [f"{n} {outcome}" for outcome, n in Counter(self.ends.values()).most_common()] or ["none finished yet"]
        parts = [f"trials: {', '.join([*before, *states])}, {len(self.running)} running"]
        if self.trials:
            parts[0] += f", {self.trials} in all"
        if self.ensemble.best_single and self.ensemble.curve:
            note = " (also used to tune: optimistic)" if self.shared else ""
            id, best = self.ensemble.best_single
            _, together, loss = self.ensemble.curve[-1]
            size, members = len(self.ensemble.labels), len(self.ensemble.members)
            parts.append(f"select split, {size} images{note}: best single {best:.2%} ({id})")
            parts.append(f"ensemble of {members}, fitted there: {together:.2%}, log-loss {loss:.4f}{self._spark()}")
        parts.append(f"elapsed {_clock(time.time() - self.began)}, {self._time_left()}")
        return "\n".join(parts)

    def _spark(self) -> str:
        """How the log-loss fell with the last candidates; "" before there are three."""
        values = [loss for *_, loss in self.ensemble.curve[-40:]]
        low, high = min(values), max(values)
        bars = "".join(SPARKS[round((len(SPARKS) - 1) * (v - low) / (high - low or 1))] for v in values)
        return f", which was {bars}" if len(values) > 2 else ""

    def _time_left(self) -> str:
        """Until the deadline, or as the trials so far suggest, whichever is sooner."""
        guesses = []
        if self.deadline is not None:
            guesses.append(self.deadline - time.time())
        ended = len(self.ends)
        if self.trials and ended:
            guesses.append((self.trials - self.earlier - ended) * (time.time() - self.began) / ended)
        return f"trials end in about {_clock(max(0.0, min(guesses)))}" if guesses else "time left: unknown yet"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
