"""A space file of trials that take seconds: a quarter of speednet at 16 pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_space(
    path: Path,
    trials: int,
    epochs: int,
    batch_size: int = 8,
    lr: tuple[float, float] = (3e-3, 3e-2),
    first: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write it to `path`; `first` are configurations to be enqueued."""
    path.write_text(f'''
"""Trials of a few seconds."""
from trainables.config import TrialConfig

TRIALS = {trials}
BACKBONES = {{"speednet": "scratch"}}
FIRST = {list(first)}

def suggest(trial, task):
    return TrialConfig(
        backbone="speednet", width=0.25, image_size=16, epochs={epochs}, batch_size={batch_size}, precision="fp32",
        lr=trial.suggest_float("lr", {lr[0]}, {lr[1]}, log=True), weight_decay=0.0, seed=trial.number,
    )
''')
    return path
