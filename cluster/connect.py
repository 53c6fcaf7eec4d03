"""connect(): the project's only ray.init, and what the machines behind it offer."""

import logging
import os
import signal
import threading
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Offer:
    """What the connected machines have.

    Attributes:
        cpus: logical CPUs of all nodes.
        gpus: of all nodes.
        nodes: how many are alive.
        dashboard_url: of Ray's own dashboard, with http://; "" when there is none.
    """

    cpus: float
    gpus: float
    nodes: int
    dashboard_url: str


def connect(cpus: int | None = None) -> Offer:
    """Join the cluster of the job that this process belongs to (RAY_ADDRESS is set), or start Ray on this machine.

    Args:
        cpus: CPUs that a local Ray may use (default: all); a cluster has what it has.

    Quiet: worker output goes to Ray's log files. In the main thread, SIGTERM (`ray job stop`) is made to act as Ctrl-C.
    """
    if os.environ.get("RAY_ADDRESS"):
        context = ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        context = ray.init(
            address="local",
            num_cpus=cpus,
            # Not for its pages: without the dashboard's processes Ray Train never frees the resources of a run whose
            # owner died, and a sweep would wait for them for ever.
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    if threading.current_thread() is threading.main_thread():
        # After ray.init, which installs a handler of its own. Tune ignores SIGTERM; it knows Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    total = ray.cluster_resources()
    url = context.dashboard_url
    return Offer(
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        dashboard_url=f"http://{url}" if url else "",
    )


def disconnect() -> None:
    """Leave the cluster; a local Ray ends with all its processes."""
    ray.shutdown()
