"""Few images: every one is predicted by a network that has not seen it, and the one that is kept has seen all."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upath import UPath

from trainables import all_images as room
from trainables.all_images import cross_fit
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits, make_splits
from trainables.features import Features
from trainables.job import Alone, DataSource, Job, Outcome
from trainables.models.weights import find_weights
from trainables.run_directory import list_candidates, read_candidate
from trainables.train import train
from trainables.trial import run_trial

SMALL = TrialConfig(
    backbone="speednet", width=0.125, image_size=12, epochs=3, batch_size=12, lr=5e-3, precision="fp32",
    weight_decay=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def dealt(data: Data) -> Splits:
    return make_splits(data.labels, data.fingerprint)


def test_each_fold_is_predicted_by_a_network_trained_without_it(data: Data, dealt: Splits) -> None:
    whole = cross_fit(SMALL, data, dealt)
    assert whole.outcome is Outcome.FINISHED
    for number, held in enumerate(dealt.folds):
        alone = train(SMALL, data, dealt.without(number))
        assert np.array_equal(whole.probs["select"][held], alone.probs["select"])
    kept = train(SMALL, data, dealt.undivided())
    assert all((a == b).all() for a, b in zip(whole.model.parameters(), kept.model.parameters(), strict=True))
    right = whole.probs["tune"].argmax(1) == data.labels
    assert whole.metrics["select_accuracy"] == whole.metrics["tune_accuracy"] == right.mean()
    assert whole.metrics["select_images"] == len(data.labels)
    assert whole.curve[-1]["tune_accuracy"] == right.mean()
    assert whole.curve[-1]["seconds"] == pytest.approx(whole.seconds, rel=0.5)
    assert whole.refitted


def test_labels_at_random_are_scored_at_random(data: Data) -> None:
    """A network that had seen what it predicts would know them by heart."""
    labels = np.random.default_rng(0).permutation(data.labels)
    noise = dataclasses.replace(data, labels=labels)
    config = dataclasses.replace(SMALL, epochs=12, width=0.5)
    found = cross_fit(config, noise, make_splits(labels, "noise"))
    assert found.metrics["select_accuracy"] < 0.55  # a third is right by chance
    assert found.curve[-1]["train_loss"] < 0.7


def test_a_cut_trial_goes_on_with_the_folds_that_it_has(
    data: Data, dealt: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cross_fit(SMALL, data, dealt)
    checkpoint = UPath(tmp_path / "state.safetensors")
    trained: list[Splits] = []

    def counted(config: TrialConfig, data: Data, splits: Splits, *args: Any, **options: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(splits)
        return train(config, data, splits, *args, **options)

    monkeypatch.setattr(room, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        cross_fit(SMALL, data, dealt, checkpoint=checkpoint)
    trained.clear()
    found = cross_fit(SMALL, data, dealt, checkpoint=checkpoint)
    assert len(trained) == 3  # two folds, and all images
    assert found.resumed == [1]  # half of the six trainings were done
    assert np.array_equal(found.probs["select"], expected.probs["select"])


def test_time_is_shared_out_among_the_folds(data: Data, dealt: Splits) -> None:
    found = cross_fit(SMALL, data, dealt, deadline=1.0)  # long past: every network ends in its first epoch
    assert found.outcome is Outcome.TIME
    assert found.probs["select"].sum(1) == pytest.approx(1.0, abs=1e-5)
    assert len(found.curve) == 1


def test_features_that_all_folds_use_may_take_all_of_the_time(
    data: Data, dealt: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: they had the first fold's share alone, and a trial that passed it was begun again and again."""
    computed = Features._vectors

    def slowly(self: Features, *args: Any) -> Any:
        time.sleep(2)
        return computed(self, *args)

    monkeypatch.setattr(Features, "_vectors", slowly)
    monkeypatch.setattr("trainables.features.eval_batch", lambda *_: 30)  # three batches, after each the clock is read
    fresh = dataclasses.replace(data, fingerprint="0123456789abcdef")
    config = TrialConfig(backbone="tf_efficientnet_lite0", pretrained=True, image_size=32, epochs=0, precision="fp32")
    weights = find_weights("tf_efficientnet_lite0")
    assert cross_fit(config, fresh, dealt, deadline=time.time() + 22, weights=weights).outcome is Outcome.FINISHED


def test_reports_carry_no_scores_before_the_end_and_may_stop_it(data: Data, dealt: Splits) -> None:
    rows: list[dict[str, float]] = []
    cross_fit(SMALL, data, dealt, lambda metrics: bool(rows.append(metrics)))
    assert [("tune_accuracy" in row) for row in rows] == [False] * (len(rows) - 1) + [True]
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)
    assert rows[-1]["epoch"] == SMALL.epochs
    assert cross_fit(SMALL, data, dealt, lambda metrics: True).outcome is Outcome.PRUNED


def test_a_probe_is_cross_fitted_in_a_trial(data: Data, dealt: Splits, tmp_path: Path) -> None:
    from trainables.data.splits import save_splits

    run = UPath(tmp_path / "run")
    save_splits(run, dealt)
    config = TrialConfig(
        backbone="tf_efficientnet_lite0", pretrained=True, image_size=32, epochs=0, precision="fp32", tta="mirror"
    )
    source = DataSource(str(data.path), "folder")
    job = Job("0000", config, str(run), source, find_weights("tf_efficientnet_lite0"))
    result = run_trial(job, Alone())
    assert result.outcome is Outcome.FINISHED, result.error
    [candidate] = list_candidates(run)
    assert candidate.info.tune_and_select_shared
    assert candidate.info.refitted
    assert candidate.probs("select").shape == (len(data.labels), len(data.classes))
    assert result.metrics["select_images"] == len(data.labels)
    assert not (run / "checkpoints" / "0000").exists()
    assert read_candidate(candidate.path).info.metrics == result.metrics
