"""The report on a run: everything gathered, scored on the test part, and written.

The frozen ensemble and the best single model are scored on the test part of the run's data set, where there is one:
nothing else reads the test labels. Whatever else is told of the select split says so.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from upath import UPath

from ensemble.file import Ensemble, run_of
from ensemble.pool import Pool, load_pool
from ensemble.predict import BATCH, Predictor, candidate_predictor, predict_all
from ensemble.report.looks import Look, count_look, in_words
from ensemble.report.numbers import Evidence, findings, test_scores
from ensemble.report.page import report_page
from ensemble.report.study import as_study
from ensemble.report.trials import list_trials
from ensemble.select import best_single
from ensemble.selection.blend import Blend
from ensemble.selection.goal import LOWER_IS_BETTER
from ensemble.show import metric_in_words
from trainables.command import progress
from trainables.data.dataset import Data, open_test
from trainables.data.packed import ImageRows
from trainables.data.share import open_run_data, select_images
from trainables.data.splits import Splits
from trainables.errors import UserError
from trainables.run.records import read_records
from trainables.run_directory import Candidate, RunInfo, read_candidate, read_run
from trainables.storage import Damaged, exists, read_json, write_bytes, write_json

PAGE, NUMBERS = "report.html", "report.json"
PARTS = 16  # of the test part, at least, where other machines predict it
Spread = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""Calls a function as `function(device, *call)` for every call, on other machines; yields the results in order."""


def read_report(run: UPath, ensemble: Ensemble) -> dict[str, Any] | None:
    """What report.json holds, where it is of this very ensemble: a new one would be another look at the test labels."""
    try:
        found = read_json(run / NUMBERS) if exists(run / PAGE) and exists(run / NUMBERS) else {}
        if found["ensemble"]["name"] != ensemble.name or found["ensemble"]["created"] != ensemble.created:
            return None
        summary(found)
    except (Damaged, KeyError, TypeError, ValueError):  # written by another version, or by hand
        return None
    return found


def write_report(runs: Sequence[UPath], ensemble: Ensemble, spread: Spread | None = None) -> dict[str, Any]:
    """Write report.html and report.json, and return what the latter holds: `test` only where there is a test part.

    Of a refit only report.json: all its labelled images were trained on, so the test part is all there is to report on.

    runs: the ensemble's own, then the others that its members come from. spread: has other machines predict the test
    part, from the run directory's networks and the images alone. Raises UserError when the ensemble's members are not
    usable.
    """
    run, info = runs[0], read_run(runs[0])
    if info.refit_of is not None:
        return _report_refit(runs, info, ensemble)
    pool = load_pool(runs)
    if ensemble.split_fingerprint not in ("", pool.split_fingerprint):
        raise UserError(f"ensemble {ensemble.name} was chosen on other splits than {run}'s; select again")
    blend, single = _blend(runs, ensemble, pool)
    missing: dict[str, str] = {}
    data = splits = None
    try:
        data, splits = open_run_data(run, info)
    except UserError as error:
        missing["images"] = str(error)
    evidence = None
    if info.splits.test and data is not None:
        try:
            evidence = _on_test(runs, ensemble, pool.candidates[single], data, spread)
        except UserError as error:
            missing["test"] = str(error)
    elif info.splits.test:
        missing["test"] = missing["images"]
    if evidence is None:
        evidence = replace(_on_select(run, pool, blend, single, data, splits, missing), decision=ensemble.decision)
    records, study = [], None
    try:
        records = read_records(run)
        study = as_study(records, _maximises(info))
    except UserError as error:
        missing["study"] = str(error)
    if not records and not missing.get("study"):
        missing["study"] = f"{run.name} has no records of trials: an earlier version made it, or no sweep"
    trials = list_trials(records, [c for c in pool.candidates if c.path.parent.parent == run])
    found = findings(run, info, ensemble, pool, blend, single, evidence, trials) | {"missing": missing}
    write_bytes(run / PAGE, report_page(found, evidence, pool, trials, study))
    write_json(run / NUMBERS, found)
    return found


def _maximises(info: RunInfo) -> bool:
    """Whether the sweep's objective was to be high: a metric, accuracy unless it says so."""
    metric = str(info.search.get("metric", "accuracy")).partition(":")[0]
    return info.search.get("objective", "metric") in ("metric", "accuracy") and metric not in LOWER_IS_BETTER


def _blend(runs: Sequence[UPath], ensemble: Ensemble, pool: Pool) -> tuple[Blend, int]:
    """The ensemble as a blend of the pool's candidates, and the index of the single model that it is compared with."""
    places = {(str(c.path.parent.parent), c.id): m for m, c in enumerate(pool.candidates)}
    weights, temperatures = np.zeros(len(pool.candidates)), np.ones(len(pool.candidates))
    found = []
    for member in ensemble.members:
        place = places.get((str(run_of(runs, member.run)), member.id))
        if place is None:
            member.candidate(runs)  # says so when it is not there at all
            reason = next(
                (why for id, why in pool.left_out.items() if id.endswith(member.id)), "its predictions are unusable"
            )
            raise UserError(f"member {member.id} of ensemble {ensemble.name} cannot be used: {reason}; select again")
        weights[place], temperatures[place] = member.weight, member.temperature
        found.append(place)
    stack = ensemble.stack
    if stack is not None:  # its members are in the ensemble's order; a blend's are in the pool's
        stack = type(stack)(stack.coefficients[:, np.argsort(found, kind="stable")], stack.intercept)
    named = ensemble.single()
    single = None if named is None else places.get((str(run_of(runs, named.run)), named.id))
    blend = Blend(weights, temperatures, stack, ensemble.temperature)
    return blend, best_single(pool) if single is None else single


