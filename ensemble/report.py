"""python -m ensemble.report : what a sweep found, as a page (report.html) and as numbers (report.json).

The frozen ensemble and the best single model are scored on the test part of the run's data set, where there is one:
nothing else reads the test labels. Whatever else is told of the select split says so.
"""

import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import optuna
import tyro
from upath import UPath

from ensemble import diagnosis, metrics
from ensemble.blend import Blend
from ensemble.ensemble import Ensemble, read_ensemble
from ensemble.explain import explain
from ensemble.limits import Limits
from ensemble.page import Evidence, report_page
from ensemble.pool import Pool, load_pool
from ensemble.predict import candidate_predictor
from ensemble.select import best_single, describe, score_all
from ensemble.select import where as select_split
from ensemble.trials import LEFT_NOTHING, Trial, list_trials, load_study, read_study
from trainables.candidate import open_run, read_run, write_bytes, write_json
from trainables.data import Data, open_data, open_test
from trainables.errors import UserError, exit_on_user_error
from trainables.splits import load_splits

PAGE = "report.html"
WORST = 24  # images of the highest loss that are named


@dataclass(frozen=True)
class Report:
    """Report on a run and its ensemble: report.html to look at, report.json to read on."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: the newest under runs/."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Optuna storage of the study; default: study.db in the run directory."""


def write_report(run: UPath, ensemble: Ensemble, study: optuna.Study | None = None) -> dict[str, Any]:
    """Write report.html and report.json, and return what the latter holds: `test` only where there is a test part.

    study: the run's; by default it is read from study.db. Raises UserError when the ensemble's members are not usable.
    """
    pool = _pool(run, ensemble)
    info = read_run(run)
    blend, single = _blend(run, ensemble, pool)
    missing: dict[str, str] = {}
    data = None
    try:
        data = _data(info)
    except UserError as error:
        missing["images"] = str(error)
    evidence = None
    if _has_test(info) and data is not None:
        try:
            evidence = _on_test(run, ensemble, pool, single, data)
        except UserError as error:
            missing["test"] = str(error)
    elif _has_test(info):
        missing["test"] = missing["images"]
    if evidence is None:
        evidence = _on_select(run, pool, blend, single, data, missing)
    if study is None:
        try:
            study = read_study(run)
        except UserError as error:
            missing["study"] = str(error)
    trials = list_trials(study, [c for c in pool.candidates if c.path.parent.parent == run])
    found = findings(run, info, ensemble, pool, blend, single, evidence, trials) | {"missing": missing}
    write_bytes(run / PAGE, report_page(found, evidence, pool, trials, study))
    write_json(run / "report.json", found)
    return found


def findings(
    run: UPath, info: dict[str, Any], ensemble: Ensemble, pool: Pool, blend: Blend, single: int, evidence: Evidence,
    trials: list[Trial],
) -> dict[str, Any]:  # fmt: skip
    """All numbers of a report as plain JSON; every score names its split and the number of its images."""
    scores = score_all(pool, blend, single)
    if "cross_validated" in ensemble.scores:
        scores["cross_validated"] = ensemble.scores["cross_validated"]
    matrix = diagnosis.confusion(evidence.ensemble, evidence.labels)
    found: dict[str, Any] = {"run": run.name, "created": time.time()}
    if evidence.split == "test":
        found["test"] = _test_scores(ensemble, pool.candidates[single].id, evidence)
    gains = explain(Blend(np.array([1.0, 0.0])), [evidence.ensemble, evidence.single], evidence.labels, 1, pool.classes)
    return found | {
        "select": scores,
        "data": _section(info, "data"),
        "splits": _section(info, "splits"),
        "classes": pool.classes,
        "ensemble": {"name": ensemble.name, "selector": ensemble.selector, "members": _members(pool, blend, single)},
        "candidates": len(pool.candidates),
        "growth": select_split(pool) | _growth(ensemble, pool, blend),
        "mistakes": evidence.where | {
            "classes": diagnosis.per_class(matrix, pool.classes),
            "gains": gains["classes"],
            "confused": [
                {"label": a, "answer": b, "images": n} for a, b, n in diagnosis.confused_pairs(matrix)
            ],
            "worst": diagnosis.worst(evidence.ensemble, evidence.labels, WORST),
        },
        "calibration": evidence.where | {
            "ensemble": diagnosis.calibration(evidence.ensemble, evidence.labels),
            "best_single": diagnosis.calibration(evidence.single, evidence.labels),
        },
        "outcomes": dict(Counter(trial.outcome for trial in trials)),
        "failures": [
            {"id": trial.id, "outcome": trial.outcome, "architecture": trial.architecture, "error": trial.error,
             "traceback": trial.traceback}
            for trial in trials if trial.outcome in LEFT_NOTHING
        ],
        "left_out": pool.left_out,
        "reproduce": _reproduce(info, ensemble),
    }  # fmt: skip


