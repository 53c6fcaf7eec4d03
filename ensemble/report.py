"""python -m ensemble.report : what a sweep found, as a page (report.html) and as numbers (report.json).

The frozen ensemble and the best single model are scored on the test part of the run's data set, where there is one:
nothing else reads the test labels. Whatever else is told of the select split says so.
"""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import optuna
import tyro
from upath import UPath

from ensemble.blend import Blend
from ensemble.ensemble import Ensemble, Member, read_ensemble, run_at
from ensemble.findings import Evidence, findings, section, test_scores
from ensemble.page import report_page
from ensemble.pool import Pool, load_pool
from ensemble.predict import candidate_predictor
from ensemble.select import best_single
from ensemble.trials import list_trials, load_study, read_study
from trainables.candidate import Candidate, open_run, read_run, study_name, write_bytes, write_json
from trainables.data import Data, open_test
from trainables.errors import UserError, exit_on_user_error
from trainables.share import open_shared
from trainables.splits import load_splits

PAGE, NUMBERS = "report.html", "report.json"


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

    Of a refit only report.json: all its labelled images were trained on, so the test part is all there is to tell of.

    study: the run's; by default it is read from study.db. Raises UserError when the ensemble's members are not usable.
    """
    info = read_run(run)
    if "refit_of" in info:
        return _report_refit(run, info, ensemble)
    pool = _pool(run, ensemble)
    blend, single = _blend(run, ensemble, pool)
    missing: dict[str, str] = {}
    data = None
    try:
        data = _data(run, info)
    except UserError as error:
        missing["images"] = str(error)
    evidence = None
    if _has_test(info) and data is not None:
        try:
            evidence = _on_test(run, ensemble, pool.candidates[single], data)
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
    write_json(run / NUMBERS, found)
    return found


def _pool(run: UPath, ensemble: Ensemble) -> Pool:
    """The candidates of the run and of every other run that a member comes from."""
    others = dict.fromkeys(member.run for member in ensemble.members if member.run)
    pool = load_pool([run, *(run_at(run, other) for other in others)])
    if ensemble.split_fingerprint not in ("", pool.split_fingerprint):
        raise UserError(f"ensemble {ensemble.name} was chosen on other splits than {run}'s; select again")
    return pool


def _blend(run: UPath, ensemble: Ensemble, pool: Pool) -> tuple[Blend, int]:
    """The ensemble as a blend of the pool's candidates, and the index of the single model that it is compared with."""
    places = {(str(c.path.parent.parent), c.id): m for m, c in enumerate(pool.candidates)}
    weights, temperatures = np.zeros(len(pool.candidates)), np.ones(len(pool.candidates))
    found = []
    for member in ensemble.members:
        place = places.get((str(run_at(run, member.run) if member.run else run), member.id))
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
    home = str(run_at(run, named["run"]) if named.get("run") else run)
    single = places.get((home, str(named.get("id"))))
    blend = Blend(weights, temperatures, stack, ensemble.temperature)
    return blend, best_single(pool) if single is None else single


def _has_test(info: dict[str, Any]) -> bool:
    return bool(section(info, "splits").get("test"))


def _data(run: UPath, info: dict[str, Any]) -> Data:
    spec = section(info, "data")
    if "path" not in spec:
        raise UserError("run.json does not say where the images lie")
    data = open_shared(run, spec["path"])
    if data.fingerprint != spec.get("fingerprint", data.fingerprint):
        raise UserError(f"{spec['path']} holds other images than this run's; prepare them again")
    return data


def _report_refit(run: UPath, info: dict[str, Any], ensemble: Ensemble) -> dict[str, Any]:
    if not _has_test(info):
        raise UserError(
            f"{run} is a refit and its data set has no test part, so no labelled image is left to report on"
        )
    named = ensemble.scores.get("best_single")  # one written by hand need not say which it was
    single = (Member(str(named["id"]), 1.0) if named else ensemble.members[0]).candidate(run)
    test = test_scores(ensemble, single.id, _on_test(run, ensemble, single, _data(run, info)))
    found = {
        "run": run.name, "created": time.time(), "refit_of": info["refit_of"],
        "test": test if named else {"ensemble": test["ensemble"]},
    }  # fmt: skip
    write_json(run / NUMBERS, found)
    return found


def _on_test(run: UPath, ensemble: Ensemble, alone: Candidate, data: Data) -> Evidence:
    """The frozen ensemble and the best single model on the test part. Raises UserError when one cannot predict."""
    images, labels = open_test(data.path)
    candidates = [member.candidate(run) for member in ensemble.members]
    probs = {}
    for candidate in {str(c.path): c for c in [*candidates, alone]}.values():
        probs[str(candidate.path)] = candidate_predictor(candidate)(images)
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


def summary(found: dict[str, Any]) -> list[str]:
    """The best single model and the ensemble in two lines for a person: on the test part, else on the select split."""
    split, together = ("test", "ensemble") if "test" in found else ("select", "select")
    lines = []
    for name, key in (("best single", "best_single"), ("ensemble", together)):
        if key not in found[split]:  # a refit of an ensemble that does not say which was best
            continue
        score = found[split][key]
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
        study = load_study(args.storage, study_name(run)) if args.storage else None
        found = write_report(run, ensemble, study)
        print("\n".join(summary(found)))
        print(f"written to {run / (NUMBERS if 'refit_of' in found else PAGE)}")


if __name__ == "__main__":
    main()
