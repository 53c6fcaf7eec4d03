"""What nodes add: trials per second of the same sweep on one node and on four, of one CPU slot each.

    python -m benchmarks.nodes [--nodes 1,4] [--trials 32] [--seconds 5] [--json FILE]

Every node is a Ray node of its own (raylet, agents, workers) on this machine. A trial sleeps, so that the machine's few
cores do not decide. The lanes are started before the clock: a lane's start (`start`, seconds until the last one was
ready) is paid once per sweep, and on one machine several of them are in each other's way, which on real nodes they are
not. Expected: 3.6 to 4 times the throughput of one node. Takes about five minutes.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from cluster.connect import connect, disconnect
from cluster.lane import LaneSpec
from cluster.local import LocalCluster
from cluster.tuner import run_trials
from trainables.job import HANG_S, Metrics, Outcome, Reporter, Result


@dataclass(frozen=True)
class Nodes:
    """Throughput of sleeping trials on one node and on several.

    Attributes:
        nodes: numbers of nodes.
        trials: of the measured sweep.
        seconds: that a trial sleeps.
        json: file for the same figures.
    """

    nodes: tuple[int, ...] = (1, 4)
    trials: int = 32
    seconds: float = 5.0
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclass(frozen=True)
class Nap:
    """A trial that sleeps; a warm-up trial waits until `of` of them are in `folder`, so every lane gets exactly one."""

    id: str
    folder: str
    seconds: float = 0.0
    of: int = 0
    hang_s: float = HANG_S
    stops_at: tuple[int, ...] = ()
    gpus: float = 0.0
    node: str = ""


def sleep(job: Nap, report: Reporter) -> Result:
    """Sleep, and note on which machine."""
    folder = Path(job.folder)
    (folder / job.id).write_text(job.node)
    while len(list(folder.iterdir())) < job.of:
        report.alive()
        time.sleep(0.05)
    time.sleep(job.seconds)
    return Result(Outcome.FINISHED)


class Sweep:
    """One warm-up trial a lane, which all end together, and then the sleeping ones."""

    stopping = False

    def __init__(self, lanes: int, trials: int, seconds: float, folder: Path) -> None:
        self.folder = folder
        self.warm = [Nap(f"warm{n}", str(folder), of=lanes) for n in range(lanes)]
        self.waiting = [Nap(f"{n:04d}", str(folder), seconds) for n in range(trials)]
        self.began = 0.0
        self.ended: list[float] = []
        self.nodes: Counter[str] = Counter()  # trials by node

    def next(self) -> Nap | None:
        if self.warm:
            return self.warm.pop(0)
        return self.waiting.pop(0) if self.waiting else None

    def has_more(self) -> bool:
        return bool(self.warm or self.waiting)

    def report(self, id: str, metrics: Metrics) -> bool:
        return False

    def finish(self, id: str, result: Result) -> None:
        assert result.outcome is Outcome.FINISHED, result
        if id.startswith("warm"):
            self.began = self.began or time.monotonic()
        else:
            self.ended.append(time.monotonic())
            self.nodes[(self.folder / id).read_text()] += 1

    def tick(self) -> None:
        pass


def measure(nodes: int, args: Nodes) -> dict[str, Any]:
    """Start the nodes, and the sweep's driver in a process of its own: Ray reads the token while it is imported."""
    os.environ["PYTHONPATH"] = os.getcwd()  # the nodes' workers import this module
    with LocalCluster() as cluster:
        for _ in range(nodes):
            cluster.add_node(cpus=1)
        (cluster.folder / "meet").mkdir()
        call = f"drive({nodes}, {args.trials}, {args.seconds}, {str(cluster.folder / 'meet')!r})"
        done = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.nodes import drive; {call}"],
            env={**cluster.env, "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    if len(row["by_node"]) != nodes:
        raise RuntimeError(f"trials ran on {len(row['by_node'])} of {nodes} nodes")
    return row


def drive(nodes: int, trials: int, seconds: float, meet: str) -> None:
    """Run the sweep on the cluster in RAY_ADDRESS and print its row as JSON."""
    connect()
    try:
        called = time.monotonic()
        sweep = Sweep(nodes, trials, seconds, Path(meet))
        run_trials(sweep, sleep, LaneSpec(), nodes)
    finally:
        disconnect()
    took = sweep.ended[-1] - sweep.began
    row = {"nodes": nodes, "start_s": sweep.began - called, "took_s": took, "trials_per_s": trials / took}
    print(json.dumps({**row, "by_node": sorted(sweep.nodes.values(), reverse=True)}))


def main() -> None:
    args = tyro.cli(Nodes, description=Nodes.__doc__, prog="python -m benchmarks.nodes")
    rows = [measure(nodes, args) for nodes in args.nodes]
    table = Table(title=f"{args.trials} trials that sleep {args.seconds:g} s")
    headings = ("nodes of one slot", "start, once (s)", "took (s)", "trials/s", "times the first", "trials by node")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        row["speedup"] = row["trials_per_s"] / rows[0]["trials_per_s"]
        table.add_row(
            str(row["nodes"]), f"{row['start_s']:.1f}", f"{row['took_s']:.1f}", f"{row['trials_per_s']:.3f}",
            f"{row['speedup']:.2f}", " ".join(map(str, row["by_node"])),
        )  # fmt: skip
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
