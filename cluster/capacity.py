"""How many lanes the cluster's machines hold: now, and after others join or leave."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster.connect import Demand, Node, connect, disconnect, in_cluster, nodes
from cluster.lane import LaneSpec
from cluster.pool import Places
from trainables.errors import UserError
from trainables.job import LaneRequest

MOST_CPU_LANES = 8  # on a machine without GPUs; each lane is a process of its own with a copy of torch
JOIN_S = 1800.0  # for the first machine of a cluster to come
LOOK_S = 2.0
CPUS_ALONE = (
    "no machine of the cluster has a GPU now, so trials use CPUs until one comes; --gpus-per-trial 1 waits for it"
)
GPUS_CAME = "a machine with GPUs has joined: trials begin there from now on, and those on CPUs come to their end"
RAY_DIED = "Ray has died on this machine: one of its processes was killed, or memory ran out"


class Lanes:
    """The cluster's lanes for trials of one size: `with lanes:` connects to Ray, as `cluster.connect.connect` finds or
    starts it, and there the attributes below are known.

    A cluster that has no room for a lane yet is waited for, up to `patience_s`; a local Ray without room is a UserError
    at once, and so is a cluster that cannot be joined.

    Attributes:
        dashboard: Ray's, its address; "" when there is none.
        spec: what one lane takes, by the machines there are at the start; where the request leaves that open, of a GPU
            as soon as there is one.
        count: how many there are.
    """

    dashboard: str
    spec: LaneSpec
    count: int

    def __init__(self, request: LaneRequest, say: Callable[[str], None] = print, patience_s: float = JOIN_S) -> None:
        self.request, self.say, self.patience_s, self.demand = request, say, patience_s, Demand()

    def __enter__(self) -> "Lanes":
        try:
            self.dashboard = connect()
        except ConnectionError as error:
            raise UserError(str(error)) from error
        try:
            self.spec, self.count = self._first()
        except BaseException:
            disconnect()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        disconnect()

    def _first(self) -> tuple[LaneSpec, int]:
        """Size and number of lanes, once there is room for one."""
        request, end, said = self.request, time.time() + self.patience_s, False
        while True:
            try:
                spec, count = lanes_for(nodes(), request)
                if not spec.gpus and request.gpus is None and in_cluster():
                    self.say(CPUS_ALONE)
                return spec, count
            except UserError as error:
                if not in_cluster() or time.time() > end:
                    raise
                if not said:
                    self.say(f"waiting for machines: {error}")
                    said = True
            self.demand.keep(request.cpus or 1.0, request.gpus or 0.0, request.workers, lanes=1)
            time.sleep(LOOK_S)

    def now(self, wanted: int | None) -> Places:
        """How many each machine holds; of an autoscaler those that `wanted` (None: any number of) trials lack are
        asked for.

        Raises UserError when Ray has died on this machine: a driver that stays behind gets no worker ever again.
        """
        machines = nodes()
        if not any(node.here for node in machines):
            raise UserError(f"{RAY_DIED}; the same command continues")
        if not self.spec.gpus and self.request.gpus is None and any(node.gpus for node in machines):
            with suppress(UserError):  # they are too small for a trial
                self.spec, _ = lanes_for(machines, self.request)
                self.say(GPUS_CAME)
        places = place_lanes(machines, self.spec)
        self.count = sum(places.values())
        lacking = sys.maxsize if wanted is None else max(0, wanted - self.count)
        self.demand.keep(self.spec.cpus, self.spec.gpus, self.spec.workers, lacking)
        return places


def lanes_for(machines: Sequence[Node], request: LaneRequest) -> tuple[LaneSpec, int]:
    """What one lane takes and how many lanes these machines hold; raises UserError when they hold none."""
    gpus, workers = request.gpus, request.workers
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in machines) else 0.0
    shares = []  # CPU slots for one worker, on every machine that can have any
    for node in machines:
        places = _gpu_places(node, gpus) if gpus else min(int(node.cpus), max(workers, MOST_CPU_LANES))
        share = node.cpus // places if places else 0.0
        shares += [share] if share >= 1 else []  # one with less has no lane
    cpus = request.cpus or min(shares, default=1.0)
    spec = LaneSpec(workers=workers, cpus=cpus, gpus=gpus)
    lanes = sum(place_lanes(machines, spec).values())
    if lanes < 1:
        has = " + ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in machines)
        raise UserError(
            f"a trial needs {workers} x ({cpus:g} CPUs, {gpus:g} GPUs), but there are {has or 'none'}; "
            "lower --cpus-per-trial, --gpus-per-trial or --workers-per-trial"
        )
    return spec, lanes


def _gpu_places(node: Node, gpus: float) -> int:
    """How many workers its GPUs hold; a share lies on one GPU, never on parts of two."""
    return int(node.gpus) * int(1 / gpus) if gpus < 1 else int(node.gpus / gpus)


def place_lanes(machines: Sequence[Node], spec: LaneSpec) -> Places:
    """How many lanes of this size each machine holds. Only where none has room for all workers of one, lanes lie on
    several: between machines gradients travel slowly, and the loss of one ends what the others do."""
    places = [
        min(int(node.cpus / spec.cpus), _gpu_places(node, spec.gpus) if spec.gpus else sys.maxsize) for node in machines
    ]
    whole = [count // spec.workers for count in places]
    if any(whole):
        return {node.id: count for node, count in zip(machines, whole, strict=True)}
    return {**dict.fromkeys((node.id for node in machines), 0), None: sum(places) // spec.workers}
