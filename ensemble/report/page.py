"""report.html: what a report found, laid out for a person. It computes nothing but positions."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from ensemble.pool import Pool
from ensemble.report import diagnosis, figures
from ensemble.report.looks import in_words
from ensemble.report.numbers import Evidence
from ensemble.report.trials import Trial, described, list_trials
from ensemble.show import metric_name, score_rows, show_metric, where
from trainables.page.shell import percent, render

TEMPLATE = Path(__file__).with_name("report.html")
GRID = 100  # predictions shown at random
PAIRS, PER_PAIR = 6, 6  # confused pairs, and images of each
CONFUSED = 20  # classes that a confusion matrix shows at most


def report_page(
    found: dict[str, Any], evidence: Evidence, pool: Pool, trials: list[Trial], study: optuna.Study | None
) -> bytes:
    """The page as UTF-8. found: as of `ensemble.findings.findings`, with the reasons for what is `missing`."""
    members = [member["id"] for member in found["ensemble"]["members"]]
    growth, chosen = found["growth"], found["select"].get("claim", found["select"]["select"])
    told = found.get("test", {}).get("risk", found["select"].get("risk"))
    plots = {
        "growth": figures.growth(growth["singles"], growth["ensembles"], chosen),
        "confusion": _confusion(evidence, pool.classes),
        "calibration": figures.calibration(
            {"ensemble": found["calibration"]["ensemble"], "best single": found["calibration"]["best_single"]}
        ),
        "risk": figures.risk(told["curve"], found["risk"]["sure"], found["risk"]["level"]) if told else None,
        "curves": figures.learning_curves(trials, members) if any(trial.curve for trial in trials) else None,
        "study": figures.of_study(study) if study is not None else {},
    }
    scores = _scores(found)
    return render(
        TEMPLATE,
        found=found,
        scores=scores,
        scale=(min(row["interval"][0] for row in scores), max(row["interval"][1] for row in scores)),
        where=where,
        metric_name=metric_name,
        show_metric=show_metric,
        on=where(evidence.where),
        risk=told,
        look=in_words(evidence.looks) if evidence.looks else "",
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(found["created"])),
        started=_day(found["reproduce"]["started"]),
        plots=plots,
        classes=_classes(found["mistakes"]),
        pairs=_pairs(evidence, pool.classes),
        worst=_worst(found, evidence, pool.classes),
        grid=_grid(evidence, pool.classes),
        outcomes=[(name, described(name), n) for name, n in found["outcomes"].items()],
        trials={trial.id: _trial(trial) for trial in trials} | _foreign(pool),
    )


def _scores(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of scores, `mine` for the ensemble's."""
    rows = []
    if "test" in found:
        names = {"best single model": "best_single", "best single model, calibrated": "best_single_calibrated"}
        for name, key in (names | {"ensemble": "ensemble"}).items():
            if key in found["test"]:
                rows.append({**found["test"][key], "name": name, "mine": key == "ensemble"})
    for name, score in score_rows(found["select"]):
        rows.append({**score, "name": name.replace("single", "single model"), "mine": name.startswith("ensemble")})
    return rows


