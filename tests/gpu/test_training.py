"""What a GPU changes about training, predicting, measuring and exporting; needs neither Ray nor Optuna."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from upath import UPath

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.features import Features
from trainables.inference import eval_batch, predict_probs
from trainables.job import Alone, DataSource, Job, Outcome, WeightSource
from trainables.models.backbones import build
from trainables.models.latency import measure_latencies
from trainables.models.speed import training_rate
from trainables.run_directory import list_candidates
from trainables.train import train
from trainables.training import compiled, feed, memory
from trainables.training.augment import random_boxes, resized_crops
from trainables.training.learner import Learner
from trainables.trial import run_trial

CONFIG = TrialConfig(
    backbone="speednet", width=0.25, image_size=16, epochs=8, batch_size=12, optimizer="muon", lr=0.2, momentum=0.6,
    flip="alternating", crop=1, weight_decay=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    feed._resident.clear()
    memory._fitting.clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_every_precision_learns(device: torch.device, data: Data, splits: Splits, precision: str) -> None:
    config = dataclasses.replace(CONFIG, precision=precision)
    found = train(config, data, splits, device=str(device))
    assert found.metrics["select_accuracy"] > 0.8
    assert found.precision in ("bf16", "fp16") or precision == "fp32" or device.type == "cpu"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_all_optimisers_and_averages_run_on_the_device(
    device: torch.device, data: Data, splits: Splits, optimizer: str
) -> None:
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, lr={"adamw": 5e-3, "sgd": 0.1, "muon": 0.2}[optimizer], ema=0.1, clip_norm=1.0,
        mixup=0.2, erase=0.2, jitter=0.2, scale=0.6, crop=0, flip="random", tta="mirror_shift",
    )  # fmt: skip
    assert train(config, data, splits, device=str(device)).metrics["select_accuracy"] > 0.5


def losses(data: Data, splits: Splits, device: torch.device, config: TrialConfig) -> tuple[list[float], Learner]:
    learner = Learner(config, data, splits, device=str(device))
    found = []
    for epoch in range(2):
        for batch in learner.begin_epoch(epoch):
            learner.set_lr(epoch)
            found.append(float(learner.step(batch, 0.1)))
    return found, learner


def test_images_on_the_gpu_and_images_read_ahead_are_the_same(
    device: torch.device, data: Data, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, precision="fp32")
    first, kept = losses(data, splits, device, config)
    monkeypatch.setattr(feed, "SHARE", 0.0)
    feed._resident.clear()
    second, streamed = losses(data, splits, device, config)
    assert second == pytest.approx(first, rel=2e-2)  # cuDNN may add up in another order
    if device.type == "cuda":
        assert isinstance(kept.feed.images, torch.Tensor)
        assert kept.feed.images.device.type == "cuda"
        assert streamed.feed.thread is not None
        assert streamed.feed.stream is not None


def test_crops_of_a_batch_are_those_of_one_image_after_another(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 40, 30, 3), generator=generator, dtype=torch.uint8)
    boxes = random_boxes(16, 40, 30, 0.4, generator)
    ours = resized_crops(images.to(device), boxes, 24).float().cpu()
    theirs = resized_crops(images, boxes, 24).float()
    assert (ours - theirs).abs().mean() < 4


def test_a_gpu_and_a_cpu_predict_alike(device: torch.device, data: Data, splits: Splits) -> None:
    trained = train(dataclasses.replace(CONFIG, precision="fp32"), data, splits, device=str(device))
    model = trained.model
    ours = predict_probs(model, data.images, splits.select, trained.pixels, 16, "mirror_shift")
    pixels = dataclasses.replace(trained.pixels, mean=trained.pixels.mean.cpu(), std=trained.pixels.std.cpu())
    theirs = predict_probs(model.cpu(), data.images, splits.select, pixels, 16, "mirror_shift")
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def a_job(run: UPath, config: TrialConfig, gpus: float) -> Job:
    from trainables.data.dataset import default_cache
    from trainables.run_directory import read_run

    folder = default_cache() / "data" / read_run(run).data.folder
    return Job("0009", config, str(run), DataSource(str(folder), "folder"), gpus=gpus)


@pytest.fixture
def run(small_run: UPath, tmp_path: Path) -> UPath:
    import shutil

    return UPath(shutil.copytree(str(small_run), tmp_path / "run"))


def test_memory_that_runs_out_halves_the_micro_batch_and_not_the_batch(device: torch.device, run: UPath) -> None:
    if device.type != "cuda":
        pytest.skip("only a GPU's memory can be limited")
    config = dataclasses.replace(CONFIG, backbone="vit_scratch", image_size=192, epochs=1, batch_size=64, width=1.0)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.empty_cache()
    share = min(1.0, (torch.cuda.memory_allocated(device) + 1.2e9) / total)
    try:
        assert run_trial(a_job(run, config, share), Alone()).outcome is Outcome.FINISHED
    finally:
        memory.take_share(1.0)
    (made,) = [candidate for candidate in list_candidates(run) if candidate.id == "0009"]
    assert made.info.config is not None
    assert made.info.config.accumulate > 1
    assert made.info.config.batch_size == 64


def test_a_trial_that_shares_a_gpu_gets_no_more_than_its_part(device: torch.device) -> None:
    if device.type != "cuda":
        assert memory.free_memory(device) == 0
        pytest.skip("only a GPU's memory can be limited")
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]
    whole = memory.free_memory(device)
    memory.take_share(0.25)
    try:
        assert memory.free_memory(device) <= total / 4 < whole
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(total // 2, dtype=torch.uint8, device=device)
    finally:
        memory.take_share(1.0)


def test_a_gpu_takes_its_fastest_convolutions_and_products(device: torch.device, data: Data, splits: Splits) -> None:
    if device.type != "cuda":
        pytest.skip("other devices have no such choices")
    Learner(CONFIG, data, splits, device=str(device))
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"


def test_a_smaller_evaluation_batch_is_remembered(device: torch.device) -> None:
    whole = eval_batch(device, 32)
    assert memory.halved(device, 32, whole, torch.OutOfMemoryError("CUDA out of memory")) == whole // 2
    assert eval_batch(device, 32) == whole // 2
    assert eval_batch(device, 64) >= whole // 2 or device.type == "cpu"


def test_a_trial_without_a_gpu_of_its_own_trains_on_a_cpu(device: torch.device, run: UPath) -> None:
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    assert run_trial(a_job(run, dataclasses.replace(CONFIG, epochs=1), 0.0), Alone()).outcome is Outcome.FINISHED
    assert (torch.cuda.max_memory_allocated() if device.type == "cuda" else 0) >= before


def test_features_of_a_frozen_body_are_the_cpus(device: torch.device, data: Data, splits: Splits) -> None:
    config = dataclasses.replace(CONFIG, precision="fp32", freeze_epochs=2, epochs=0, flip="none", crop=0)
    found = []
    for place in (str(device), "cpu"):
        learner = Learner(config, data, splits, device=place)
        features = Features(learner.model, config, data, learner.pixels, "fp32", None, lambda: None)
        found.append(features.rows(splits.select)[0].cpu())
    np.testing.assert_allclose(found[0], found[1], rtol=0.05, atol=0.02)


def test_latency_and_speed_are_measured_on_the_device(device: torch.device, run: UPath) -> None:
    latencies = measure_latencies(list_candidates(run), (12, 12, 3), 3, str(device))
    assert len(latencies.candidates) == 3
    assert all(latency.ms > 0 for latency in latencies.candidates.values())
    if device.type == "cuda":
        assert torch.cuda.get_device_name(device) in latencies.device
    assert training_rate(device.type) > 0


def test_what_a_gpu_trained_is_exported_and_answers_alike(device: torch.device, run: UPath, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from ensemble.export import export
    from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
    from trainables.data.dataset import open_data
    from trainables.run_directory import read_run

    assert run_trial(a_job(run, CONFIG, 1.0), Alone()).outcome is Outcome.FINISHED
    fingerprint = read_run(run).split_fingerprint
    write_ensemble(run, Ensemble("one", (Member("0009", 1.0),), "hand", fingerprint, {"select": {"accuracy": 1.0}}))
    export([run], read_ensemble(run, "one"), tmp_path / "one.onnx", "onnx")
    data = open_data(a_job(run, CONFIG, 1.0).data.path)
    (made,) = [candidate for candidate in list_candidates(run) if candidate.id == "0009"]
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx")
    rows = np.load(Path(str(run)) / "splits.npz")["select"]
    probs = np.concatenate([session.run(["probs"], {"images": data.images[row][None]})[0] for row in rows])
    assert (probs.argmax(1) == made.probs("select").argmax(1)).mean() > 0.9


def test_nccl_with_one_rank(
    device: torch.device, data: Data, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        learner = Learner(CONFIG, data, splits, device=str(device))
        learner.world = 2  # as among two: what is summed over ranks goes through the library
        assert learner.over_ranks([1.5, 2.5]) == [1.5, 2.5]
        assert learner.agreed({"a": 1}) == {"a": 1}
        learner.world = 1
        batch = learner.begin_epoch(0)[0]
        assert np.isfinite(float(learner.step(batch, 0.0)))
    finally:
        dist.destroy_process_group()


def test_a_long_training_is_compiled_and_ends_as_one_that_is_not(
    device: torch.device, data: Data, splits: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if device.type != "cuda":
        pytest.skip("only there it is done; tests/trainables/training/test_compiled.py compiles for a CPU")
    data = dataclasses.replace(data, cache=tmp_path)
    plain = train(CONFIG, data, splits, device=str(device))
    assert not (tmp_path / "compiled").exists()  # 30 steps do not win it back
    monkeypatch.setattr(compiled, "COMPILING_S", 0.0)
    monkeypatch.setattr(compiled.Compiling, "saves", lambda known, steps: 1.0 if known.step_s else -1.0)
    for accumulate, modes in ((1, 2), (3, 1)):  # no graphs where gradients are added up
        config = dataclasses.replace(CONFIG, accumulate=accumulate)
        faster = train(config, data, splits, device=str(device))
        (memory,) = (tmp_path / "compiled").iterdir()
        rows = json.loads(memory.read_text())["modes"]
        memory.unlink()
        print(rows)
        assert len(rows) == modes
        assert any(row["step_s"] and row["step_s"] < row["plain_step_s"] for row in rows)
        assert faster.metrics["select_accuracy"] > plain.metrics["select_accuracy"] - 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_low_rank_adapters_learn_on_the_device(
    device: torch.device, data: Data, splits: Splits, tmp_path: Path, precision: str
) -> None:
    config = TrialConfig(
        backbone="test_vit", pretrained=True, image_size=32, epochs=5, batch_size=12, lr=3e-3, lora=4,
        precision=precision,
    )  # fmt: skip
    state = build(dataclasses.replace(config, pretrained=False, lora=0), len(data.classes)).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "test_vit.safetensors")
    weights = WeightSource("file", str(tmp_path / "test_vit.safetensors"))
    found = train(config, data, splits, weights=weights, device=str(device))
    assert found.curve[-1]["train_loss"] < found.curve[0]["train_loss"]
    assert found.model.state_dict().keys() == state.keys()


def test_a_training_that_was_cut_goes_on_from_what_the_thread_wrote(
    device: torch.device, data: Data, splits: Splits, tmp_path: Path
) -> None:
    path = UPath(tmp_path / "state.safetensors")
    cut = train(CONFIG, data, splits, lambda row: row["epoch"] == 3, checkpoint=path, device=str(device))
    assert cut.outcome == "pruned"
    again = train(CONFIG, data, splits, checkpoint=path, device=str(device))
    assert again.resumed == [3]
    assert [row["epoch"] for row in again.curve] == list(range(1, 9))
    assert again.metrics["select_accuracy"] > 0.8
