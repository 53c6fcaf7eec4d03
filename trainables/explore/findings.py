"""python -m trainables.explore : one page on a data set: classes, sizes, duplicates across splits, unreadable files.

After a sweep, with --run RUN, also the labels that are likely wrong. Test images are looked at for twins of others;
their labels are not read: that is the report's, once.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from upath import UPath

from trainables.command import progress
from trainables.data.dataset import open_test_images, read_meta
from trainables.data.decode import Fit, measure
from trainables.data.duplicates import Group, Signatures, find_groups, sign, twins_across
from trainables.data.origin import find_origin, unnamed
from trainables.data.prepare import prepare
from trainables.data.share import open_run_data
from trainables.data.splits import Splits, load_splits, notes_on, split_data
from trainables.errors import UserError
from trainables.explore import fiftyone
from trainables.explore.images import Images
from trainables.explore.page import explore_page
from trainables.explore.suspects import find_suspects
from trainables.models import speed
from trainables.run_directory import open_run, read_run
from trainables.storage import check_out, write_bytes, write_json

MEASURED = 5000  # files, spread over the data set, whose size is looked up
SUSPECTS = 200


@dataclass(frozen=True)
class Explore:
    """Look at a data set: what is in it, what leaks from one split into another, what cannot be read.

    With --run also which labels are likely wrong, by what the candidates of that run predicted.
    """

    data: str | None = None
    """Data set, as for search.run; default: the run's, as it was prepared, else digits."""
    data_dir: Path | None = None
    """Where its images lie; of a run's, too, to show the files' names."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Table of its images, as for search.run."""
    group_by: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Which images stay on one side of a split, as for search.run."""
    ignore_twins: bool = False
    """Split without regard to twins, as for search.run."""
    stored_size: int | None = None
    """Shorter side in pixels at which images are kept, as for search.run."""
    fit: Fit = "squash"
    """How images of other proportions are brought to that size, as for search.run."""
    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory of a sweep on this data set."""
    split_seed: int = 0
    """Of the splits, as for search.run; a run has its own."""
    out: Path = Path("explore.html")
    """Page to write; the same findings go beside it as .json."""
    fiftyone: Path | None = None
    """Folder to export images, labels and findings to, in FiftyOne's image classification format."""


def explore(args: Explore) -> dict[str, Any]:
    """Write the page and its .json, and return what the latter holds. Raises UserError for what the user can fix."""
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out is {args.out}, expected a name that ends in .html")
    check_out(args.out, "--out")
    run = open_run(args.run) if args.run else None
    images = _open(args, run)
    suspects = find_suspects(run, images.data, SUSPECTS) if run else None
    with progress("reading images", len(images)) as advance:
        parts = [sign(part, advance) for part in (images.data.images, images.test)]
        signatures = parts[0] + parts[1]
    with progress("looking for twins", len(images)) as advance:
        groups = find_groups(signatures, advance)
    found: dict[str, Any] = {
        "data": {"name": images.data.name, "fingerprint": images.data.fingerprint, "folder": str(images.root or "")},
        "run": run.name if run else None,
        "created": time.time(),
        "classes": list(images.data.classes),
        "splits": {name: int((images.split == s).sum()) for s, name in enumerate(images.splits)},
        "counts": _counts(images),
        "size": [int(side) for side in images.data.images.shape[1:3]],
        "stored_bytes": int(images.data.images.nbytes + images.test.nbytes),
        "epoch": _epoch(images),
        "original_sizes": _sizes(images),
        "unreadable": images.unreadable,
        "notes": images.notes,
        "leaks": [
            {"split": later, "twin_in": earlier, "images": n}
            for (later, earlier), n in twins_across(groups, images.split, images.splits).items()
        ],
        "leaking": sum(
            int((np.unique(images.split[list(group.rows)], return_inverse=True)[1] > 0).sum()) for group in groups
        ),
        "groups": [_group(images, group) for group in groups],
        "suspects": None,
    }
    if suspects is not None:
        found["suspects"] = {
            "checked": suspects.checked,
            "models": suspects.models,
            "estimate": suspects.estimate,
            "images": [
                {**_named(images, int(row)), "row": int(row), "quality": float(quality),
                 "suggested": images.data.classes[int(suggested)], "confidence": float(confidence)}
                for row, quality, suggested, confidence in zip(
                    suspects.rows, suspects.quality, suspects.suggested, suspects.confidence, strict=True)
            ],
        }  # fmt: skip
    write_bytes(UPath(args.out), explore_page(found, images, signatures, groups))
    if args.fiftyone is not None:
        _export(args.fiftyone, found, images, signatures, groups)
    write_json(UPath(args.out.with_suffix(".json")), found)
    return found


