"""A cluster of several Ray nodes on this machine, with token authentication on: what tests and benchmarks run against.

    with LocalCluster() as cluster:
        node = cluster.add_node(cpus=1)
        cluster.ray("job", "submit", "--working-dir", ".", "--", "python", "-m", "search.run", ...)
        node.kill()     # as if its power had failed

The head has no CPU slots: trials are placed on the other nodes. Every node has a loopback address of its own, and all
that was started ends with the `with` block.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cluster.connect import free_port

BIN = Path(sys.executable).parent
START_S = 120.0
STARTED = "Ray runtime started"
OBJECT_STORE_BYTES = 100 * 2**20


class LocalNode:
    """`ray start --block` and everything below it."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        with open(log, "ab") as file:
            self.process = psutil.Popen(
                [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments],
                env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_S
        while STARTED not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"ray start {' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL for all its processes at once: Ray's, the workers', a job's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.process, *self.process.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)


class LocalCluster:
    """A head and the nodes that `add_node` starts."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has at most 107 characters
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.dashboard_url = f"http://127.0.0.1:{self.dashboard_port}"
        self.token = secrets.token_hex(32)
        self.nodes: list[LocalNode] = []
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ADDRESS": self.dashboard_url,  # of the clients
            "RAY_worker_maximum_startup_concurrency": "8",  # else one at a time on a head without CPU slots
        }

    def __enter__(self) -> "LocalCluster":
        self.start_head()
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> LocalNode:
        """Also to start it again, on the same ports, after it was killed."""
        return self._start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}", f"--metrics-export-port={self.metrics_port}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip

    def add_node(self, cpus: int = 1) -> LocalNode:
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def ray(self, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command of somebody who knows the token; `env` overrides, and an empty value removes."""
        merged = {key: value for key, value in {**self.env, **env}.items() if value}
        done = subprocess.run([str(BIN / "ray"), *arguments], env=merged, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"ray {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def _start(self, *arguments: str) -> LocalNode:
        number = len(self.nodes)
        common = [
            f"--node-ip-address=127.0.0.{number + 1 if '--head' not in arguments else 1}",
            f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={self.folder / str(number)}",  # nodes of one machine would delete each other's job sources
        ]  # fmt: skip
        env = {key: value for key, value in self.env.items() if key != "RAY_ADDRESS"}
        self.nodes.append(LocalNode([*arguments, *common], env, self.folder / f"node{number}.log"))
        return self.nodes[-1]
