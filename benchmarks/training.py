"""How much of the machine's speed a trial's training gets, beside a plain PyTorch loop and beside pure compute.

    python -m benchmarks.training --data-dir data/cifar10 [--repeats 3] [--scale 1] [--json FILE]

Images per second on CIFAR-10's train images, for three networks:

- ours: an epoch of trainables.train.train(), as the curve of a trial reports it (augmentation, steps, everything but
  the evaluation), in the precision that it measured to be fastest.
- pure: forward and backward passes on one batch that lies in memory, in that precision; no data, no optimiser.
- plain: ImageFolder, torchvision's transforms, a DataLoader with two workers, AdamW, fp32.

Each warms up first. The three are measured in turn, again and again; figures are medians over the repeats. Takes about
six minutes on two idle cores; other work on the machine shows in every row.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import autocast
from trainables.models.backbones import build
from trainables.train import Trained, train

AUGMENTED = TrialConfig(epochs=5, flip="random", crop=2)  # five, so that an early epoch is like any other
# network -> configuration, and images that an epoch takes here
NETWORKS = {
    "speednet": (
        replace(AUGMENTED, backbone="speednet", optimizer="muon", lr=0.9, body_lr=0.2, momentum=0.6, batch_size=500),
        4000,
    ),
    "resnet18, small stem": (replace(AUGMENTED, backbone="resnet18", stem="small"), 1024),
    "tf_efficientnet_lite0 at 96": (
        replace(AUGMENTED, backbone="tf_efficientnet_lite0", image_size=96, batch_size=64),
        1024,
    ),
}


@dataclass(frozen=True)
class Training:
    """Images per second in training: ours, pure compute, a plain PyTorch loop."""

    data_dir: Path = Path("data/cifar10")
    """CIFAR-10 as train/<class>/*.png."""
    repeats: int = 3
    """How often each is measured."""
    scale: float = 1.0
    """Factor on the images of a measurement; less than 1 to try it."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def ours(config: TrialConfig, data: Data, images: np.ndarray) -> Trained:
    """Two epochs on `images`; the second one counts."""
    few = images[:100]  # evaluated after each epoch, outside the clock
    return train(config, data, Splits(images, few, few, True, ""), report=lambda metrics: metrics["epoch"] == 2)


def pure(config: TrialConfig, data: Data, steps: int, precision: str) -> float:
    """Images per second of forward and backward passes on one batch that lies in memory."""
    torch.manual_seed(0)
    model = build(config, len(data.classes)).to(memory_format=torch.channels_last).train()
    size = config.image_size
    x = torch.randn(config.batch_size, 3, size, size).to(memory_format=torch.channels_last)
    y = torch.randint(0, len(data.classes), (config.batch_size,))
    begin = 0.0
    for step in range(-2, steps):
        if step == 0:
            begin = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        model.zero_grad(set_to_none=True)
    return steps * config.batch_size / (time.perf_counter() - begin)


def plain(config: TrialConfig, data: Data, folder: Path, steps: int) -> float:
    """Images per second of the loop that a tutorial teaches, once its workers have started."""
    size = config.image_size
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=2, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            *([transforms.Resize(size)] if size != 32 else []),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    images = ImageFolder(str(folder), transform)
    warm_up = 4  # also empties the queue of batches that were prepared meanwhile
    chosen = np.random.default_rng(0).permutation(len(images))[: (steps + warm_up) * config.batch_size]
    loader = DataLoader(Subset(images, chosen.tolist()), config.batch_size, shuffle=True, num_workers=2)
    model = build(config, len(data.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin = 0.0
    for step, (x, y) in enumerate(loader):
        if step == warm_up:
            begin = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (len(loader) - warm_up) * config.batch_size / (time.perf_counter() - begin)


def measure(options: Training) -> list[dict[str, Any]]:
    folder = options.data_dir / "train"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; name CIFAR-10's images, as train/<class>/*.png, with --data-dir")
    data = prepare("cifar10", options.data_dir)
    order = np.random.default_rng(0).permutation(len(data.labels))
    rows = []
    for name, (config, count) in NETWORKS.items():
        steps = max(2, round(options.scale * count / config.batch_size))
        images = np.sort(order[: steps * config.batch_size])
        speeds: dict[str, list[float]] = {"ours": [], "pure": [], "plain": []}
        for _ in range(options.repeats):
            trained = ours(config, data, images)
            speeds["ours"].append(trained.curve[1]["images_per_second"])
            speeds["pure"].append(pure(config, data, steps, trained.precision))
            speeds["plain"].append(plain(config, data, folder, steps))
        medians = {key: statistics.median(values) for key, values in speeds.items()}
        rows.append(
            {
                "network": name, "precision": trained.precision, "batch_size": config.batch_size, **medians,
                "ours_over_pure": medians["ours"] / medians["pure"],
                "ours_over_plain": medians["ours"] / medians["plain"], "repeats": speeds,
            }
        )  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    threads = torch.get_num_threads()
    table = Table(title=f"Images per second in training, CIFAR-10 images, {os.cpu_count()} cores, {threads} threads")
    for column in ("network", "precision", "batch"):
        table.add_column(column)
    for column in ("ours", "pure compute", "ours / pure", "plain loop", "ours / plain"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["network"], row["precision"], str(row["batch_size"]), f"{row['ours']:.0f}", f"{row['pure']:.0f}",
            f"{row['ours_over_pure']:.2f}", f"{row['plain']:.0f}", f"{row['ours_over_plain']:.1f}",
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)
    if path is not None:
        path.write_text(json.dumps({"cores": os.cpu_count(), "threads": threads, "rows": rows}, indent=1) + "\n")


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Training, description=Training.__doc__, prog="python -m benchmarks.training")
        report(measure(options), options.json)


if __name__ == "__main__":
    main()
