"""The run directory on disk: a public format that other tools may read and add candidates to.

    runs/<name>/
      run.json                  data set, class names, split fingerprint, ... (needs `classes`, `split_fingerprint`)
      trials/                   the record of every trial of the sweep, see run/records.py
      study.db                  the same for Optuna's tools, and for them alone; unless --storage names another place
      splits.npz                train / tune / select indices, int64
      select_labels.npy         int64 (N,)
      select_units.npy          optional, int64 (N,): images of one group, and twins, have the same number
      candidates/<id>/
        candidate.json          written LAST: a candidate without it does not exist (needs `id`)
        select_probs.npy        float32 (N, C), rows sum to 1, in select_labels order; float16 from HALF_FROM numbers on
        tune_probs.npy          optional, the same for the tune split
        weights.safetensors     absent for a candidate that only brings predictions, and where --keep-weights has
                                deleted them (candidate.json then has `weights_deleted`)
        before.safetensors      optional: the weights that made the predictions, where the others have learned from
                                those images since
      checkpoints/<id>/         latest checkpoint of a trial that has not finished
      ensembles/<name>.json
      report.html, report.json  of the ensemble written last
      tracking/, tensorboard/   of --track: what each experiment tracker has; event files
      .lock, lease.json         held by the one search.run or search.refit that is at work here
      data/<name>-<fingerprint>/  of a run on a cluster or an object store: the prepared data set, see share.py

A run directory may lie on an object store (s3://bucket/run, with s3fs installed).

Opening somebody else's run directory is safe (docs/security.md says what that means). Here that takes: values are
parsed once, into the typed descriptions below; ids and names are checked against one pattern before they become paths;
a path or an address that a file names is never opened; and a directory with links in it is refused.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from upath import UPath

from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.storage import (
    AnyPath,
    Damaged,
    exists,
    is_link,
    is_local,
    list_folder,
    parse,
    reach,
    read_array,
    read_json,
    remove_folder,
    write_array,
    write_bytes,
    write_json,
)

RUNS = "runs"
WEIGHTS, BEFORE = "weights.safetensors", "before.safetensors"
HALF_FROM = 2**21  # probabilities of a split, from which on they are stored as float16
FORMAT = 2  # of run directories that are made now; 1: of before trials/, which can be selected from but not continued
OWN = (  # what commands write into
    "candidates", "checkpoints", "ensembles", "data", "trials", "study.db", ".lock", "tensorboard", "tracking",
)  # fmt: skip
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_DATA_FOLDER = re.compile(r"[a-z0-9_]{1,40}-[0-9a-f]{16}")


# --- what the files say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataInfo:
    """The data set of a run.

    Attributes:
        name: as in --data; fingerprint: 16 hex digits of its content.
        folder: of the prepared data set, in whichever cache it is: "<name>-<fingerprint>".
        size: (height, width) of the stored images.
        stored_size: the shorter side that was asked for; None: the data set's own.
        fit: how images of other proportions were brought to that size; see trainables.data.decode.Canvas.
        white: of 16-bit and float images, see there.
        group_by, twins: which images stay on one side of a split, as trainables.data.prepare takes them.
        mean, std: of the three channels, of pixels in 0..1.
    """

    name: str = "data set"
    fingerprint: str = ""
    folder: str = ""
    size: tuple[int, int] | None = None
    stored_size: int | None = None
    fit: Literal["squash", "crop", "pad"] = "crop"  # as runs did that do not say
    white: float | None = None
    group_by: str | None = None
    twins: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.folder and not _DATA_FOLDER.fullmatch(self.folder):
            raise ValueError(f"data.folder is {self.folder[:60]!r}, expected <name>-<16 hex digits>")
        if self.white is not None and not self.white > 0:
            raise ValueError(f"data.white is {self.white}, expected more than 0")


@dataclass(frozen=True)
class SplitSizes:
    """Images of each split; `shared`: tune and select are the same images.

    Attributes, beside those: together: images that stay on one side, because of `why` (twins, groups by ...); leaks: of
    tune and select's, how many would otherwise have one like them in train.
    """

    train: int = 0
    tune: int = 0
    select: int = 0
    test: int = 0
    shared: bool = False
    why: str = ""
    together: int = 0
    leaks: int = 0


@dataclass(frozen=True)
class RefitOf:
    """The ensemble that a refit has retrained: its run as a text, its name, and when it was made."""

    run: str
    ensemble: str
    created: float = 0.0


@dataclass(frozen=True)
class RunInfo:
    """run.json. Only `classes` and `split_fingerprint` are sure to be there.

    Attributes:
        classes: C names; a label is an index into them.
        split_fingerprint: of the splits; runs with the same one can be merged.
        splits, data: what they are of.
        format: see FORMAT.
        search: the command's options, as JSON (see search/config.py): a record, of which no path is ever opened.
        space, backbones, study: of the sweep; the study's name in its storage.
        command, versions, created: how and when it was made.
        refit_of: of a refit only.
    """

    classes: tuple[str, ...]
    split_fingerprint: str
    splits: SplitSizes = SplitSizes()
    data: DataInfo = DataInfo()
    format: int = 1
    search: dict[str, Any] = field(default_factory=dict)
    space: str = ""
    backbones: tuple[str, ...] = ()
    study: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    created: float | None = None
    refit_of: RefitOf | None = None

    def __post_init__(self) -> None:
        if not self.classes or not all(name.isprintable() for name in self.classes):
            raise ValueError("classes are missing, or one of their names cannot be printed")


@dataclass(frozen=True)
class CandidateInfo:
    """candidate.json. Only `id` is sure to be there; what other tools have added is passed over.

    Attributes:
        id: the folder's name.
        config: hyperparameters; None for a candidate that only brings predictions.
        metrics: `tune_accuracy`, `select_log_loss`, `select_images`, ...: scores and sizes by split.
        curve: one row per epoch, as train() reports it.
        outcome: how its trial ended.
        num_classes, mean, std, image_size, precision: what it takes to predict with the weights.
        params, flops, latency_ms, seconds: what it cost.
        node, device, resumed_after_epochs, finished: where ("cuda" or "cpu") and when it was trained.
        split_fingerprint, tune_and_select_shared: of the splits that it was trained on.
        soup: ids of the candidates whose weights it averages.
        refitted: a probe's head was fitted once more on all labelled images after its predictions were made, or a
            network trained further on them, so the weights are better than its scores, which no image of tune or select
            can check any longer.
        taught_by: name of the ensemble that it learned from beside the labels.
        weights_deleted: they were, to save space.
    """

    id: str
    config: TrialConfig | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()
    outcome: str = "added"
    num_classes: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    image_size: int | None = None
    precision: str = "fp32"
    params: int | None = None
    flops: float | None = None
    latency_ms: float | None = None
    seconds: float | None = None
    node: str = ""
    device: str = ""
    resumed_after_epochs: tuple[float, ...] = ()
    finished: float | None = None
    split_fingerprint: str | None = None
    tune_and_select_shared: bool = False
    soup: tuple[str, ...] = ()
    refitted: bool = False
    taught_by: str = ""
    weights_deleted: bool = False


@dataclass(frozen=True)
class Candidate:
    """One trained model as it lies on disk: its id, its folder, and its candidate.json."""

    id: str
    path: UPath
    info: CandidateInfo

    @property
    def architecture(self) -> str:
        """The backbone's name, or "unknown" for a candidate that only brings predictions."""
        return self.info.config.backbone if self.info.config else "unknown"

    def probs(self, split: str) -> np.ndarray:
        """Stored predictions of a split ("select" or "tune"): float (N, C), memory-mapped when local.

        Raises FileNotFoundError when the candidate has none, Damaged when the file is no plain array.
        """
        return read_array(self.path / f"{split}_probs.npy")

    @property
    def has_weights(self) -> bool:
        return exists(self.path / WEIGHTS)

    @property
    def has_weights_before(self) -> bool:
        """Whether the weights that made the predictions lie beside the better ones that are used."""
        return exists(self.path / BEFORE)


