"""A whole sweep on an object store."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from upath import UPath

from tests.tiny_space import write_space
from tests.trainables.test_s3 import ROOT, Store, store  # noqa: F401
from trainables.run_directory import list_candidates


def test_a_whole_sweep_on_s3_with_the_store_away_for_half_a_minute(
    store: Store, tmp_path: Path, pictures: Path
) -> None:
    def command(module: str, *more: str) -> list[str]:
        return [sys.executable, "-m", module, "--run", "s3://bucket/sweep", *more]

    def finish(process: subprocess.Popen) -> str:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]
        return output

    def start(arguments: list[str]) -> subprocess.Popen:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    space = tmp_path / "tiny.py"
    write_space(space, trials=4, epochs=20)
    run = UPath("s3://bucket/sweep")
    sweep = command(
        "search.run", "--data", "folder", "--data-dir", str(pictures), "--space", str(space), "--pruner", "none",
        "--cpus-per-trial", str(os.cpu_count()),
    )  # fmt: skip
    process = start(sweep)
    while not (run / "candidates/0000/candidate.json").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.2)
    store.away(30).join()
    output = finish(process)
    assert "ensemble     test accuracy" in output
    candidates = list_candidates(run)
    assert [found.id for found in candidates] == ["0000", "0001", "0002", "0003"]
    for found in candidates:
        assert [row["epoch"] for row in found.info.curve] == list(range(1, 21))
        assert not found.info.resumed_after_epochs
    assert "trial at a time" not in finish(start(sweep)), "nothing is left to do"
    finish(start(command("ensemble.select", "--top-k", "2")))
    assert "test accuracy" in finish(start(command("ensemble.report")))
    assert json.loads((run / "report.json").read_text())["test"]["ensemble"]["images"] == 90
    out = tmp_path / "predictions.csv"
    finish(start(command("ensemble.predict", "--images", str(pictures / "test"), "--out", str(out))))
    assert len(out.read_text().splitlines()) == 91
