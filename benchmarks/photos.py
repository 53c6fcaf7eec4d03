"""The default sweep on folders of photographs, against what a person would write in an afternoon.

    python -m benchmarks.photos --data-dir data [--minutes 8] [--seeds 3] [--only trash] [--json FILE]

One machine, one after the other, at the same wall time: `python -m search.run` with nothing but the data and --minutes;
a plain script (EfficientNet-lite0 fine-tuned at 128 pixels, see `fine_tuned`); and logistic regression on its frozen
features at 224 pixels, which takes what it takes. A fifth of the labelled photographs is held out before anything
starts, and all three are scored on it alone. What is done is kept in the JSON file, and not done again.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from trainables.config import TrialConfig
from trainables.models.backbones import build
from trainables.models.weights import find_weights, read_pretrained

BACKBONE = "tf_efficientnet_lite0"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HELD_OUT = 0.2
RESERVE_S = 20.0  # of the plain script's time, for its start and its predictions


@dataclass(frozen=True)
class Photos:
    """Compare the default sweep with a plain script and with logistic regression."""

    data_dir: Path = Path("data")
    """Folder with trash/train and intel96/train."""
    minutes: tuple[float, ...] = (8.0,)
    seeds: int = 3
    only: tuple[str, ...] = ("trash", "intel")
    sides: tuple[Literal["sweep", "script", "regression"], ...] = ("sweep", "script", "regression")
    images: int | None = None
    """Number of labelled images to learn from, drawn by seed; the rest is held out."""
    json: Path = Path("photos.json")


def labelled(args: Photos, name: str, seed: int) -> tuple[list[Path], list[Path]]:
    """Files to learn from and files held out, stratified by class; of Intel 3,000 are taken."""
    source = args.data_dir / {"trash": "trash/train", "intel": "intel96/train"}[name]
    random = np.random.RandomState(seed)
    files = sorted(path for path in source.glob("*/*") if path.is_file())
    if name == "intel":
        files = [files[i] for i in np.sort(np.random.RandomState(0).permutation(len(files))[:3000])]
    learn: list[Path] = []
    for folder in sorted({path.parent for path in files}):
        own = [path for path in files if path.parent == folder]
        share = 1 - HELD_OUT if args.images is None else args.images / len(files)
        learn += [own[i] for i in random.permutation(len(own))[: max(3, round(share * len(own)))]]
    return learn, sorted(set(files) - set(learn))


def copied(files: list[Path], to: Path) -> Path:
    """The files in class folders below `to`."""
    for path in files:
        (to / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.parent.name / path.name)
    return to


def swept(folder: Path, held: Path, minutes: float, seed: int, work: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The default command, and its ensemble's labels by path; and what it claimed."""
    run = work / "run"
    search = [sys.executable, "-m", "search.run", "--data", "folder", "--data-dir", str(folder), "--run", str(run)]
    subprocess.run([*search, "--minutes", str(minutes), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
    csv = work / "predictions.csv"
    predict = [sys.executable, "-m", "ensemble.predict", "--run", str(run), "--images", str(held), "--out", str(csv)]
    subprocess.run(predict, check=True, stdout=subprocess.DEVNULL)
    rows = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    report = json.loads((run / "report.json").read_text())
    claim = report["select"]["claim"]
    return {row[0]: row[1] for row in rows}, {"claimed": claim["accuracy"], "interval": claim["interval"]}


def network(classes: int) -> nn.Module:
    weights = read_pretrained(BACKBONE, find_weights(BACKBONE))
    return build(TrialConfig(backbone=BACKBONE, pretrained=True, dropout=0.1), classes, weights)


def fine_tuned(
    folder: Path, held: Path, minutes: float, seed: int, work: Path
) -> tuple[dict[str, str], dict[str, Any]]:
    """The plain script: random resized crops, flip, jitter, AdamW at 5e-4 for the body and 5e-3 for the head."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    norm = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose(
        [v2.RandomResizedCrop(128, (0.35, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), *norm]
    )
    plain = v2.Compose([v2.Resize((128, 128)), *norm])
    data = ImageFolder(str(folder), augmented)
    model = network(len(data.classes)).to(memory_format=torch.channels_last)
    head = list(model.get_classifier().parameters())  # type: ignore[operator]
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": body, "lr": 5e-4}, {"params": head, "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    loader = DataLoader(data, batch_size=min(32, max(4, len(data) // 4)), shuffle=True, drop_last=True)

    def step(x: Tensor, y: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

    for group in optimizer.param_groups:  # how long is a step? at a rate that changes nothing
        group["lr"] = 0.0
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    step(*next(batches))
    since = time.perf_counter()
    for _ in range(4):
        step(*next(batches))
    each = (time.perf_counter() - since) / 4
    left = 60 * minutes - RESERVE_S - (time.perf_counter() - began)
    epochs = max(1, int(left / each / len(loader)))
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [5e-4, 5e-3], total_steps=steps + 1, pct_start=0.2)
    for _ in range(epochs):
        for x, y in loader:
            step(x, y)
            schedule.step()
    return predicted(model, data.classes, held, plain), {"epochs": epochs}


@torch.inference_mode()
def predicted(model: nn.Module, classes: list[str], held: Path, transform: Callable[[Any], Tensor]) -> dict[str, str]:
    model.eval()
    data = ImageFolder(str(held), transform)
    found = []
    for x, _ in DataLoader(data, batch_size=16):
        found += (model(x).softmax(1) + model(x.flip(3)).softmax(1)).argmax(1).tolist()
    return {_id(Path(path), held): classes[i] for (path, _), i in zip(data.samples, found, strict=True)}


@torch.inference_mode()
def regressed(folder: Path, held: Path, minutes: float, seed: int, work: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Logistic regression on frozen features at 224 pixels, as scikit-learn does it by default."""
    norm = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    plain = v2.Compose([v2.Resize((224, 224)), *norm])
    model = network(2).eval()

    def features(data: ImageFolder) -> np.ndarray:
        rows = [model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in DataLoader(data, 16)]  # type: ignore[operator]
        return torch.cat(rows).numpy()

    learn, rest = ImageFolder(str(folder), plain), ImageFolder(str(held), plain)
    x = features(learn)
    mean, std = x.mean(0), x.std(0) + 1e-6
    regression = LogisticRegression(max_iter=1000).fit((x - mean) / std, learn.targets)
    labels = regression.predict((features(rest) - mean) / std)
    names = [_id(Path(path), held) for path, _ in rest.samples]
    return {name: learn.classes[i] for name, i in zip(names, labels, strict=True)}, {}


def _id(path: Path, folder: Path) -> str:
    """As `ensemble.predict` names a picture: its path below the folder, without the ending."""
    return path.relative_to(folder).with_suffix("").as_posix()


SIDES = {"sweep": swept, "script": fine_tuned, "regression": regressed}


def measured(args: Photos, name: str, seed: int, minutes: float, side: str) -> dict[str, Any]:
    """Accuracy on the held-out photographs, and seconds."""
    learn, held = labelled(args, name, seed)
    with tempfile.TemporaryDirectory(prefix="photos-") as folder:
        work = Path(folder)
        pictures, rest = copied(learn, work / f"{name}"), copied(held, work / "held")
        began = time.perf_counter()
        labels, extra = SIDES[side](pictures, rest, minutes, seed, work)
        seconds = time.perf_counter() - began
        right = [labels[f"{path.parent.name}/{path.stem}"] == path.parent.name for path in held]
    return {"accuracy": float(np.mean(right)), "images": len(right), "learned from": len(learn),
            "seconds": round(seconds, 1), **extra}  # fmt: skip


def _key(args: Photos, name: str, seed: int, minutes: float, side: str) -> str:
    return f"{name} {args.images or 'all'} {seed} {'any' if side == 'regression' else f'{minutes:g}'} {side}"


def main() -> None:
    args, console = tyro.cli(Photos, prog="python -m benchmarks.photos"), Console()
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for minutes in args.minutes:
        for name in args.only:
            for seed in range(args.seeds):
                for side in args.sides:
                    key = _key(args, name, seed, minutes, side)
                    if key not in results:
                        results[key] = measured(args, name, seed, minutes, side)
                        args.json.write_text(json.dumps(results, indent=1) + "\n")
                        console.print(key, results[key])
    table = Table(title="accuracy on held-out photographs, %")
    for heading in ("data", "minutes", "seed", *args.sides, "first minus the best other"):
        table.add_column(heading, justify="right")
    for minutes in args.minutes:
        gains = []
        for name in args.only:
            for seed in range(args.seeds):
                found = [results[_key(args, name, seed, minutes, side)] for side in args.sides]
                own, *others = [100 * one["accuracy"] for one in found]
                gains.append(own - max(others))
                cells = [f"{value:.2f}" for value in (own, *others)]
                table.add_row(name, f"{minutes:g}", str(seed), *cells, f"{gains[-1]:+.2f}")
        table.add_row("mean", f"{minutes:g}", "", *("" for _ in args.sides), f"{np.mean(gains):+.2f}", end_section=True)
    console.print(table)


if __name__ == "__main__":
    main()
