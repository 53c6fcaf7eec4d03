"""auto: its folds, its temperatures, and the choices that only cross-validation can get right."""

from dataclasses import asdict

import numpy as np
import pytest

from ensemble.selection import options
from ensemble.selection.auto import auto, choose_selector
from ensemble.selection.blend import fit_temperature, measure_temperature, scale, shrink, softmax
from ensemble.selection.claim import claim, deal
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.options import Option, Table, temperature_of
from ensemble.selection.selectors import best_single
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
    assert choice.option.selector != "best_single"
    assert (choice.blend.weights > 0).sum() > 1
    found = claim(choice.held_out)
    assert found["accuracy"] <= choice.fitted["accuracy"] + 0.02
    assert found["log_loss"] >= choice.fitted["log_loss"] - 0.02
    everything = {"greedy", "brier", "convex", "bagged", "stacked", "uniform", "best_single"}
    assert {option.selector for option in choice.options} == everything
    chosen = [option for option in choice.options if option.error == 0]
    assert asdict(choice.option).items() <= asdict(chosen[0]).items()
    assert chosen[0].loss == pytest.approx(found["log_loss"], abs=0.02)


def test_members_and_the_average_have_the_temperatures_that_suit_them():
    probs, labels = make_pool(12, 600, 4)
    fold = Table(probs, labels, Limits()).on(np.arange(600))
    blend = fold.fit(Option("greedy", 9, "free"))
    for m in np.flatnonzero(blend.weights):
        assert blend.temperatures[m] == pytest.approx(fit_temperature(probs[m], labels), rel=1e-2)
    assert fit_temperature(blend(probs), labels) == pytest.approx(1, abs=1e-2)
    plain, labels_elsewhere = make_pool(12, 600, 4, seed=5)
    spoiled = np.stack([scale(p.astype(float), t) for p, t in zip(plain, np.geomspace(0.7, 1.4, 12), strict=True)])
    one, other = auto(plain, labels_elsewhere), auto(spoiled.astype(np.float32), labels_elsewhere)
    assert np.allclose(one(plain), other(spoiled), atol=0.05), "how sure candidates are must hardly matter"


def test_a_prior_draws_temperatures_towards_1_the_more_the_fewer_rows_there_are():
    probs, labels = make_pool(1, 4000, 4)
    hot = scale(probs[0].astype(float), 0.5)
    drawn = []
    for rows in (30, 4000):
        temperature, error = measure_temperature(hot[:rows], labels[:rows])
        wide, tight = (float(shrink(np.array(temperature), np.array(error), spread)) for spread in (0.3, 0.1))
        assert 1 < tight < wide < temperature
        assert shrink(np.array(temperature), np.array(error), 0.0) == 1
        assert shrink(np.array(temperature), np.array(error), np.inf) == pytest.approx(temperature)
        drawn.append(np.log(wide) / np.log(temperature))
    assert drawn[0] < 0.9 < drawn[1]


@pytest.mark.parametrize("rows", [200, 1000])
def test_the_error_of_a_temperature_is_the_one_that_fresh_rows_show(rows):
    probs, labels = make_pool(1, 100 * rows, 4)
    parts = [measure_temperature(probs[0, i::100], labels[i::100]) for i in range(100)]
    spread = np.std([np.log(temperature) for temperature, _ in parts])
    assert np.mean([error for _, error in parts]) == pytest.approx(spread, rel=0.35)


def test_where_nothing_is_learned_about_a_temperature_it_is_1():
    labels = np.arange(50) % 2
    certain = np.eye(2, dtype=np.float32)[labels]
    assert temperature_of(certain, labels, 0.3) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("temperatures", options.SPREADS)
@pytest.mark.parametrize("selector", ["greedy", "brier", "convex", "bagged", "stacked", "uniform", "best_single"])
def test_what_is_fitted_on_some_rows_knows_nothing_of_the_others(selector, temperatures, monkeypatch):
    """Neither which candidates are looked at, nor temperatures, nor weights: the others can be anything."""
    monkeypatch.setattr(options, "POOL", 10)
    probs, labels = make_pool(30, 300, 3)
    rng = np.random.default_rng(1)
    rows = np.sort(rng.permutation(300)[:240])
    others = np.setdiff1d(np.arange(300), rows)
    changed, wrong = probs.copy(), labels.copy()
    changed[:, others], wrong[others] = rng.permutation(probs[:, others]), rng.permutation(labels[others])
    if selector == "stacked" and options.SPREADS[temperatures] in (0, np.inf):
        temperatures = "tight"  # it is always held by its prior
    option = Option(selector, 5, temperatures)
    one, other = (Table(p, y, Limits()).on(rows).fit(option) for p, y in ((probs, labels), (changed, wrong)))
    assert np.array_equal(one.weights, other.weights)
    if one.stack is None:
        assert np.array_equal(one.temperatures, other.temperatures)
    else:
        assert np.array_equal(one.stack.coefficients, other.stack.coefficients)
        assert np.array_equal(one.stack.intercept, other.stack.intercept)
    assert one.temperature == other.temperature


