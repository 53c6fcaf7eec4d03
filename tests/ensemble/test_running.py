"""The ensemble so far: it follows the final rule in a cheap form."""

import numpy as np
import pytest
from upath import UPath

from ensemble.running import EnsembleSoFar
from ensemble.selection.auto import auto
from ensemble.selection.metrics import accuracy, log_loss
from tests.ensemble.test_select import make_run
from trainables.run_directory import CandidateInfo, list_candidates, write_candidate
from trainables.storage import write_array, write_json


def test_it_ends_close_to_what_selection_chooses(tmp_path):
    run, probs, labels = make_run(tmp_path / "run", models=12, rows=500)
    live = EnsembleSoFar(run, 9)
    final = auto(probs, labels)(probs)
    assert len(live.members) > 1
    assert sum(live.members.values()) == pytest.approx(1)
    _, together, loss = live.curve[-1]
    assert together == pytest.approx(accuracy(final, labels), abs=0.02)
    assert loss == pytest.approx(log_loss(final, labels), abs=0.04)
    best = max(range(12), key=lambda m: accuracy(probs[m], labels))
    assert live.best_single == (f"c{best}", accuracy(probs[best], labels))


def test_how_sure_candidates_are_hardly_matters(tmp_path):
    """A greedy choice without temperatures takes whatever is calibrated; the final rule scales first."""
    run, probs, _ = make_run(tmp_path / "run", models=8, rows=500)
    powers = probs.astype(np.float64) ** np.geomspace(0.5, 2, 8)[:, None, None]
    spoiled = (powers / powers.sum(axis=2, keepdims=True)).astype(np.float32)
    plain = EnsembleSoFar(run, 9).curve[-1]
    for m, p in enumerate(spoiled):
        write_array(run / "candidates" / f"c{m}" / "select_probs.npy", p)
    assert EnsembleSoFar(run, 9).curve[-1][2] == pytest.approx(plain[2], abs=0.02)


def test_a_single_candidate_stays_one_where_others_add_nothing(tmp_path):
    run = UPath(tmp_path / "run")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    good = (0.05 + 0.85 * np.eye(3)[np.where(rng.random(400) < 0.9, labels, (labels + 1) % 3)]).astype(np.float32)
    worse = good.copy()
    worse[::20] = np.roll(worse[::20], 1, axis=1)
    write_json(run / "run.json", {"classes": ["a", "b", "c"], "split_fingerprint": "f"})
    write_array(run / "select_labels.npy", labels)
    live = EnsembleSoFar(run, 9)
    for id, p in (("worse", worse), ("good", good)):
        write_candidate(run, CandidateInfo(id), p)
        live.add(next(c for c in list_candidates(run) if c.id == id))
    assert live.members == {"good": 1.0}
    assert live.curve[-1][1] == accuracy(good, labels)
    assert [count for count, *_ in live.curve] == [1, 2]
