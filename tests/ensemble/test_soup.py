"""Weight soups: the pure functions, and a small run from training to a selected soup."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from upath import UPath

from ensemble import soup
from ensemble.pool import load_pool
from ensemble.predict import candidate_predictor
from ensemble.soup import average, greedy_soup, measure_batchnorm
from tests.conftest import split_once
from trainables.config import TrialConfig
from trainables.data.prepare import prepare
from trainables.data.splits import save_splits
from trainables.inference import predict_probs, scores
from trainables.models.weights import load_model, load_weights
from trainables.run_directory import Candidate, CandidateInfo, list_candidates, write_candidate
from trainables.storage import read_json, write_array, write_json
from trainables.train import train
from trainables.training.augment import Pixels


def test_average_is_the_mean_and_leaves_its_inputs():
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(9)}
    mixed = average([one, two, two])
    assert torch.allclose(mixed["w"], torch.tensor([7 / 3, 14 / 3]))
    assert mixed["w"].dtype == torch.float32
    assert mixed["n"] == 3
    assert one["w"].tolist() == [1, 2]
    half = average([{"w": torch.tensor([1.0], dtype=torch.bfloat16)}] * 2)
    assert half["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("other", [{"v": torch.zeros(2)}, {"w": torch.zeros(3)}, {}])
def test_networks_that_differ_are_refused(other):
    with pytest.raises(ValueError, match="same weights"):
        average([{"w": torch.zeros(2)}, other])


def test_greedy_soup_takes_what_strictly_improves():
    # The loss is the distance of the average to 1.0: from 0.8, adding 0.9 helps, 0.6 harms, 0.85 changes nothing.
    states = [{"w": torch.tensor([x], dtype=torch.float64)} for x in (0.8, 0.9, 0.6, 0.85, 1.3)]
    chosen, loss = greedy_soup(states, lambda state: round(abs(float(state["w"]) - 1.0), 9))
    assert chosen == [0, 1, 4]
    assert loss == 0


def test_batchnorm_statistics_are_those_of_the_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(4 * 9, 2))
    batches = [torch.randn(8, 3, 3, 3) * 2 + 1 for _ in range(5)]
    model[1].running_mean.fill_(100)
    measure_batchnorm(model, batches)
    activations = torch.stack([model[0](batch) for batch in batches])
    assert torch.allclose(model[1].running_mean, activations.mean(dim=(0, 1, 3, 4)), atol=1e-5)
    assert model[1].momentum == 0.1
    assert not model.training
    assert not model[1].training
    unchanged = nn.Linear(2, 2)
    measure_batchnorm(unchanged, [torch.randn(3, 2)])


@pytest.fixture
def run(pictures, tmp_path):
    """A trained network t as candidates t + d, t - d and t + e: the first two average to t, the third spoils it."""
    data = prepare("folder", pictures)
    splits = split_once(data)
    config = TrialConfig(
        backbone="speednet", width=0.125, image_size=16, epochs=8, batch_size=12, lr=5e-3, precision="fp32",
        weight_decay=0.0,
    )  # fmt: skip
    trained = train(config, data, splits)
    run = UPath(tmp_path / "run")
    write_json(
        run / "run.json",
        {"classes": list(data.classes), "split_fingerprint": splits.fingerprint, "data": {"path": str(data.path)}},
    )
    save_splits(run, splits)
    write_array(run / "select_labels.npy", data.labels[splits.select])
    torch.manual_seed(0)
    state = trained.model.state_dict()
    noise = {
        name: 0.25 * torch.randn_like(w) * w.std() if w.ndim == 4 else torch.zeros_like(w) for name, w in state.items()
    }
    for id, sign in (("0000", 1.0), ("0001", -1.0), ("0002", 30.0)):
        trained.model.load_state_dict({name: w + (sign * noise[name]).to(w.dtype) for name, w in state.items()})
        probs = {
            split: predict_probs(trained.model, data.images, getattr(splits, split), trained.pixels, 16)
            for split in ("tune", "select")
        }
        info = CandidateInfo(
            id,
            config=replace(config, pretrained=True),
            num_classes=3,
            mean=tuple(trained.pixels.mean.flatten().tolist()),
            std=tuple(trained.pixels.std.flatten().tolist()),
            metrics=scores(probs["tune"], data.labels[splits.tune], "tune"),
            split_fingerprint=splits.fingerprint,
        )
        weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
        write_candidate(run, info, probs["select"], probs["tune"], save(weights))
    return run, data, splits


def test_a_soup_that_is_better_becomes_a_candidate(run):
    path, data, splits = run
    [group] = soup.kitchens(list_candidates(path))
    assert len(group) == 3
    made = soup.cook(path, group, data, splits, torch.device("cpu"))
    assert set(made.members) == {"0000", "0001"}
    assert made.tune_log_loss < made.best_single_log_loss
    [candidate] = [c for c in list_candidates(path) if c.id == made.candidate == "soup-speednet"]
    predicted = predict_probs(
        load_model(candidate),
        data.images,
        splits.tune,
        Pixels.of(candidate.info.mean, candidate.info.std, torch.device("cpu")),
        16,
    )
    assert np.allclose(predicted, candidate.probs("tune"), atol=1e-5), "the stored weights are the ones that predicted"
    assert scores(predicted, data.labels[splits.tune], "tune")["tune_log_loss"] == pytest.approx(made.tune_log_loss)
    assert candidate.info.soup == made.members
    assert soup.kitchens(list_candidates(path))[0] == group, "a soup is no ingredient of the next one"
    assert len(load_pool([path]).candidates) == 4


def test_statistics_that_training_left_alone_are_not_measured_anew(run, monkeypatch):
    path, data, splits = run
    frozen = [
        Candidate(c.id, c.path, replace(c.info, config=replace(c.info.config, frozen_norm=True)))
        for c in list_candidates(path)
    ]
    assert len(soup.kitchens([*frozen, *list_candidates(path)])) == 2, "a network has the one kind or the other"
    measured = []
    monkeypatch.setattr(soup, "measure_batchnorm", lambda model, batches: measured.append(model))
    soup.cook(path, frozen, data, splits, torch.device("cpu"))
    assert not measured
    soup.cook(path, list_candidates(path), data, splits, torch.device("cpu"))
    assert measured


def test_networks_are_averaged_as_they_were_before_their_last_epochs(run):
    path, data, splits = run
    as_before = soup.cook(path, list_candidates(path), data, splits, torch.device("cpu"))
    for candidate in list_candidates(path):
        if candidate.info.soup:
            continue
        weights = candidate.path / "weights.safetensors"
        (candidate.path / "before.safetensors").write_bytes(weights.read_bytes())
        weights.write_bytes(save({name: tensor + 1 for name, tensor in load_weights(candidate).items()}))
        write_json(
            candidate.path / "candidate.json", {**read_json(candidate.path / "candidate.json"), "refitted": True}
        )
    [group] = soup.kitchens(list_candidates(path))
    made = soup.cook(path, group, data, splits, torch.device("cpu"))
    assert (made.members, made.tune_log_loss) == (as_before.members, as_before.tune_log_loss)
    [candidate] = [c for c in list_candidates(path) if c.id == made.candidate]
    assert not candidate.info.refitted
    (group[0].path / "before.safetensors").unlink()  # what has learned from the tune split is judged by no part of it
    assert [c.id for c in soup.kitchens(list_candidates(path))[0]] == [c.id for c in group[1:]]


def test_a_soup_is_scored_at_the_size_that_its_best_candidate_was(run):
    path, data, splits = run
    changed = [
        Candidate(c.id, c.path, replace(c.info, image_size=16, config=replace(c.info.config, image_size=12)))
        for c in list_candidates(path)
    ]
    made = soup.cook(path, changed, data, splits, torch.device("cpu"))
    [candidate] = [c for c in list_candidates(path) if c.id == made.candidate]
    predicted = candidate_predictor(candidate, "cpu")(data.images[splits.tune])
    assert np.allclose(predicted, candidate.probs("tune"), atol=1e-5)


def test_networks_with_position_embeddings_are_merged_within_a_size(run):
    path, *_ = run

    def groups(backbone):
        sized = [
            Candidate(c.id, c.path, replace(c.info, config=replace(c.info.config, backbone=backbone, image_size=size)))
            for c, size in zip(list_candidates(path), (32, 48, 32), strict=True)
        ]
        return [[c.id for c in group] for group in soup.kitchens(sized)]

    assert groups("resnet18") == [["0000", "0001", "0002"]]
    assert groups("vit_tiny_patch16_224") == [["0000", "0002"]]


def test_random_starts_and_lone_networks_are_not_merged(run):
    path, *_ = run
    from_scratch = [
        Candidate(c.id, c.path, replace(c.info, config=replace(c.info.config, pretrained=False)))
        for c in list_candidates(path)
    ]
    assert soup.kitchens(from_scratch) == []
    assert soup.kitchens(list_candidates(path)[:1]) == []
