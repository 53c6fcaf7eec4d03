"""The one place that connects to Ray: the cluster of a submitted job, or a local one that ends with this process."""

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass

import ray

OBJECT_STORE_BYTES = 256 * 2**20  # images travel as memory-mapped files, so Ray's third of the memory is not needed
DASHBOARD = "RAY_API_SERVER_ADDRESS"
ENVIRONMENT = {  # a local cluster hands these on to all its processes
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home, and there is no notice about it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it Ray warns at every start
}


@dataclass(frozen=True)
class Offer:
    """What the cluster has: CPU slots, GPUs, live nodes, and the dashboard's address ("" when there is none)."""

    cpus: float
    gpus: float
    nodes: int
    dashboard_url: str


def connect(cpus: int | None = None) -> Offer:
    """Join the cluster when this process runs as its job (RAY_ADDRESS is set), else start a local one.

    `cpus` is the number of CPU slots of a local cluster (default: the machine's cores); a cluster has its own number.
    The dashboard's processes are part of a local cluster, on the loopback interface alone: without them Ray Train never
    frees the placement group of a run whose controller was killed, and the sweep hangs.

    From here on SIGTERM (`ray job stop`, a batch system's time limit) does what Ctrl-C does.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if os.environ.get("RAY_ADDRESS"):
        context = ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        port = _free_port()
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
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    resources = ray.cluster_resources()
    return Offer(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else "",
    )


def disconnect() -> None:
    """Leave the cluster; a local one is ended with all its processes."""
    ray.shutdown()
    os.environ.pop(DASHBOARD, None)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
