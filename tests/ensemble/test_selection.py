"""One contract for every selector, brute force on small pools, and the ties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble import select
from ensemble.selection import selectors as selection
from ensemble.selection.auto import auto
from ensemble.selection.blend import ROWS, Blend, combine
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import SCORES
from ensemble.selection.scorers import Accuracy, LogLoss, true_probs
from ensemble.selection.selectors import convex, grow, grow_each
from ensemble.selection.stacking import stacking
from trainables.errors import UserError


def make_pool(models=12, rows=300, classes=4, seed=0, kind="soft"):
    """Models that share what is hard, differ in noise and in confidence: (M, N, C) float32 and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    shared = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[labels]
    logits = shared + rng.normal(size=(models, rows, classes)) * rng.uniform(0.5, 2, (models, 1, 1))
    logits *= rng.uniform(0.5, 2, (models, 1, 1))
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    if kind == "hard":
        probs = np.eye(classes)[probs.argmax(axis=2)]
    elif kind == "coarse":  # as of nearest neighbours: many ties
        probs = np.round(5 * probs) + np.eye(classes)[probs.argmax(axis=2)]
        probs /= probs.sum(axis=2, keepdims=True)
    return probs.astype(np.float32), labels


KINDS = ("soft", "hard", "coarse")
SLOW = {"stacking"}  # a tenth of a second and more, so fewer pools

# Every selector with the score that it is judged by.
SELECTORS = {
    "best_single": (selection.best_single, "log_loss"),
    "greedy": (selection.greedy, "log_loss"),
    "greedy_brier": (lambda p, y, limits: selection.greedy(p, y, limits, "brier"), "brier"),
    "greedy_accuracy": (lambda p, y, limits: selection.greedy(p, y, limits, "accuracy"), "accuracy"),
    "uniform": (selection.uniform, "log_loss"),
    "uniform_accuracy": (lambda p, y, limits: selection.uniform(p, y, limits, "accuracy"), "accuracy"),
    "accuracy_weighted": (selection.accuracy_weighted, "accuracy"),
    "convex": (convex, "log_loss"),
    "auto": (auto, "log_loss"),
    "stacking": (stacking, "log_loss"),
}


def weights_of(found):
    return found.weights if isinstance(found, Blend) else found


def check_contract(name, probs, labels, k):
    select, score = SELECTORS[name]
    before = probs.copy()
    found = select(probs, labels, Limits(k=k))
    weights = weights_of(found)
    assert np.array_equal(before, probs), "the input was changed"
    assert weights.shape == (len(probs),)
    assert weights.dtype == np.float64
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    assert 1 <= (weights > 0).sum() <= k
    assert np.array_equal(weights, weights_of(select(probs, labels, Limits(k=k)))), "not deterministic"
    # auto falls back to what everybody calls the best single model: the most accurate one
    loss = SCORES["accuracy" if name == "auto" and (weights > 0).sum() == 1 else score]
    together = found(probs) if isinstance(found, Blend) else combine(probs, weights)
    assert loss(together, labels) <= min(loss(p, labels) for p in probs) + 1e-6


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_contract(name, kind):
    for k in (1, 9) if name in SLOW else (1, 3, 9, 50):
        check_contract(name, *make_pool(kind=kind), k)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - SLOW))
@settings(max_examples=15, deadline=None, derandomize=True)  # ties that float32 makes or breaks are near
@given(
    models=st.integers(1, 7),
    rows=st.integers(1, 40),
    classes=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    k=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
)
def test_contract_on_random_pools(name, models, rows, classes, seed, k, kind):
    check_contract(name, *make_pool(models, rows, classes, seed, kind), k)


@pytest.mark.parametrize("name", SELECTORS)
def test_permuted_candidates_get_permuted_weights(name):
    select, _ = SELECTORS[name]
    probs, labels = make_pool(rows=500)
    order = np.random.default_rng(1).permutation(len(probs))
    permuted = weights_of(select(probs[order], labels, Limits(5)))
    assert np.allclose(permuted, weights_of(select(probs, labels, Limits(5)))[order], atol=1e-6)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_sequence_of_memory_maps_is_as_good_as_an_array(name, tmp_path):
    select, _ = SELECTORS[name]
    probs, labels = make_pool(5, ROWS + 100, 3)  # more rows than are worked on at once
    for m, p in enumerate(probs):
        np.save(tmp_path / f"{m}.npy", p)
    maps = [np.load(tmp_path / f"{m}.npy", mmap_mode="r") for m in range(len(probs))]
    of_maps, of_array = select(maps, labels, Limits(3)), select(probs, labels, Limits(3))
    assert np.array_equal(weights_of(of_maps), weights_of(of_array))


