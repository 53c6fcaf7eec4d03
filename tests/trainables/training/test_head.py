"""The head that is fitted exactly: with an end in sight, however many images and classes there are."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainables.training import head
from trainables.training.head import FEW_STEPS, FEW_STRENGTHS, STRENGTHS, fit_at, fit_head, shared_head

CLASSES = 4
LABELS = np.random.default_rng(0).integers(0, CLASSES, 400)
FEATURES = torch.from_numpy(
    np.random.default_rng(1).normal(0, 1, (400, 16)).astype(np.float32) + np.eye(CLASSES, 16, dtype=np.float32)[LABELS]
)
TRAIN, TUNE = np.arange(300), np.arange(300, 400)


def rows(indices: np.ndarray) -> list[torch.Tensor]:
    return [FEATURES[indices]]


def test_a_fit_whose_time_is_over_ends_where_it_stands() -> None:
    """Before: of 100,000 photographs in 1,000 classes it would have taken hours, whatever the deadline."""
    calls: list[None] = []
    heads = fit_at(rows, LABELS, TRAIN, CLASSES, STRENGTHS, tick=lambda: calls.append(None), deadline=time.time() - 1)
    assert len(heads) == len(calls) == 1
    assert torch.isfinite(heads[0].weight).all()
    found, strength = fit_head(rows, LABELS, TRAIN, TUNE, CLASSES, deadline=time.time() - 1)
    assert strength == STRENGTHS[0]
    assert torch.isfinite(found.weight).all()


def test_a_deadline_that_is_far_away_changes_nothing() -> None:
    one, strength = fit_head(rows, LABELS, TRAIN, TUNE, CLASSES)
    other, same = fit_head(rows, LABELS, TRAIN, TUNE, CLASSES, deadline=time.time() + 1000)
    assert strength == same
    assert torch.equal(one.weight, other.weight)
    assert (one(FEATURES[TUNE]).argmax(1).numpy() == LABELS[TUNE]).mean() > 0.4


def test_much_work_is_done_in_fewer_steps_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    fit_head(rows, LABELS, TRAIN, TUNE, CLASSES, tick=lambda: calls.append(None))
    usual = len(calls)
    monkeypatch.setattr(head, "MUCH_WORK", 1000)
    monkeypatch.setattr(head, "MOST_WORK", 100 * 16 * CLASSES)
    seen: list[int] = []

    def counted(indices: np.ndarray) -> list[torch.Tensor]:
        seen.append(len(indices))
        return rows(indices)

    calls.clear()
    found, strength = fit_head(counted, LABELS, TRAIN, TUNE, CLASSES, tick=lambda: calls.append(None))
    assert strength in FEW_STRENGTHS
    assert len(calls) <= len(FEW_STRENGTHS) * 2 * FEW_STEPS
    assert len(calls) < usual
    assert max(seen) == 100
    assert (found(FEATURES[TUNE]).argmax(1).numpy() == LABELS[TUNE]).mean() > 0.4


def test_a_head_that_the_deadline_cut_short_is_not_kept(tmp_path: Path) -> None:
    cpu, question = torch.device("cpu"), {"of": "these"}
    for deadline, kept in ((time.time() - 1, 0), (time.time() + 1000, 1)):
        found, strength = shared_head(
            tmp_path, question, (CLASSES, 16), cpu,
            lambda end=deadline: fit_head(rows, LABELS, TRAIN, TUNE, CLASSES, deadline=end),
            deadline,
        )  # fmt: skip
        assert len(list(tmp_path.iterdir())) == kept
    again, same = shared_head(tmp_path, question, (CLASSES, 16), cpu, lambda: pytest.fail("fitted again"))
    assert same == strength
    assert torch.equal(again.weight, found.weight)
    (path,) = tmp_path.iterdir()
    hostile = (torch.zeros(1, 1), torch.zeros(CLASSES)), (torch.full((CLASSES, 16), torch.nan), torch.zeros(CLASSES))
    for weight, bias in hostile:  # which would be broadcast, or spoil every trial
        save_file({"weight": weight, "bias": bias}, path, metadata={"strength": "1.0"})
        anew, _ = shared_head(tmp_path, question, (CLASSES, 16), cpu, lambda: (found, strength))
        assert torch.equal(anew.weight, found.weight)


def test_a_feature_that_sleeps_on_the_training_images_does_not_drown_the_others_where_it_wakes() -> None:
    """Before: it was scaled up to unit variance, and the loss of shifted digits was 69 nats."""
    rng = np.random.default_rng(2)
    asleep = torch.from_numpy(1e-5 * (rng.random((400, 16)) < 0.02).astype(np.float32))
    awake = asleep + torch.from_numpy((rng.random((400, 16)) < 0.5).astype(np.float32))

    def loss(sleepers: torch.Tensor, indices: np.ndarray) -> float:
        features = torch.cat([FEATURES[indices], sleepers[indices]], 1)
        return float(torch.nn.functional.cross_entropy(found(features), torch.from_numpy(LABELS[indices])))

    found, _ = fit_head(
        lambda indices: [torch.cat([FEATURES[indices], asleep[indices]], 1)], LABELS, TRAIN, TUNE, CLASSES
    )
    assert loss(awake, TUNE) < 1.5 * loss(asleep, TUNE)
