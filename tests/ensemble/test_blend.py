"""Blends, temperatures, the stacked layer, and what explains and prices an ensemble."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from ensemble.file import Ensemble, Member
from ensemble.selection import explain, frontier, stacking
from ensemble.selection.blend import (
    ROWS,
    Blend,
    Stack,
    combine,
    fit_temperature,
    fit_temperatures,
    scale,
    scale_all,
    tempered,
)
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.options import Option
from ensemble.selection.selectors import best_single, greedy
from tests.ensemble.test_selection import make_pool
from trainables.errors import UserError


def test_combine_is_the_weighted_average_and_reads_members_only():
    probs, _ = make_pool(4, ROWS + 10, 3)
    weights = np.array([0.5, 0, 0.3, 0.2])
    probs[1] = np.nan
    expected = 0.5 * probs[0].astype(float) + 0.3 * probs[2] + 0.2 * probs[3]
    combined = combine(probs, weights)
    assert combined.dtype == np.float32
    assert np.allclose(combined, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_is_the_minimum_that_a_line_search_finds(seed):
    probs, labels = make_pool(1, 400, 5, seed)
    found = optimize.minimize_scalar(lambda t: log_loss(scale(probs[0].astype(float), t), labels), bounds=(0.2, 5))
    assert fit_temperature(probs[0], labels) == pytest.approx(found.x, rel=1e-2)


def test_temperature_of_certainty_stays_in_range():
    labels = np.arange(30) % 3
    right = np.eye(3)[labels]
    assert fit_temperature(right, labels) >= 0.2
    assert fit_temperature(right, (labels + 1) % 3) <= 5.0
    assert np.isfinite(scale(right, 0.2)).all()


def test_scaling_keeps_every_answer_and_lowers_the_loss():
    probs, labels = make_pool(6)
    temperatures = fit_temperatures(probs, labels)
    for before, after in zip(probs, scale_all(probs, temperatures), strict=True):
        assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1))
        assert np.allclose(after.sum(axis=1), 1, atol=1e-5)
        assert log_loss(after, labels) <= log_loss(before, labels) + 1e-6


@pytest.mark.parametrize("classes", [2, 4])
def test_stacking_contract(classes):
    probs, labels = make_pool(10, 400, classes)
    before = probs.copy()
    blend = stacking.stacking(probs, labels, Limits(4))
    assert np.array_equal(before, probs)
    assert blend.weights.sum() == pytest.approx(1)
    assert (blend.weights >= 0).all()
    assert 1 <= (blend.weights > 0).sum() <= 4
    assert blend.stack is not None
    together = blend(probs)
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)
    assert log_loss(together, labels) <= min(log_loss(p, labels) for p in probs)
    order = np.random.default_rng(1).permutation(len(probs))
    permuted = stacking.stacking(probs[order], labels, Limits(4))
    assert np.allclose(permuted.weights, blend.weights[order])
    assert np.allclose(permuted(probs[order]), together, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_stacking_is_the_layer_of_scikit_learn(classes):
    from sklearn.linear_model import LogisticRegression

    probs, labels = make_pool(3, 200, classes)
    blend = stacking.stacking(probs, labels, Limits(3))
    chosen = greedy(probs, labels, Limits(3))
    members = [m for m in np.argsort(-chosen, kind="stable") if chosen[m] > 0]
    features = np.concatenate([np.log(np.maximum(probs[m], 1e-7)) for m in members], axis=1).astype(float)
    features = (features - features.mean(axis=0)) / features.std()
    layers = [LogisticRegression(C=c, tol=1e-3).fit(features, labels) for c in stacking.STRENGTHS]
    assert min(np.abs(blend(probs) - layer.predict_proba(features)).max() for layer in layers) < 1e-5


def test_the_small_layer_is_the_optimum_and_learns_what_classes_are_called_too_often():
    probs, labels = make_pool(3, 600, 3)
    biased = probs * np.array([3, 1, 1], np.float32)  # class 0 is called too often
    biased /= biased.sum(axis=2, keepdims=True)
    start = np.array([0.5, 0.3, 0.2])
    stack = stacking.small_layer(biased, labels, start, 0.3)
    assert stack.intercept[0] < min(stack.intercept[1:]) - 0.3
    logs = np.log(biased.astype(np.float64))

    def loss(x):
        scores = np.tensordot(x[:3], logs, 1) + x[3:]
        chosen = scores[np.arange(600), labels] - np.logaddexp.reduce(scores, axis=1)
        return 0.5 / 0.3**2 * (((x[:3] - start) ** 2).sum() + (x[3:] ** 2).sum()) - chosen.sum()

    found = np.r_[stack.coefficients[0, :, 0], stack.intercept]
    assert loss(found) == pytest.approx(optimize.minimize(loss, np.r_[start, np.zeros(3)]).fun, abs=1e-3)
    held = stacking.small_layer(biased, labels, start, 1e-3)
    assert held.coefficients[0, :, 0] == pytest.approx(start, abs=1e-2), "the prior holds it"


def test_stacking_without_enough_rows_of_a_class_is_the_best_single():
    probs, labels = make_pool(3, 40, 3)
    labels = np.where(labels == 2, 0, labels)
    blend = stacking.stacking(probs, labels)
    assert blend.stack is None
    assert np.array_equal(blend.weights, best_single(probs, labels))


def tempered_greedy(probs, labels, limits):
    return tempered(lambda p, y: greedy(p, y, limits), probs, labels)


def test_tempered_selection():
    probs, labels = make_pool(10)
    blend = tempered_greedy(probs, labels, Limits(4))
    best = min(log_loss(scale(p.astype(float), fit_temperature(p, labels)), labels) for p in probs)
    uncalibrated = replace(blend, temperature=1.0)(probs)
    assert log_loss(blend(probs), labels) < log_loss(uncalibrated, labels) < best
    assert best <= min(log_loss(p, labels) for p in probs)
    assert blend.temperature < 1, "an average of calibrated models is too unsure"
    assert np.array_equal(blend(probs).argmax(axis=1), uncalibrated.argmax(axis=1))


@pytest.mark.parametrize("kind", ["plain", "tempered", "stacked"])
def test_an_ensemble_file_predicts_what_the_blend_did(kind):
    probs, labels = make_pool(6, 300, 3)
    select = {
        "plain": lambda: Blend(greedy(probs, labels, Limits(3))),
        "tempered": lambda: tempered_greedy(probs, labels, Limits(3)),
        "stacked": lambda: stacking.stacking(probs, labels, Limits(3)),
    }
    blend = select[kind]()
    members = [int(m) for m in np.argsort(-blend.weights, kind="stable") if blend.weights[m] > 0]
    small = blend.only(np.array(members))
    temperatures = np.ones(len(members)) if small.temperatures is None else small.temperatures
    kept = tuple(
        Member(f"c{m}", float(w), "", float(t)) for m, w, t in zip(members, small.weights, temperatures, strict=True)
    )
    ensemble = Ensemble("x", kept, kind, "f", {}, stack=small.stack, temperature=small.temperature)
    read = Ensemble.from_dict(ensemble.to_dict(), "x")
    assert np.allclose(read.predict([probs[m] for m in members]), blend(probs), atol=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        {"members": [{"id": "a", "weight": 1, "temperature": 0}]},
        {"members": [{"id": "a", "weight": 1}], "temperature": float("nan")},
        {"members": [{"id": "a", "weight": 1}], "stack": {"coefficients": [[[1, 2]]], "intercept": [0]}},
        {"members": [{"id": "a", "weight": 1}], "stack": {}},
    ],
)
def test_a_damaged_ensemble_file_is_a_user_error(damage):
    with pytest.raises(UserError, match="damaged"):
        Ensemble.from_dict(damage, "x")


def test_explanations():
    labels = np.array([0, 0, 1, 1])
    one = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.1, 0.9]])  # wrong on row 1
    two = np.array([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9]])  # wrong on row 0
    bad = np.array([[0.5, 0.5]] * 4)
    probs = [bad, one, two]
    found = explain.explain(Blend(np.array([0, 0.5, 0.5])), probs, labels, 1, ["cat", "dog"])
    assert found["disagreement"] == [[0, 0.5], [0.5, 0]]
    assert found["repairs"] == {
        "fixed": 1,
        "broken": 0,
        "by_member": [{"fixed": 0, "broken": 0}, {"fixed": 1, "broken": 0}],
    }
    assert found["classes"] == [
        {"class": "cat", "images": 2, "recall": 1.0, "gain": 0.5},
        {"class": "dog", "images": 2, "recall": 1.0, "gain": 0.0},
    ]
    whole = log_loss(combine([one, two], np.array([0.5, 0.5])), labels)
    assert found["leave_one_out"][0] == pytest.approx({"accuracy": 0.25, "log_loss": log_loss(two, labels) - whole})


def test_leaving_out_the_only_member_or_a_stacked_one():
    probs, labels = make_pool(4, 200, 3)
    [alone] = explain.leave_one_out(Blend(np.ones(1)), probs[:1], labels)
    assert alone == {"accuracy": None, "log_loss": None}, "a lone member has no without"
    stack = Stack(np.stack([np.eye(3)] * 2, axis=1) / 2, np.zeros(3))
    values = explain.leave_one_out(Blend(np.array([0.5, 0.5]), stack=stack), probs[:2], labels)
    assert len(values) == 2


def test_frontier_has_temperatures_where_the_option_has():
    probs, labels = make_pool(8, 500, 4)
    unsure = scale_all(probs, np.full(8, 3.0))
    plain = frontier.frontier(unsure, labels, Limits(6), np.ones(8), Option("greedy", 6, "none"))
    points = frontier.frontier(unsure, labels, Limits(6), np.ones(8), Option("greedy", 6, "free"))
    assert points[-1]["log_loss"] < plain[-1]["log_loss"] - 0.1


def test_frontier_is_not_fitted_to_what_it_scores_and_ends_in_the_choice():
    rng = np.random.default_rng(0)
    noise, coin = rng.dirichlet(np.ones(2), (100, 60)).astype(np.float32), rng.integers(0, 2, 60)
    for point in frontier.frontier(noise, coin, Limits(), np.geomspace(1, 9, 100)):
        assert point["accuracy"] < 0.65 < max(accuracy(p, coin) for p in noise)
    chosen = Blend(np.r_[0.5, 0.5, np.zeros(98)])
    last = frontier.frontier(
        noise, coin, Limits(), np.geomspace(1, 9, 100), chosen=(chosen, {"accuracy": 0.61, "log_loss": 0.6})
    )[-1]
    assert last == {"latency_ms": pytest.approx(1 + 9 ** (1 / 99)), "members": 2, "accuracy": 0.61, "log_loss": 0.6}


def test_frontier_rises_with_the_budget_and_keeps_to_it():
    probs, labels = make_pool(12, 500, 4)
    latency = np.r_[np.nan, np.linspace(1, 12, 11)]
    points = frontier.frontier(probs, labels, Limits(6), latency)
    assert len(points) >= 3
    assert points[0]["latency_ms"] == 1
    for faster, slower in itertools.pairwise(points):
        assert slower["latency_ms"] > faster["latency_ms"]
        assert slower["log_loss"] < faster["log_loss"]
    together = accuracy(combine(probs[1:], greedy(list(probs[1:]), labels, Limits(6))), labels)
    assert points[-1]["accuracy"] == pytest.approx(together, abs=0.03)
    assert frontier.frontier(probs, labels, Limits(6), np.full(12, np.nan)) == []