def _day(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if isinstance(seconds, int | float) else "unknown"


def _confusion(evidence: Evidence, classes: list[str]) -> Any:
    matrix = diagnosis.confusion(evidence.answers, evidence.labels, len(classes))
    shown = diagnosis.confused_classes(matrix, CONFUSED)
    totals = matrix.sum(axis=1)
    return figures.confusion(matrix[np.ix_(shown, shown)], totals[shown], [classes[c] for c in shown])


def _classes(mistakes: dict[str, Any]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and gain over the best single model of every class, the worst F1 first."""
    gains = {row["class"]: row["gain"] for row in mistakes["gains"]}
    rows = [{**row, "gain": gains.get(row["class"])} for row in mistakes["classes"]]
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"] or 0.0))


def _shot(evidence: Evidence, classes: list[str], i: int, by_verdict: bool = True) -> dict[str, Any]:
    """Image i of the split as parts.html shows it: its label, and what the ensemble calls it."""
    assert evidence.images is not None
    probs, label = evidence.ensemble[i], int(evidence.labels[i])
    answer = int(evidence.decision.answers(probs[None])[0])
    right = answer == label
    note = (
        percent(float(probs[answer]), 0) if right else f"called {classes[answer]}, {percent(float(probs[answer]), 0)}"
    )
    return {
        "image": evidence.images[evidence.rows[i]],
        "title": classes[label],
        "note": note,
        "right": right if by_verdict else None,
    }


def _pairs(evidence: Evidence, classes: list[str]) -> list[dict[str, Any]]:
    """The most confused pairs of classes with the images of which the ensemble was most sure."""
    if evidence.images is None:
        return []
    answers = evidence.answers
    pairs = []
    for label, answer, count in diagnosis.confused_pairs(diagnosis.confusion(answers, evidence.labels, len(classes)))[
        :PAIRS
    ]:
        rows = np.flatnonzero((evidence.labels == label) & (answers == answer))
        rows = rows[np.argsort(-evidence.ensemble[rows, answer], kind="stable")][:PER_PAIR]
        shots = []
        for i in rows.tolist():
            shot = _shot(evidence, classes, i, by_verdict=False)
            shots.append(shot | {"title": percent(float(evidence.ensemble[i, answer]), 0), "note": ""})
        pairs.append(
            {"label": classes[label], "answer": classes[answer], "count": count,
             "of": int((evidence.labels == label).sum()), "shots": shots}
        )  # fmt: skip
    return pairs


def _worst(found: dict[str, Any], evidence: Evidence, classes: list[str]) -> list[dict[str, Any]]:
    if evidence.images is None:
        return []
    return [
        _shot(evidence, classes, row["index"], by_verdict=False)
        | {"note": f"called {classes[row['answer']]}, loss {row['loss']:.1f}"}
        for row in found["mistakes"]["worst"]
        if row["label"] != row["answer"]
    ]


def _grid(evidence: Evidence, classes: list[str]) -> list[dict[str, Any]]:
    if evidence.images is None:
        return []
    n = len(evidence.labels)
    rows = np.sort(np.random.default_rng(0).choice(n, min(GRID, n), replace=False))
    return [_shot(evidence, classes, i) for i in rows.tolist()]


def _trial(trial: Trial) -> dict[str, Any]:
    """A trial as page.js shows it: nothing but text."""
    info, scores, cost = trial.info, [], []
    for split in ("tune", "select"):
        if f"{split}_accuracy" in info.metrics:
            size = info.metrics.get(f"{split}_images")
            name = f"{split} accuracy" if size is None else f"{split} accuracy ({int(size):,} images)"
            scores.append([name, percent(info.metrics[f"{split}_accuracy"])])
            scores.append([f"{split} log-loss", f"{info.metrics.get(f'{split}_log_loss', float('nan')):.4f}"])
    for value, name, text in (
        (info.seconds, "training", "{:,.0f} s"),
        (info.params, "parameters", "{:,}"),
        (info.flops and info.flops / 1e6, "operations per image", "{:,.1f} million"),
        (info.latency_ms, "latency", "{:.2f} ms per image"),
    ):
        if value is not None:
            cost.append([name, text.format(value)])
    if trial.candidate is not None:
        cost.append(["precision", info.precision])
    return {
        "title": f"{trial.id} {trial.architecture}",
        "summary": ": ".join(part for part in (trial.outcome, described(trial.outcome)) if part),
        "scores": scores,
        "curve": list(trial.curve),
        "error": "\n\n".join(part for part in (trial.error, trial.traceback) if part),
        "cost": cost,
        "config": [[str(k), str(v)] for k, v in trial.config.items()],
    }


def _foreign(pool: Pool) -> dict[str, Any]:
    """Candidates of other runs than the ensemble's own, under run/id."""
    foreign = [(m, c) for m, c in enumerate(pool.candidates) if pool.run_of(m)]
    return {f"{pool.run_of(m)}/{c.id}": _trial(list_trials((), [c])[0]) for m, c in foreign}
