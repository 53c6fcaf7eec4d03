"""Every usable candidate of one or several runs, with its predictions on their common select split.

Usable is checked, never assumed: predictions that are missing, truncated, of the wrong shape, not finite, not
normalised, duplicated or made on other splits are named with the reason and left out: one spoils every average.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from upath import UPath

from ensemble.file import relative_run
from ensemble.selection.blend import chunks
from ensemble.selection.goal import Goal
from ensemble.selection.limits import Limits
from trainables.data.splits import FOLDS
from trainables.errors import UserError
from trainables.run.latencies import Latencies, read_latencies
from trainables.run_directory import Candidate, RunInfo, find_candidates, read_run, select_labels, select_units
from trainables.storage import Damaged

TOLERANCE = 1e-3
"""How far from 1 a row may sum, and below 0 a probability may lie: what half precision and rounded text files leave."""


@dataclass(frozen=True)
class Pool:
    """What a selector chooses from; M candidates, N images, C classes.

    Attributes:
        candidates: M usable ones, in the order of the runs and then of their ids.
        probs: M arrays (N, C), memory-mapped where that is possible.
        labels: int64 (N,).
        classes: C names.
        split_fingerprint: of the splits that all of them were made on.
        shared: the select split is also the one that the search optimised, so scores on it are optimistic.
        runs: where they come from; the first is the one that an ensemble is written to.
        left_out: reason by candidate id (by run/id from the second run on).
        learned_from: share of its images that each network which made the predictions had of those that the one in the
            candidate has; below 1 where candidates are cross-fitted.
        units: int64 (N,), the same for images of one group and for twins; None where every image is alone.
        device: on which the candidates' latencies were measured together; "" where each has its own trial's figure.
    """

    candidates: list[Candidate]
    probs: list[np.ndarray]
    labels: np.ndarray
    classes: list[str]
    split_fingerprint: str
    shared: bool
    runs: list[UPath]
    left_out: dict[str, str] = field(default_factory=dict)
    device: str = ""
    learned_from: float = 1.0
    units: np.ndarray | None = None

    def run_of(self, m: int) -> str:
        """What Member.run says about where candidate m lies: "" for the first run."""
        return relative_run(self.candidates[m].path.parent.parent, self.runs[0])

    def best_on_tune(self, goal: Goal | None = None) -> int | None:
        """The candidate that is best on the tune split, the lower log-loss there breaking ties.

        None where tune and select are the same images, a candidate does not say how it did there, or the goal is
        neither accuracy nor log-loss. Named so, the candidate was not chosen for its luck on the rows that it is scored
        on.
        """
        metrics, goal = [candidate.info.metrics for candidate in self.candidates], goal or Goal()
        if self.shared or not goal.is_scored or not all("tune_accuracy" in m for m in metrics):
            return None
        keys = [(-m["tune_accuracy"], m.get("tune_log_loss", np.inf)) for m in metrics]
        if goal.name == "log_loss":
            keys = [(loss, right) for right, loss in keys]
        return min(range(len(keys)), key=keys.__getitem__)

    def numbers(self, key: str) -> np.ndarray:
        """A number of every candidate's candidate.json, such as "latency_ms", float64 (M,); NaN where it has none."""
        return np.array([_number(getattr(candidate.info, key)) for candidate in self.candidates])


def load_pool(runs: Sequence[UPath], exclude: Collection[str] = ()) -> Pool:
    """Open every candidate of `runs` and keep the usable ones, but for those of the ids to `exclude`.

    Raises UserError when the runs are on different splits or classes, when an id to exclude is nobody's, or when
    nothing usable is left.
    """
    first = read_run(runs[0])
    classes, fingerprint = list(first.classes), first.split_fingerprint
    for run in runs[1:]:
        other = read_run(run)
        if other.split_fingerprint != fingerprint:
            raise UserError(
                f"{run} and {runs[0]} are on different splits (fingerprints {other.split_fingerprint} and "
                f"{fingerprint}); only runs on the same data and split seed can be merged"
            )
        if list(other.classes) != classes:
            raise UserError(f"{run} and {runs[0]} have different classes; only runs on the same data can be merged")
    labels = _labels(runs[0], len(classes))
    usable: list[Candidate] = []
    probs: list[np.ndarray] = []
    left_out: dict[str, str] = {}
    seen: dict[bytes, list[int]] = {}
    found: list[tuple[str, Candidate]] = []  # under the names that the first run has for them
    measured = [read_latencies(run) for run in runs]
    for run, latencies in zip(runs, measured, strict=True):
        candidates, damaged = find_candidates(run)
        candidates = [_timed(candidate, latencies) for candidate in candidates]
        prefix = "" if run is runs[0] else f"{run.name}/"
        found += [(f"{prefix}{candidate.id}", candidate) for candidate in candidates]
        left_out |= {f"{prefix}{id}": reason for id, reason in damaged.items()}
    total = len(found) + len(left_out)
    for id in exclude:
        if id not in left_out and id not in (name for name, _ in found):
            near = difflib.get_close_matches(id, [name for name, _ in found], 1, 0)
            raise UserError(f"--exclude {id} is no candidate of {runs[0]}; did you mean {near[0] if near else '?'}?")
        left_out[id] = "excluded, as asked"
    for name, candidate in found:
        if name in exclude:
            continue
        try:
            array = candidate.probs("select")
            _check(array, candidate, labels, len(classes), fingerprint)
            # float32 as the format says, else converted; the same mapped memory, but no np.memmap to slow each slice
            array = np.asarray(array, np.float32)
            if candidate.info.weights_deleted:
                raise _BadError("its weights were deleted (--keep-weights), so it cannot predict new images")
        except (OSError, Damaged, _BadError) as error:
            left_out[name] = str(error) if isinstance(error, _BadError) else f"cannot be read ({error})"
            continue
        key = array[np.arange(len(labels)), labels].tobytes()
        twin = next((i for i in seen.get(key, []) if np.array_equal(probs[i], array)), None)
        if twin is not None:
            left_out[name] = f"predicts exactly what {usable[twin].id} predicts"
            continue
        seen.setdefault(key, []).append(len(usable))
        usable.append(candidate)
        probs.append(array)
    if not total:
        raise UserError(f"{runs[0]} has no candidates yet; wait for the first trial to finish, or run the search")
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"{runs[0]} has {total} candidates and none is usable ({reasons})")
    return Pool(
        usable,
        probs,
        labels,
        classes,
        fingerprint,
        first.splits.shared,
        list(runs),
        left_out,
        measured[0].device,
        learned_from(first, usable),
        _units(runs[0], len(labels)),
    )


