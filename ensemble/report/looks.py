"""Every reading of a run's test labels is counted: the more often one looks and chooses again, the less it says."""

import contextlib
import time
from dataclasses import asdict, dataclass

from upath import UPath

from trainables.run_directory import refuse_links
from trainables.storage import Damaged, exists, is_link, parse, read_json, write_json

LOOKS = "looks.json"


@dataclass(frozen=True)
class Look:
    """`ensemble`: whose scores the test labels were read for; `created`: when that was selected, `time`: when they were
    read, in seconds since the epoch."""

    ensemble: str
    created: float
    time: float


@dataclass(frozen=True)
class _File:
    looks: tuple[Look, ...] = ()


def count_look(run: UPath, ensemble: str, created: float) -> list[Look]:
    """Write down that the test labels are about to be read; returns all looks so far, this one last."""
    refuse_links(run)
    looks = [*list_looks(run), Look(ensemble, created, time.time())]
    write_json(run / LOOKS, {"looks": [asdict(look) for look in looks]})
    return looks


def list_looks(run: UPath) -> list[Look]:
    """The looks so far, the first one first; none where the file is missing or damaged."""
    path = run / LOOKS
    with contextlib.suppress(Damaged, ValueError, TypeError):
        if exists(path) and not is_link(path):
            return list(parse(read_json(path), _File, path).looks)
    return []


def in_words(looks: list[Look]) -> str:
    """Which look the last one is, in half a sentence: "look 2 at the test labels, after one for greedy"."""
    others = sorted({look.ensemble for look in looks if look.created != looks[-1].created})
    before = f", after others for {', '.join(others)}" if others else ""
    again = "" if len(looks) == 1 or others else ", all for this ensemble"
    return f"look {len(looks)} at the test labels{before}{again}"
