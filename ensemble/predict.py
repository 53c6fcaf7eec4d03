"""python -m ensemble.predict --images FOLDER --out predictions.csv : what an ensemble says about new images."""

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from upath import UPath

from ensemble.ensemble import Ensemble, read_ensemble
from trainables.augment import Pixels
from trainables.backbones import load_model
from trainables.candidate import Candidate, open_run, read_json, read_run, write_json
from trainables.config import TrialConfig
from trainables.data import read_images
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import pick_device, predict_probs

BATCH = 500  # images between two writes to the file
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Predict:
    """Predict a folder of images with an ensemble. Repeating the command goes on where it stopped."""

    images: Path
    """Folder of images; its subfolders are searched too."""
    out: Path = Path("predictions.csv")
    """CSV to write: id (file name without ending, or path when names repeat), label."""
    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: the newest under runs/."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    probs: bool = False
    """Add a column per class with its probability."""


def candidate_predictor(candidate: Candidate, device: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 images (N, H, W, 3) to float32 probabilities (N, C), as the candidate predicted its splits.

    Raises UserError when the candidate has no weights or they do not fit.
    """
    place = pick_device(device)
    model = load_model(candidate, place)
    info = candidate.info
    config = TrialConfig.from_dict(info["config"])
    pixels = Pixels.of(info["mean"], info["std"], place)
    precision = info.get("precision", "fp32") if place.type == "cuda" or info.get("precision") != "fp16" else "fp32"
    size = info.get("image_size", config.image_size)
    return lambda images: predict_probs(model, images, None, pixels, size, config.tta, precision)


def ensemble_predictor(run: UPath, ensemble: Ensemble, device: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """As `candidate_predictor`, for a whole ensemble, combined as it was when it was chosen."""
    predictors = [candidate_predictor(member.candidate(run), device) for member in ensemble.members]
    return lambda images: ensemble.predict([predict(images) for predict in predictors])


def find_images(folder: Path) -> dict[str, Path]:
    """The images below a folder by id, sorted; raises UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist; name one with --images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise UserError(f"no images below {folder}; expected files ending in {', '.join(ENDINGS)}")
    by_stem = {path.stem: path for path in paths}
    if len(by_stem) == len(paths):
        return by_stem
    return {str(path.relative_to(folder)): path for path in paths}


def predict_folder(args: Predict) -> tuple[int, int]:
    """Write the CSV; returns how many images have a row, and how many of these could not be read (empty label)."""
    images = find_images(args.images)
    run = open_run(args.run)
    info = read_run(run)
    classes = [str(name) for name in info["classes"]]
    ensemble = read_ensemble(run, args.ensemble)
    header = ["id", "label", *(classes if args.probs else [])]
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"folder {args.out.absolute().parent} does not exist; make it, or name another --out")
    done = _rows_done(args.out, header, _origin(args, run, ensemble))
    predict = ensemble_predictor(run, ensemble)
    height, width = info.get("data", {}).get("size", (224, 224))
    todo = [id for id in images if id not in done]
    unreadable = 0
    with open(args.out, "a", newline="") as file:
        writer = csv.writer(file)
        if not done and file.tell() == 0:
            writer.writerow(header)
        for ids in _progress(todo):
            pictures = {
                i: p
                for i, (_, p) in enumerate(read_images([images[id] for id in ids], (height, width)))
                if p is not None
            }
            good = list(pictures)
            rows = [[id, "", *([""] * (len(header) - 2))] for id in ids]
            if good:
                probs = predict(np.stack(list(pictures.values())))
                for i, p in zip(good, probs, strict=True):
                    rows[i] = [ids[i], classes[int(p.argmax())], *(f"{x:.6f}" for x in (p if args.probs else []))]
            unreadable += len(ids) - len(good)
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
    return len(images), unreadable


def _origin(args: Predict, run: UPath, ensemble: Ensemble) -> dict[str, Any]:
    """What a prediction depends on besides the image."""
    return {
        "run": str(run.absolute()), "ensemble": ensemble.name, "created": ensemble.created,
        "images": str(args.images.absolute()),
    }  # fmt: skip


def _rows_done(out: Path, header: list[str], origin: dict[str, Any]) -> set[str]:
    """Ids that the file already answers; a last line that was cut in the middle is removed from it.

    What made the file stands beside it, as <out>.json: rows of another ensemble are never mixed in.
    """
    beside = UPath(out.with_name(out.name + ".json"))
    if not out.exists():
        write_json(beside, origin)
        return set()
    if not beside.exists() or read_json(beside) != origin:
        raise UserError(f"{out} holds predictions of another ensemble or folder; remove it or name another --out")
    text = out.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if rows and rows[0] != header:
        raise UserError(f"{out} has other columns ({', '.join(rows[0][:4])} ...); remove it or name another --out")
    if whole != text:
        out.write_text(whole)
    return {row[0] for row in rows[1:]}


def _progress(ids: list[str]) -> Iterator[list[str]]:
    from rich.progress import track

    parts = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    yield from track(parts, description="predicting", disable=not os.isatty(2))


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Predict, description=Predict.__doc__, prog="python -m ensemble.predict")
        total, unreadable = predict_folder(args)
        note = f", {unreadable} of them unreadable and without a label" if unreadable else ""
        print(f"{total} images in {args.out}{note}")


if __name__ == "__main__":
    main()