def _report_refit(runs: Sequence[UPath], info: RunInfo, ensemble: Ensemble) -> dict[str, Any]:
    run = runs[0]
    if not info.splits.test:
        raise UserError(
            f"{run} is a refit and its data set has no test part, so no labelled image is left to report on"
        )
    named = ensemble.single()  # one written by hand need not say which it was
    single = (named or ensemble.members[0]).candidate(runs)
    evidence = _on_test(runs, ensemble, single, open_run_data(run, info)[0])
    test = test_scores(ensemble, single.id, evidence)
    found = {
        "run": run.name, "created": time.time(), "refit_of": info.refit_of and asdict(info.refit_of),
        "test": test if named else {"ensemble": test["ensemble"]}, "looks": [asdict(look) for look in evidence.looks],
    }  # fmt: skip
    write_json(run / NUMBERS, found)
    return found


def _on_test(
    runs: Sequence[UPath], ensemble: Ensemble, alone: Candidate, data: Data, spread: Spread | None = None
) -> Evidence:
    """The frozen ensemble and the best single model on the test part. Raises UserError when one cannot predict."""
    looks = count_look(runs[0], ensemble.name, ensemble.created)
    images, labels = open_test(data.path)
    candidates = [member.candidate(runs) for member in ensemble.members]
    networks = {str(c.path): c for c in [*candidates, alone]}
    with progress("predicting the test part", len(networks) * len(images)) as advance:
        probs = None if spread is None else _predict_elsewhere(tuple(networks), images, spread, advance)
        if probs is None:
            probs = {p: predict_all(candidate_predictor(c), images, advance) for p, c in networks.items()}
    together = ensemble.predict([probs[str(candidate.path)] for candidate in candidates])
    return Evidence(
        "test",
        False,
        labels,
        together,
        probs[str(alone.path)],
        images,
        np.arange(len(labels)),
        ensemble.decision,
        looks,
    )


def _predict_elsewhere(
    paths: tuple[str, ...], images: ImageRows, spread: Spread, advance: Callable[[int], None]
) -> dict[str, np.ndarray] | None:
    """Each network's probabilities, float32 (N, C), of images (N, H, W, 3) that go to other machines in parts; None
    where these cannot do it."""
    size = max(1, min(BATCH, len(images) // PARTS))
    starts = range(0, len(images), size)
    calls = ((path, np.asarray(images[start : start + size])) for path in paths for start in starts)
    parts: list[np.ndarray] = []
    try:
        for part in spread(predict_part, calls):
            parts.append(part)
            advance(len(part))
    except UserError as error:
        print(f"predicting on this machine: {error}", file=sys.stderr, flush=True)
        return None
    count = len(starts)
    return {path: np.concatenate(parts[n * count : (n + 1) * count]) for n, path in enumerate(paths)}


def predict_part(device: str, path: str, images: np.ndarray) -> np.ndarray:
    """Probabilities, float32 (N, C), of images (N, H, W, 3) by the candidate in this folder."""
    return _network(path, device)(images)


@functools.lru_cache(maxsize=1)
def _network(path: str, device: str) -> Predictor:
    """Loaded once by a process that gets part after part; one at a time, as a trial holds."""
    return candidate_predictor(read_candidate(UPath(path)), device)


def _on_select(
    run: UPath, pool: Pool, blend: Blend, single: int, data: Data | None, splits: Splits | None, missing: dict[str, str]
) -> Evidence:
    """The same from the stored predictions on the select split; notes in `missing` why there are no images."""
    images, rows = None, np.arange(len(pool.labels))
    if data is not None and splits is not None:
        try:
            rows = select_images(run, data, splits, pool.labels)
            images = data.images
        except UserError as error:
            missing["images"] = str(error)
    return Evidence("select", pool.shared, pool.labels, blend(pool.probs), np.asarray(pool.probs[single]), images, rows)


def summary(found: dict[str, Any]) -> list[str]:
    """The best single model and the ensemble in two lines for a person: on the test part, else on the select split."""
    split, together = ("test", "ensemble") if "test" in found else ("select", "claim")
    if together not in found[split]:  # nothing was held out when it was selected
        together = "select"
    lines = []
    for name, key in (("best single", "best_single"), ("ensemble", together)):
        if key not in found[split]:  # a refit of an ensemble that does not say which was best
            continue
        score = found[split][key]
        low, high = score["interval"]
        also = ", also used to tune: optimistic" if score["shared"] else ""
        told = f"{metric_in_words(score['metric'])}, " if "metric" in score else ""
        lines.append(
            f"{name:<12} {score['split']} {told}accuracy {score['accuracy']:.2%} "
            f"({low:.2%} to {high:.2%}, {score['images']} images{also}), log-loss {score['log_loss']:.4f}"
        )
    if len(looks := found.get("looks", [])) > 1:
        lines.append(f"this is {in_words([Look(**look) for look in looks])}")
    return lines
