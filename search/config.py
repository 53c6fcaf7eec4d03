"""SearchConfig: everything about a sweep that is not a hyperparameter. The dataclass is the command's help text."""

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from search.budget import parse_keep
from trainables.errors import UserError
from trainables.job import LaneRequest, WeightSource

Sampler = Literal["tpe", "gp", "random"]
Pruner = Literal["asha", "hyperband", "median", "promote", "wilcoxon", "none"]
Objective = Literal["metric", "log_loss", "ensemble"]
Fit = Literal["squash", "crop", "pad"]
Scale = Literal["full", "tiny"]
Track = Literal["mlflow", "tensorboard", "wandb"]


@dataclass(frozen=True)
class SearchConfig:
    """Sweep backbones and hyperparameters; keep the nine that vote best together.

    Without arguments: a dry run on scikit-learn's digits. Running the same command again goes on where it stopped.
    """

    data: str = "digits"
    """Data set: digits, cifar10, cifar100, or folder, which takes any --data-dir with train/<class>/* and, where they
    are there, val/<class>/* and test/<class>/*; or with <class>/* alone. Or one by name: torchvision:Flowers102,
    hf:org/name (extra hf)."""
    data_dir: Path | None = None
    """Where the images lie. Without it cifar10 and cifar100 are downloaded into the cache."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Table of the images of --data folder: .csv, .tsv or .parquet with the columns path and label and, if you like,
    split (train, val, test) and group; or a list of files, .txt. A path, or a URL that fsspec knows. Its paths are
    relative to --data-dir, or else to its own folder."""
    group_by: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Which images stay on one side of a split, because they show one patient, video or burst: a column of --labels, or
    a regular expression on the images' paths; those belong together for which its first bracket matches the same."""
    ignore_twins: bool = False
    """Split without regard to images that are there twice or almost, which otherwise stay on one side."""
    stored_size: int | None = None
    """Side in pixels at which images are kept; default: their own, or the median one up to 256."""
    fit: Fit = "squash"
    """How images of other proportions than most are brought to the stored size: squash keeps all of an image and
    stretches it, crop cuts the middle out, pad keeps all of it in its proportions, on grey."""
    space: str = "auto"
    """Search space: a name in search/spaces/, or the path of a Python file like those. auto: what the budget buys on
    these images and devices; but the run's own when it goes on, and dry_run for digits."""
    scale: Scale = "full"
    """tiny: few, short, narrow trials on small images, to try a space out in minutes."""
    backbones: tuple[str, ...] = ()
    """Backbones instead of the space's own: timm names, squeezenet1_1, speednet."""
    from_scratch: bool = False
    """Train --backbones from random weights instead of pretrained ones."""
    weights_dir: Path | None = None
    """Folder with pretrained weights as <timm name>.safetensors or .pth, for machines that reach no hub."""
    weights_licence: Literal["permissive", "any"] = "permissive"
    """Pretrained weights that a space takes if found: under permissive licences, or any (some forbid commercial use).
    What --backbones names is taken as it is."""
    trials: int | None = None
    """Trials in all, over repetitions of the command; default: the space's own, or no limit with another budget. The
    automatic space has no number of its own: without any budget it takes an hour."""
    minutes: float | None = None
    """Time in all, over repetitions of the command, ensemble included."""
    device_hours: float | None = None
    """Hours of GPUs (without any: of workers) that trials may occupy in all, over repetitions of the command."""
    target_accuracy: float | None = None
    """End when the ensemble so far is that accurate on the select split, 0 to 1."""
    stop_on_plateau: int | None = None
    """End when so many more trials have not raised the ensemble so far (its select log-loss)."""
    final_seeds: float = 0.0
    """Share of the budget, 0 to 1, at its end that goes to new seeds of the ensemble's members."""
    warm_start: tuple[str, ...] = ()
    """Run directories of earlier sweeps, on these data or others: the sampler learns from their trials."""
    keep_weights: str | None = None
    """How many candidates keep their weights (30), or their size (20GB): the worst by select log-loss lose them first.
    Predictions are kept for all, and weights for the members of every saved ensemble."""
    top_k: int = 9
    """Most members of the ensemble."""
    metric: str = "accuracy"
    """What the ensemble is to be best at: accuracy, log_loss, balanced_accuracy, macro_f1, auroc or cost:FILE (see
    ensemble.select). The sampler, the selection, the claim and the report are about it."""
    objective: Objective = "metric"
    """What the sampler looks at, on the tune split: the candidate's own metric or log_loss; ensemble: the log-loss of
    the ensemble so far with the candidate added (benchmarks.search: on recorded curves no worse, not surely better)."""
    sampler: Sampler = "tpe"
    """Optuna sampler: proposes configurations."""
    pruner: Pruner = "promote"
    """promote: after a ninth of its epochs a trial waits with its checkpoint; the best quarter so far, and the best of
    every backbone, go on when a device is free. Others are Optuna's and stop trials that fall behind (asha: successive
    halving); none: all are trained to the end."""
    workers_per_trial: int = 1
    """Ray Train workers (DDP ranks) of one trial."""
    gpus_per_trial: float | None = None
    """GPUs of one worker, 0 to 1; default: 1 when the cluster has any, else 0."""
    cpus_per_trial: float | None = None
    """CPUs of one worker; default: the cluster's, spread over its GPUs, or over at most 8 trials without any."""
    refit: bool = False
    """In the end retrain the members on all labelled images (see search.refit), which takes about as long as training
    them took, beyond --minutes; the claim stays the one from before."""
    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: runs/<data>-<space>."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Optuna storage; default: study.db in the run directory."""
    track: tuple[Track, ...] = ()
    """Experiment trackers that show the sweep (extras of these names): mlflow, to where MLFLOW_TRACKING_URI says;
    tensorboard, into the run directory; wandb, as its own variables say (WANDB_MODE=offline needs no account)."""
    seed: int = 0
    """Of the sampler."""
    split_seed: int = 0
    """Of the train, tune and select splits."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise UserError(f"--trials is {self.trials}, expected at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"--minutes is {self.minutes}, expected more than 0")
        if self.device_hours is not None and not self.device_hours > 0:
            raise UserError(f"--device-hours is {self.device_hours}, expected more than 0")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise UserError(f"--target-accuracy is {self.target_accuracy}, expected above 0, at most 1")
        if self.stop_on_plateau is not None and self.stop_on_plateau < 1:
            raise UserError(f"--stop-on-plateau is {self.stop_on_plateau}, expected at least 1")
        if not 0 <= self.final_seeds < 1:
            raise UserError(f"--final-seeds is {self.final_seeds}, expected 0 to below 1")
        if self.keep_weights is not None:
            parse_keep(self.keep_weights)
        if self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}, expected at least 1")
        if "tensorboard" in self.track and "://" in (self.run or ""):
            raise UserError(
                f"--track tensorboard writes event files, which cannot be written to {self.run}; expected a folder: "
                "name one with --run, or track with mlflow or wandb"
            )
        if self.workers_per_trial < 1:
            raise UserError(f"--workers-per-trial is {self.workers_per_trial}, expected at least 1")
        if self.cpus_per_trial is not None and not self.cpus_per_trial > 0:
            raise UserError(f"--cpus-per-trial is {self.cpus_per_trial:g}, expected more than 0")
        gpus = self.gpus_per_trial
        if gpus is not None and not 0 <= gpus <= 1:
            raise UserError(
                f"--gpus-per-trial is {gpus:g}, expected 0 to 1: a worker uses one GPU; for a trial on several, raise "
                "--workers-per-trial"
            )
        if gpus is not None and 0 < gpus < 1 and self.workers_per_trial > 1:
            raise UserError(
                f"--gpus-per-trial is {gpus:g} with {self.workers_per_trial} workers, expected 1: two ranks of a trial "
                "cannot share a GPU"
            )

    def command(self) -> str:
        """The command line of this configuration, however it was made; what is as by default is left away."""
        parts = ["python", "-m", "search.run"]
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if value != part.default:
                parts.append(f"--{part.name.replace('_', '-')}")
                if not isinstance(value, bool):
                    parts += [str(one) for one in value] if isinstance(value, tuple) else [str(value)]
        return shlex.join(parts)

    def lane_request(self) -> LaneRequest:
        """What a trial asks of the cluster."""
        return LaneRequest(self.workers_per_trial, self.cpus_per_trial, self.gpus_per_trial)


def name_data(data: str | os.PathLike[str]) -> dict[str, str]:
    """The options for a data set: --data for a name, or --data folder with --data-dir or --labels for a path."""
    from trainables.data.prepare import DATASETS  # not while importing: they need what decodes images
    from trainables.data.sources.tables import TABLES

    if isinstance(data, str) and data in DATASETS:
        return {"data": data}
    if str(data).lower().endswith(TABLES):
        return {"data": "folder", "labels": str(data)}
    is_name = isinstance(data, str) and not os.path.isdir(data)
    return {"data": str(data)} if is_name else {"data": "folder", "data_dir": str(data)}


@dataclass(frozen=True)
class Cost:
    """What a pretrained backbone costs a lane.

    Attributes:
        native: side in pixels at which it was pretrained.
        forward: seconds per view of one image for stored features, at `native`.
        training: seconds per image of a training step, at `native`.
    """

    native: int
    forward: float
    training: float

    def features(self, images: int, size: int) -> float:
        """Seconds to compute the stored features of `images` images, plain and mirrored."""
        return 2 * images * self.forward * (size / self.native) ** 2

    def epoch(self, images: int, size: int) -> float:
        """Seconds of a training epoch over `images` images."""
        return images * self.training * (size / self.native) ** 2


@dataclass(frozen=True)
class Task:
    """What a search space may look at when it proposes a configuration.

    Attributes:
        backbones: name -> source of its pretrained weights, or None where it starts from random ones.
        classes: number of classes.
        images, train_images: size of all splits together, and of the train split.
        trainings: networks that are trained for one candidate: more than one where few images are cross-fitted.
        imbalance: images of the largest class for one of the smallest, 1 or more.
        stored_size: shorter side in pixels of the stored images.
        device: "cuda" or "cpu".
        left: seconds that a lane has left, None for no limit.
        costs: of the backbones with pretrained weights, as far as they are known.
    """

    backbones: dict[str, WeightSource | None]
    classes: int
    images: int
    train_images: int
    stored_size: int
    device: Literal["cuda", "cpu"]
    left: float | None
    costs: dict[str, Cost]
    trainings: int = 1
    imbalance: float = 1.0
