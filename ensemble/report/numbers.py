"""What a report has to tell, as numbers: report.json."""

import dataclasses
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from upath import UPath

from ensemble.file import Ensemble
from ensemble.pool import Pool
from ensemble.report import diagnosis
from ensemble.report.looks import Look
from ensemble.report.trials import Trial, is_failure
from ensemble.risk import measure
from ensemble.select import cheap_option, describe, score_all
from ensemble.select import where as select_split
from ensemble.selection import metrics
from ensemble.selection.blend import Blend, scale
from ensemble.selection.explain import class_gain, explain
from ensemble.selection.goal import MOST_PROBABLE, Decision
from ensemble.selection.limits import Limits
from trainables.data.packed import ImageRows
from trainables.run_directory import RunInfo, SplitSizes
from trainables.storage import hide_password

HELD_OUT = ("claim", "best_single", "best_single_calibrated", "gain", "risk")  # scores that only selection can measure
WORST = 24  # images of the highest loss that are named


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a report shows predictions of: the frozen ensemble and the best single model on one split.

    Attributes:
        split: "test", or "select" where there is no test part to read.
        shared: the select split was also tuned on.
        labels: int64 (N,).
        ensemble, single: their predictions, float (N, C).
        decision: how probabilities become answers.
        looks: at the test labels so far, this one last.
        images: uint8 (.., H, W, 3), of which `rows` (N,) are the split's; None when they are not on this machine.
    """

    split: str
    shared: bool
    labels: np.ndarray
    ensemble: np.ndarray
    single: np.ndarray
    images: ImageRows | None
    rows: np.ndarray
    decision: Decision = MOST_PROBABLE
    looks: list[Look] = field(default_factory=list)

    @property
    def answers(self) -> np.ndarray:
        """The ensemble's, int64 (N,)."""
        return self.decision.answers(self.ensemble)

    @property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the ensemble and the best single model are, bool (N,) each."""
        return self.answers == self.labels, self.decision.answers(self.single) == self.labels

    @property
    def where(self) -> dict[str, Any]:
        """What every score says about the images that it was measured on."""
        return {"split": self.split, "images": len(self.labels), "shared": self.shared}


def findings(
    run: UPath, info: RunInfo, ensemble: Ensemble, pool: Pool, blend: Blend, single: int, evidence: Evidence,
    trials: list[Trial],
) -> dict[str, Any]:  # fmt: skip
    """All numbers of a report as plain JSON; every score names its split and the number of its images."""
    scores = score_all(pool, blend, single, goal=ensemble.goal)
    if ensemble.claim is not None:  # what was held out when it was selected
        scores |= {key: ensemble.scores[key] for key in HELD_OUT if key in ensemble.scores}
    matrix = diagnosis.confusion(evidence.answers, evidence.labels, len(pool.classes))
    found: dict[str, Any] = {"run": run.name, "created": time.time()}
    if evidence.split == "test":
        found["test"] = test_scores(ensemble, pool.candidates[single].id, evidence)
        found["looks"] = [dataclasses.asdict(look) for look in evidence.looks]
    return found | {
        "select": scores,
        "data": dataclasses.asdict(info.data),
        "splits": dataclasses.asdict(info.splits) | {"leaks_worth": _worth_of_leaks(info.splits, scores)},
        "classes": pool.classes,
        "ensemble": {
            "name": ensemble.name, "selector": ensemble.selector, "metric": ensemble.metric,
            "created": ensemble.created,
            "temperature": ensemble.temperature,
            "device": pool.device, "members": _members(pool, blend, single),
        },
        "candidates": len(pool.candidates),
        "risk": None if ensemble.risk is None else dataclasses.asdict(ensemble.risk),
        "growth": select_split(pool) | _growth(ensemble, pool, blend),
        "mistakes": evidence.where | {
            "classes": diagnosis.per_class(matrix, pool.classes),
            "gains": class_gain(*evidence.right, evidence.labels, pool.classes),
            "confused": [
                {"label": a, "answer": b, "images": n} for a, b, n in diagnosis.confused_pairs(matrix)
            ],
            "worst": diagnosis.worst(evidence.ensemble, evidence.answers, evidence.labels, WORST),
        },
        "calibration": evidence.where | {
            "ensemble": diagnosis.calibration(evidence.ensemble, evidence.labels),
            "best_single": diagnosis.calibration(evidence.single, evidence.labels),
        },
        "outcomes": dict(Counter(trial.outcome for trial in trials)),
        "failures": [
            {"id": trial.id, "outcome": trial.outcome, "architecture": trial.architecture, "error": trial.error,
             "traceback": trial.traceback}
            for trial in trials if is_failure(trial.outcome)
        ],
        "left_out": pool.left_out,
        "reproduce": _reproduce(info, ensemble),
    }  # fmt: skip


def test_scores(ensemble: Ensemble, single: str, evidence: Evidence) -> dict[str, Any]:
    """`ensemble` and `best_single` with accuracy, 95 % Wilson interval, log-loss, ...; `gain` is their difference.

    `best_single_calibrated` is the single model at the temperature that the select split gave it, where that is known.
    """
    right, single_right = evidence.right
    goal, decision, labels = ensemble.goal, ensemble.decision, evidence.labels
    mean, low, high = metrics.paired_bootstrap(right, single_right)
    found = {
        "ensemble": {"name": ensemble.name} | evidence.where | describe(evidence.ensemble, labels, goal, decision),
        "best_single": {"id": single} | evidence.where | describe(evidence.single, labels, goal, decision),
        "gain": evidence.where
        | {"accuracy": mean, "interval": [low, high], "mcnemar_p": metrics.mcnemar(right, single_right)},
    }
    if ensemble.risk is not None:
        found["risk"] = evidence.where | measure(ensemble.risk, evidence.ensemble[None], labels, decision)
    named = ensemble.scores.get("best_single_calibrated", {})
    if named.get("id") == single and isinstance(named.get("temperature"), float):
        heat = {"id": single, "temperature": named["temperature"]}
        calibrated = scale(np.asarray(evidence.single, np.float64), named["temperature"])
        found["best_single_calibrated"] = heat | evidence.where | describe(calibrated, labels, goal, decision)
    return found


def _worth_of_leaks(splits: SplitSizes, scores: dict[str, Any]) -> float | None:
    """By how much the claimed accuracy could have been too high at most, 0 to 1, had twins and groups been torn apart:
    networks would have answered those images from memory, and have got some of the rest of them right anyway."""
    held_out = splits.select if splits.shared else splits.tune + splits.select
    if not splits.leaks or not held_out:
        return None
    wrong = 1 - scores.get("claim", scores["select"])["accuracy"]
    return float(wrong * min(1.0, splits.leaks / held_out))


def _members(pool: Pool, blend: Blend, single: int) -> list[dict[str, Any]]:
    """The members, heaviest first: weight, select scores, and what each is good for there."""
    together, alone = blend(pool.probs), np.asarray(pool.probs[single])
    insight = explain(blend, pool.probs, pool.labels, single, pool.classes)
    order = [int(m) for m in np.argsort(-blend.weights, kind="stable") if blend.weights[m] > 0]
    return [
        {
            "id": pool.candidates[m].id,
            "run": pool.run_of(m),
            "architecture": pool.candidates[m].architecture,
            "weight": float(blend.weights[m]),
            "temperature": 1.0 if blend.temperatures is None else float(blend.temperatures[m]),
            "select": select_split(pool) | describe(np.asarray(pool.probs[m]), pool.labels),
            "without": insight["leave_one_out"][k],
            **insight["repairs"]["by_member"][k],
            "fixed_classes": diagnosis.fixed_classes(
                together, alone, np.asarray(pool.probs[m]), pool.labels, pool.classes
            ),
            "params": pool.candidates[m].info.params,
            "latency_ms": pool.candidates[m].info.latency_ms,
        }
        for k, m in enumerate(order)
    ]  # fmt: skip


def _growth(ensemble: Ensemble, pool: Pool, blend: Blend) -> dict[str, Any]:
    """Every candidate's select accuracy in the order in which they finished, and what could be made of those so far."""
    finished = pool.numbers("finished")
    order = np.arange(len(finished)) if np.isnan(finished).any() else np.argsort(finished, kind="stable")
    top_k = ensemble.options.get("top_k")
    limits = Limits(k=max(len(ensemble.members), top_k if isinstance(top_k, int) else 1))
    singles = []
    for m in order.tolist():
        right, candidate = int(metrics.correct(np.asarray(pool.probs[m]), pool.labels).sum()), pool.candidates[m]
        singles.append(
            {
                "id": candidate.id,
                "run": pool.run_of(m),
                "name": candidate.architecture,
                "weight": float(blend.weights[m]),
                "accuracy": right / len(pool.labels),
                "interval": list(metrics.wilson(right, len(pool.labels))),
            }
        )
    option = cheap_option(ensemble.selector, limits.k, ensemble.insight)
    points = diagnosis.growth([pool.probs[m] for m in order.tolist()], pool.labels, limits, option)
    if points and ensemble.claim is not None:  # the last of them is what was chosen
        points[-1] |= {key: ensemble.claim[key] for key in ("accuracy", "interval", "log_loss")}
        points[-1]["members"] = float(len(ensemble.members))
    return {"most_members": limits.k, "singles": singles, "ensembles": points}


def _reproduce(info: RunInfo, ensemble: Ensemble) -> dict[str, Any]:
    """What one needs to do the same again."""
    parts = shlex.split(info.command) if info.command.count("'") % 2 == 0 else info.command.split()
    command = info.command
    if parts and parts[0].endswith("search/run.py"):
        command = f"python -m search.run {shlex.join(parts[1:])}".strip()
    seed = info.search.get("split_seed")
    return {
        "command": hide_password(command),  # a page is shown around
        "versions": info.versions,
        "space": info.space or None,
        "split_seed": seed if isinstance(seed, int) else None,
        "split_fingerprint": info.split_fingerprint,
        "data_fingerprint": info.data.fingerprint or None,
        "selector": ensemble.selector,
        "options": ensemble.options,
        "started": info.created,
    }
