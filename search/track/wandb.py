"""--track wandb: a run for the sweep and one for each trial, in a group, as Weights & Biases' own variables say.

WANDB_MODE=offline writes folders that `wandb sync` sends; WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR and WANDB_API_KEY are
wandb's. Runs have ids of their own sweep and trial, so that one that is sent twice is the same run, of which Weights &
Biases keeps the steps that it has.
"""

import os
from typing import Any

from search.track.tracker import CURVE, PROJECT, EndedTrial, SweepEnd, SweepInfo, missing
from trainables.errors import UserError

ANSWER_S = 30.0  # that Weights & Biases may take for a run's start, and for its upload, before it is tried again


class WandbTracker:
    """A sweep in Weights & Biases. Raises UserError when wandb is not installed, or nobody is logged in."""

    name = "wandb"
    registers = False

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing(self.name, error) from None
        self.wandb = wandb
        self.sweep: SweepInfo | None = None
        self.parent: Any = None
        self.project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.mode = str(wandb.setup().settings.mode)
        if self.mode in ("online", "shared", "run"):  # a key is asked for now, not in the middle of the sweep
            try:
                is_logged_in = wandb.login(verify=False)  # a server that is away is no mistake
            except wandb.Error as error:
                raise UserError(f"--track wandb: {str(error).strip().splitlines()[0]}; {_LOGIN}") from None
            if not is_logged_in:
                raise UserError(f"--track wandb: nobody is logged in; {_LOGIN}")

    def where(self, sweep: SweepInfo) -> str:
        return f"project {self.project}, group {sweep.key}, {self.mode}"

    def open(self, sweep: SweepInfo, key: str) -> str:
        self.sweep = sweep
        if self.parent is None:
            self.parent = self._start("sweep", sweep.name, "sweep")
            self.parent.config.update(sweep.options, allow_val_change=True)
        return f"{self.project}/{self.parent.id}"

    def add(self, trial: EndedTrial) -> None:
        run = self._start(trial.id, trial.id, "trial")
        run.config.update(trial.params, allow_val_change=True)
        for row in trial.curve:
            scores = {CURVE + name: value for name, value in row.items() if name != "epoch"}
            run.log(scores, step=int(row["epoch"]))
        run.summary.update({**trial.scores, "outcome": str(trial.outcome), "error": trial.error})
        run.finish(exit_code=int(trial.outcome.is_failure))

    def conclude(self, end: SweepEnd) -> None:
        assert self.sweep is not None
        self.parent.summary.update({**end.scores, "trials": end.trials, "complete": end.complete})
        if end.files:
            artifact = self.wandb.Artifact(f"{self.sweep.key}-ensemble", "ensemble")
            for name, text in end.files.items():
                with artifact.new_file(name, encoding="utf-8") as file:
                    file.write(text)
            self.parent.log_artifact(artifact)
        self.parent.finish()

    def _start(self, id: str, name: str, kind: str) -> Any:
        assert self.sweep is not None
        return self.wandb.init(
            project=self.project, group=self.sweep.key, job_type=kind, id=f"{self.sweep.key}-{id}", name=name,
            resume="allow", reinit="create_new",
            settings=self.wandb.Settings(
                silent=True, console="off", init_timeout=ANSWER_S, finish_timeout=ANSWER_S, finish_timeout_raises=True,
                x_disable_meta=True, x_disable_stats=True,  # the command line, which may have a password, and this CPU
            ),
        )  # fmt: skip


_LOGIN = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