def brute_force_greedy(probs, labels, k, steps, score):
    """Caruana's loop as one would write it down, every average made anew."""
    counts = np.zeros(len(probs), int)
    best, best_loss = counts, np.inf
    for _ in range(steps):
        trials = []
        for m in range(len(probs)):
            if counts[m] == 0 and (counts > 0).sum() == k:
                continue
            grown = counts.copy()
            grown[m] += 1
            average = combine(probs, grown / grown.sum())
            losses = [round(SCORES[s](average, labels), 9) for s in (score, "log_loss")]
            trials.append((losses[0], counts[m] == 0, losses[1], m, grown))
        loss, *_, counts = min(trials, key=lambda trial: trial[:4])
        if loss < best_loss:
            best, best_loss = counts, loss
    return best / best.sum()


@pytest.mark.parametrize("score", ["log_loss", "brier", "accuracy"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_the_textbook_loop(score, seed):
    probs, labels = make_pool(7, 61, 3, seed)  # 61 rows: not a multiple of the 32 that share a logarithm
    for k, steps in ((7, 12), (2, 9)):
        weights = selection.greedy(probs, labels, Limits(k), score, steps)
        assert np.allclose(weights, brute_force_greedy(probs, labels, k, steps, score))


@pytest.mark.parametrize(("models", "rows"), [(3, 7), (16, 64), (30, 250), (60, 2000)])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_draws_that_grow_together_find_what_each_finds_alone(models, rows, k):
    probs, labels = make_pool(models=models, rows=rows, seed=models)
    true = np.stack(true_probs(probs, labels))
    true[1] = true[0]  # a tie
    rng = np.random.default_rng(0)
    draws = [(rng.permutation(models)[: models // 2 + 1], rng.integers(0, rows, rows)) for _ in range(20)]
    alone = [grow(LogLoss(true[np.ix_(*draw)]), Limits(k), 20) for draw in draws]
    np.testing.assert_array_equal(grow_each(true, draws, k, 20), alone)


def test_greedy_comes_close_to_the_best_of_all_weightings():
    probs, labels = make_pool(4, 80, 3)
    steps = 10
    shares = [w for w in itertools.product(range(steps + 1), repeat=4) if sum(w) == steps]
    best = min(SCORES["log_loss"](combine(probs, np.array(w) / steps), labels) for w in shares)
    found = SCORES["log_loss"](combine(probs, selection.greedy(probs, labels, steps=steps)), labels)
    assert found <= best + 2e-3


@pytest.mark.parametrize("score", ["log_loss", "brier", "accuracy"])
def test_scorers_agree_with_the_metrics(score):
    probs, labels = make_pool(6, 77, 5, seed=3)
    scorer = selection.scorer(probs, labels, score)
    chosen = [2, 4, 2, 0, 5, 5, 1]
    for size in range(len(chosen)):
        counts = np.bincount(chosen[:size], minlength=6)
        expected = []
        for m in range(6):
            grown = counts + (np.arange(6) == m)
            expected.append(SCORES[score](combine(probs, grown / grown.sum()), labels))
        assert np.allclose(scorer.losses(np.arange(6)), expected, atol=1e-6)
        scorer.add(chosen[size])


@pytest.mark.parametrize("kind", KINDS)
def test_ruling_candidates_out_never_loses_the_best(kind):
    probs, labels = make_pool(150, 333, 4, seed=4, kind=kind)
    scorer = LogLoss(true_probs(probs, labels))
    candidates = np.arange(150)
    looked_at = []
    for _ in range(40):
        exact, quick = scorer.losses(candidates), scorer.losses(candidates, best_only=True)
        seen = np.isfinite(quick)
        assert np.array_equal(quick[seen], exact[seen])
        assert seen[exact == exact.min()].all(), "every candidate that ties for the best"
        looked_at.append(seen.mean())
        scorer.add(int(exact.argmin()))
    if kind == "soft":
        assert np.mean(looked_at[10:]) < 0.5, "and it does save work"


def test_log_loss_survives_certain_mistakes_and_many_steps():
    true = np.zeros((3, 100)) + true_probs(np.zeros((1, 100, 2), np.float32), np.zeros(100, int))
    scorer = LogLoss(true)
    for _ in range(500):
        scorer.add(0)
    assert scorer.losses(np.array([1]))[0] == pytest.approx(-np.log(1e-7))


@pytest.mark.parametrize("score", ["log_loss", "accuracy"])
def test_probabilities_a_little_below_zero_count_as_zero(score):
    probs, labels = make_pool(6, 50, 3)
    probs[2, 7] = np.eye(3)[(labels[7] + 1) % 3]
    below = probs.copy()
    below[2, 7, labels[7]] = -5e-4  # what half precision may leave, and a pool lets pass
    assert np.array_equal(selection.greedy(below, labels, score=score), selection.greedy(probs, labels, score=score))


def test_ties_go_to_members_then_log_loss_then_the_first():
    labels = np.array([0, 0, 0, 0])
    sure = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]], np.float32)
    unsure = np.array([[0.7, 0.3]] * 3 + [[0.1, 0.9]], np.float32)
    # All three are 75 % accurate and stay so together: the lowest log-loss is taken, then only that member again.
    weights = selection.greedy(np.stack([unsure, sure, sure]), labels, score="accuracy")
    assert weights.tolist() == [0, 1, 0]
    accurate = selection.scorer(np.stack([unsure, sure, sure]), labels, "accuracy")
    accurate.add(0)
    assert accurate.losses(np.arange(3)).tolist() == [-0.75] * 3


def test_the_best_prefix_is_kept():
    probs, labels = make_pool(6, 50, 3, seed=5)
    losses = [
        SCORES["log_loss"](combine(probs, selection.greedy(probs, labels, steps=s)), labels) for s in range(1, 30)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))


def test_accuracy_weighted_follows_the_nine_model_rule():
    probs, labels = make_pool(10, 400, 3, seed=7)
    accuracy = (probs.argmax(axis=2) == labels).mean(axis=1)
    groups = np.arange(10) % 3
    threshold = float(np.sort(accuracy)[-3])
    weights = selection.accuracy_weighted(probs, labels, Limits(9, groups=groups, min_per_group=1), threshold)
    members = np.flatnonzero(weights)
    assert set(groups[members]) == {0, 1, 2}, "at least one of each architecture"
    assert set(np.flatnonzero(accuracy >= threshold)) <= set(members), "everything above the threshold"
    assert np.allclose(weights[members], accuracy[members] / accuracy[members].sum())


@pytest.mark.parametrize("name", SELECTORS)
def test_budgets_hold(name):
    select, _ = SELECTORS[name]
    probs, labels = make_pool(10, 200, 3)
    costs = np.array([[5, 1, 2, 4, 1, 3, np.nan, 2, 6, 1.0]])
    weights = weights_of(select(probs, labels, Limits(9, costs=costs, budgets=np.array([4.0]))))
    assert costs[0, weights > 0].sum() <= 4  # a member of unknown cost would make this NaN, so false
    with pytest.raises(UserError, match="budget"):
        select(probs, labels, Limits(9, costs=costs, budgets=np.array([0.5])))


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"best_single"}))
def test_quotas_hold(name):
    select, _ = SELECTORS[name]
    probs, labels = make_pool(12, 200, 3)
    groups = np.repeat([0, 1, 2], 4)
    weights = weights_of(select(probs, labels, Limits(6, groups=groups, min_per_group=2)))
    assert np.bincount(groups[weights > 0], minlength=3).min() >= 2
    assert (weights > 0).sum() <= 6
    with pytest.raises(UserError, match="min-per-architecture"):
        select(probs, labels, Limits(5, groups=groups, min_per_group=2))


def test_unknown_score_and_no_members_are_refused():
    probs, labels = make_pool(3)
    with pytest.raises(UserError, match="log_loss, brier, accuracy"):
        selection.greedy(probs, labels, score="auc")
    with pytest.raises(UserError, match="at least 1"):
        Limits(k=0)


def test_accuracy_skips_rows_without_changing_the_answer():
    probs, labels = make_pool(8, 500, 6, seed=9)
    scorer = Accuracy(probs, labels)
    total = np.zeros(probs.shape[1:])
    for m in (0, 3, 3, 5, 1, 1, 7):
        scorer.add(m)
        total += probs[m]
        expected = [-((total + p).argmax(axis=1) == labels).mean() for p in probs]
        assert scorer.losses(np.arange(8)).tolist() == expected


def test_every_selector_of_the_command_is_tried_here() -> None:
    assert set(select.SELECTORS) <= {*SELECTORS, "auto"}
