"""The selector that does more than weigh: a linear layer stacked on the members."""

import numpy as np

from ensemble.selection.blend import Blend, Probs, Stack, softmax
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import FLOOR, log_loss
from ensemble.selection.selectors import NINE, best_single, greedy

STEPS, HALVINGS, CLOSE = 12, 12, 1e-4  # of Newton's method
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation: from hardly anything learned to hardly any restraint


def stacking(probs: Probs, labels: np.ndarray, limits: Limits = NINE, folds: int = 3) -> Blend:
    """A regularised multinomial logistic regression on the members' concatenated log-probabilities.

    The members are those of `greedy`; the regularisation is the one with the best cross-validated log-loss among
    STRENGTHS. Where the layer does not beat the best single candidate on these rows, or a class has fewer than `folds`
    of them, that candidate is the answer. Weights are each member's share of the coefficients, by their norm: they say
    who matters, the layer does the predicting.

    Source: Wolpert 1992, "Stacked Generalization", with the linear layer of the Intel seed; scikit-learn fits it.
    """
    single = Blend(best_single(probs, labels, limits))
    classes = probs[0].shape[1]
    if np.bincount(labels, minlength=classes).min() < folds:
        return single
    members = np.flatnonzero(chosen := greedy(probs, labels, limits))
    members = members[np.argsort(-chosen[members], kind="stable")]  # one order, whatever the candidates' was
    features = np.concatenate([np.log(np.maximum(probs[m], FLOOR)) for m in members.tolist()], axis=1)
    features = features.astype(np.float64)
    # of about unit size the solver needs a tenth of the iterations, and a strength means the same for every pool
    centre, unit = features.mean(axis=0), max(float(features.std()), 1e-12)
    coefficients, intercept = _layer((features - centre) / unit, labels, folds)
    coefficients = coefficients / unit
    intercept = intercept - coefficients @ centre
    if classes == 2:  # scikit-learn keeps one row for two classes; half of it on either side is the same layer
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    blocks = coefficients.reshape(classes, len(members), classes)
    weights = np.zeros(len(probs))
    norms = np.maximum(np.sqrt((blocks**2).sum(axis=(0, 2))), 1e-12)
    weights[members] = norms / norms.sum()
    stacked = Blend(weights, stack=Stack(blocks[:, np.argsort(members)], intercept))
    return stacked if log_loss(stacked(probs), labels) < log_loss(single(probs), labels) else single


def small_layer(probs: Probs, labels: np.ndarray, start: np.ndarray, spread: float) -> Stack:
    """A stacked layer of few numbers: one coefficient for each of K members, and one intercept for each class.

    The answer is softmax(sum of a_k log p_k + b), of the highest posterior under normal priors of standard deviation
    `spread`: of a around `start` (K,), of b around 0. So it can learn that a class is called too often, and from few
    rows it does not. Convex; Newton's method with steps that are halved until they help.

    Source: a logarithmic opinion pool, Heskes 1998, "Selecting Weighting Factors in Logarithmic Opinion Pools", with
    the biases of Guo et al. 2017's vector scaling.
    """
    logs = np.stack([np.log(np.maximum(p, FLOOR)) for p in probs]).astype(np.float64)
    members, rows, classes = logs.shape
    target, precision = np.eye(classes)[labels], 1 / spread**2
    numbers, centre = np.concatenate([start, np.zeros(classes)]), np.concatenate([start, np.zeros(classes)])

    def predict(numbers: np.ndarray) -> np.ndarray:
        return softmax(np.tensordot(numbers[:members], logs, 1) + numbers[members:])

    def loss(p: np.ndarray, numbers: np.ndarray) -> float:
        likelihood = np.log(np.maximum(p[np.arange(rows), labels], FLOOR)).sum()
        return float(0.5 * precision * ((numbers - centre) ** 2).sum() - likelihood)

    p = predict(numbers)
    best = loss(p, numbers)
    for _ in range(STEPS):
        residual, mean, weighted = p - target, np.einsum("knc,nc->kn", logs, p), logs * p
        gradient = np.concatenate([np.tensordot(logs, residual, 2), residual.sum(axis=0)])
        gradient += precision * (numbers - centre)
        flat = weighted.reshape(members, -1)
        cross = weighted.sum(axis=1) - mean @ p
        curvature = np.block(
            [
                [flat @ logs.reshape(members, -1).T - mean @ mean.T, cross],
                [cross.T, np.diag(p.sum(axis=0)) - p.T @ p],
            ]
        ) + precision * np.eye(len(numbers))
        step = np.linalg.solve(curvature, gradient)
        for _ in range(HALVINGS):
            moved = predict(numbers - step)
            if (new := loss(moved, numbers - step)) < best:
                break
            step = step / 2
        else:
            break
        numbers, p, best = numbers - step, moved, new
        if np.abs(step).max() < CLOSE:
            break
    coefficients = np.zeros((classes, members, classes))
    coefficients[np.arange(classes), :, np.arange(classes)] = numbers[:members]
    return Stack(coefficients, numbers[members:])


def _layer(features: np.ndarray, labels: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (C, F) and intercept (C,), one row for two classes, of the strength best on held-out rows."""
    from sklearn.linear_model import LogisticRegression  # a second to import: only who stacks pays for it
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    def layer(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, tol=1e-3, max_iter=1000)

    rows = StratifiedKFold(folds, shuffle=True, random_state=0)
    held_out = [
        cross_val_score(layer(strength), features, labels, cv=rows, scoring="neg_log_loss").mean()
        for strength in STRENGTHS
    ]
    fitted = layer(STRENGTHS[int(np.argmax(held_out))]).fit(features, labels)
    return fitted.coef_, fitted.intercept_