def _epoch(images: Images) -> dict[str, Any]:
    """What an epoch of a usual pretrained network takes on this machine: its speed is measured, its work counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = min(speed.native_size(speed.MEASURED), max(96, round(2.5 * min(images.data.images.shape[1:3]) / 32) * 32))
    train = int((images.split == 0).sum())
    work = 3 * speed.gflops(speed.MEASURED, side) * train  # forwards once, and backwards for twice as much
    seconds = work / speed.training_rate(device)
    return {"backbone": speed.MEASURED, "pixels": side, "images": train, "seconds": seconds, "device": device}


def _open(args: Explore, run: UPath | None) -> Images:
    """The data set that the arguments or the run name, with the splits that a sweep uses, or that the run used."""
    if run is not None and args.data is None and args.data_dir is None and args.labels is None:
        return _opened(run)  # as it was prepared: where its files lie is not for run.json to say
    name = args.data or ("folder" if args.data_dir or args.labels else "digits")
    twins = not args.ignore_twins
    data = prepare(
        name, args.data_dir, size=args.stored_size, fit=args.fit, group_by=args.group_by, twins=twins,
        labels=args.labels,
    )  # fmt: skip
    if run is None:
        splits = split_data(data, args.split_seed)
        notes = notes_on(data, splits, args.split_seed)
    else:
        splits, notes = load_splits(run), []
        expected = read_run(run).data.fingerprint
        if expected == read_meta(data.path).content != data.fingerprint:
            return _opened(run)  # it began when twins were not kept apart, and may have another test part
        if expected and data.fingerprint != expected:
            raise UserError(f"{run} is a run on other images than these; name those with --data and --data-dir")
    test = open_test_images(data.path)
    origin = find_origin(name, args.data_dir, None, args.stored_size, args.fit, args.group_by, twins, args.labels)
    names, split = _split_of_each(splits, len(data.labels), len(test))
    root = origin.root
    every = origin.train + origin.test
    return Images(data, test, every, root, names, split, origin.unreadable, [*origin.notes, *notes])


def _opened(run: UPath) -> Images:
    """The data set of a run, as it was prepared for it, without the names of its files."""
    data, splits = open_run_data(run)
    test = open_test_images(data.path)
    origin = unnamed(data, len(test))
    names, split = _split_of_each(splits, len(data.labels), len(test))
    return Images(data, test, origin.train + origin.test, None, names, split, origin.unreadable, [])


def _split_of_each(splits: Splits, images: int, test: int) -> tuple[list[str], np.ndarray]:
    """Names of the splits, and which of them each image is in, those of the test part behind the others."""
    parts = [("train", splits.train), ("tune", splits.tune), ("select", splits.select)]
    if splits.folds:
        parts = [("train, tune and select, cross-fitted", splits.train)]
    elif splits.shared:
        parts = [("train", splits.train), ("tune and select", splits.select)]
    split = np.zeros(images + test, np.int64)
    for s, (_, rows) in enumerate(parts):
        split[rows] = s
    split[images:] = len(parts)
    return [name for name, _ in parts] + (["test"] if test else []), split


def _counts(images: Images) -> dict[str, dict[str, int]]:
    """Images of every class by split; those of the test part have no label here."""
    labels = images.data.labels
    own = images.split[: len(labels)]
    return {
        name: {
            split: int(((labels == c) & (own == s)).sum()) for s, split in enumerate(images.splits) if split != "test"
        }
        for c, name in enumerate(images.data.classes)
    }


def _sizes(images: Images) -> list[list[int]]:
    """(width, height, images) of the files that were measured, the most frequent first."""
    if images.root is None:
        height, width = images.data.images.shape[1:3]
        return [[int(width), int(height), len(images)]]
    rows = np.unique(np.linspace(0, len(images) - 1, min(MEASURED, len(images))).round().astype(int))
    shapes = [shape for i in rows.tolist() if (shape := measure(images.root / images.names[i])) is not None]
    sizes, counts = np.unique(np.array(shapes, np.int64).reshape(-1, 2), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [[int(sizes[i, 1]), int(sizes[i, 0]), int(counts[i])] for i in order.tolist()]


def _named(images: Images, i: int) -> dict[str, Any]:
    return {"name": images.names[i], "split": images.splits[int(images.split[i])], "label": images.label(i)}


def _group(images: Images, group: Group) -> dict[str, Any]:
    members = [_named(images, i) for i in group.rows]
    return {
        "kind": group.kind,
        "across": len({member["split"] for member in members}) > 1,
        "contradictory": len({member["label"] for member in members if member["label"] is not None}) > 1,
        "images": members,
    }


def _export(folder: Path, found: dict[str, Any], images: Images, signatures: Signatures, groups: list[Group]) -> None:
    """The data set with these findings in FiftyOne's format; test images without their labels."""
    n = len(images.data.labels)
    brightness, contrast = signatures.brightness, signatures.contrast
    attributes: list[dict[str, Any]] = [
        {"split": images.splits[int(images.split[i])], "source": images.names[i],
         "brightness": round(float(brightness[i]), 1), "contrast": round(float(contrast[i]), 1)}
        for i in range(len(images))
    ]  # fmt: skip
    for number, group in enumerate(groups):
        for i in group.rows:
            attributes[i] |= {"twins": number, "twin_kind": group.kind}
    for rank, suspect in enumerate((found["suspects"] or {"images": []})["images"], start=1):
        attributes[suspect["row"]] |= {
            "suspect_rank": rank, "suggested": suspect["suggested"], "label_quality": suspect["quality"],
        }  # fmt: skip
    fiftyone.export(
        folder,
        list(images.data.classes),
        [path if (path := images.path(i)) is not None else images[i] for i in range(len(images))],
        [f"train-{i:07d}" if i < n else f"test-{i - n:07d}" for i in range(len(images))],
        [int(images.data.labels[i]) if i < n else None for i in range(len(images))],
        attributes,
    )


