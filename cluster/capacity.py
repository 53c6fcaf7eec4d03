"""How many lanes the cluster's machines hold: now, and after others join or leave."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.connect import Demand, Node, connect, disconnect, in_cluster, nodes
from cluster.lane import ANYWHERE, LaneSpec
from trainables.errors import UserError
from trainables.job import LaneRequest

MOST_CPU_LANES = 8  # on a machine without GPUs; each lane is a process of its own with a copy of torch
JOIN_S = 1800.0  # for the first machine of a cluster to come
LOOK_S = 2.0
CPUS_ALONE = (
    "no machine of the cluster has a GPU now, so trials use CPUs until one has; --gpus-per-trial 1 waits for it"
)
GPUS_CAME = "a machine with GPUs has joined: from now on trials use GPUs"
RAY_DIED = "Ray has died on this machine: one of its processes was killed, or memory ran out"


class Lanes:
    """The cluster's lanes for trials of one size: `with lanes:` connects to Ray, as `cluster.connect.connect` finds or
    starts it, and there the attributes below are known.

    A cluster that has no room for a lane yet is waited for, up to half an hour; a local Ray without room is a UserError
    at once, and so is a cluster that cannot be joined.

    Attributes:
        dashboard: Ray's, its address; "" when there is none.
        spec: what one lane takes, by the machines there are.
        count: how many there are.
        places: on which machines, see `places_on`.
    """

    dashboard: str
    spec: LaneSpec
    places: dict[LaneSpec, int]

    def __init__(self, request: LaneRequest, say: Callable[[str], None] = print) -> None:
        self.request, self.say, self.demand = request, say, Demand()

    @property
    def count(self) -> int:
        return sum(self.places.values())

    def __enter__(self) -> "Lanes":
        try:
            self.dashboard = connect()
        except ConnectionError as error:
            raise UserError(str(error)) from error
        try:
            self.spec, self.places = self._first()
        except BaseException:
            disconnect()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        disconnect()

    def _first(self) -> tuple[LaneSpec, dict[LaneSpec, int]]:
        """Size and places of the lanes, once there is room for one."""
        request, end, said = self.request, time.time() + JOIN_S, False
        while True:
            try:
                spec, places = lanes_for(nodes(), request)
                if not spec.gpus and request.gpus is None and in_cluster():
                    self.say(CPUS_ALONE)
                return spec, places
            except UserError as error:
                if not in_cluster() or time.time() > end:
                    raise
                if not said:
                    self.say(f"waiting for machines: {error}")
                    said = True
            self.demand.keep(request.cpus or 1.0, request.gpus or 0.0, request.workers, lanes=1)
            time.sleep(LOOK_S)

    def now(self, wanted: int | None) -> dict[LaneSpec, int]:
        """The places there are; of an autoscaler those that `wanted` (None: any number of) trials lack are asked for.

        Where the sweep began on CPUs for want of GPUs, and was not told to, it goes over to the first GPUs that come.

        Raises UserError when Ray has died on this machine: a driver that stays behind gets no worker ever again.
        """
        machines = nodes()
        if not any(node.here for node in machines):
            raise UserError(f"{RAY_DIED}; the same command continues")
        if not self.spec.gpus and self.request.gpus is None and any(node.gpus for node in machines):
            self.spec, _ = lanes_for(machines, self.request)
            self.say(GPUS_CAME)
        self.places = places_on(machines, self.spec)
        lacking = sys.maxsize if wanted is None else max(0, wanted - self.count)
        self.demand.keep(self.spec.cpus, self.spec.gpus, self.spec.workers, lacking)
        return self.places


def lanes_for(machines: Sequence[Node], request: LaneRequest) -> tuple[LaneSpec, dict[LaneSpec, int]]:
    """What one lane takes, and where these machines hold lanes; raises UserError when they hold none."""
    gpus, workers = request.gpus, request.workers
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in machines) else 0.0
    shares = []  # CPU slots for one worker, on every machine that can have any
    for node in machines:
        ranks = _gpu_places(node, gpus) if gpus else min(int(node.cpus), max(workers, MOST_CPU_LANES))
        shares += [float(node.cpus // ranks)] if ranks else []
    cpus = request.cpus or max(1.0, min(shares, default=1.0))
    spec = LaneSpec(workers=workers, cpus=cpus, gpus=gpus)
    places = places_on(machines, spec)
    if not places:
        has = " + ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in machines)
        raise UserError(
            f"a trial needs {workers} x ({cpus:g} CPUs, {gpus:g} GPUs), but there are {has or 'none'}; "
            "lower --cpus-per-trial, --gpus-per-trial or --workers-per-trial"
        )
    return spec, places


def _gpu_places(node: Node, gpus: float) -> int:
    """How many workers its GPUs hold; a share lies on one GPU, never on parts of two."""
    return int(node.gpus) * int(1 / gpus) if gpus < 1 else int(node.gpus / gpus)


def places_on(machines: Sequence[Node], spec: LaneSpec) -> dict[LaneSpec, int]:
    """How many lanes of this size each machine holds, of those that hold any.

    Where that leaves out lanes that would fit with their workers on several machines, all lanes may be anywhere.
    """
    ranks = {
        node.id: min(int(node.cpus / spec.cpus), _gpu_places(node, spec.gpus) if spec.gpus else sys.maxsize)
        for node in machines
    }
    whole = {replace(spec, node=id): count // spec.workers for id, count in ranks.items() if count >= spec.workers}
    most = sum(ranks.values()) // spec.workers
    return whole if sum(whole.values()) == most else {replace(spec, node=ANYWHERE): most}  # most is 0: no machine
