"""A sweep whose trials share a GPU; needs Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_twelve_trials_share_a_gpu(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run = tmp_path / "run"
    gpus = ["--gpus-per-trial", "0.5"] if device.type == "cuda" else []
    subprocess.run(
        [sys.executable, "-m", "search.run", "--trials", "12", "--run", str(run), *gpus, "--scale", "tiny"],
        check=True, timeout=900,
    )  # fmt: skip
    candidates = [json.loads(path.read_text()) for path in run.glob("candidates/*/candidate.json")]
    assert len(candidates) >= 3
    if device.type == "cuda":
        assert {one["precision"] for one in candidates} & {"bf16", "fp16"}
    assert list(run.glob("ensembles/*.json"))
