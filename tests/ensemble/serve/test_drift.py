"""ensemble.serve.drift: what the select split's answers are, and when others differ from them."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.pool import load_pool
from ensemble.serve import drift as drifting
from ensemble.serve.drift import WINDOW, Drift, Reference, compare_means, compare_shares
from trainables.run_directory import list_candidates
from trainables.storage import write_array

CLASSES = ("cat", "dog", "owl")


def reference(images: int = 3000, shares: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Reference:
    sure = np.random.default_rng(1).beta(8, 2, images)
    return Reference(sure, np.round(np.array(shares) * images).astype(np.int64))


def feed(drift: Drift, number: int, seed: int, a: float = 8, shares: tuple[float, ...] = (0.5, 0.3, 0.2)) -> list[str]:
    """Log lines of simulated answers: their classes come in these shares, their confidence is Beta(a, 2)."""
    random = np.random.default_rng(seed)
    labels = random.choice(len(shares), number, p=shares)
    lines = [drift.add(drift.classes[k], float(p)) for k, p in zip(labels, random.beta(a, 2, number), strict=True)]
    return [line for line in lines if line is not None]


def test_the_reference_is_what_the_ensemble_answers(run: UPath) -> None:
    ensemble, pool = read_ensemble(run), load_pool([run])
    found = Reference.of([run], ensemble)
    assert found is not None
    probs = ensemble.predict([pool.probs[[c.id for c in pool.candidates].index(m.id)] for m in ensemble.members])
    np.testing.assert_allclose(found.confidence, probs.max(axis=1))
    assert found.counts.tolist() == np.bincount(probs.argmax(axis=1), minlength=3).tolist()
    assert found.counts.sum() == len(found.confidence) == len(pool.labels)

    cost = np.array([[0, 9, 9], [0, 0, 0], [9, 9, 0]], float)  # to answer "across" is never wrong enough
    decided = dataclasses.replace(ensemble, decision=dataclasses.replace(ensemble.decision, cost=cost))
    other = Reference.of([run], decided)
    assert other is not None
    answers = decided.decision.answers(probs)
    np.testing.assert_allclose(other.confidence, probs[np.arange(len(probs)), answers])
    assert other.counts.tolist() == np.bincount(answers, minlength=3).tolist()


def test_without_usable_predictions_there_is_no_reference(run: UPath, tmp_path: Path) -> None:
    broken = UPath(shutil.copytree(str(run), tmp_path / "broken"))
    path = list_candidates(broken)[0].path / "select_probs.npy"
    probs = np.load(path)
    for wrong in (probs[:-1], probs[:, :-1], np.full_like(probs, np.nan), probs[None], probs.astype(str)):
        np.save(path, wrong)
        assert Reference.of([broken], read_ensemble(broken)) is None
    path.write_bytes(b"no array")
    assert Reference.of([broken], read_ensemble(broken)) is None
    path.unlink()
    assert Reference.of([broken], read_ensemble(broken)) is None
    for candidate in list_candidates(broken):
        write_array(candidate.path / "select_probs.npy", probs[:0])
    assert Reference.of([broken], read_ensemble(broken)) is None, "a refit has no images left"


def test_the_tests_are_the_textbooks() -> None:
    random = np.random.default_rng(0)
    a, b = random.beta(8, 2, 400), random.beta(7, 2, 900)
    found = compare_means(a, b)
    assert found is not None
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.statistic == pytest.approx(welch.statistic)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(welch.statistic)))

    counts = np.array([50, 30, 20]), np.array([400, 350, 250])
    shares = compare_shares(*counts)
    expected = stats.chi2_contingency(np.stack(counts), correction=False)
    assert shares is not None
    assert (shares.statistic, shares.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert shares.degrees == expected.dof == 2


def test_rare_classes_are_tested_together() -> None:
    a, b = np.array([40, 1, 30, 2, 0, 27]), np.array([400, 9, 300, 20, 0, 271])
    found = compare_shares(a, b)
    pooled = np.array([[30, 30, 40], [300, 300, 400]])  # the three rarest are too few, so that a fourth joins them
    expected = stats.chi2_contingency(pooled, correction=False)
    assert found is not None
    assert (found.statistic, found.degrees) == (pytest.approx(expected.statistic), 2)

    half = np.repeat([2, 0], 500)  # of a thousand classes, one is expected in each
    found = compare_shares(half, half[::-1])
    assert found is not None
    assert found.degrees == 199
    assert found.is_clear
    found = compare_shares(np.append(half, 0), np.append(half, 1))
    assert found is not None
    assert not found.is_clear
    assert compare_shares(np.array([100, 0, 0]), np.array([3000, 0, 0])) is None, "one class cannot have another share"
    assert compare_shares(np.array([10, 5]), np.array([300, 300])) is None, "too few answers"


def test_too_little_is_not_tested_and_constants_are() -> None:
    assert compare_means(np.full(29, 0.9), np.full(1000, 0.5)) is None
    assert compare_means(np.full(1000, 0.9), np.full(29, 0.5)) is None
    same, other = (compare_means(np.full(100, value), np.full(100, 0.7)) for value in (0.7000001, 0.6))
    assert same is not None
    assert other is not None
    assert (same.is_clear, other.is_clear) == (False, True)


def test_equal_pictures_raise_an_alarm_as_rarely_as_promised() -> None:
    """1,000 windows and two tests at 1 in 1,000 each: 2 expected, and above 8 one time in ten thousand."""
    truth = (0.5, 0.3, 0.2)
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(1000):
        means = compare_means(random.beta(8, 2, WINDOW), random.beta(8, 2, 3000))
        shares = compare_shares(random.multinomial(WINDOW, truth), random.multinomial(3000, truth))
        assert means is not None
        assert shares is not None
        alarms += means.is_clear + shares.is_clear
    assert alarms <= 8


def test_a_clear_difference_is_said_once_and_so_is_its_end() -> None:
    drift = Drift(CLASSES, reference())
    assert feed(drift, 2 * WINDOW, 0) == []
    (line,) = feed(drift, WINDOW, 1, a=6)
    assert line.startswith("drift: the last 1,000 answers differ from those to the select split: mean confidence 7")
    assert "there 80.0% (p = " in line
    assert "most often" not in line
    assert line.endswith("; see /drift")
    assert feed(drift, 3 * WINDOW, 2, a=6) == [], "it was said"
    (line,) = feed(drift, WINDOW, 3, a=6, shares=(0.1, 0.3, 0.6))
    assert "most often owl (59%)" in line
    assert "there cat (50%)" in line
    assert feed(drift, WINDOW - 1, 4) == []
    assert feed(drift, 1, 5) == ["drift: the last 1,000 answers are like those to the select split again"]


def test_the_window_has_an_end() -> None:
    drift = Drift(CLASSES, reference())
    feed(drift, WINDOW, 0, a=2)
    feed(drift, WINDOW, 1)
    assert len(drift) == WINDOW
    assert not any(found and found.is_clear for found in drift.differences().values()), "the first are forgotten"
    assert drift.counts().sum() == WINDOW


def test_what_is_reported() -> None:
    drift = Drift(CLASSES, reference())
    empty = drift.report()
    assert empty.keys() == {"window", "select", "tests"}
    assert empty["tests"] == {}
    feed(drift, 200, 0, shares=(0.1, 0.3, 0.6))
    told = drift.report()
    assert told["answers"]["images"] == 200
    assert told["answers"]["confidence"] == pytest.approx(drift.confidence().mean(), abs=1e-6)
    assert sum(told["answers"]["classes"].values()) == pytest.approx(1, abs=1e-5)
    assert told["select"]["classes"] == {"cat": 0.5, "dog": 0.3, "owl": 0.2}
    assert told["tests"]["classes"]["clear"]
    assert told["tests"]["classes"]["degrees"] == 2
    assert told["tests"]["confidence"].keys() == {"statistic", "p", "clear"}

    alone = Drift(CLASSES, None)
    assert feed(alone, 2 * WINDOW, 0) == []
    assert alone.report().keys() == {"window", "answers", "tests"}


def test_of_many_classes_those_that_differ_most_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drifting, "MOST_CLASSES", 2)
    drift = Drift(CLASSES, reference())
    feed(drift, 500, 0, shares=(0.1, 0.3, 0.6))
    assert [list(shares) for shares in drift.shares().values()] == [["cat", "owl"], ["cat", "owl"]]
