"""--track tensorboard: event files in the run directory, for `tensorboard --logdir RUN/tensorboard`.

    tensorboard/sweep/   the sweep's options, the ensemble's scores and its file
    tensorboard/0007/    a trial: its curve, and its hyperparameters with its scores for the HParams page

A folder is written anew when it is written again, because events cannot be replaced.
"""

import json
import os
import uuid
from typing import Any

from search.track.tracker import CURVE, EndedTrial, SweepEnd, SweepInfo, missing
from trainables.run_directory import refuse_links
from trainables.storage import Damaged, is_link, remove_folder

FOLDER, SWEEP = "tensorboard", "sweep"


class TensorBoardTracker:
    """A sweep as event files. Raises UserError when TensorBoard is not installed."""

    name = "tensorboard"
    registers = False

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing(self.name, error) from None
        self.writer = SummaryWriter
        self.sweep: SweepInfo | None = None

    def where(self, sweep: SweepInfo) -> str:
        return f"tensorboard --logdir {sweep.run / FOLDER}"

    def open(self, sweep: SweepInfo, key: str) -> str:
        refuse_links(sweep.run)
        self.sweep = sweep
        if key and (sweep.run / FOLDER / SWEEP).is_dir():
            return key
        self._write_sweep(None)
        return uuid.uuid4().hex

    def add(self, trial: EndedTrial) -> None:
        with self._anew(trial.id) as writer:
            for row in trial.curve:
                for name, value in row.items():
                    if name != "epoch":
                        writer.add_scalar(CURVE + name, value, int(row["epoch"]), walltime=trial.time_of(row))
            writer.add_text("outcome", f"{trial.outcome}: {trial.error}" if trial.error else str(trial.outcome))
            writer.add_hparams(trial.params, trial.scores, run_name=os.curdir)

    def conclude(self, end: SweepEnd) -> None:
        self._write_sweep(end)

    def _write_sweep(self, end: SweepEnd | None) -> None:
        assert self.sweep is not None
        with self._anew(SWEEP) as writer:
            writer.add_text("options", _code(json.dumps(self.sweep.options, indent=1)))
            if end is None:
                return
            for name, value in end.scores.items():
                writer.add_scalar(name, value, end.trials, walltime=end.at)
            for name, text in end.files.items():
                if name.endswith(".json"):  # a page is none of TensorBoard's kinds; it lies beside
                    writer.add_text(name, _code(text))

    def _anew(self, name: str) -> Any:
        """A writer into an empty folder of that name; what a process that was killed has left there goes."""
        assert self.sweep is not None
        folder = self.sweep.run / FOLDER / name
        if is_link(folder):
            raise Damaged(f"{folder} is a symbolic link, which is not followed")
        remove_folder(folder)
        return self.writer(str(folder))


def _code(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join("    " + line for line in text.splitlines())
