"""From a command line to a prediction, without Ray: what search.run and ensemble.predict do, on one tiny net."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from ensemble.file import write_ensemble
from ensemble.predict import Predict, predict_folder
from ensemble.select import Select, choose
from search import run as search_run
from search.config import SearchConfig
from search.plan import Plan, make_plan
from trainables.config import TrialConfig
from trainables.explore.__main__ import Explore, explore
from trainables.job import Alone, DataSource, Job, Outcome
from trainables.trial import run_trial

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 40, 40)}


def paint(colour: str, seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A picture of that colour with structure of its own, so that no two are twins; a net learns it in seconds."""
    rng = np.random.default_rng([seed, *colour.encode()])
    field = Image.fromarray(rng.integers(0, 110, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(field).astype(int) + COLOURS[colour]).clip(0, 255).astype(np.uint8))


def paint_folder(root: Path, per_class: int, seed: int = 0, ending: str = "png") -> Path:
    """ROOT/{blue,green,red}/NN.png"""
    for colour in COLOURS:
        (root / colour).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            paint(colour, seed + i).save(root / colour / f"{i:02}.{ending}")
    return root


def planned(run: Path, *args: str) -> tuple[SearchConfig, Plan]:
    """What `search.run ARGS` would do."""
    config = tyro.cli(SearchConfig, args=[*args, "--run", str(run), "--backbones", "speednet", "--space", "auto"])
    return config, make_plan(config)


def swept(run: Path, *args: str) -> Plan:
    """A run of `search.run ARGS` with one candidate, which is its ensemble."""
    config, plan = planned(run, *args)
    search_run._open_run(plan, config)
    tiny = TrialConfig(
        backbone="speednet", width=0.125, image_size=16, epochs=8, batch_size=12, lr=1e-2, precision="fp32",
        weight_decay=0.0,
    )  # fmt: skip
    job = Job("0000", tiny, str(plan.run), DataSource(str(plan.data.path), config.data))
    assert run_trial(job, Alone()).outcome is Outcome.FINISHED
    write_ensemble(plan.run, choose(Select(run=(str(plan.run),), selector="greedy")))
    return plan


def predicted(run: Path, images: Path) -> dict[str, str]:
    """Labels of a folder of images by id, as `ensemble.predict` writes them."""
    out = run.parent / f"{run.name}.csv"
    predict_folder(Predict(images, out, run=(str(run),), device="cpu"))
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["id"]: row["label"] for row in csv.DictReader(file)}


def learned(run: Path, tmp_path: Path, *args: str) -> Plan:
    """Sweep, and predict new pictures, of which nearly all must be right."""
    plan = swept(run, *args)
    new = paint_folder(tmp_path / "new", 10, seed=9000)
    labels = predicted(run, new)
    assert len(labels) == 30
    right = [label == id.split("/")[0] for id, label in labels.items()]
    assert np.mean(right) >= 0.8, labels
    return plan


def explored(out: Path, *args: str) -> dict:
    """What `trainables.explore ARGS` finds."""
    return explore(tyro.cli(Explore, args=[*args, "--out", str(out)]))


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, run: Path, *args: str) -> str:
    """The one line of a search.run that must end with exit code 2 and leave neither a run nor a prepared data set."""
    monkeypatch.setattr(sys, "argv", ["search.run", *args, "--run", str(run)])
    monkeypatch.setattr(search_run, "Lanes", lambda *args: pytest.fail("Ray was started"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        search_run.main()
    assert exit.value.code == 2
    assert not run.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
