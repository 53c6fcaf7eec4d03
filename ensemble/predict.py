"""python -m ensemble.predict --images FOLDER --out predictions.csv : what an ensemble says about new images.

The CSV has one row an image: `id,label`, with --unsure also how sure that is, with --probs a column per class. A file's
id is its path below FOLDER without the ending (`/` between the parts); where that would name two files, every id keeps
its ending. An image that cannot be read has a row with an empty label. Rows are written in batches, and the same
command goes on where an earlier one was killed. Beside the CSV, <out>.json says what made it, and `complete` once every
image has its row.
"""

import contextlib
import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from filelock import FileLock, Timeout
from upath import UPath

from ensemble.file import Ensemble, read_ensemble
from ensemble.risk import confidence
from trainables.command import progress
from trainables.config import TestTimeAugmentation
from trainables.data.dataset import LARGEST_SIDE
from trainables.data.decode import Canvas, read_images
from trainables.data.packed import ImageRows
from trainables.data.sources import Passed, list_images
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import pick_device, predict_probs
from trainables.models.weights import load_model
from trainables.run_directory import Candidate, open_runs, read_run
from trainables.storage import check_out, read_json, write_json
from trainables.training.augment import Pixels
from trainables.training.memory import keep_memory

BATCH = 500  # images between two writes to the file, at most
BATCH_BYTES = 128 * 2**20  # of their pixels
SURE = ("confidence", "agreement", "set", "unsure")  # columns
YES_NO = {True: "yes", False: "no"}
NAMED = 5  # unreadable images that are told by name


@dataclass(frozen=True)
class Predict:
    """Predict a folder of images with an ensemble. Repeating the command goes on where it stopped."""

    images: Path
    """Folder of images; its subfolders are searched too."""
    out: Path = Path("predictions.csv")
    """CSV to write: id (path below the folder without the ending; with it where names repeat), label."""
    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    probs: bool = False
    """Add a column per class with its probability."""
    unsure: bool = False
    """Add how sure the ensemble is: `confidence`; `agreement`, the weight of the members that say the same; `set`, the
    classes among which the right one is, at the risk that was selected for, with | between; `unsure`, yes or no."""
    tta: TestTimeAugmentation | Literal["own"] = "own"
    """Views that a prediction averages over; "own": those with which each member was chosen."""
    device: str | None = None
    """cuda, mps or cpu; default: the first that there is."""
    json: Path | None = None
    """File to write the labels to as JSON, too, once every image has its row: with their counts, and the reasons of
    those that cannot be read."""


Predictor = Callable[[np.ndarray], np.ndarray]
"""From uint8 images (N, H, W, 3) to float32 probabilities (N, C)."""


def candidate_predictor(
    candidate: Candidate,
    device: str | None = None,
    tta: TestTimeAugmentation | None = None,
    precision: str | None = None,
) -> Predictor:
    """A candidate's network, loaded once. It predicts as the candidate did its splits, unless told otherwise.

    Raises UserError when the candidate has no weights or they do not fit.
    """
    place = pick_device(device)
    keep_memory(place)
    model = load_model(candidate, place)
    info = candidate.info
    assert info.config is not None  # load_model has refused it
    assert info.mean is not None
    assert info.std is not None
    pixels = Pixels.of(info.mean, info.std, place)
    if precision is None:
        precision = info.precision
        if precision == "fp16" and place.type != "cuda":
            precision = "fp32"
    size, views = info.image_size or info.config.image_size, tta or info.config.tta
    return lambda images: predict_probs(model, images, None, pixels, size, views, precision)


@dataclass(frozen=True, eq=False)
class Voters:
    """An ensemble with every member's network loaded.

    Attributes:
        ensemble: how the votes combine.
        classes: C names.
        canvas: the form of the images that it takes, as its data set stores them.
        members: one predictor each, in the ensemble's order.
    """

    ensemble: Ensemble
    classes: tuple[str, ...]
    canvas: Canvas
    members: tuple[Predictor, ...]

    @classmethod
    def load(
        cls,
        runs: Sequence[UPath],
        ensemble: Ensemble,
        device: str | None = None,
        tta: TestTimeAugmentation | None = None,
        precision: str | None = None,
    ) -> "Voters":
        """Raises UserError when a member is gone or has no weights, or the run does not say how it stores images."""
        info = read_run(runs[0])
        candidates = [member.candidate(runs) for member in ensemble.members]
        for candidate in candidates:
            if candidate.info.num_classes not in (None, len(info.classes)):
                raise UserError(
                    f"candidate {candidate.id} knows {candidate.info.num_classes} classes, its run "
                    f"{len(info.classes)}; select again with --exclude {candidate.id}"
                )
        members = [candidate_predictor(candidate, device, tta, precision) for candidate in candidates]
        if ensemble.decision.classes not in (None, len(info.classes)):
            raise UserError(f"ensemble {ensemble.name} decides among {ensemble.decision.classes} classes; select again")
        return cls(ensemble, info.classes, stored_form(runs[0]), tuple(members))

    def votes(self, images: np.ndarray) -> list[np.ndarray]:
        """Each member's probabilities, float32 (N, C), of uint8 images (N, H, W, 3) of that form."""
        return [member(images) for member in self.members]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The ensemble's probabilities, float32 (N, C), of uint8 images (N, H, W, 3) of that form."""
        return self.ensemble.predict(self.votes(images))


