"""schemathesis against a real server: its command line, in a process of its own, and what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.server import ROOT, Server

CONFIG = """
[[operations]]
include-path = "/predict"
[operations.checks.positive_data_acceptance]
expected-statuses = ["200", "415"]  # no schema says which bytes are a picture
"""


def run_cases(server: Server, document: dict[str, Any], folder: Path, examples: int) -> dict[str, Any]:
    """Send up to `examples` random cases to every operation of a document, besides those at its edges.

    Returns schemathesis' report: `test_cases`, how many there were; `failures`; `operations`; `exit_code`. The document
    is handed over as a file, because schemathesis does not try the address that it has loaded one from.
    """
    described, config, report = folder / "openapi.json", folder / "schemathesis.toml", folder / "report.json"
    described.write_text(json.dumps(document))
    config.write_text(CONFIG)
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "--config-file", str(config),
        "run", str(described), "--url", f"http://localhost:{server.port}", "--max-examples", str(examples),
        "--seed", "1", "--continue-on-failure", "--report-json-path", str(report),
    ]  # fmt: skip
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    return json.loads(report.read_text())


def check_contract(server: Server, folder: Path, examples: int) -> int:
    """The same with the server's own document: fails for any fault, and returns how many cases there were."""
    report = run_cases(server, json.loads(server.ask("GET", "/openapi.json")[1]), folder, examples)
    assert report["failures"] == report["errors"] == []
    assert report["complete"]
    assert report["exit_code"] == 0
    assert report["operations"]["tested"] == report["operations"]["total"] == 6
    return report["test_cases"]["generated"]
