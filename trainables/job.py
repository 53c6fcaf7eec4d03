"""What passes between a sweep and whoever trains its trials: a Job goes out, reports and a Result come back.

Standard library only: the driver, Tune's actors, the mailbox and the ranks of a lane all import this.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from trainables.config import TrialConfig

HANG_S = 1800.0

Metrics = dict[str, float]
"""An epoch's scores, or a trial's, by name: `tune_accuracy`, `select_log_loss`, `epoch`, `seconds`, ..."""


class Outcome(StrEnum):
    """How a trial's run ended. Its value is what people and files call it."""

    FINISHED = "finished"
    TIME = "time"
    PRUNED = "pruned"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    INVALID = "invalid"
    BUG = "bug"
    LOST_NODE = "lost node"
    NOT_STARTED = "not started"
    REPEATED = "repeated"
    STORAGE_LOST = "storage lost"

    @property
    def leaves_candidate(self) -> bool:
        """Whether the trial has written a candidate."""
        return self in (Outcome.FINISHED, Outcome.TIME)

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that a budget allows, or else a proposal that came to nothing."""
        return self not in (Outcome.INVALID, Outcome.NOT_STARTED, Outcome.REPEATED)

    @property
    def teaches(self) -> bool:
        """Whether the sampler learns from it that the configuration is a bad one."""
        return self in (Outcome.DIVERGED, Outcome.OUT_OF_MEMORY)

    @property
    def continues(self) -> bool:
        """Whether the trial can be continued from its checkpoint, as if nothing had been."""
        return self in (Outcome.INTERRUPTED, Outcome.STORAGE_LOST)

    @property
    def retries(self) -> int:
        """How often the trial is run again before this is its end; lost lanes are counted by cluster.tuner."""
        return 1 if self is Outcome.BUG else 0

    @property
    def is_failure(self) -> bool:
        """Whether a person should be told of it."""
        return self in (Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.INVALID, Outcome.BUG, Outcome.LOST_NODE)

    @property
    def text(self) -> str:
        """What it means, for a person."""
        return _TEXTS[self]


_TEXTS = {
    Outcome.FINISHED: "trained to the end",
    Outcome.TIME: "cut at the deadline, still a candidate",
    Outcome.PRUNED: "stopped early by the pruner",
    Outcome.INTERRUPTED: "interrupted; the same command continues with it",
    Outcome.DIVERGED: "diverged",
    Outcome.OUT_OF_MEMORY: "ran out of memory",
    Outcome.INVALID: "could not be trained as configured",
    Outcome.BUG: "failed with an error",
    Outcome.LOST_NODE: "lost with its machine",
    Outcome.NOT_STARTED: "proposed, but did not fit into the time left",
    Outcome.REPEATED: "proposed, but had been tried already",
    Outcome.STORAGE_LOST: "could not reach the run directory",
}


@dataclass(frozen=True)
class WeightSource:
    """Where pretrained weights lie: `kind` "hub", "file" or "offline", and for the latter two the file."""

    kind: str
    path: str = ""


@dataclass(frozen=True)
class DataSource:
    """A prepared data set, and what it takes to prepare it again on another machine.

    Attributes:
        path: the folder in which the driver has it; elsewhere it may lie in another cache, or beside the run.
        name, data_dir, size, fit, group_by, twins, labels: as `trainables.data.prepare` takes them; data_dir None where
            the images are not at hand.
    """

    path: str
    name: str
    data_dir: str | None = None
    size: int | None = None
    fit: Literal["squash", "crop", "pad"] = "squash"
    group_by: str | None = None
    twins: bool = True
    labels: str | None = None


@dataclass(frozen=True)
class LaneRequest:
    """What a user asks for a trial: workers, and CPUs and GPUs of each; None: as the machines suggest."""

    workers: int = 1
    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class LessonMember:
    """A candidate that teaches: the path or URL of its folder, its weight and its temperature in the ensemble."""

    path: str
    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Lesson:
    """What a network learns from an ensemble (distillation).

    Attributes:
        members: of the ensemble.
        name: the ensemble's.
        temperature: of the members' average, as the ensemble has it.
        softness: by which the average's log-probabilities are divided, too; above 1 says more of the other classes.
        share: of the teacher's answer in what a labelled image's target is, 0 to 1; the rest is the label.
        unlabelled: path or URL of an array of other images, uint8 (N, H, W, 3), in the form of the data set; "": none.
    """

    members: tuple[LessonMember, ...]
    name: str = ""
    temperature: float = 1.0
    softness: float = 1.0
    share: float = 0.7
    unlabelled: str = ""


@dataclass(frozen=True)
class Job:
    """One trial to train.

    Attributes:
        id: of the candidate that it becomes.
        config: its hyperparameters.
        run: path or URL of the run directory.
        data: what to train on.
        weights: where pretrained weights lie; None: the network starts from random ones.
        gpus: of each worker of the lane, which fills it in.
        deadline: time.time() at which it finishes with what it has; None: never.
        stops_at: epochs at whose report the sweep may stop it, so that it waits for the verdict.
        lesson: what it learns from an ensemble; None: from labels alone.
        hang_s: seconds without a sign of life after which it counts as hung.
        node: the machine that it runs on; the lane fills it in.
    """

    id: str
    config: TrialConfig
    run: str
    data: DataSource
    weights: WeightSource | None = None
    gpus: float = 0.0
    deadline: float | None = None
    stops_at: tuple[int, ...] = ()
    hang_s: float = HANG_S
    node: str = ""
    lesson: Lesson | None = None


@dataclass(frozen=True)
class Result:
    """How a job ended.

    Attributes:
        outcome: what became of it.
        metrics: scores and sizes by split, of a candidate.
        seconds: spent in training, over all continuations; None when it is not known.
        error: one line, where something went wrong; traceback: the whole of it.
    """

    outcome: Outcome
    metrics: Metrics = field(default_factory=dict)
    seconds: float | None = None
    error: str = ""
    traceback: str = ""


class Reporter(Protocol):
    """What a trial reports with; the same calls from every rank."""

    def __call__(self, metrics: Metrics) -> bool:
        """Report an epoch's scores (rank 0's travel). True: the trial is to be abandoned, return soon.

        All ranks call it at the same points and get the same answer.
        """

    def alive(self) -> None:
        """Give a sign of life within a long epoch, from any rank at any time; costs next to nothing."""


class Alone:
    """A Reporter for a trial that nobody watches."""

    def __call__(self, metrics: Metrics) -> bool:
        return False

    def alive(self) -> None:
        pass