# --- names -----------------------------------------------------------------------------------------------------------


def safe_id(text: object, what: str) -> str:
    """Return a name that may become a part of a path; raises Damaged for one that could lead elsewhere."""
    if not isinstance(text, str) or not ID.fullmatch(text) or ".." in text:
        raise Damaged(f"{what} is {str(text)[:60]!r}, expected letters, digits and . _ + - (at most 128)")
    return text


def trial_id(number: int) -> str:
    """The candidate that a trial of the study becomes: "0007"."""
    return f"{number:04d}"


# --- a run -----------------------------------------------------------------------------------------------------------


def open_run(path: AnyPath | None = None, root: AnyPath = RUNS) -> UPath:
    """Return the run directory `path`, or the newest one under `root` (by the time of its run.json).

    Raises UserError when there is none, or it has links in it.
    """
    if path is not None:
        run = reach(path)
        if not (run / "run.json").exists():
            raise UserError(f"{run} is not a run directory: it has no run.json; make one with python -m search.run")
    else:
        runs = [run for run in UPath(root).glob("*") if (run / "run.json").exists()]
        if not runs:
            raise UserError(
                f"no run directory under {root}/; make one with python -m search.run, or name one with --run"
            )
        run = max(runs, key=lambda run: (run / "run.json").stat().st_mtime)
    refuse_links(run)
    return run


