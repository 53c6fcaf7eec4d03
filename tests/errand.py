"""A job for lanes that are tested without training, and lanes for jobs that are trained without Ray."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.lane import LaneSpec
from cluster.pool import LanePool
from cluster.tuner import _Bridge
from trainables.job import Metrics


@dataclass(frozen=True)
class Errand:
    """What a test's target is to do, in `options`; the rest is what every lane wants to know."""

    id: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    hang_s: float = 1800.0
    stops_at: tuple[int, ...] = ()
    gpus: float = 0.0
    node: str = ""
    deadline: float | None = None


def errand(id: str = "", hang_s: float = 1800.0, stops_at: tuple[int, ...] = (), **options: Any) -> Errand:
    return Errand(id, options, hang_s, stops_at)


class Hear:
    """A trainables.job.Reporter that passes on what it hears."""

    def __init__(self, hear: Callable[[Metrics], bool]) -> None:
        self.hear = hear

    def __call__(self, metrics: Metrics) -> bool:
        return self.hear(metrics)

    def alive(self) -> None:
        pass


def run_here(jobs: Any, target: Callable[[Any, Hear], Any], *_: object) -> None:
    """cluster.tuner.run_trials without Ray: one trial after the other, in this process."""
    while (job := jobs.next()) is not None:

        def report(metrics: Metrics, id: str = job.id) -> bool:
            return bool(jobs.report(id, metrics))

        jobs.finish(job.id, target(job, Hear(report)))


class PaperLane:
    """cluster.lane.Lane without Ray: closed as soon as that is asked for."""

    name = "paper"

    def __init__(self, spec: LaneSpec, machine: str | None) -> None:
        self.spec, self.machine, self.killed, self.has_ended = spec, machine, False, False

    def close(self) -> None:
        pass

    def is_closed(self, wait_s: float = 0.0) -> bool:
        return True

    def kill(self) -> None:
        self.killed = True


def bridge_over(source: Any, count: Callable[[], int], notice_s: float = 0.0) -> _Bridge:
    """Between the source and `count()` lanes without Ray, on machines that nobody names."""
    return _Bridge(source, LanePool(PaperLane, LaneSpec, lambda: {None: count()}, notice_s))  # type: ignore[arg-type]


class HereLanes:
    """cluster.capacity.Lanes without Ray."""

    spec = None

    def __init__(self, request: object) -> None:
        pass

    def __enter__(self) -> "HereLanes":
        return self

    def __exit__(self, *_: object) -> None:
        pass
