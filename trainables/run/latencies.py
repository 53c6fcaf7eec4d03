"""How long each candidate of a run takes for one image: measured together, on one named device, when nothing else ran.

A trial's own figure (`latency_ms` in candidate.json) was taken beside other trials: equal networks differ by a factor.
"""

import contextlib
from dataclasses import asdict, dataclass, field

from upath import UPath

from trainables.run_directory import refuse_links
from trainables.storage import Damaged, exists, is_link, parse, read_json, write_json

FILE = "latencies.json"


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image with all its views: the median, lowest and highest of several."""

    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Latencies:
    """latencies.json: `device`, in words; `candidates` by id."""

    device: str = ""
    candidates: dict[str, Latency] = field(default_factory=dict)


def read_latencies(run: UPath) -> Latencies:
    """What a run directory has of them; nothing where the file is missing or damaged."""
    path = run / FILE
    with contextlib.suppress(Damaged, ValueError, TypeError):
        if exists(path) and not is_link(path):
            return parse(read_json(path), Latencies, path)
    return Latencies()


def write_latencies(run: UPath, latencies: Latencies) -> None:
    """Write latencies.json, whole or not at all."""
    refuse_links(run)
    write_json(run / FILE, asdict(latencies))
