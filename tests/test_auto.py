"""auto: its moments, its folds, and the choices that only cross-validation can get right."""

import numpy as np
import pytest

from ensemble import auto as auto_module
from ensemble.auto import Moments, auto, choose_selector, deal
from ensemble.blend import combine
from ensemble.limits import Limits
from ensemble.metrics import accuracy, brier
from ensemble.selection import greedy
from tests.test_selection import make_pool


def test_moments_know_the_brier_score_of_any_average_of_any_rows():
    probs, labels = make_pool(5, 90, 3)
    weights = np.array([0.5, 0.2, 0, 0.3, 0])
    first, second = np.arange(40), np.arange(40, 90)
    parts = [Moments.of(probs, labels, rows) for rows in (first, second)]
    whole = parts[0] + parts[1]
    average = combine(probs, weights)
    assert whole.loss(weights) == pytest.approx(brier(average, labels), abs=1e-6)
    assert (whole - parts[0]).loss(weights) == pytest.approx(brier(average[second], labels[second]), abs=1e-6)
    assert np.allclose(whole.right / whole.rows, [accuracy(p, labels) for p in probs])


def test_moments_are_the_same_however_little_memory_is_used(monkeypatch):
    probs, labels = make_pool(5, 90, 3)
    at_once = Moments.of(probs, labels, np.arange(90))
    monkeypatch.setattr(auto_module, "CELLS", 100)
    piecewise = Moments.of(probs, labels, np.arange(90))
    assert np.allclose(at_once.gram, piecewise.gram)
    assert np.allclose(at_once.true, piecewise.true)


def test_rows_are_dealt_in_equal_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 60, 43])
    parts = deal(labels, 20, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(203))
    assert {len(part) for part in parts} == {10, 11}
    shares = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert (shares.max(axis=0) - shares.min(axis=0) <= 1).all()


def test_models_that_complement_each_other_become_an_ensemble():
    probs, labels = make_pool(12, 600, 4)
    choice = choose_selector(probs, labels)
    assert choice.selector != "best_single"
    assert (choice.weights > 0).sum() > 1
    assert choice.cross_validated["accuracy"] <= choice.fitted["accuracy"] + 0.02
    assert choice.cross_validated["log_loss"] >= choice.fitted["log_loss"] - 0.02
    assert {option.selector for option in choice.options} == {"greedy_brier", "greedy", "uniform", "best_single"}


def test_without_a_gain_the_best_single_model_is_the_answer():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    answers = np.where(rng.random(400) < 0.9, labels, (labels + 1) % 3)
    good = (0.05 + 0.85 * np.eye(3)[answers]).astype(np.float32)
    worse = np.stack([good, good])  # the same model with some rows spoiled: nothing to learn from it
    worse[0, ::50] = np.roll(worse[0, ::50], 1, axis=1)
    worse[1, 7::40] = np.roll(worse[1, 7::40], 1, axis=1)
    choice = choose_selector(np.stack([worse[0], good, worse[1]]), labels)
    assert choice.selector == "best_single"
    assert choice.weights.tolist() == [0, 1, 0]
    assert choice.cross_validated["accuracy"] == pytest.approx(accuracy(good, labels))


def test_the_optimism_of_fitting_noise_is_seen():
    """Of forty models that guess, some mixture always fits sixty rows; on other rows it is worth nothing."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    probs = rng.dirichlet([4, 4], size=(40, 60)).astype(np.float32)
    choice = choose_selector(probs, labels)
    fitted = brier(combine(probs, greedy(probs, labels, score="brier")), labels)
    held_out = next(option.loss for option in choice.options if option.selector == "greedy_brier")
    assert fitted < 0.45 < 0.5 - 0.02 < held_out


def test_too_few_rows_to_cross_validate():
    probs, labels = make_pool(6, 30, 3)
    choice = choose_selector(probs, labels)
    assert choice.selector == "best_single"
    assert choice.cross_validated == {}
    groups = np.array([0, 0, 0, 1, 1, 1])
    quota = auto(probs, labels, Limits(4, groups=groups, min_per_group=1))
    assert set(groups[quota > 0]) == {0, 1}


def test_a_large_pool_is_cut_to_its_best(monkeypatch):
    probs, labels = make_pool(30, 300, 3)
    monkeypatch.setattr(auto_module, "POOL", 10)
    weights = auto(probs, labels)
    ranking = np.argsort([brier(p, labels) for p in probs])
    assert set(np.flatnonzero(weights)) <= set(ranking[:10]) | {int(np.argmax([accuracy(p, labels) for p in probs]))}


def test_the_seed_deals_the_folds():
    probs, labels = make_pool(8, 200, 3)
    first, again, other = (choose_selector(probs, labels, seed=seed) for seed in (0, 0, 1))
    assert first.report() == again.report()
    assert first.options != other.options
