"""What a GPU's speed becomes in training: images per second, beside pure compute in the same precision.

    python -m benchmarks.gpu [--only NAME] [--repeats 3] [--scale 1] [--json FILE]

Random pictures, so no data are needed; neither Ray nor Optuna is imported. Rows:

- speednet at 32 pixels, 50,000 pictures in batches of 1,000: a step is short, so what the CPU does between two shows.
- resnet50 and vit_small_patch16_224 at 224 pixels, in batches of 128.

"ours" is the last of three epochs of trainables.train.train(), as the curve of a trial reports it: augmentation, steps,
everything but the evaluation. "pure" is forward and backward on one batch that lies in memory, and nothing else. Both
are measured in turn; figures are medians over the repeats. FILE is written after each row. Tried on a CPU only so far.
"""

import json
import statistics
import tempfile
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

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import autocast, pick_device
from trainables.models.backbones import build
from trainables.train import train
from trainables.training import feed

CLASSES, HELD = 10, 100
PLAIN = TrialConfig(epochs=3, flip="random", lr=1e-3, optimizer="adamw")
# name -> configuration, and pictures that an epoch takes
NETWORKS: dict[str, tuple[TrialConfig, int]] = {
    "speednet": (
        replace(PLAIN, backbone="speednet", optimizer="muon", lr=0.2, momentum=0.6, crop=2, batch_size=1000), 50_000,
    ),
    "resnet50": (replace(PLAIN, backbone="resnet50", image_size=224, batch_size=128, scale=0.35), 4096),
    "vit_small_patch16_224": (
        replace(PLAIN, backbone="vit_small_patch16_224", image_size=224, batch_size=128, scale=0.35), 4096,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """Images per second in training on this machine's GPU: ours and pure compute."""

    only: str | None = None
    """One of the networks."""
    repeats: int = 3
    """How often each is measured."""
    scale: float = 1.0
    """Factor on the pictures of an epoch; less than 1 to try it."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def pictures(count: int, size: int, cache: Path) -> Data:
    """Random ones."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count + HELD, size, size, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, count + HELD)
    names = tuple(f"class {number}" for number in range(CLASSES))
    return Data(
        name="random pictures", classes=names, images=images, labels=labels, fingerprint=f"{count}-{size}",
        path=cache / "data", cache=cache, test_images=0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip


def ours(config: TrialConfig, data: Data, device: torch.device) -> tuple[float, str]:
    """Images per second of the last epoch, and the precision that was chosen."""
    rows = np.arange(len(data.labels))
    splits = Splits(rows[HELD:], rows[:HELD], rows[:HELD], True, "")
    trained = train(config, data, splits, device=str(device))
    return trained.curve[-1]["images_per_second"], trained.precision


def pure(config: TrialConfig, precision: str, steps: int, device: torch.device) -> float:
    torch.manual_seed(0)
    model = build(config, CLASSES).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    size = config.image_size
    x = torch.randn(config.batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (config.batch_size,), device=device)
    begin = 0.0
    for step in range(-5, steps):
        if step == 0:
            _wait(device)
            begin = time.perf_counter()
        with autocast(device, precision):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        model.zero_grad(set_to_none=True)
    _wait(device)
    return steps * config.batch_size / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, options: Gpu, device: torch.device) -> dict[str, Any]:
    config, count = NETWORKS[name]
    count = max(config.batch_size * 2, round(options.scale * count))
    speeds: dict[str, list[float]] = {"ours": [], "pure": []}
    with tempfile.TemporaryDirectory() as cache:
        data = pictures(count, config.image_size, Path(cache))
        for _ in range(options.repeats):
            speed, precision = ours(config, data, device)
            speeds["ours"].append(speed)
            speeds["pure"].append(pure(config, precision, max(2, count // config.batch_size), device))
        feed._resident.clear()
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    return {
        "network": name, "image_size": config.image_size, "batch_size": config.batch_size, "precision": precision,
        **medians, "ours_over_pure": medians["ours"] / medians["pure"], "repeats": speeds,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], card: str) -> None:
    table = Table(title=f"Images per second in training, {card}, torch {torch.__version__}")
    for column in ("network", "pixels", "batch", "precision", "ours", "pure compute", "ours / pure"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(
            row["network"], str(row["image_size"]), str(row["batch_size"]), row["precision"], f"{row['ours']:.0f}",
            f"{row['pure']:.0f}", f"{row['ours_over_pure']:.2f}",
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Gpu, description=Gpu.__doc__, prog="python -m benchmarks.gpu")
        if options.only is not None and options.only not in NETWORKS:
            raise UserError(f"--only is {options.only}, expected {', '.join(NETWORKS)}")
        device, rows = pick_device(), []
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU, {device.type}"
        for name in [options.only] if options.only else NETWORKS:
            rows.append(measure(name, options, device))
            if options.json is not None:
                figures = {"card": card, "torch": torch.__version__, "rows": rows}
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
        report(rows, card)


if __name__ == "__main__":
    main()
