"""What the parts of the usual tuning are worth: a pretrained backbone tuned as the default space does, less one part.

    python -m benchmarks.recipe --data folder --data-dir data/trash --images 400 --size 128 --epochs 9 [--seeds 3]

Every seed draws its images to learn from, and tunes once for each variant on the same ones; the others, up to
--held-out, tell how accurate it is. Nothing is chosen by them. What is done is kept in the JSON file and not repeated.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

from benchmarks.parts import draw_part
from ensemble.show import make_console
from search.spaces.auto import usual_tuning
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits
from trainables.errors import UserError, exit_on_user_error
from trainables.models.weights import find_weights
from trainables.train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "statistics of the batches": {"frozen_norm": False},
    "no crops": {"scale": 1.0},
    "no jitter": {"jitter": 0.0},
    "no label smoothing": {"label_smoothing": 0.0},
    "no dropout": {"dropout": 0.0},
    "no weight decay": {"weight_decay": 0.0},
    "no mirrored predictions": {"tta": "none"},
}
BASE = "as it is"


@dataclass(frozen=True)
class Recipe:
    """Compare the usual tuning of a pretrained backbone with the same less one of its parts."""

    data: str = "folder"
    """As --data of search.run."""
    data_dir: Path = Path("data/trash")
    backbone: str = "tf_efficientnet_lite0"
    images: int = 400
    """Images to learn from."""
    held_out: int = 1200
    """Most of the others that are predicted."""
    size: int = 128
    """Side in pixels."""
    epochs: int = 9
    seeds: int = 3
    variants: tuple[str, ...] = ()
    """Only those whose name contains one of these, and the whole."""
    json: Path = Path("recipe.json")


def measured(args: Recipe, data: Data, variant: str, seed: int) -> dict[str, float]:
    """Accuracy and log-loss on the images held out, and the CPU seconds that it took."""
    sizes = args.images, min(args.held_out, len(data.labels) - args.images)
    with tempfile.TemporaryDirectory() as cache:
        part, (learned, held) = draw_part(data, sizes, seed, Path(cache))
        splits = Splits(learned, held, held, True, part.fingerprint)
        usual = replace(usual_tuning(args.backbone, args.size, args.epochs), seed=seed)
        began = time.process_time()
        weights = find_weights(args.backbone)
        trained = train(replace(usual, **VARIANTS[variant]), part, splits, weights=weights, device="cpu")
        seconds = time.process_time() - began
    metrics = trained.metrics
    return {"accuracy": metrics["tune_accuracy"], "log_loss": metrics["tune_log_loss"], "images": len(learned),
            "held_out": len(held), "seconds": round(seconds, 1)}  # fmt: skip


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Recipe, description=__doc__, prog="python -m benchmarks.recipe")
        chosen = [v for v in VARIANTS if v == BASE or not args.variants or any(part in v for part in args.variants)]
        data = prepare(args.data, args.data_dir)
        if args.images >= len(data.labels):
            raise UserError(f"--images is {args.images}, expected fewer than the {len(data.labels)} of {args.data_dir}")
        results: dict[str, dict[str, float]] = json.loads(args.json.read_text()) if args.json.exists() else {}
        for seed in range(args.seeds):
            for variant in chosen:
                if _key(args, variant, seed) not in results:
                    results[_key(args, variant, seed)] = measured(args, data, variant, seed)
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
                    print(_key(args, variant, seed), results[_key(args, variant, seed)], flush=True)
        show(args, {variant: [results[_key(args, variant, seed)] for seed in range(args.seeds)] for variant in chosen})


def _key(args: Recipe, variant: str, seed: int) -> str:
    return f"{args.data_dir.name} {args.backbone} {args.images} {args.size} {args.epochs} {seed} {variant}"


def show(args: Recipe, rows: dict[str, list[dict[str, float]]]) -> None:
    def column(variant: str, name: str) -> np.ndarray:
        return np.array([row[name] for row in rows[variant]])

    table = Table(title=f"{args.backbone}, {args.images} of {args.data_dir}, {args.size} px, {args.epochs} epochs")
    table.add_column("tuned")
    for heading in ("accuracy, held out", "difference by seed, points", "log-loss", "CPU seconds"):
        table.add_column(heading, justify="right")
    for variant in rows:
        points = 100 * (column(variant, "accuracy") - column(BASE, "accuracy"))
        table.add_row(
            variant, f"{100 * column(variant, 'accuracy').mean():.2f} %",
            "" if variant == BASE else " ".join(f"{point:+.1f}" for point in points),
            f"{column(variant, 'log_loss').mean():.4f}", f"{column(variant, 'seconds').mean():.0f}",
        )  # fmt: skip
    make_console().print(table)


if __name__ == "__main__":
    main()
