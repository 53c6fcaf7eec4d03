"""The whole default sweep on a machine without a network, from a folder that search.fetch filled."""

import json
from pathlib import Path

from tests.airgap import PRELUDE, python

SWEEP = """
import runpy
sys.argv = ["search.run", *ARGUMENTS]
runpy.run_module("search.run", run_name="__main__")
"""


def test_an_air_gapped_sweep_ends_in_an_ensemble(pictures_with_val: Path, tmp_path: Path) -> None:
    """The weights are named in the driver and read by its workers, which know neither packages nor hub, too."""
    weights, run = tmp_path / "weights", tmp_path / "run"
    filled = python("-m", "search.fetch", "--to", str(weights), cache=tmp_path)
    assert filled.returncode == 0, filled.stderr
    arguments = [
        "--data", "folder", "--data-dir", str(pictures_with_val), "--space", "auto", "--weights-dir", str(weights),
        "--minutes", "2", "--run", str(run),
    ]  # fmt: skip
    ran = python("-c", f"{PRELUDE}\nARGUMENTS = {arguments!r}\n{SWEEP}", cache=tmp_path, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (ensemble,) = run.glob("ensembles/*.json")
    assert json.loads(ensemble.read_text())["members"]
    sources = [json.loads(path.read_text())["config"] for path in run.glob("candidates/*/candidate.json")]
    assert all(config["pretrained"] for config in sources)
    assert {config["backbone"] for config in sources} <= {f"tf_efficientnet_lite{i}" for i in range(3)}
