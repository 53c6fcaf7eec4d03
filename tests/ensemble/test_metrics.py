import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ensemble.selection import metrics


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 500).astype(np.float32)
    labels = np.array([rng.choice(4, p=p / p.sum()) for p in probs.astype(np.float64)])
    return probs, labels


def test_scores_agree_with_scikit_learn(pool):
    probs, labels = pool
    exact = probs.astype(np.float64) / probs.sum(axis=1, keepdims=True, dtype=np.float64)
    assert metrics.accuracy(probs, labels) == sklearn_metrics.accuracy_score(labels, probs.argmax(axis=1))
    assert metrics.log_loss(probs, labels) == pytest.approx(sklearn_metrics.log_loss(labels, exact), abs=1e-5)
    assert metrics.brier(probs, labels) == pytest.approx(
        ((exact - np.eye(4)[labels]) ** 2).sum(axis=1).mean(), abs=1e-5
    )


def test_log_loss_of_an_impossible_label_is_large_and_finite():
    assert metrics.log_loss(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-np.log(1e-7))
    assert metrics.log_loss(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert metrics.log_loss(np.array([[1.001, -0.001]]), np.array([1])) == pytest.approx(-np.log(1e-7)), "by rounding"


def test_calibration_error_sees_overconfidence(pool):
    probs, labels = pool
    assert metrics.ece(probs, labels) < 0.08  # labels were drawn from these very probabilities
    assert metrics.ece(np.eye(4)[probs.argmax(axis=1)], labels) > 0.3
    assert metrics.ece(np.eye(4)[labels], labels) == 0


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 10), (9_472, 10_000)])
def test_wilson_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert metrics.wilson(right, n) == pytest.approx((expected.low, expected.high))


def test_wilson_of_nothing_is_everything():
    assert metrics.wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("score", [metrics.correct, metrics.log_losses])
def test_paired_bootstrap_covers_the_standard_error(pool, score):
    probs, labels = pool
    rng = np.random.default_rng(1)
    a = score(probs, labels).astype(float)
    b = score(rng.permutation(probs), labels).astype(float)
    mean, low, high = metrics.paired_bootstrap(a, b)
    error = (a - b).std() / np.sqrt(len(a))
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
    assert metrics.paired_bootstrap(a, b) == (mean, low, high)
    assert metrics.paired_bootstrap(a, a) == (0, 0, 0)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 5), (3, 12), (40, 90), (2000, 2100)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    a = np.array([True] * only_a + [False] * only_b + [True] * 7)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert metrics.mcnemar(a, b) == pytest.approx(expected)
