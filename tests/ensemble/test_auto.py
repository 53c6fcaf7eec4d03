"""auto: its folds, its temperatures, and the choices that only cross-validation can get right."""

from dataclasses import replace

import numpy as np
import pytest

from ensemble.selection import auto as auto_module
from ensemble.selection.auto import auto, choose_selector
from ensemble.selection.blend import fit_temperature, scale
from ensemble.selection.folds import deal
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from tests.ensemble.test_selection import make_pool


def test_rows_are_dealt_in_equal_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 60, 43])
    parts = deal(labels, 20, np.random.default_rng(1))
    assert sorted(np.concatenate(parts)) == list(range(203))
    assert {len(part) for part in parts} == {10, 11}
    shares = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert (shares.max(axis=0) - shares.min(axis=0) <= 1).all()


def test_models_that_complement_each_other_become_an_ensemble():
    probs, labels = make_pool(12, 600, 4)
    choice = choose_selector(probs, labels)
    assert choice.selector != "best_single"
    assert (choice.blend.weights > 0).sum() > 1
    assert choice.cross_validated["accuracy"] <= choice.fitted["accuracy"] + 0.02
    assert choice.cross_validated["log_loss"] >= choice.fitted["log_loss"] - 0.02
    assert {option.selector for option in choice.options} == {"greedy", "uniform", "best_single"}
    chosen = next(option for option in choice.options if (option.selector, option.k) == (choice.selector, choice.k))
    assert chosen.error == 0
    assert chosen.loss == pytest.approx(choice.cross_validated["log_loss"])


def test_members_and_the_average_have_the_temperatures_that_suit_them():
    probs, labels = make_pool(12, 600, 4)
    blend = auto(probs, labels)
    for m in np.flatnonzero(blend.weights):
        assert blend.temperatures[m] == pytest.approx(fit_temperature(probs[m], labels), rel=1e-2)
    assert fit_temperature(blend(probs), labels) == pytest.approx(1, abs=1e-2)
    plain, labels_elsewhere = make_pool(12, 600, 4, seed=5)
    spoiled = np.stack([scale(p.astype(float), t) for p, t in zip(plain, np.geomspace(0.7, 1.4, 12), strict=True)])
    one, other = auto(plain, labels_elsewhere), auto(spoiled.astype(np.float32), labels_elsewhere)
    assert np.allclose(one.weights, other.weights, atol=0.05), "how sure candidates are must not matter"
    assert np.allclose(one(plain), other(spoiled), atol=0.02)


def test_what_is_scored_was_not_fitted_on(monkeypatch):
    """Labels of held-out rows must not reach what is fitted for them: neither weights nor temperatures."""
    probs, labels = make_pool(6, 300, 3)
    fitted = []
    inner = auto_module._Tempered.on

    def spy(self, rows):
        fold = inner(self, rows)
        fitted.append((rows, fold.temperatures, fold.fit("greedy", 3)))
        return fold

    monkeypatch.setattr(auto_module._Tempered, "on", spy)
    choose_selector(probs, labels)
    assert len(fitted) == auto_module.FOLDS * auto_module.REPEATS
    for rows, temperatures, blend in fitted[:3]:
        assert len(rows) == 240
        expected = [fit_temperature(p[rows], labels[rows]) for p in probs]
        assert np.allclose(temperatures, expected, rtol=2e-3), "but for what Newton's last step leaves"
        assert blend.temperature == pytest.approx(
            fit_temperature(replace(blend, temperature=1.0)(probs[:, rows]), labels[rows]), rel=2e-3
        )


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
    assert choice.blend.weights.tolist() == [0, 1, 0]
    assert choice.cross_validated["accuracy"] == pytest.approx(accuracy(good, labels))


def test_an_ensemble_of_one_is_the_most_accurate_one():
    """A sharper model of a lower accuracy may have the lower log-loss, but nobody would call it the best single."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    right = rng.random(400) < 0.8
    knows = np.where(right, 0.95, 0.4)  # its errors are close calls
    guesses = np.where(right | (rng.random(400) < 0.1), 0.7, 0.3)
    probs = np.stack([np.where(labels == 0, p, 1 - p) for p in (knows, guesses)])
    probs = np.stack([probs, 1 - probs], axis=2).astype(np.float32)
    choice = choose_selector(probs, labels)
    assert accuracy(probs[1], labels) > accuracy(probs[0], labels)
    assert log_loss(probs[0], labels) < log_loss(probs[1], labels)
    members = np.flatnonzero(choice.blend.weights)
    assert len(members) > 1 or members.tolist() == [1]
    assert choose_selector(probs, labels, Limits(1)).blend.weights.tolist() == [0, 1]


def test_the_optimism_of_fitting_noise_is_seen():
    """Of forty models that guess, some mixture always fits sixty rows; on other rows it is worth nothing."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    probs = rng.dirichlet([4, 4], size=(40, 60)).astype(np.float32)
    choice = choose_selector(probs, labels)
    whole = auto_module._Tempered(probs, labels, probs.argmax(axis=2) == labels, Limits(), np.arange(60))
    fitted = log_loss(whole.fit("greedy", 9)(probs), labels)
    held_out = next(option.loss for option in choice.options if (option.selector, option.k) == ("greedy", 9))
    assert fitted < 0.62 < np.log(2) < held_out


def test_too_few_rows_to_cross_validate():
    probs, labels = make_pool(6, 30, 3)
    choice = choose_selector(probs, labels)
    assert choice.selector == "best_single"
    assert choice.cross_validated == {}
    groups = np.array([0, 0, 0, 1, 1, 1])
    quota = auto(probs, labels, Limits(4, groups=groups, min_per_group=1)).weights
    assert set(groups[quota > 0]) == {0, 1}


def test_a_large_pool_is_cut_to_its_most_accurate(monkeypatch):
    probs, labels = make_pool(30, 300, 3)
    monkeypatch.setattr(auto_module, "POOL", 10)
    ranking = np.argsort([-accuracy(p, labels) for p in probs], kind="stable")
    assert set(np.flatnonzero(auto(probs, labels).weights)) <= set(ranking[:10])
    groups = np.zeros(30, int)
    groups[ranking[-1]] = 1
    quota = auto(probs, labels, Limits(9, groups=groups, min_per_group=1))
    assert quota.weights[ranking[-1]] > 0, "a quota reaches beyond the pool"
    costs = np.ones((1, 30))
    costs[0, ranking[:10]] = 3
    cheap = auto(probs, labels, Limits(9, costs=costs, budgets=np.array([2.0])))
    assert not set(np.flatnonzero(cheap.weights)) & set(ranking[:10]), "so does a budget"


def test_the_seed_deals_the_folds():
    probs, labels = make_pool(8, 200, 3)
    first, again, other = (choose_selector(probs, labels, seed=seed) for seed in (0, 0, 1))
    assert first.report() == again.report()
    assert first.options != other.options