def _pool(run: UPath, ensemble: Ensemble) -> Pool:
    """The candidates of the run and of every other run that a member comes from."""
    others = dict.fromkeys(member.run for member in ensemble.members if member.run)
    pool = load_pool([run, *(run / other for other in others)])
    if ensemble.split_fingerprint not in ("", pool.split_fingerprint):
        raise UserError(f"ensemble {ensemble.name} was chosen on other splits than {run}'s; select again")
    return pool


def _blend(run: UPath, ensemble: Ensemble, pool: Pool) -> tuple[Blend, int]:
    """The ensemble as a blend of the pool's candidates, and the index of the single model that it is compared with."""
    places = {(str(c.path.parent.parent), c.id): m for m, c in enumerate(pool.candidates)}
    weights, temperatures = np.zeros(len(pool.candidates)), np.ones(len(pool.candidates))
    found = []
    for member in ensemble.members:
        place = places.get((str(run / member.run if member.run else run), member.id))
        if place is None:
            member.candidate(run)  # says so when it is not there at all
            reason = next(
                (why for id, why in pool.left_out.items() if id.endswith(member.id)), "its predictions are unusable"
            )
            raise UserError(f"member {member.id} of ensemble {ensemble.name} cannot be used: {reason}; select again")
        weights[place], temperatures[place] = member.weight, member.temperature
        found.append(place)
    stack = ensemble.stack
    if stack is not None:  # its members are in the ensemble's order; a blend's are in the pool's
        stack = type(stack)(stack.coefficients[:, np.argsort(found, kind="stable")], stack.intercept)
    named = ensemble.scores.get("best_single", {})
    home = str(run / named["run"] if named.get("run") else run)
    single = places.get((home, str(named.get("id"))))
    return Blend(weights, temperatures, stack), best_single(pool) if single is None else single


