"""The one place that connects to Ray: the cluster of a submitted job, or a local one that ends with this process."""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

OBJECT_STORE_BYTES = 256 * 2**20  # images travel as memory-mapped files, so Ray's third of the memory is not needed
KNOCK_S = 10.0
QUIET_S = 10.0
MOST_DEMANDED = 16  # places at a time; when they have come, the next
DASHBOARD = "RAY_API_SERVER_ADDRESS"
ENVIRONMENT = {  # a local cluster hands these on to all its processes
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home, and there is no notice about it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it Ray warns at every start
}


HEAD = "node:__internal_head__"  # a resource of which Ray gives the head 1
CONTROL_BYTES = 240 * 2**20  # of what waits for a trial (120) and cleans up after its lane (113), measured


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its CPU slots and GPUs, whether this process runs on it, and Ray's id of it."""

    cpus: float
    gpus: float = 0.0
    here: bool = False
    id: str = ""


def connect(cpus: int | None = None) -> str:
    """Join the cluster when this process runs as its job (RAY_ADDRESS is set), else start a local one.

    Returns the dashboard's address, "" when there is none.

    `cpus` is the number of CPU slots of a local cluster (default: the machine's cores); a cluster has its own number.
    The dashboard's processes are part of a local cluster, on the loopback interface alone: without them Ray Train never
    frees the placement group of a run whose controller was killed, and the sweep hangs.

    From here on SIGTERM (`ray job stop`, a batch system's time limit) does what Ctrl-C does.

    Raises ConnectionError when the cluster cannot be joined.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if in_cluster():
        try:
            _knock(os.environ["RAY_ADDRESS"])
            context = ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # nobody there, another version of Ray or of Python, a token that is refused
            where, why = os.environ["RAY_ADDRESS"], " ".join(str(error).split())[:300]
            raise ConnectionError(
                f"the Ray cluster of RAY_ADDRESS={where} cannot be joined ({why}); "
                "unset it to run on this machine alone"
            ) from error
    else:
        if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
            # Its own, so that nothing is written into HOME, and no other local Ray knows it.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        port = free_port()
        # Ray Train's cleaner looks for its dashboard by itself, and dies when a second Ray runs on the machine.
        os.environ[DASHBOARD] = f"http://127.0.0.1:{port}"
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    if threading.current_thread() is threading.main_thread():
        # Ray installs its own SIGTERM handler in init, which ends the process at once: replace it afterwards.
        signal.signal(signal.SIGTERM, _like_ctrl_c)
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at host:port, which Ray would go on trying for many minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), KNOCK_S).close()


def _like_ctrl_c(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts its background jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def nodes() -> tuple[Node, ...]:
    """The machines that the cluster has now: others may join and leave at any time."""
    here = ray.get_runtime_context().get_node_id()
    return tuple(
        Node(
            node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0), node["NodeID"] == here, node["NodeID"]
        )
        for node in ray.nodes()
        if node["Alive"]
    )


def room_on_head() -> int:
    """For how many processes that wait for trials the head has memory: in half of it, so that two sweeps fit."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return int(sum(has.get("memory", 0.0) for has in machines if HEAD in has) / 2 // CONTROL_BYTES)


def waiter(on_head: bool) -> dict[str, float]:
    """What Ray reserves for the process that waits for a trial. It belongs on the head, with which everything ends
    anyway, so that no other machine's loss ends a trial that runs elsewhere; where that has no room, wherever there is
    most memory."""
    return {"memory": float(CONTROL_BYTES), HEAD: 0.0001} if on_head else {"memory": 1.0}


def in_cluster() -> bool:
    """Whether this process runs as a job of a cluster, or was told of one; `connect` then joins it."""
    return bool(os.environ.get("RAY_ADDRESS"))


class Demand:
    """What an autoscaler acts on: placement groups for which there is no room.

    Unlike `ray.autoscaler.sdk.request_resources` they end with this process, however it ends: no machine is kept (and
    paid for) because a driver was killed. Whether there is room is found by asking: a group that is placed at once is
    given up again, because the room is the lanes', and nothing is demanded for the next QUIET_S seconds.
    """

    def __init__(self) -> None:
        self.waiting: list[PlacementGroup] = []
        self.bundle: dict[str, float] = {}  # that each of them has
        self.quiet_until = 0.0

    def keep(self, cpus: float, gpus: float, workers: int, lanes: int) -> None:
        """From now on demand so many lanes, of `workers` places of that size each, beyond what the cluster has."""
        if not in_cluster():
            return
        if any(placement_group_table(group).get("state") == "CREATED" for group in self.waiting):
            self.quiet_until = time.monotonic() + QUIET_S
        count = 0 if time.monotonic() < self.quiet_until else min(workers * lanes, MOST_DEMANDED)
        bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        kept = count if bundle == self.bundle else 0
        for group in self.waiting[kept:]:
            remove_placement_group(group)
        self.bundle = bundle
        self.waiting = self.waiting[:kept]
        self.waiting += [placement_group([bundle]) for _ in range(count - len(self.waiting))]


def disconnect() -> None:
    """Leave the cluster; a local one is ended with all its processes."""
    ray.shutdown()
    os.environ.pop(DASHBOARD, None)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
