"""python -m ensemble.report : the frozen ensemble and the best single member on the test part, as report.json.

This is the only reader of the test labels.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from upath import UPath

from ensemble import metrics
from ensemble.ensemble import Ensemble, Member, read_ensemble
from ensemble.predict import candidate_predictor
from trainables.candidate import open_run, read_run, write_json
from trainables.data import open_test
from trainables.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Report:
    """Score the frozen ensemble and the best single model on the test part of the run's data set."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: the newest under runs/."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""


def test_scores(run: UPath, ensemble: Ensemble) -> dict[str, Any] | None:
    """Accuracy with its 95 % Wilson interval, log-loss and size on the test part; None when there is no test part.

    "ensemble" is the ensemble as written; "best_single" the candidate that was best on the *select* split.
    """
    info = read_run(run)
    if not info.get("splits", {}).get("test"):
        return None
    images, labels = open_test(info["data"]["path"])
    if "best_single" not in ensemble.scores:
        raise UserError(f"ensemble {ensemble.name} does not say which model was best alone; select again")
    single = ensemble.scores["best_single"]
    probs = {member: candidate_predictor(member.candidate(run))(images) for member in ensemble.members}
    alone = Member(str(single["id"]), 1.0, single.get("run", ""))
    alone = next((member for member in ensemble.members if (member.id, member.run) == (alone.id, alone.run)), alone)
    if alone not in probs:
        probs[alone] = candidate_predictor(alone.candidate(run))(images)
    together = ensemble.predict([probs[member] for member in ensemble.members])
    return {
        "ensemble": {"name": ensemble.name, **_score(together, labels)},
        "best_single": {"id": alone.id, **_score(probs[alone], labels)},
    }


def _score(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    right = int(metrics.correct(probs, labels).sum())
    return {
        "accuracy": right / len(labels),
        "interval": list(metrics.wilson(right, len(labels))),
        "log_loss": metrics.log_loss(probs, labels),
        "images": len(labels),
    }


def write_report(run: UPath, ensemble: Ensemble) -> dict[str, Any] | None:
    """Write report.json and return its test scores; None, and nothing written, when there is no test part."""
    scores = test_scores(run, ensemble)
    if scores is not None:
        write_json(run / "report.json", {"test": scores, "select": ensemble.scores})
    return scores


def describe_test(scores: dict[str, Any]) -> list[str]:
    """The test scores in two lines for a person."""
    lines = []
    for label, key in (("best single", "best_single"), ("ensemble", "ensemble")):
        score = scores[key]
        low, high = score["interval"]
        lines.append(
            f"{label:<12} test accuracy {score['accuracy']:.2%} "
            f"({low:.2%} to {high:.2%}, {score['images']} images), log-loss {score['log_loss']:.4f}"
        )
    return lines


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Report, description=Report.__doc__, prog="python -m ensemble.report")
        run = open_run(args.run)
        scores = write_report(run, read_ensemble(run, args.ensemble))
        if scores is None:
            raise UserError(f"the data set of {run} has no test part, so there is nothing to report on")
        print("\n".join(describe_test(scores)))


if __name__ == "__main__":
    main()
