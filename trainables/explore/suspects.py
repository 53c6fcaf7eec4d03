"""Likely label errors, by cleanlab, from what the candidates of a run predicted for images that they had not learned.

Those are the images of the tune and select splits. A model has seen the labels of the train split and may have learned
the wrong ones among them by heart, so nothing is said about these; another --split-seed puts others to the test.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
from upath import UPath

from trainables.data.dataset import Data
from trainables.data.splits import load_splits
from trainables.errors import UserError
from trainables.run_directory import list_candidates, read_run
from trainables.storage import Damaged

MODELS = 9  # the best candidates, whose predictions are averaged
SHARPNESS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)  # of their weights, which fall with exp(-sharpness x log-loss)


@dataclass(frozen=True, eq=False)
class Suspects:
    """Images by how little their label is believed, the least believed first.

    Attributes:
        rows: int64 (S,), indices into the data's train part.
        quality: float (S,), the probability that the models give to the label, 0 to 1.
        suggested: int64 (S,), the class that they think most likely.
        confidence: float (S,), and how likely.
        checked: images of which there are predictions.
        models: how many candidates predicted.
        estimate: how many of the checked labels are wrong, by cleanlab's estimate.
    """

    rows: np.ndarray
    quality: np.ndarray
    suggested: np.ndarray
    confidence: np.ndarray
    checked: int
    models: int
    estimate: int


def find_suspects(run: UPath, data: Data, most: int = 200) -> Suspects:
    """The images of the tune and select splits of `run` whose labels are least likely, at most so many.

    Those are among the images that the models would have called something else.

    Raises UserError when cleanlab is not installed, or no candidate has predictions of these images.
    Source: Northcutt et al. 2021, "Confident Learning"; the ranking is cleanlab's self-confidence.
    """
    try:
        from cleanlab.count import num_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise UserError("label errors are found by cleanlab; install it: pip install 'ninefold[explore]'") from None
    rows, predictions = _predictions(run)
    labels = data.labels[rows]
    probs, models = _average(predictions, labels)
    try:
        quality = get_label_quality_scores(labels, probs, method="self_confidence")
        with redirect_stdout(io.StringIO()):  # it prints where it is unsure
            estimate = int(num_label_issues(labels, probs))
    except ValueError as error:  # such as labels of a single class
        raise UserError(f"cleanlab cannot judge the labels of {run} ({error})") from None
    answers = probs.argmax(axis=1)
    worst = np.argsort(quality, kind="stable")
    worst = worst[answers[worst] != labels[worst]][:most]
    return Suspects(rows[worst], quality[worst], answers[worst], probs.max(axis=1)[worst], len(rows), models, estimate)


def _predictions(run: UPath) -> tuple[np.ndarray, list[np.ndarray]]:
    """The rows of the tune and select splits, and what each candidate that predicted both of them says, (N, C)."""
    splits = load_splits(run)
    parts = {"select": splits.select} if splits.shared else {"tune": splits.tune, "select": splits.select}
    usable, classes = [], len(read_run(run).classes)
    for candidate in list_candidates(run):
        if candidate.info.split_fingerprint not in (None, splits.fingerprint):  # it predicted other images
            continue
        try:
            own = [np.asarray(candidate.probs(split), np.float64) for split in parts]
        except (OSError, Damaged):  # a candidate that only brings predictions of the select split
            continue
        if all(_are_probabilities(probs, len(rows), classes) for probs, rows in zip(own, parts.values(), strict=True)):
            usable.append(np.concatenate(own))
    if not usable:
        raise UserError(f"no candidate of {run} has predictions of its tune and select splits; label errors need some")
    return np.concatenate(list(parts.values())), usable


def _are_probabilities(probs: np.ndarray, rows: int, classes: int) -> bool:
    if probs.shape != (rows, classes) or not np.isfinite(probs).all():
        return False
    return bool((probs >= 0).all() and np.allclose(probs.sum(axis=1), 1, atol=1e-2))


def _average(predictions: Sequence[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, int]:
    """The average of the best models, weighted as suits the log-loss best; and how many they are.

    A poor model is unsure of everything and buries the errors that good ones see, so its weight falls with its loss.
    """
    losses = np.array([_log_loss(probs, labels) for probs in predictions])
    best = np.argsort(losses, kind="stable")[:MODELS]
    averages = []
    for sharpness in SHARPNESS:
        weights = np.exp(-sharpness * (losses[best] - losses[best[0]]))
        average = sum(w * predictions[m] for w, m in zip(weights / weights.sum(), best.tolist(), strict=True))
        averages.append(average / average.sum(axis=1, keepdims=True))
    return min(averages, key=lambda average: _log_loss(average, labels)), len(best)


def _log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-7)).mean())