def test_a_claim_is_not_flattered_by_the_number_of_candidates():
    """Of 1,500 models that guess, the best is right on 61 % of 200 rows; whatever is made of them is worth a half."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 200)
    probs = rng.dirichlet([4, 4], size=(1500, 200)).astype(np.float32)
    assert max(accuracy(p, labels) for p in probs) > 0.6
    choice = choose_selector(probs, labels)
    low, high = claim(choice.held_out)["interval"]
    assert choice.fitted["accuracy"] > 0.6
    assert low < 0.5 < high


def test_calibrated_models_on_few_rows_lose_nothing_to_temperatures():
    """Six calibrated models, 60 rows: free temperatures made auto 0.11 nats worse than the best single model."""
    losses = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, 5060)
        common = rng.normal(size=(5060, 4)) * 0.8
        seen = common + rng.normal(size=(6, 5060, 4)) * 0.6 + 2 * np.eye(4)[labels]
        probs = np.stack([softmax(2 * p) for p in seen]).astype(np.float32)  # skill over variance: the posterior
        blend = auto(probs[:, :60], labels[:60])
        single = best_single(probs[:, :60], labels[:60], score="accuracy").argmax()
        losses.append(log_loss(blend(probs[:, 60:]), labels[60:]) - log_loss(probs[single, 60:], labels[60:]))
    assert np.mean(losses) < 0.005


def test_without_a_gain_the_best_single_model_is_the_answer():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    answers = np.where(rng.random(400) < 0.9, labels, (labels + 1) % 3)
    good = (0.05 + 0.85 * np.eye(3)[answers]).astype(np.float32)
    worse = np.stack([good, good])  # the same model with some rows spoiled: nothing to learn from it
    worse[0, ::50] = np.roll(worse[0, ::50], 1, axis=1)
    worse[1, 7::40] = np.roll(worse[1, 7::40], 1, axis=1)
    choice = choose_selector(np.stack([worse[0], good, worse[1]]), labels)
    assert choice.option.selector == "best_single"
    assert choice.blend.weights.tolist() == [0, 1, 0]
    assert claim(choice.held_out)["accuracy"] == pytest.approx(accuracy(good, labels))


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
    whole = Table(probs, labels, Limits()).on(np.arange(60))
    fitted = log_loss(whole.fit(Option("greedy", 9, "free"))(probs), labels)
    held_out = next(o.loss for o in choice.options if (o.selector, o.k, o.temperatures) == ("greedy", 9, "free"))
    assert fitted < 0.62 < np.log(2) < held_out


def test_too_few_rows_to_cross_validate():
    probs, labels = make_pool(6, 30, 3)
    choice = choose_selector(probs, labels)
    assert choice.option.selector == "best_single"
    assert choice.options == ()
    assert claim(choice.held_out)["accuracy"] < 1, "what one model does is claimed all the same"
    groups = np.array([0, 0, 0, 1, 1, 1])
    quota = auto(probs, labels, Limits(4, groups=groups, min_per_group=1)).weights
    assert set(groups[quota > 0]) == {0, 1}


def test_a_large_pool_is_cut_to_its_most_accurate(monkeypatch):
    probs, labels = make_pool(30, 300, 3)
    monkeypatch.setattr(options, "POOL", 10)
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


def test_on_few_rows_networks_of_one_kind_are_averaged():
    """Before, one greedy selection, or one network, was kept where bags of selections were not better by clear margins:
    on 146 photographs nearly all weight went to the network that had been lucky there."""
    behind = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 6, 4120)
        seen = rng.normal(size=(4120, 6)) + 0.4 * rng.normal(size=(5, 4120, 6)) + 2.8 * np.eye(6)[labels]
        probs = np.stack([softmax(0.9 * p) for p in seen]).astype(np.float32)
        few, others = probs[:, :120], probs[:, 120:]
        bagged = Table(few, labels[:120], Limits()).on(np.arange(120)).fit(Option("bagged", 9, "wide"))
        chosen = auto(few, labels[:120])
        behind.append(log_loss(chosen(others), labels[120:]) - log_loss(bagged(others), labels[120:]))
    assert np.mean(behind) < 0.003