def learned_from(info: RunInfo, candidates: Sequence[Candidate]) -> float:
    """Of a run, see Pool. Cross-fitted candidates are of a run whose every image is in all splits; others may have
    learned from the held-out images once they were predicted."""
    sizes = info.splits
    if sizes.shared and sizes.select > 0 and sizes.train == sizes.select:
        return 1 - 1 / FOLDS
    if sizes.train > 0 and any(candidate.info.refitted for candidate in candidates):
        return sizes.train / (sizes.train + sizes.select + (0 if sizes.shared else sizes.tune))
    return 1.0


def _timed(candidate: Candidate, latencies: Latencies) -> Candidate:
    """The candidate with the latency that was measured together with the others', where there is one."""
    found = latencies.candidates.get(candidate.id)
    return candidate if found is None else replace(candidate, info=replace(candidate.info, latency_ms=found.ms))


def limits_for(
    pool: Pool,
    k: int,
    min_per_architecture: int = 0,
    max_latency_ms: float | None = None,
    max_params: float | None = None,
    max_flops: float | None = None,
) -> Limits:
    """These demands as Limits for a pool; a candidate of unknown latency or size never fits a budget on it."""
    asked = [("latency_ms", max_latency_ms), ("params", max_params), ("flops", max_flops)]
    budgets = [(key, budget) for key, budget in asked if budget is not None]
    costs = [pool.numbers(key) for key, _ in budgets]
    groups = np.unique([c.architecture for c in pool.candidates], return_inverse=True)[1]
    return Limits(
        k=k,
        costs=np.array(costs) if budgets else None,
        budgets=np.array([budget for _, budget in budgets], float) if budgets else None,
        groups=groups,
        min_per_group=min_per_architecture,
    )


class _BadError(ValueError):
    """Predictions that can be read but not used."""


def _labels(run: UPath, classes: int) -> np.ndarray:
    try:
        labels = np.asarray(select_labels(run))
    except (OSError, Damaged) as error:
        raise UserError(f"{run / 'select_labels.npy'} cannot be read ({error}); selection needs the labels") from None
    if not len(labels):
        raise UserError(f"{run / 'select_labels.npy'} is empty; selection needs the labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{run / 'select_labels.npy'} holds labels {labels.min()} to {labels.max()}, "
            f"run.json names {classes} classes"
        )
    return labels.astype(np.int64)


def _units(run: UPath, images: int) -> np.ndarray | None:
    path = run / "select_units.npy"
    try:
        units = select_units(run)
    except (OSError, Damaged) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to count every image as one of its own") from None
    if units is not None and len(units) != images:
        raise UserError(f"{path} is for {len(units)} images and not {images}; remove it to count every image alone")
    return None if units is None else units.astype(np.int64)


def _check(array: np.ndarray, candidate: Candidate, labels: np.ndarray, classes: int, fingerprint: str) -> None:
    """Raise _BadError with what is wrong with these predictions."""
    own = candidate.info.split_fingerprint
    if own is not None and own != fingerprint:
        raise _BadError(f"made on other splits (fingerprint {own}, the run's is {fingerprint})")
    if array.shape[0] != len(labels):
        raise _BadError(f"has {array.shape[0]} rows, the select split {len(labels)}")
    if array.shape[1] != classes:
        raise _BadError(f"has {array.shape[1]} classes, the run {classes}")
    ones = np.ones(classes, np.float32)
    for rows in chunks(len(array)):
        sums = array[rows].astype(np.float32, copy=False) @ ones
        if not np.isfinite(sums).all():
            raise _BadError(f"{int((~np.isfinite(sums)).sum())} rows from {rows.start} on hold NaN or infinity")
        worst = rows.start + int(np.abs(sums - 1).argmax())
        if abs(sums[worst - rows.start] - 1) > TOLERANCE:
            raise _BadError(f"row {worst} sums to {sums[worst - rows.start]:.4g}, expected probabilities that sum to 1")
        if array[rows].min() < -TOLERANCE:
            raise _BadError(f"holds negative values ({array[rows].min():.4g}), expected probabilities")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else np.nan
