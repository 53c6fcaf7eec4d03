"""Run by the Python of the peers' own environment (see peers.py): fits and times their released selectors.

Reads one JSON object from stdin: `probs` and `labels`, paths of .npy files (M, N, C) and (N,), and `jobs`, a list of
{"peer", "score", "steps", "rows"} where rows is the path of a .npy of indices, or null for all. Writes one JSON line a
job: {"seconds", "cpu_seconds", "weights"} or {"error"}. Nothing of Ninefold is imported here.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np


def phem(probs: list[np.ndarray], labels: np.ndarray, score: str, steps: int, processes: int) -> Any:
    """auto-sklearn's greedy ensemble selection as phem releases it."""
    from phem.base_utils.metrics import make_metric
    from phem.methods.ensemble_selection.greedy_ensemble_selection import EnsembleSelection
    from sklearn.metrics import accuracy_score, log_loss

    smooth = score == "log_loss"
    metric = make_metric(
        (lambda y, p: log_loss(y, p, labels=range(probs[0].shape[1]))) if smooth else accuracy_score,
        metric_name=score,
        maximize=not smooth,
        classification=True,
        always_transform_conf_to_pred=not smooth,
        optimum_value=0 if smooth else 1,
        requires_confidences=smooth,
    )
    selection = EnsembleSelection([None] * len(probs), steps, metric, n_jobs=processes, random_state=0)
    return selection.ensemble_fit(probs, labels)


def autogluon(probs: list[np.ndarray], labels: np.ndarray, score: str, steps: int) -> Any:
    """AutoGluon's EnsembleSelection, with the tie breaker that AutoGluon itself uses."""
    from autogluon.core.metrics import accuracy, log_loss
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    metric = log_loss if score == "log_loss" else accuracy
    selection = EnsembleSelection(
        ensemble_size=steps,
        problem_type="multiclass" if probs[0].shape[1] > 2 else "binary",
        metric=metric,
        tie_breaker="second_metric",
    )
    return selection.fit(probs, labels)


PEERS = {
    "phem": lambda probs, labels, score, steps: phem(probs, labels, score, steps, 1),
    "phem, all cores": lambda probs, labels, score, steps: phem(probs, labels, score, steps, -1),
    "autogluon.core": autogluon,
}


def main() -> None:
    task = json.load(sys.stdin)
    probs, labels = np.load(task["probs"], allow_pickle=False), np.load(task["labels"], allow_pickle=False)
    for job in task["jobs"]:
        rows = slice(None) if job["rows"] is None else np.load(job["rows"], allow_pickle=False)
        part = [np.ascontiguousarray(p[rows], np.float64) for p in probs]
        try:
            PEERS[job["peer"]](part[:2], labels[rows], job["score"], 1)  # its imports are not part of the fit
            start, cpu = time.perf_counter(), sum(os.times()[:4])  # its own processes' included
            fitted = PEERS[job["peer"]](part, labels[rows], job["score"], job["steps"])
            seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu
            weights = [float(w) for w in fitted.weights_]
            answer: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "weights": weights}
        except Exception as error:  # a peer that fails is a result, and no reason to lose the others
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