def open_runs(paths: Sequence[AnyPath]) -> list[UPath]:
    """Return these run directories, or the newest one under runs/ when none is named."""
    return [open_run(path) for path in paths] or [open_run()]


def refuse_links(run: UPath) -> None:
    """Raise UserError when something that commands write into is a symbolic link: it may lead anywhere."""
    links = [name for name in OWN if is_link(run / name)]
    if links:
        raise UserError(
            f"{run / links[0]} is a symbolic link, which could lead out of the run directory; put the whole run where "
            "there is room, and name that place with --run"
        )


def lock_run(run: UPath) -> FileLock:
    """Return a lock on a local run that is held until this process ends: two would train the same trials.

    Raises UserError when another process holds it. For a remote run see run/lease.py.
    """
    lock = FileLock(str(run / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another search is at work in {run}; wait for it, or name another run with --run") from None
    return lock


def read_run(run: UPath) -> RunInfo:
    """Return run.json; raises UserError when it is damaged or lacks `classes` or `split_fingerprint`."""
    path = run / "run.json"
    values = read_json(path)
    missing = [key for key in ("classes", "split_fingerprint") if key not in values]
    if missing:
        raise UserError(f"{path} lacks {' and '.join(missing)}; a run directory needs both")
    data = values.get("data")
    if isinstance(data, dict) and "folder" not in data and isinstance(data.get("path"), str):
        data["folder"] = PurePath(data["path"]).name  # older runs named the whole path, which is not theirs to say
    return parse(values, RunInfo, path)


def study_name(run: UPath) -> str:
    """What the run's study is called in its storage: the folder may have been renamed since, or copied."""
    return read_run(run).study or run.absolute().name


def select_labels(run: UPath) -> np.ndarray:
    """Return labels of the select split, int64 (N,)."""
    return read_array(run / "select_labels.npy", "iu", 1)


def select_units(run: UPath) -> np.ndarray | None:
    """Return which images of the select split belong together, integers (N,); None where every one is alone."""
    path = run / "select_units.npy"
    return read_array(path, "iu", 1) if exists(path) else None


def remove_temporaries(run: UPath) -> None:
    """Remove what processes that were killed in the middle of `write_bytes` have left of a run's candidates."""
    if is_local(run):
        for path in [*run.glob(".*.tmp"), *run.glob("candidates/*/.*.tmp")]:
            if not is_link(path.parent):
                path.unlink(missing_ok=True)


# --- candidates ------------------------------------------------------------------------------------------------------


def list_candidates(run: UPath) -> list[Candidate]:
    """Return every finished candidate of a run that can be read, sorted by id."""
    return find_candidates(run)[0]


def find_candidates(run: UPath) -> tuple[list[Candidate], dict[str, str]]:
    """Return every finished candidate of a run, sorted by id; and those that cannot be read, with the reason.

    A folder without candidate.json is no candidate (yet).
    """
    candidates, damaged = [], {}
    for path in list_folder(run / "candidates"):
        try:
            if exists(path / "candidate.json"):
                candidates.append(read_candidate(path))
        except (UserError, OSError) as error:
            damaged[path.name if path.name.isprintable() else ascii(path.name)] = str(error)
    return sorted(candidates, key=lambda candidate: candidate.id), damaged


def read_candidate(path: UPath) -> Candidate:
    """Return the candidate in a folder; raises UserError when it is damaged, or its name or place is not its own."""
    id = safe_id(path.name, "a candidate's id")
    if is_link(path):
        raise Damaged(f"{path} is a symbolic link, which is not followed")
    values = read_json(path / "candidate.json")
    config = parse_config(values.pop("config", None), path / "candidate.json")
    info = parse({**values, "id": id}, CandidateInfo, path / "candidate.json")
    return Candidate(id, path, dataclasses.replace(info, config=config))


def write_candidate(
    run: UPath,
    info: CandidateInfo,
    select_probs: np.ndarray | None,
    tune_probs: np.ndarray | None = None,
    weights: bytes | None = None,
    before: bytes | None = None,
) -> Candidate:
    """Write candidates/<info.id>/: arrays (N, C) and weights (safetensors bytes) first, candidate.json last.

    before: the weights that made the predictions, where they are others.

    Without `select_probs` (a refit, which was trained on the select split, too) it can predict but not be selected.
    Writing the same id again replaces it, so a trial that died between two files is simply written once more.
    """
    path = run / "candidates" / safe_id(info.id, "a candidate's id")
    if is_link(path) or is_link(path.parent):
        raise UserError(f"{path} is a symbolic link, or lies behind one; nothing is written through it")
    if select_probs is not None:
        write_array(path / "select_probs.npy", np.asarray(select_probs, stored_type(np.size(select_probs))))
    if tune_probs is not None:
        write_array(path / "tune_probs.npy", np.asarray(tune_probs, stored_type(np.size(tune_probs))))
    if weights is not None:
        write_bytes(path / WEIGHTS, weights)
    if before is not None:
        write_bytes(path / BEFORE, before)
    write_json(path / "candidate.json", to_json(info))
    return Candidate(info.id, path, info)


def stored_type(numbers: int) -> type[np.floating]:
    """The type in which a number of probabilities is stored: float32 of 1,000 classes would be 20 MB a candidate."""
    return np.float16 if numbers >= HALF_FROM else np.float32


def mark_weights_deleted(candidate: Candidate) -> None:
    """Note in candidate.json that the weights go; what other tools have written there stays."""
    path = candidate.path / "candidate.json"
    write_json(path, {**read_json(path), "weights_deleted": True})


def remove_checkpoint(run: UPath, id: str) -> None:
    """Delete a trial's checkpoint: it has finished, or will not continue."""
    remove_folder(run / "checkpoints" / safe_id(id, "a trial's id"))


def to_json(info: Any) -> dict[str, Any]:
    """Return a description as plain JSON values; what is as by default is left away."""
    values: dict[str, Any] = {}
    for part in dataclasses.fields(info):
        value = getattr(info, part.name)
        default = part.default_factory() if part.default_factory is not dataclasses.MISSING else part.default
        if value != default:
            if isinstance(value, TrialConfig):
                value = value.to_dict()
            elif isinstance(value, DataInfo | SplitSizes | RefitOf):
                value = dataclasses.asdict(value)
            values[part.name] = value
    return values


def parse_config(values: object, where: UPath) -> TrialConfig | None:
    """The hyperparameters in a file; raises UserError for those of another version of Ninefold."""
    if values is None:
        return None
    parse(values, TrialConfig, where)  # of which types they are
    assert isinstance(values, dict)
    return TrialConfig.from_dict(values)
