"""The Optuna study of a sweep: opened by its storage, with samplers and pruners by name."""

import contextlib
import hashlib
import sqlite3
import tempfile
import warnings
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from upath import UPath

from search.config import Objective, Pruner, Sampler
from search.study.storage import OneWriter
from trainables.data.dataset import default_cache
from trainables.errors import UserError
from trainables.storage import exists, hide_password, is_local, read_bytes, write_bytes

SQLITE = "sqlite:///"  # and then a file's path


def open_study(
    storage: str | None, name: str, objective: Objective, sampler: Sampler, pruner: Pruner, seed: int
) -> optuna.Study:
    """Create the study or load it; `storage` None keeps it in memory alone.

    Raises UserError when the storage cannot be opened or has another objective.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="The reported value is ignored")  # see search/sweep.py
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    direction = maximize if objective == "accuracy" else minimize
    try:
        study = optuna.create_study(
            storage=storage and _open_storage(storage), study_name=name, direction=direction, load_if_exists=True,
            sampler=_sampler(sampler, seed), pruner=_pruner(pruner),
        )  # fmt: skip
    except Exception as error:  # SQLAlchemy's many, and a driver that is not installed
        reason = hide_password(str(error).splitlines()[0])
        raise UserError(
            f"the study cannot be opened in {hide_password(storage or '')}: {reason}; check --storage"
        ) from None
    # several processes may have asked since: a seed alone would make each of them propose the same again
    if study.get_trials(deepcopy=False):
        study.sampler.reseed_rng()
    kept = study.user_attrs.get("objective", objective)
    if kept != objective:
        raise UserError(f"this run's objective is {kept}, not {objective}; use --objective {kept} or another --run")
    study.set_user_attr("objective", objective)
    return study


def _open_storage(storage: str) -> OneWriter:
    _create_file(storage)
    # a database server may have closed an idle connection since: ask before use
    return OneWriter(RDBStorage(storage, engine_kwargs={} if storage.startswith(SQLITE) else {"pool_pre_ping": True}))


def fetch_study(run: UPath) -> Path:
    """Where the study of a run lies on this machine: study.db itself, or for a remote run a copy in the cache."""
    if is_local(run):
        return Path(str(run)) / "study.db"
    copy = default_cache() / "studies" / f"{hashlib.sha256(str(run).encode()).hexdigest()[:20]}.db"
    copy.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("", "-journal", "-wal", "-shm"):  # SQLite would roll a journal of the old copy into the new one
        copy.with_name(copy.name + ending).unlink(missing_ok=True)
    if exists(run / "study.db"):
        write_bytes(UPath(copy), read_bytes(run / "study.db"))
    return copy


def store_study(run: UPath, copy: Path) -> None:
    """Write the copy that `fetch_study` made back to the remote run; whole, whatever is being written to it."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / "study.db"
        source, target = sqlite3.connect(copy), sqlite3.connect(snapshot)
        with contextlib.closing(source), contextlib.closing(target):
            source.backup(target)
        write_bytes(run / "study.db", snapshot.read_bytes())


def _create_file(storage: str) -> None:
    """Make the tables of a new SQLite file aside, and rename it.

    A kill between a table and its index would leave a file without the index that keeps study names unique: the next
    process adds the study, and the one after that adds it again, after which nobody can open it.
    """
    if not storage.startswith(SQLITE) or Path(storage.removeprefix(SQLITE)).exists():
        return
    path = Path(storage.removeprefix(SQLITE))
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    made = RDBStorage(f"{SQLITE}{new}")
    made.engine.dispose()
    new.replace(path)


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    samplers = optuna.samplers
    if name == "tpe":  # constant liar: parallel trials do not all ask for the same point
        return samplers.TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=10, seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed)
    if name == "qmc":
        return samplers.QMCSampler(seed=seed, warn_independent_sampling=False)
    return samplers.RandomSampler(seed=seed)


def _pruner(name: Pruner) -> optuna.pruners.BasePruner:
    pruners = optuna.pruners
    if name == "asha":
        # Rungs at 3, 6, 12, ... epochs, the better half goes on. The textbook's factor of 3 from the first epoch on
        # leaves hardly any candidate to choose an ensemble from.
        return pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=2)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    # "promote" is the sweep's own matter, see promotion.py
    return pruners.WilcoxonPruner() if name == "wilcoxon" else pruners.NopPruner()
