"""What freeze epochs cost: five epochs of a head on a frozen backbone, with the stored features and without.

    python -m benchmarks.freeze --data-dir data/intel96 [--images 10000] [--repeats 3] [--json FILE]

tf_efficientnet_lite0 at 96 pixels, five freeze epochs, wall time of the whole train() call (network built, weights
loaded, every epoch evaluated). Rows:

- one pass: the backbone's features of all images, once, and nothing else.
- ours, the first time: nothing is stored yet.
- ours, from the cache: what every later trial of a sweep pays.
- without the cache: the same train(), with every step and evaluation through the whole network.

Accuracy is that of the select split, a tenth of the images. Figures are medians over the repeats; the row without the
cache is measured once. Takes about five minutes on two idle cores.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from trainables import features
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, draw
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import autocast, eval_batch
from trainables.job import WeightSource
from trainables.models.backbones import build, normalisation
from trainables.models.weights import find_weights, read_pretrained
from trainables.train import train
from trainables.training.augment import Pixels

CONFIG = TrialConfig(
    backbone="tf_efficientnet_lite0", pretrained=True, image_size=96, epochs=0, freeze_epochs=5, batch_size=128, lr=3e-3
)


@dataclass(frozen=True)
class Freeze:
    """Five freeze epochs: with stored features, and without."""

    data_dir: Path = Path("data/intel96")
    """Labelled photographs, as train/<class>/*."""
    images: int = 10_000
    """How many of them, the tenths for tune and select included."""
    repeats: int = 3
    """How often each is measured."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def one_pass(data: Data, weights: WeightSource, precision: str) -> None:
    pixels = Pixels.of(*normalisation(CONFIG.backbone, True, data.mean, data.std), device=torch.device("cpu"))
    tensors = read_pretrained(CONFIG.backbone, weights)
    model = build(CONFIG, len(data.classes), tensors).to(memory_format=torch.channels_last).eval()
    batch = eval_batch(torch.device("cpu"), CONFIG.image_size)
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        for start in range(0, len(data.images), batch):
            x = pixels(torch.from_numpy(data.images[start : start + batch]), CONFIG.image_size)
            model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]


def part_of(options: Freeze, folder: Path) -> tuple[Data, Splits]:
    """So many images as a data set of their own, with an empty cache in `folder`."""
    data = prepare("folder", options.data_dir)
    if len(data.labels) < options.images:
        raise UserError(f"{options.data_dir} has {len(data.labels)} train images; lower --images")
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.labels))[: options.images])
    labels = data.labels[chosen]
    tune, select = draw(labels, [0.1, 0.1], seed=0)
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([tune, select]))
    images = np.ascontiguousarray(data.images[chosen])
    fingerprint = f"{data.fingerprint}-{options.images}"
    path = folder / "data" / "part"
    part = replace(data, images=images, labels=labels, fingerprint=fingerprint, path=path, cache=folder)
    return part, Splits(rest, tune, select, False, fingerprint)


def measure(options: Freeze) -> dict[str, Any]:
    weights = find_weights(CONFIG.backbone)
    seconds: dict[str, list[float]] = {"one pass": [], "first": [], "cached": [], "uncached": []}
    accuracy: dict[str, float] = {}

    def clock(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - begin)
        return result

    with tempfile.TemporaryDirectory() as folder:
        data, splits = part_of(options, Path(folder))
        # the choice of a precision is measured once per machine, and is not what is measured here
        precision = train(replace(CONFIG, epochs=1, freeze_epochs=0), data, few(splits), weights=weights).precision
        config = replace(CONFIG, precision=precision)  # type: ignore[arg-type]
        for _ in range(options.repeats):
            clock("one pass", lambda: one_pass(data, weights, precision))
            forget(Path(folder))
            clock("first", lambda: train(config, data, splits, weights=weights))
            trained = clock("cached", lambda: train(config, data, splits, weights=weights))
            accuracy["cached"] = trained.metrics["select_accuracy"]
        forget(Path(folder))
        with mock.patch.object(features, "_takes_vectors", return_value=False):
            trained = clock("uncached", lambda: train(config, data, splits, weights=weights))
            accuracy["uncached"] = trained.metrics["select_accuracy"]
    return {
        "images": options.images, "precision": precision, "select_images": len(splits.select),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "select_accuracy": accuracy, "repeats": seconds,
    }  # fmt: skip


def forget(cache: Path) -> None:
    """Leave nothing that a trial has stored of its frozen epochs."""
    for path in [*cache.glob("features/*.npy"), *cache.glob("heads/*")]:
        path.unlink()


def few(splits: Splits) -> Splits:
    """Enough for one step."""
    batch = splits.train[: CONFIG.batch_size]
    return Splits(batch, splits.tune[:10], splits.tune[:10], True, "")


def report(figures: dict[str, Any], path: Path | None) -> None:
    pass_s = figures["seconds"]["one pass"]
    table = Table(
        title=f"{CONFIG.freeze_epochs} freeze epochs of {CONFIG.backbone} at {CONFIG.image_size} pixels, "
        f"{figures['images']} images, {figures['precision']}, {os.cpu_count()} cores"
    )
    table.add_column("")
    for column in ("seconds", "of one pass", f"select accuracy ({figures['select_images']} images)"):
        table.add_column(column, justify="right")
    names = {
        "one pass": "one pass of feature extraction", "first": "ours, the first time", "cached": "ours, from the cache",
        "uncached": "without the cache",
    }  # fmt: skip
    for key, name in names.items():
        accuracy = figures["select_accuracy"].get(key)
        seconds = figures["seconds"][key]
        table.add_row(name, f"{seconds:.2f}", f"{seconds / pass_s:.1%}", f"{accuracy:.2%}" if accuracy else "")
    Console(width=max(100, Console().width)).print(table)
    if path is not None:
        path.write_text(json.dumps({"cores": os.cpu_count(), **figures}, indent=1) + "\n")


def main() -> None:
    with exit_on_user_error():
        options = tyro.cli(Freeze, description=Freeze.__doc__, prog="python -m benchmarks.freeze")
        report(measure(options), options.json)


if __name__ == "__main__":
    main()
