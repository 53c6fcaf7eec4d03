"""What each member of an ensemble is good for, from its predictions on the select split. Pure functions."""

from dataclasses import replace
from typing import Any

import numpy as np

from ensemble.selection.blend import Blend, Probs
from ensemble.selection.metrics import accuracy, correct, log_loss


def explain(blend: Blend, probs: Probs, labels: np.ndarray, single: int, classes: list[str]) -> dict[str, Any]:
    """All of this room in one JSON object; see the functions for what the numbers are.

    blend, probs, labels: M candidates, of which those of positive weight are members; single: index of the best single
    candidate; classes: C names. Members are listed heaviest first, as in the ensemble's file.
    """
    members = [int(m) for m in np.argsort(-blend.weights, kind="stable") if blend.weights[m] > 0]
    small = blend.only(np.array(members))
    parts = [probs[m] for m in members]
    together, alone = small(parts), np.asarray(probs[single])
    return {
        "leave_one_out": leave_one_out(small, parts, labels),
        "disagreement": disagreement(parts).tolist(),
        "repairs": repairs(together, alone, parts, labels),
        "classes": class_gain(correct(together, labels), correct(alone, labels), labels, classes),
    }


def leave_one_out(blend: Blend, probs: Probs, labels: np.ndarray) -> list[dict[str, float | None]]:
    """What the ensemble loses without each of its K members, the others' weights scaled to sum 1.

    Positive: the member helps. `accuracy` in fractions, `log_loss` in nats. A stacked layer is not fitted again: the
    member then gives every class the same probability, which is what it knows when it is silent. A lone member has no
    "without it": None.
    """
    if len(probs) == 1:
        return [{"accuracy": None, "log_loss": None}]
    whole = blend(probs)
    base = accuracy(whole, labels), log_loss(whole, labels)
    values: list[dict[str, float | None]] = []
    for k in range(len(probs)):
        if blend.stack is not None:
            without = blend([np.full_like(whole, 1 / whole.shape[1]) if j == k else p for j, p in enumerate(probs)])
        else:
            weights = np.where(np.arange(len(probs)) == k, 0.0, blend.weights)
            without = replace(blend, weights=weights / weights.sum())(probs)
        values.append(
            {"accuracy": base[0] - accuracy(without, labels), "log_loss": log_loss(without, labels) - base[1]}
        )
    return values


def disagreement(probs: Probs) -> np.ndarray:
    """Fraction of rows on which two models' answers differ, float64 (K, K): symmetric, 0 on the diagonal."""
    answers = np.stack([np.argmax(p, axis=1) for p in probs])
    return (answers[:, None, :] != answers[None, :, :]).mean(axis=2) if len(answers) < 50 else _pairwise(answers)


def _pairwise(answers: np.ndarray) -> np.ndarray:
    return np.stack([(answers != one).mean(axis=1) for one in answers])


def repairs(together: np.ndarray, alone: np.ndarray, probs: Probs, labels: np.ndarray) -> dict[str, Any]:
    """Which errors of the best single model the ensemble fixes, which it adds, and who is right on those.

    together, alone: the ensemble's and the best single model's predictions (N, C). `fixed` and `broken` count rows;
    `by_member[k]` says on how many of them the k-th member is right.
    """
    right, single_right = correct(together, labels), correct(alone, labels)
    fixed, broken = right & ~single_right, single_right & ~right
    by_member = []
    for p in probs:
        own = correct(np.asarray(p), labels)
        by_member.append({"fixed": int((own & fixed).sum()), "broken": int((own & broken).sum())})
    return {"fixed": int(fixed.sum()), "broken": int(broken.sum()), "by_member": by_member}


def class_gain(
    right: np.ndarray, single_right: np.ndarray, labels: np.ndarray, classes: list[str]
) -> list[dict[str, str | int | float]]:
    """For each class of which there are rows: their number, the share of them that is right, and by how much more.

    right, single_right: which rows are, bool (N,), by the ensemble and by what it is compared with.
    """
    gains: list[dict[str, str | int | float]] = []
    for c, name in enumerate(classes):
        rows = labels == c
        if rows.any():
            recall = float(right[rows].mean())
            gain = recall - float(single_right[rows].mean())
            gains.append({"class": name, "images": int(rows.sum()), "recall": recall, "gain": gain})
    return gains