def predict_all(predictor: Predictor, images: ImageRows, advance: Callable[[int], None]) -> np.ndarray:
    """Probabilities, float32 (N, C), of images (N, H, W, 3), in parts, after each of which `advance` gets its size."""
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(predictor(images[start : start + BATCH]))
        advance(len(parts[-1]))
    return np.concatenate(parts)


def stored_form(run: UPath) -> Canvas:
    """Return the form to which a run's data set was decoded, and new images must be. Raises UserError if unknown."""
    data = read_run(run).data
    if data.size is None or not all(1 <= side <= LARGEST_SIDE for side in data.size):
        raise UserError(
            f"{run / 'run.json'} does not say to which size images are to be decoded; "
            f"expected data.size: [height, width], each 1 to {LARGEST_SIDE}"
        )
    return Canvas(*data.size, data.fit, data.white)


def images_at_a_time(canvas: Canvas) -> int:
    """How many decoded images are held in memory at a time."""
    return max(1, min(BATCH, BATCH_BYTES // (3 * canvas.height * canvas.width)))


def find_images(folder: Path) -> dict[str, Path]:
    """The images below a folder by id, sorted by path; raises UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist; name one with --images")
    passed = Passed()
    paths = [path for path, _, _ in list_images(folder, passed=passed)]
    notes = passed.note(folder)
    if not paths:
        more = f" ({notes[0]})" if notes else ""
        raise UserError(f"no images below {folder}; expected files ending in .jpg, .png, .webp or the like{more}")
    for note in notes:
        print(note, file=sys.stderr)
    by_stem = {os.path.splitext(path)[0]: folder / path for path in paths}
    return by_stem if len(by_stem) == len(paths) else {path: folder / path for path in paths}


def predict_folder(args: Predict) -> tuple[int, dict[str, str]]:
    """Write the CSV; returns how many rows it has, and the images without a label, by id with the reason.

    Raises UserError, before anything is written, when images or ensemble are missing or the CSV is not this one's.
    """
    images = find_images(args.images)
    runs = open_runs(args.run)
    run, ensemble = runs[0], read_ensemble(runs[0], args.ensemble)
    tta = None if args.tta == "own" else args.tta
    voters = Voters.load(runs, ensemble, args.device, tta)
    if args.unsure and ensemble.risk is None:
        raise UserError(f"ensemble {ensemble.name} does not say when it is unsure; select again")
    header = ["id", "label", *(SURE if args.unsure else []), *(voters.classes if args.probs else [])]
    check_out(args.out, "--out")
    check_out(args.json, "--json")
    beside = UPath(args.out.with_name(args.out.name + ".json"))
    origin = _origin(args, run, ensemble)
    with _alone(args.out):
        done = _rows_done(args.out, beside, header, origin)
        unreadable = {id: "found unreadable before" for id, label in done.items() if not label}
        if gone := sorted(done.keys() - images.keys()):
            raise UserError(
                f"{args.out} has rows of images that are not below {args.images} (or under other ids), such as "
                f"{gone[0]}; remove it or name another --out"
            )
        write_json(beside, {**origin, "complete": False})
        with open(args.out, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                rows.writerow(header)
            for ids, pictures, reasons in _batches(images, done, voters.canvas):
                readable = [picture for picture in pictures if picture is not None]
                answers = _answers(voters, np.stack(readable), args) if readable else iter(())
                for id, picture in zip(ids, pictures, strict=True):
                    if picture is None:
                        rows.writerow([id, *[""] * (len(header) - 1)])
                    else:
                        rows.writerow([id, *next(answers)])
                unreadable |= reasons
                file.flush()
                os.fsync(file.fileno())
        write_json(beside, {**origin, "complete": True})
        if args.json is not None:
            labels = _rows_done(args.out, beside, header, origin)
            write_json(UPath(args.json), {**origin, **_summary(args.out, labels, unreadable, voters.classes)})
    return len(images), unreadable


def _answers(voters: Voters, images: np.ndarray, args: Predict) -> Iterator[list[str]]:
    """A row for each of these images, without its id."""
    votes = voters.votes(images)
    probs = voters.ensemble.predict(votes)
    sure = _how_sure(voters, votes, probs) if args.unsure else [[]] * len(probs)
    for row, answer, more in zip(probs, voters.ensemble.decision.answers(probs).tolist(), sure, strict=True):
        shown = [f"{p:.6f}" for p in row] if args.probs else []
        yield [voters.classes[answer], *more, *shown]


def _how_sure(voters: Voters, votes: list[np.ndarray], probs: np.ndarray) -> list[list[str]]:
    """The columns SURE of images for which the members and the ensemble have these probabilities."""
    risk, decision, classes = voters.ensemble.risk, voters.ensemble.decision, np.array(voters.classes)
    assert risk is not None
    columns = (
        confidence(probs, decision), voters.ensemble.agreement(votes, probs), risk.sets(probs, decision),
        risk.unsure(probs, decision).tolist(),
    )  # fmt: skip
    return [
        [f"{own:.6f}", f"{same:.6f}", "|".join(classes[chosen].tolist()), YES_NO[unsure]]
        for own, same, chosen, unsure in zip(*columns, strict=True)
    ]


def _batches(
    images: dict[str, Path], done: Container[str], canvas: Canvas
) -> Iterator[tuple[list[str], list[np.ndarray | None], dict[str, str]]]:
    """Ids, pixels (None: unreadable) and the unreadable's reasons; the next batch is decoded while one is worked on."""
    todo = [id for id in images if id not in done]
    step = images_at_a_time(canvas)
    parts = [todo[start : start + step] for start in range(0, len(todo), step)]

    def read(ids: list[str]) -> tuple[list[str], list[np.ndarray | None], dict[str, str]]:
        reasons: dict[str, str] = {}
        names = {images[id]: id for id in ids}
        decoded = read_images(names, canvas, lambda path, reason: reasons.update({names[path]: reason}))
        return ids, [picture for _, picture in decoded], reasons

    before = len(images) - len(todo)
    with progress("predicting", len(images), before) as advance, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, parts[0]) if parts else None
        for part in range(len(parts)):
            assert ahead is not None
            batch = ahead.result()
            ahead = reader.submit(read, parts[part + 1]) if part + 1 < len(parts) else None
            yield batch
            advance(len(batch[0]))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two processes that append to one file would leave every row twice."""
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another ensemble.predict is writing {out}; wait for it, or name another --out") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _origin(args: Predict, run: UPath, ensemble: Ensemble) -> dict[str, Any]:
    """What a prediction depends on besides the image."""
    return {
        "run": str(run.absolute()),
        "ensemble": ensemble.name,
        "created": ensemble.created,
        "members": [[member.id, member.weight] for member in ensemble.members],
        "tta": args.tta,
        "images": str(args.images.absolute()),
    }


def _summary(out: Path, labels: dict[str, str], unreadable: dict[str, str], classes: Sequence[str]) -> dict[str, Any]:
    """What --json adds to that: `labels` by id (None: unreadable), how often each came, and why some have none."""
    counts = Counter(labels.values())
    return {
        "out": str(out.absolute()),
        "images": len(labels),
        "classes": {name: counts[name] for name in classes},
        "labels": {id: label or None for id, label in labels.items()},
        "unreadable": unreadable,
    }


def _rows_done(out: Path, beside: UPath, header: list[str], origin: dict[str, Any]) -> dict[str, str]:
    """Labels that the file already holds, by id; a last line that was cut in the middle is removed from it.

    Raises UserError when something else made the file: rows of another ensemble are never mixed in.
    """
    if not out.exists():
        return {}
    made_by = read_json(beside) if beside.exists() else {}
    if {**made_by, "complete": None} != {**origin, "complete": None}:
        raise UserError(f"{out} holds predictions of another ensemble or folder; remove it or name another --out")
    with open(out, "rb") as raw:
        whole, quoted, end = 0, False, 0
        for line in raw:
            end += len(line)
            quoted ^= line.count(b'"') % 2 == 1  # a file name may hold a line break
            if line.endswith(b"\n") and not quoted:
                whole = end
    os.truncate(out, whole)
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as text:
        rows = csv.reader(text)
        if (found := next(rows, header)) != header:
            raise UserError(f"{out} has other columns ({', '.join(found[:4])} ...); remove it or name another --out")
        return {row[0]: row[1] for row in rows}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.predict") -> None:
    with exit_on_user_error():
        args = tyro.cli(Predict, description=Predict.__doc__, prog=prog, args=arguments)
        try:
            rows, unreadable = predict_folder(args)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        for id, reason in list(unreadable.items())[:NAMED]:
            print(f"{id} is unreadable and has no label: {reason}", file=sys.stderr)
        if len(unreadable) > NAMED:
            print(f"{len(unreadable) - NAMED} more are unreadable and have no label", file=sys.stderr)
        print(f"{rows} images in {args.out}{f', {len(unreadable)} without a label' if unreadable else ''}")


if __name__ == "__main__":
    main()
