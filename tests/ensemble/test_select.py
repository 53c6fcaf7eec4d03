"""The command, on run directories written by hand: good ones, damaged ones, several at once."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble import select
from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.pool import load_pool
from ensemble.select import Select, choose
from ensemble.selection.blend import Blend, Stack
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.show import auto_in_words
from tests.ensemble.test_selection import make_pool
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.run_directory import HALF_FROM, CandidateInfo, write_candidate
from trainables.storage import write_array, write_json

ROOT = Path(__file__).parents[2]


def make_run(path, models=8, rows=300, classes=4, seed=0, fingerprint="f00d", prefix="c", **info):
    """A run directory as a person would write one; returns its path, the probabilities and the labels."""
    probs, labels = make_pool(models, rows, classes, seed)
    run = UPath(path)
    write_json(run / "run.json", {"classes": list("abcdefgh"[:classes]), "split_fingerprint": fingerprint} | info)
    write_array(run / "select_labels.npy", labels.astype(np.int64))
    for m, p in enumerate(probs):
        config = TrialConfig(backbone=f"net{m % 3}")
        write_candidate(run, CandidateInfo(f"{prefix}{m}", config, latency_ms=1.0 + m, params=1000 * m), p)
    return run, probs, labels


def run_command(*arguments, cwd):
    command = [sys.executable, "-m", "ensemble.select", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_command_writes_what_it_prints_and_needs_neither_torch_nor_ray(tmp_path):
    run, probs, labels = make_run(tmp_path / "runs" / "hand")
    code = (
        "import sys; from ensemble.select import main; sys.argv = ['select', '--top-k', '3']; main(); "
        "heavy = {'torch', 'ray', 'pandas', 'optuna', 'sklearn', 'plotly'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ensemble = read_ensemble(run)
    assert 1 <= len(ensemble.members) <= 3
    index = [int(member.id[1:]) for member in ensemble.members]
    weights, temperatures = np.zeros(len(probs)), np.ones(len(probs))
    weights[index] = ensemble.weights
    temperatures[index] = [member.temperature for member in ensemble.members]
    average = ensemble.predict([probs[m] for m in index])
    stack = ensemble.stack
    if stack is not None:  # its members are in the ensemble's order; a blend's are in the pool's
        stack = Stack(stack.coefficients[:, np.argsort(index)], stack.intercept)
    blend = Blend(weights, temperatures, stack, ensemble.temperature)
    assert np.allclose(average, blend(probs), atol=1e-6)
    scores = ensemble.scores["select"]
    assert scores["accuracy"] == pytest.approx(accuracy(average, labels))
    assert scores["log_loss"] == pytest.approx(log_loss(average, labels))
    low, high = scores["interval"]
    assert low < scores["accuracy"] < high
    assert scores["split"] == "select"
    assert scores["images"] == 300
    assert scores["shared"] is False
    assert f"{scores['accuracy']:.2%}" in done.stdout
    assert all(member.id in done.stdout for member in ensemble.members)
    best = max(range(len(probs)), key=lambda m: (accuracy(probs[m], labels), -log_loss(probs[m], labels)))
    assert ensemble.scores["best_single"]["id"] == f"c{best}"
    assert ensemble.split_fingerprint == "f00d"
    assert "select split (300 images)" in done.stdout


@pytest.mark.parametrize("selector", sorted(select.SELECTORS))
def test_every_selector_answers(selector, tmp_path):
    run, *_ = make_run(tmp_path / "run")
    ensemble = choose(Select(run=(str(run),), selector=selector, top_k=4))
    assert (ensemble.selector, ensemble.name) == (selector, f"{selector}-top4")
    assert 1 <= len(ensemble.members) <= 4
    json.dumps(ensemble.to_dict(), allow_nan=False)


def test_a_shared_split_is_said_wherever_a_score_is(tmp_path):
    run, *_ = make_run(tmp_path / "run", splits={"train": 1, "tune": 300, "select": 300, "test": 0, "shared": True})
    done = run_command("--run", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "also used to tune" in done.stdout
    assert all(score["shared"] for score in read_ensemble(run).scores.values())


def test_the_newest_run_is_taken(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "old", prefix="o")
    os.utime(tmp_path / "runs" / "old" / "run.json", (1, 1))
    make_run(tmp_path / "runs" / "new", prefix="n")
    monkeypatch.chdir(tmp_path)
    assert choose(Select()).members[0].id.startswith("n")


def test_limits_reach_the_selector(tmp_path):
    run, *_ = make_run(tmp_path / "run", models=9)
    everything = choose(Select(run=(str(run),)))
    cheap = choose(Select(run=(str(run),), max_latency_ms=6, max_params=5000))
    latency = {f"c{m}": 1.0 + m for m in range(9)}
    assert sum(latency[m.id] for m in everything.members) > 6
    assert sum(latency[m.id] for m in cheap.members) <= 6
    mixed = choose(Select(run=(str(run),), min_per_architecture=1))
    assert {int(m.id[1:]) % 3 for m in mixed.members} == {0, 1, 2}
    assert cheap.options == {"top_k": 9, "metric": "accuracy", "max_latency_ms": 6, "max_params": 5000, "risk": 0.05}


def test_auto_says_how_it_chose_and_claims_what_it_would_score_elsewhere(tmp_path):
    run, *_ = make_run(tmp_path / "run", models=9)
    done = run_command("--run", run, cwd=tmp_path)
    ensemble = read_ensemble(run)
    report = ensemble.insight["auto"]
    assert ensemble.selector == "auto"
    assert report["selector"] != "best_single"
    assert {option["selector"] for option in report["options"]} >= {"greedy", "uniform", "best_single"}
    found = ensemble.claim
    assert (found["split"], found["images"], found["shared"]) == ("select", 300, False)
    low, high = found["interval"]
    assert low < found["accuracy"] < high
    assert found["gain"]["interval"][0] < found["gain"]["accuracy"] < found["gain"]["interval"][1]
    assert report["fitted"]["accuracy"] == pytest.approx(ensemble.scores["select"]["accuracy"])
    assert ensemble.scores["select"]["fitted"] is True
    assert found["log_loss"] > ensemble.scores["select"]["log_loss"]
    words = " ".join(done.stdout.split())
    assert f"expect {found['accuracy']:.2%} on new images (95 % {low:.2%} to {high:.2%})" in words
    assert "ensemble, fitted" in words
    assert "best single, calibrated" in words


@pytest.mark.parametrize("selector", sorted(select.SELECTORS))
def test_every_selector_claims_what_it_does_on_rows_that_it_did_not_see(selector, tmp_path):
    """Models that guess: whatever fits their luck is worth a half on other rows."""
    rng = np.random.default_rng(0)
    run = UPath(tmp_path / "run")
    labels = rng.integers(0, 2, 150)
    write_json(run / "run.json", {"classes": ["a", "b"], "split_fingerprint": "f"})
    write_array(run / "select_labels.npy", labels)
    for m, p in enumerate(rng.dirichlet([4, 4], size=(60, 150)).astype(np.float32)):
        write_candidate(run, CandidateInfo(f"c{m}"), p)
    scores = choose(Select(run=(str(run),), selector=selector)).scores
    low, high = scores["claim"]["interval"]
    assert low < 0.5 < high
    assert scores["select"]["accuracy"] > 0.55


def test_the_best_single_model_is_named_by_tune_and_scored_on_select(tmp_path):
    run, probs, labels = make_run(tmp_path / "run", models=4)
    for m in range(4):
        info = CandidateInfo(f"c{m}", metrics={"tune_accuracy": 0.9 if m == 2 else 0.5, "tune_log_loss": 1.0})
        write_candidate(run, info, probs[m])
    scores = choose(Select(run=(str(run),))).scores
    assert (scores["best_single"]["id"], scores["best_single"]["named_by"]) == ("c2", "tune")
    assert scores["best_single"]["accuracy"] == pytest.approx(accuracy(probs[2], labels))
    assert scores["gain"]["accuracy"] == pytest.approx(scores["claim"]["accuracy"] - accuracy(probs[2], labels))
    splits = {"train": 1, "tune": 300, "select": 300, "test": 0, "shared": True}
    write_json(run / "run.json", {"classes": list("abcd"), "split_fingerprint": "f00d", "splits": splits})
    assert choose(Select(run=(str(run),))).scores["best_single"]["named_by"] == "select", "they are the same images"


def test_a_file_from_before_there_were_claims_is_read(tmp_path):
    run = UPath(tmp_path / "run")
    old = Ensemble("old", (Member("a", 1.0),), "auto", "f", {"select": {}, "cross_validated": {"accuracy": 0.5}})
    write_ensemble(run, old)
    assert read_ensemble(run).claim is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_point_types_are_read_as_well(dtype, tmp_path):
    run, probs, _ = make_run(tmp_path / "run", models=3)
    for m, p in enumerate(probs):
        write_array(run / "candidates" / f"c{m}" / "select_probs.npy", p.astype(dtype))
    pool = load_pool([run])
    assert not pool.left_out
    assert all(p.dtype == np.float32 for p in pool.probs)


def test_many_probabilities_are_stored_in_half_precision(tmp_path):
    """Before: 1,000 classes took 20 MB for each candidate and 5,000 images."""
    rows = HALF_FROM // 1000 + 1
    probs = np.random.default_rng(0).dirichlet(np.full(1000, 0.01), rows).astype(np.float32)
    labels = probs.argmax(1)
    for name, kept, dtype in (("many", rows, np.float16), ("few", rows - 1, np.float32)):
        run = UPath(tmp_path / name)
        write_json(run / "run.json", {"classes": [f"c{i}" for i in range(1000)], "split_fingerprint": "f"})
        write_array(run / "select_labels.npy", labels[:kept].astype(np.int64))
        stored = write_candidate(run, CandidateInfo("a"), probs[:kept], probs[:kept])
        assert stored.probs("select").dtype == stored.probs("tune").dtype == dtype
        pool = load_pool([run])
        assert not pool.left_out
        np.testing.assert_allclose(pool.probs[0], probs[:kept], atol=5e-4)
        assert log_loss(pool.probs[0], pool.labels) == pytest.approx(log_loss(probs[:kept], labels[:kept]), abs=1e-3)


@pytest.mark.parametrize(
    ("units", "message"),
    [(np.zeros(300), "cannot be read"), (np.zeros(299, int), "is for 299 images and not 300"), (None, None)],
)
def test_units_that_do_not_fit_are_refused(tmp_path, units, message):
    run, _, _ = make_run(tmp_path / "run")
    if units is not None:
        write_array(run / "select_units.npy", units)
        with pytest.raises(UserError, match=message):
            load_pool([run])
        write_array(run / "select_units.npy", np.arange(300) // 2)
    pool = load_pool([run])
    assert (pool.units is None) == (units is None)


def spoil(path, name, probs):
    """Write candidates/<name>/ with these predictions, whatever they are."""
    write_candidate(path, CandidateInfo(name), probs)


BAD = {
    "nan": (lambda p: np.where(np.arange(p.size).reshape(p.shape) == 7, np.nan, p), "NaN"),
    "infinite": (lambda p: np.where(np.arange(p.size).reshape(p.shape) == 7, np.inf, p), "infinity"),
    "logits": (lambda p: np.log(p + 0.1), "sums to"),
    "negative": (lambda p: p + np.array([0.6, -0.6, 0, 0], np.float32), "negative"),
    "short": (lambda p: p[:-1], "299 rows, the select split 300"),
    "narrow": (lambda p: p[:, :3] / p[:, :3].sum(axis=1, keepdims=True), "3 classes, the run 4"),
    "flat": (lambda p: p.ravel(), "expected float"),
    "copy": (lambda p: p, "exactly what c0 predicts"),
}


def test_bad_predictions_are_named_and_left_out(tmp_path):
    run, probs, _ = make_run(tmp_path / "run")
    clean = choose(Select(run=(str(run),)))
    for name, (damage, _) in BAD.items():
        spoil(run, f"x_{name}", damage(probs[0]))
    spoil(run, "x_truncated", probs[1])
    file = tmp_path / "run" / "candidates" / "x_truncated" / "select_probs.npy"
    file.write_bytes(file.read_bytes()[:-100])
    spoil(run, "x_pickle", probs[1])
    file = tmp_path / "run" / "candidates" / "x_pickle" / "select_probs.npy"
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    spoil(run, "x_missing", probs[1])
    (tmp_path / "run" / "candidates" / "x_missing" / "select_probs.npy").unlink()
    write_candidate(run, CandidateInfo("x_foreign", split_fingerprint="beef"), probs[1] * 0.5 + probs[2] * 0.5)
    (tmp_path / "run" / "candidates" / "x_unfinished").mkdir()

    ensemble = choose(Select(run=(str(run),)))
    expected = {f"x_{name}": reason for name, (_, reason) in BAD.items()}
    expected |= {"x_truncated": "", "x_pickle": "", "x_missing": "cannot be read", "x_foreign": "other splits"}
    assert set(ensemble.left_out) == set(expected)
    for id, reason in expected.items():
        assert reason in ensemble.left_out[id]
    assert ensemble.members == clean.members, "what is left out must not change the choice"
    assert re.search(r"left out ([\w, ]+, )?x_nan", run_command("--run", run, cwd=tmp_path).stdout)


def test_many_that_are_left_out_for_one_reason_are_one_line(tmp_path):
    run, probs, _ = make_run(tmp_path / "run")
    for name in ("a", "b", "c"):
        write_candidate(run, CandidateInfo(name, weights_deleted=True), probs[0] * 0.5 + probs[1] * 0.5)
    told = " ".join(run_command("--run", run, cwd=tmp_path).stdout.split())
    assert "left out a, b, c: its weights were deleted (--keep-weights)" in told


def test_runs_on_the_same_splits_merge(tmp_path):
    first, _, labels = make_run(tmp_path / "first", models=3)
    second, *_ = make_run(tmp_path / "second", models=3)  # the same ids, and the same predictions
    best = (0.9 * np.eye(4)[labels] + 0.025).astype(np.float32)
    spoil(second, "winner", best)
    ensemble = choose(Select(run=(str(first), str(second))))
    assert set(ensemble.left_out) == {"second/c0", "second/c1", "second/c2"}
    winner = next(member for member in ensemble.members if member.id == "winner")
    write_ensemble(first, ensemble)
    candidate = winner.candidate([first, second])
    assert np.array_equal(candidate.probs("select"), best)
    assert len(load_pool([first, second]).candidates) == 4


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        ({}, ["--top-k", "0"], "--top-k is 0, expected at least 1"),
        ({}, ["--selector", "gredy"], "did you mean greedy?"),
        ({}, ["--score", "brier"], "auto has its own score"),
        ({}, ["--temperature-scaling"], "auto scales by itself"),
        ({"models": 0}, [], "no candidates yet"),
        ({}, ["--run", "runs/other"], "different splits"),
        ({}, ["--run", "nowhere"], "nowhere is not a run directory"),
        ({}, ["--max-params", "-1"], "no candidate fits the budget"),
        ({}, ["--min-per-architecture", "4"], "needs 12 members for 3 architectures"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(make, arguments, message, tmp_path):
    run, *_ = make_run(tmp_path / "runs" / "run", **make)
    make_run(tmp_path / "runs" / "other", fingerprint="beef")
    done = run_command("--run", run, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "run" / "ensembles").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(0, np.int64), "is empty"),
        (np.full(300, 4), "run.json names 4 classes"),
        (np.zeros(300, np.float32), "expected integers"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(labels, message, tmp_path):
    run, *_ = make_run(tmp_path / "run")
    write_array(run / "select_labels.npy", labels)
    with pytest.raises(UserError, match=message):
        choose(Select(run=(str(run),)))


def test_runs_with_nothing_usable_say_why(tmp_path):
    run, *_ = make_run(tmp_path / "run", models=0)
    spoil(run, "only", np.full((300, 4), np.nan))
    with pytest.raises(UserError, match=r"1 candidates and none is usable \(only: .*NaN"):
        choose(Select(run=(str(run),)))


def test_ensemble_files(tmp_path):
    run = UPath(tmp_path / "run")
    with pytest.raises(UserError, match="no ensemble yet"):
        read_ensemble(run)
    ensemble = Ensemble(
        "two", (Member("a", 0.75), Member("b", 0.25, "../x")), "greedy", "f", {"select": {}}, created=1.0
    )
    write_ensemble(run, ensemble)
    assert read_ensemble(run) == read_ensemble(run, "two") == ensemble
    with pytest.raises(UserError, match="it has two"):
        read_ensemble(run, "three")
    with pytest.raises(UserError, match="no candidate a"):
        ensemble.members[0].candidate([run])
    for members in ([], [{"id": "a"}], [{"id": "a", "weight": 0.4}], "ab"):
        write_json(run / "ensembles" / "bad.json", {"members": members})
        with pytest.raises(UserError, match="damaged"):
            read_ensemble(run, "bad")


def test_what_is_excluded_is_no_member(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    best = choose(Select(run=(str(run),))).members[0].id
    done = run_command("--run", run, "--exclude", best, "--exclude", "c7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ensemble = read_ensemble(run)
    assert not {best, "c7"} & {member.id for member in ensemble.members}
    assert ensemble.name == f"auto-without{best}-c7"
    assert ensemble.options["exclude"] == [best, "c7"]
    assert ensemble.left_out == dict.fromkeys((best, "c7"), "excluded, as asked")
    done = run_command("--run", run, "--exclude", "c77", cwd=tmp_path)
    assert done.returncode == 2
    assert f"--exclude c77 is no candidate of {run}; did you mean c7?" in done.stderr


def test_a_selection_with_other_limits_is_another_file(tmp_path):
    run, *_ = make_run(tmp_path / "run")

    def written(**options):
        return select.select(Select(run=(str(run),), **options))[2].name

    assert written() == written(top_k=9) == "auto.json"
    assert written(top_k=3) == "auto-top3.json"
    assert written(selector="greedy", score="accuracy", max_latency_ms=7.5) == "greedy-accuracy-7.5ms.json"
    assert written(name="mine", top_k=2) == written(name="mine", top_k=2) == "mine.json"
    before = (run / "ensembles" / "mine.json").read_bytes()
    with pytest.raises(UserError, match=r"ensembles/mine\.json was selected by auto with top_k 2; name this one with"):
        written(name="mine", top_k=3)
    with pytest.raises(UserError, match="was selected by auto with top_k 2"):
        written(name="mine", top_k=2, selector="greedy")
    assert (run / "ensembles" / "mine.json").read_bytes() == before
    assert read_ensemble(run).name == "mine"


def test_the_default_is_the_last_selection_that_was_to_be_it(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    done = run_command("--run", run, cwd=tmp_path)
    assert "it is the default of" in done.stdout
    done = run_command("--run", run, "--top-k", "3", "--no-default", cwd=tmp_path)
    assert "--ensemble auto-top3" in done.stdout
    assert read_ensemble(run).name == "auto"
    os.utime(run / "ensembles" / "auto-top3.json", (2e9, 2e9))
    assert read_ensemble(run).name == "auto", "no file's time decides"
    select.select(Select(run=(str(run),), top_k=3))
    assert read_ensemble(run).name == "auto-top3"


def test_without_a_recorded_default_the_one_that_was_created_last_is_taken(tmp_path):
    run = UPath(tmp_path / "run")
    for name, created in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        write_ensemble(run, Ensemble(name, (Member("x", 1.0),), "hand", "f", {}, created=created), default=False)
        os.utime(run / "ensembles" / f"{name}.json", (10 - created, 10 - created))
    assert read_ensemble(run).name == "c"
    for named in ("gone", "../ensembles/a", 3, None):
        write_json(run / "default.json", {"ensemble": named})
        with pytest.raises(UserError, match="expected one of a, b, c: name one with --ensemble"):
            read_ensemble(run)
        assert read_ensemble(run, "a").name == "a"


def test_to_choose_the_same_again_is_no_new_choice(tmp_path):
    """Before: `created` changed, and so predict refused to go on with its own file after another select."""
    run, _, _ = make_run(tmp_path / "run")
    args = Select(run=(str(run),), selector="greedy", top_k=3)
    first, second = (select.select(args)[1] for _ in range(2))
    assert second.created == first.created == read_ensemble(run).created
    other = select.select(dataclasses.replace(args, selector="uniform", name="greedy-k3"))[1]
    assert other.created != first.created
    assert select.select(dataclasses.replace(args, top_k=2))[1].created != first.created


def test_why_auto_did_not_take_the_lowest_loss_is_said():
    options = [{"loss": 0.41, "error": 0.0}, {"loss": 0.40, "error": 0.02}]
    report = {"selector": "best_single", "k": 1, "temperatures": "none", "options": options}
    assert auto_in_words(report).endswith("; lower ones are within a standard error of it, and it comes first")
    options[1]["loss"] = 0.42
    assert auto_in_words(report).endswith("decided among 2 options")