def _section(info: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of run.json; {} where a hand-written one lacks it."""
    value = info.get(key)
    return value if isinstance(value, dict) else {}


def _has_test(info: dict[str, Any]) -> bool:
    return bool(_section(info, "splits").get("test"))


def _data(info: dict[str, Any]) -> Data:
    spec = _section(info, "data")
    if "path" not in spec:
        raise UserError("run.json does not say where the images lie")
    data = open_data(spec["path"])
    if data.fingerprint != spec.get("fingerprint", data.fingerprint):
        raise UserError(f"{spec['path']} holds other images than this run's; prepare them again")
    return data


def _on_test(run: UPath, ensemble: Ensemble, pool: Pool, single: int, data: Data) -> Evidence:
    """The frozen ensemble and the best single model on the test part. Raises UserError when one cannot predict."""
    images, labels = open_test(data.path)
    candidates = [member.candidate(run) for member in ensemble.members]
    alone = pool.candidates[single]
    probs = {}
    for candidate in {str(c.path): c for c in [*candidates, alone]}.values():
        try:
            probs[str(candidate.path)] = candidate_predictor(candidate)(images)
        except KeyError as error:
            raise UserError(f"candidate {candidate.id} cannot predict: its candidate.json lacks {error}") from None
    together = ensemble.predict([probs[str(candidate.path)] for candidate in candidates])
    return Evidence("test", False, labels, together, probs[str(alone.path)], images, np.arange(len(labels)))


def _on_select(
    run: UPath, pool: Pool, blend: Blend, single: int, data: Data | None, missing: dict[str, str]
) -> Evidence:
    """The same from the stored predictions on the select split; notes in `missing` why there are no images."""
    images, rows = None, np.arange(len(pool.labels))
    if data is not None:
        try:
            rows = load_splits(run).select
            if not np.array_equal(data.labels[rows], pool.labels):
                raise UserError(f"the labels in {data.path} are not those of this run's select split")
            images = data.images
        except (UserError, IndexError) as error:
            missing["images"] = str(error)
    return Evidence("select", pool.shared, pool.labels, blend(pool.probs), np.asarray(pool.probs[single]), images, rows)


def _test_scores(ensemble: Ensemble, single: str, evidence: Evidence) -> dict[str, Any]:
    """`ensemble` and `best_single` with accuracy, 95 % Wilson interval, log-loss, ...; `gain` is their difference."""
    pair = [metrics.correct(p, evidence.labels) for p in (evidence.ensemble, evidence.single)]
    mean, low, high = metrics.paired_bootstrap(*pair)
    return {
        "ensemble": {"name": ensemble.name} | evidence.where | describe(evidence.ensemble, evidence.labels),
        "best_single": {"id": single} | evidence.where | describe(evidence.single, evidence.labels),
        "gain": evidence.where | {"accuracy": mean, "interval": [low, high], "mcnemar_p": metrics.mcnemar(*pair)},
    }


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
            "mends": diagnosis.mended_classes(together, alone, np.asarray(pool.probs[m]), pool.labels, pool.classes),
            "params": pool.candidates[m].info.get("params"),
            "latency_ms": pool.candidates[m].info.get("latency_ms"),
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
    points = diagnosis.growth([pool.probs[m] for m in order.tolist()], pool.labels, limits)
    return {"most_members": limits.k, "singles": singles, "ensembles": points}


def _reproduce(info: dict[str, Any], ensemble: Ensemble) -> dict[str, Any]:
    """What one needs to do the same again."""
    command = str(info.get("command", ""))
    parts = shlex.split(command) if command.count("'") % 2 == 0 else command.split()
    if parts and parts[0].endswith("search/run.py"):
        command = f"python -m search.run {shlex.join(parts[1:])}".strip()
    return {
        "command": re.sub(r"://([^:/@\s]+):[^@\s]+@", r"://\1:***@", command),  # a page is shown around
        "versions": {str(k): str(v) for k, v in _section(info, "versions").items()},
        "space": info.get("space"),
        "split_seed": _section(info, "search").get("split_seed"),
        "split_fingerprint": info["split_fingerprint"],
        "data_fingerprint": _section(info, "data").get("fingerprint"),
        "selector": ensemble.selector,
        "options": ensemble.options,
        "started": info.get("created"),
    }


def summary(found: dict[str, Any]) -> list[str]:
    """The best single model and the ensemble in two lines for a person: on the test part, else on the select split."""
    if "test" in found:
        pairs = (("best single", found["test"]["best_single"]), ("ensemble", found["test"]["ensemble"]))
    else:
        pairs = (("best single", found["select"]["best_single"]), ("ensemble", found["select"]["select"]))
    lines = []
    for name, score in pairs:
        low, high = score["interval"]
        also = ", also used to tune: optimistic" if score["shared"] else ""
        lines.append(
            f"{name:<12} {score['split']} accuracy {score['accuracy']:.2%} "
            f"({low:.2%} to {high:.2%}, {score['images']} images{also}), log-loss {score['log_loss']:.4f}"
        )
    return lines


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Report, description=Report.__doc__, prog="python -m ensemble.report")
        run = open_run(args.run)
        ensemble = read_ensemble(run, args.ensemble)
        study = load_study(args.storage, run.name) if args.storage else None
        found = write_report(run, ensemble, study)
        print("\n".join(summary(found)))
        print(f"written to {run / PAGE}")


if __name__ == "__main__":
    main()
