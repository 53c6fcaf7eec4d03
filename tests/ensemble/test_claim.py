"""The claim: its numbers are those of scikit-learn and statsmodels' formulae, its intervals hold."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from upath import UPath

from benchmarks.coverage import Cell, draw, read_draws, summarise
from ensemble.pool import learned_from
from ensemble.select import Select, choose
from ensemble.selection.auto import choose_selector
from ensemble.selection.claim import (
    VARIANCE,
    HeldOut,
    accuracy_interval,
    claim,
    deal_folds,
    design_effect,
    leave_out,
    paired_interval,
)
from ensemble.selection.goal import Goal
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, balanced_accuracy
from ensemble.selection.options import Option, Table
from tests.ensemble.test_select import make_run
from tests.ensemble.test_selection import make_pool
from trainables.run_directory import Candidate, CandidateInfo, RunInfo, SplitSizes


def test_what_the_final_networks_have_learned_from_is_told_by_splits_and_candidates() -> None:
    def of(refitted: bool, sizes: SplitSizes) -> float:
        infos = [CandidateInfo(str(i), refitted=i == 1 and refitted) for i in (0, 1)]
        candidates = [Candidate(info.id, UPath("candidates") / info.id, info) for info in infos]
        return learned_from(RunInfo(("a", "b"), "", sizes), candidates)

    assert of(False, SplitSizes(800, 100, 100)) == 1.0
    assert of(True, SplitSizes(800, 100, 100)) == 0.8
    assert of(True, SplitSizes(800, 200, 200, shared=True)) == 0.8
    assert of(True, SplitSizes(60, 60, 60, shared=True)) == 0.8  # cross-fitted in five parts
    assert of(True, SplitSizes(select=100)) == 1.0  # nothing is known


def test_balanced_accuracy_is_scikit_learns():
    probs, labels = make_pool(1, 400, 4)
    rare = labels[(labels > 0) | (np.arange(400) % 20 == 0)]
    some = probs[0][(labels > 0) | (np.arange(400) % 20 == 0)]
    expected = sklearn_metrics.balanced_accuracy_score(rare, some.argmax(axis=1))
    assert balanced_accuracy(some, rare) == pytest.approx(expected)
    two = labels[labels > 1]  # classes 0 and 1 are not there
    part = probs[0][labels > 1]
    assert balanced_accuracy(part, two) == pytest.approx(
        sklearn_metrics.recall_score(two, part.argmax(axis=1), labels=[2, 3], average="macro")
    )


def test_a_claim_scores_every_row_by_what_did_not_see_it():
    probs, labels = make_pool(6, 230, 3)
    table, folds = Table(probs, labels, Limits()), deal_folds(labels)
    blends = [
        [table.on(np.setdiff1d(np.arange(230), held)).fit(Option("greedy", 3, "wide")) for held in parts]
        for parts in folds
    ]
    held_out = leave_out(table, folds, lambda repeat, fold: blends[repeat][fold])
    assert sorted(np.concatenate(folds[1]).tolist()) == list(range(230))
    together = np.empty((3, 230, 3))
    for repeat, parts in enumerate(folds):
        for held, blend in zip(parts, blends[repeat], strict=True):
            together[repeat, held] = blend(probs)[held]
    found = claim(held_out)
    assert found["accuracy"] == pytest.approx(np.mean([accuracy(p, labels) for p in together]))
    expected = np.mean([sklearn_metrics.log_loss(labels, p / p.sum(axis=1, keepdims=True)) for p in together])
    assert found["log_loss"] == pytest.approx(expected, abs=1e-5)
    for repeat, parts in enumerate(folds):  # the single model is the one that the other rows name
        for held in parts:
            rest = np.setdiff1d(np.arange(230), held)
            best = max(accuracy(p[rest], labels[rest]) for p in probs)
            named = [m for m, p in enumerate(probs) if np.array_equal(p[held], held_out.single[repeat, held])]
            assert accuracy(probs[named[0]][rest], labels[rest]) == best


def test_one_row_is_no_claim_and_two_are():
    probs, labels = make_pool(3, 2, 3)
    assert choose_selector(probs[:, :1], labels[:1]).held_out is None
    low, high = claim(choose_selector(probs, labels).held_out)["interval"]
    assert high - low > 0.6


def test_the_interval_is_wilsons_of_fewer_rows():
    right = np.r_[np.ones(85), np.zeros(15)]
    effective = 100 / VARIANCE
    p, z = 0.85, stats.norm.ppf(0.975)
    ends = accuracy_interval(right)
    for end in ends:  # Wilson's: where the distance to p is z standard errors of that end
        assert abs(p - end) == pytest.approx(z * np.sqrt(end * (1 - end) / effective))
    assert ends[0] < p < ends[1]
    assert accuracy_interval(np.ones(50))[1] == pytest.approx(1)


@pytest.mark.parametrize(("won", "lost"), [(0.05, 0.05), (0.12, 0.02), (0.01, 0.0)])
def test_the_paired_interval_covers(won, lost):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        low, high = paired_interval(rng.choice([1, -1, 0], 150, p=[won, lost, 1 - won - lost]))
        covered += low <= won - lost <= high
    assert covered / 2000 > 0.94
    assert paired_interval(np.zeros(100))[0] < 0 < paired_interval(np.zeros(100))[1], "no difference is not certainty"


def test_repeats_are_one_row_each():
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(2), (3, 40)).astype(np.float32), rng.integers(0, 2, 40)
    once = claim(HeldOut(labels, probs[:1], probs[:1], probs[:1]))["interval"]
    thrice = claim(HeldOut(labels, *(np.repeat(probs[:1], 3, axis=0),) * 3))["interval"]
    assert once == pytest.approx(thrice), "dealing the same rows again adds none"


def test_the_benchmark_draws_the_same_again_and_reads_what_it_wrote(tmp_path):
    cell = Cell(5, 60, True)
    one = draw(cell, 3)
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in draw(cell, 3).items() if k != "seconds"
    }
    assert 0.5 < one["truth"] < 1
    path = tmp_path / "draws.jsonl"
    path.write_text(json.dumps({"cell": vars(cell), "seed": 3, "draw": one}) + '\n{"cell": {"cand')
    assert read_draws(path) == {(cell, 3): one}
    assert summarise([one, one])["draws"] == 2


def test_what_was_predicted_by_networks_that_saw_fewer_images_may_be_better_in_the_end(tmp_path):
    right = np.random.default_rng(0).random(200) < 0.8
    low, high = accuracy_interval(right)
    assert accuracy_interval(right, learned_from=1.0) == (low, high)
    low_then, high_then = accuracy_interval(right, learned_from=0.8)
    assert low_then == low
    assert 1 - high_then == pytest.approx((1 - high) * 0.8**0.5)
    assert accuracy_interval(np.ones(50), learned_from=0.8)[1] == pytest.approx(1.0)

    apart = {"train": 900, "tune": 300, "select": 300, "test": 0, "shared": False}
    crossed = {"train": 300, "tune": 300, "select": 300, "test": 0, "shared": True}
    as_before = {"train": 900, "tune": 300, "select": 300, "test": 0, "shared": True}
    ends = []
    for name, splits in (("apart", apart), ("before", as_before), ("crossed", crossed)):
        run, *_ = make_run(tmp_path / name, splits=splits)
        scores = choose(Select(run=(str(run),))).scores
        ends.append([scores[key]["interval"] for key in ("claim", "best_single")])
    assert ends[0] == ends[1]
    for (low, high), (low_then, high_then) in zip(ends[0], ends[2], strict=True):
        assert low_then == low
        assert 1 - high_then == pytest.approx((1 - high) * 0.8**0.5)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_intervals_of_bursts_hold_as_often_as_they_say(alike: float) -> None:
    """60 scenes of 2 to 10 pictures: with this probability a picture turns out as its scene does."""
    rng, holds, narrow = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        units = np.repeat(np.arange(60), rng.integers(2, 11, 60))
        scene, own = rng.random(60) < 0.8, rng.random(len(units)) < 0.8
        right = np.where(rng.random(len(units)) < alike, scene[units], own).astype(float)
        low, high = accuracy_interval(right, units=units)
        holds += low <= 0.8 <= high
        low, high = accuracy_interval(right)
        narrow += low <= 0.8 <= high
    assert holds >= 930
    assert narrow < 850 or alike == 0.0, "that every picture is a look of its own must not do"


def test_design_effects_that_are_known() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.7).astype(float)
    assert design_effect(right, None) == design_effect(right, rng.permutation(400)) == 1
    assert design_effect(np.repeat(right, 4), np.repeat(np.arange(400), 4)) == pytest.approx(4, rel=0.01)
    assert design_effect(np.ones(8), np.repeat([5, 7], 4)) == 4, "nothing varies: a unit is one look"
    assert design_effect(right, np.zeros(400)) == 400
    balanced = np.tile([0.0, 1.0], 50)  # one of each in every unit
    assert design_effect(balanced, np.repeat(np.arange(50), 2)) == 1, "never narrower than without"


def test_claims_of_units_are_wider() -> None:
    rng = np.random.default_rng(2)
    labels, units = np.repeat(rng.integers(0, 3, 50), 6), np.repeat(np.arange(50), 6)
    right = np.repeat(rng.random(50) < 0.8, 6)
    probs = np.eye(3, dtype=np.float32)[np.where(right, labels, (labels + 1) % 3)][None] * 0.9 + 0.1 / 3
    worse = np.eye(3, dtype=np.float32)[np.where(rng.random(300) < 0.6, labels, (labels + 1) % 3)][None]
    held = HeldOut(labels, probs, worse, worse)
    alone, together = claim(held), claim(held, units=units)
    assert alone["accuracy"] == together["accuracy"]
    for one, other in ((alone, together), (alone["gain"], together["gain"])):
        assert other["interval"][0] < one["interval"][0]
        assert other["interval"][1] > one["interval"][1]
    balanced = Goal("balanced_accuracy")
    one, other = (claim(held, balanced, units=known)["metric"]["interval"] for known in (None, units))
    assert other[1] - other[0] > 1.5 * (one[1] - one[0])