def summary(found: dict[str, Any]) -> list[str]:
    """The findings in a few lines for a person."""
    splits = ", ".join(f"{n:,} {name}" for name, n in found["splits"].items())
    lines = [f"{found['data']['name']}: {len(found['classes'])} classes, {splits} images"]
    lines += [f"{leak['images']} {leak['split']} images have a twin in {leak['twin_in']}" for leak in found["leaks"]]
    lines.append(f"{len(found['groups'])} groups of duplicates, {len(found['unreadable'])} unreadable files")
    height, width = found["size"]
    lines.append(
        f"kept at {width} x {height} pixels ({found['stored_bytes'] / 2**20:,.0f} MiB); files have "
        + ", ".join(f"{w} x {h} ({n:,})" for w, h, n in found["original_sizes"][:3])
        + (f" and {len(found['original_sizes']) - 3:,} other sizes" if len(found["original_sizes"]) > 3 else "")
    )
    epoch = found["epoch"]
    lines.append(
        f"an epoch of {epoch['backbone']} at {epoch['pixels']} pixels takes about {epoch['seconds']:,.0f} s here, on "
        f"{'a GPU' if epoch['device'] == 'cuda' else 'all CPUs'} ({epoch['images']:,} images)"
    )
    few = min(found["counts"].items(), key=lambda one: sum(one[1].values()))
    many = max(found["counts"].items(), key=lambda one: sum(one[1].values()))
    least, most = sum(few[1].values()), sum(many[1].values())
    spread = f"classes have {least:,} ({few[0]}) to {most:,} ({many[0]}) images"
    lines.append(spread if least < most else f"all classes have {most:,} images")
    lines += found["notes"]
    if found["suspects"]:
        suspects = found["suspects"]
        lines.append(
            f"about {suspects['estimate']} wrong labels among {suspects['checked']:,} images of tune and select"
        )
    return lines
