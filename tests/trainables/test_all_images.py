"""The last epochs, on images that have been predicted: what they change, and what stays as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from upath import UPath

from search.budget import KeepWeights, WeightStore
from trainables.all_images import last_epochs, with_last_epochs
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, make_splits, save_splits, split_data
from trainables.inference import predict_probs, scores
from trainables.job import Alone, DataSource, Job, Metrics, Outcome
from trainables.models.weights import load_model, load_weights
from trainables.run_directory import BEFORE, WEIGHTS, list_candidates
from trainables.train import train
from trainables.training.augment import Pixels
from trainables.trial import run_trial

CONFIG = TrialConfig(
    backbone="speednet", width=0.125, image_size=16, epochs=4, batch_size=12, lr=5e-3, precision="fp32",
    weight_decay=0.0, refit=0.5,
)  # fmt: skip


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_how_many_there_are(data: Data, splits: Splits) -> None:
    assert last_epochs(CONFIG, splits) == 2
    assert last_epochs(replace(CONFIG, refit=0.1), splits) == 1
    assert last_epochs(replace(CONFIG, refit=0.0), splits) == 0
    assert last_epochs(replace(CONFIG, pretrained=True, epochs=0), splits) == 0  # a probe's head is refitted anyway
    assert last_epochs(CONFIG, splits.undivided()) == 0
    folded = make_splits(data.labels, data.fingerprint)
    assert folded.folds
    assert last_epochs(CONFIG, folded) == 0


def test_predictions_and_scores_are_those_from_before(data: Data, splits: Splits) -> None:
    plain, trained = train(replace(CONFIG, refit=0.0), data, splits), with_last_epochs(CONFIG, data, splits)
    assert (trained.refitted, plain.refitted, trained.outcome) == (True, False, Outcome.FINISHED)
    assert trained.metrics == plain.metrics
    assert all(np.array_equal(trained.probs[split], plain.probs[split]) for split in ("tune", "select"))
    assert trained.before is not None
    assert same(trained.before, plain.model.state_dict())
    assert not same(trained.before, trained.model.state_dict())
    assert [row["epoch"] for row in trained.curve] == [1, 2, 3, 4]
    assert trained.curve[-1]["seconds"] > trained.curve[-2]["seconds"]
    assert trained.seconds == pytest.approx(trained.curve[-1]["seconds"], abs=1e-2)


def test_the_network_that_is_kept_has_learned_from_the_held_out_images(data: Data, splits: Splits) -> None:
    """Their labels are turned, so that nothing but these images can have taught it the new ones."""
    labels = data.labels.copy()
    labels[splits.select] = (labels[splits.select] + 1) % 3
    turned = replace(data, labels=labels)
    config = replace(CONFIG, epochs=12, refit=1.0)
    trained = with_last_epochs(config, turned, splits)
    after = predict_probs(trained.model, data.images, splits.select, trained.pixels, 16)
    before, now = (scores(probs, labels[splits.select], "select") for probs in (trained.probs["select"], after))
    assert now["select_log_loss"] < before["select_log_loss"] - 0.2


def test_a_stop_meanwhile_leaves_the_network_as_it_was(data: Data, splits: Splits) -> None:
    heard = []

    def report(metrics: Metrics) -> bool:
        heard.append(metrics)
        return len(heard) > CONFIG.epochs

    trained = with_last_epochs(CONFIG, data, splits, report)
    assert trained.outcome is Outcome.FINISHED
    assert not trained.refitted
    assert [metrics["epoch"] for metrics in heard] == [1, 2, 3, 4, 4]
    assert "tune_accuracy" not in heard[-1]  # of no images that it has not learned from
    assert same(trained.model.state_dict(), train(replace(CONFIG, refit=0.0), data, splits).model.state_dict())


def test_last_epochs_that_diverge_or_are_cut_short_cost_the_candidate_nothing(
    data: Data, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: the trial had diverged and left no candidate; or was told to the sampler as one that time had cut."""
    monkeypatch.setattr("trainables.all_images.RATE", 2e4)
    trained = with_last_epochs(replace(CONFIG, optimizer="sgd"), data, splits)
    assert (trained.outcome, trained.refitted, trained.before) == (Outcome.FINISHED, False, None)
    monkeypatch.undo()

    def late(*arguments: Any, start: Any = None, **options: Any) -> Any:
        return train(*arguments, **options | ({} if start is None else {"start": start, "deadline": 1.0}))

    monkeypatch.setattr("trainables.all_images.train", late)
    cut = with_last_epochs(CONFIG, data, splits)
    assert (cut.outcome, cut.refitted) == (Outcome.FINISHED, True)


def test_a_trial_that_was_stopped_before_has_none(data: Data, splits: Splits) -> None:
    trained = with_last_epochs(CONFIG, data, splits, lambda metrics: True)
    assert (trained.outcome, trained.refitted, trained.before) == (Outcome.PRUNED, False, None)


def test_time_that_is_short_is_shared_out(data: Data, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Any] = []

    def told(*arguments: Any, **options: Any) -> Any:
        shares.append(options.get("share", 1.0))
        return train(*arguments, **options)

    monkeypatch.setattr("trainables.all_images.train", told)
    assert with_last_epochs(CONFIG, data, splits, deadline=4e9).outcome is Outcome.FINISHED
    assert shares == [pytest.approx(4 / 6), 1.0]
    late = with_last_epochs(CONFIG, data, splits, deadline=1.0)
    assert (late.outcome, late.refitted) == (Outcome.TIME, False)


@pytest.fixture(scope="module")
def run(pictures_with_val: Path, tmp_path_factory: pytest.TempPathFactory) -> UPath:
    """A run directory with one candidate that has had its last epochs."""
    run = UPath(tmp_path_factory.mktemp("last") / "run")
    data = prepare("folder", pictures_with_val)
    save_splits(run, split_data(data))
    job = Job("0000", CONFIG, str(run), DataSource(str(data.path), "folder", str(pictures_with_val)))
    assert run_trial(job, Alone()).outcome is Outcome.FINISHED
    return run


def test_both_networks_are_kept(run: UPath, pictures_with_val: Path) -> None:
    data = prepare("folder", pictures_with_val)
    [candidate] = list_candidates(run)
    assert candidate.info.refitted
    assert candidate.info.mean is not None
    assert candidate.info.std is not None
    pixels = Pixels.of(candidate.info.mean, candidate.info.std, torch.device("cpu"))
    model = load_model(candidate)

    def predicted() -> np.ndarray:
        return predict_probs(model, data.images, split_data(data).select, pixels, 16)

    assert not np.allclose(predicted(), candidate.probs("select"), atol=1e-4)
    model.load_state_dict(load_weights(candidate, before=True))
    assert np.allclose(predicted(), candidate.probs("select"), atol=1e-5)


def test_both_are_deleted_to_save_space(run: UPath, tmp_path: Path) -> None:
    [candidate] = list_candidates(run)
    store = WeightStore(run, KeepWeights(candidates=0))
    store.add(candidate)
    files = [candidate.path / WEIGHTS, candidate.path / BEFORE]
    assert store.kept["0000"][1] == sum(file.stat().st_size for file in files)
    assert store.trim(set()) == ["0000"]
    assert not any(file.exists() for file in files)
    with pytest.raises(Exception, match="has no weights"):
        load_weights(list_candidates(run)[0], before=True)
