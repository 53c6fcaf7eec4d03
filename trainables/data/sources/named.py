"""Data sets by name: `torchvision:Flowers102`, `hf:org/name` (extra hf).

What torchvision downloads goes into our cache, what Hugging Face's `datasets` downloads into its own. The second also
reads a folder of Parquet or WebDataset shards: `hf:PATH`.
"""

import contextlib
import difflib
import functools
import importlib.metadata
import inspect
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainables.data.decode import Picture, open_image
from trainables.data.sources import HELD_OUT, Contents, Part, Source
from trainables.errors import UserError

KINDS = ("torchvision", "hf")
# Names of the parts, in the order in which they are tried
TRAIN, TEST = ("train", "trainval", "train-standard"), ("test",)
# CIFAR and LSUN are read by unpickling; PhotoTour has no labels, and FakeData no pictures
REFUSED = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "LSUN": "", "LSUNClass": "", "PhotoTour": "", "FakeData": ""}
LABEL_LISTS = ("targets", "_labels", "labels", "y")  # where torchvision's data sets keep their labels
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")


def named(name: str, data_dir: Path | None, downloads: Path) -> Source:
    """The data set that `name`, "<kind>:<name>", is called in its library.

    `data_dir` is where torchvision's files lie; None downloads them. Raises UserError when there is no such data set,
    or it cannot be had, or is none of images with one label each.
    """
    kind, _, own = name.partition(":")
    if kind == "torchvision":
        return _torchvision(own, data_dir, downloads / "torchvision")
    if data_dir is not None:
        raise UserError(f"{name} takes no --data-dir; a folder of shards is hf:PATH")
    return _hugging_face(own)


# --- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision(name: str, data_dir: Path | None, downloads: Path) -> Source:
    from torchvision import datasets

    known = {other.lower(): other for other in datasets.__all__ if other[0].isupper()}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(known[n] for n in near)}?" if near else "see torchvision.datasets"
        raise UserError(f"torchvision has no data set {name!r}; {hint}")
    name = known[name.lower()]
    if name in REFUSED:
        hint = f"use --data {REFUSED[name]}" if REFUSED[name] else "it is read by unpickling, or has no labelled images"
        raise UserError(f"torchvision:{name} is not taken; {hint}")
    make = getattr(datasets, name)
    root = data_dir or downloads

    def load() -> Contents:
        if data_dir is None:
            root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # of progress and hints
            return _torchvision_contents(name, make, root, download=data_dir is None)

    stats = _stats(root) if data_dir is not None else ""
    return Source(f"torchvision {importlib.metadata.version('torchvision')} {name} {stats}", load)


def _torchvision_contents(name: str, make: Callable[..., Any], root: Path, download: bool) -> Contents:
    parameters = inspect.signature(make).parameters
    options: dict[str, Any] = {"root": root} if "root" in parameters else {}
    if download and "download" in parameters:
        options["download"] = True

    def part(choices: Sequence[dict[str, Any]]) -> Any:
        """The first of the parts that there is; None."""
        for choice in choices:
            try:
                return make(**options, **choice)
            except ValueError as error:  # no such split
                if "split" not in str(error).lower() and "argument" not in str(error).lower():
                    raise
        return None

    try:
        if "split" in parameters:
            found = [part([{"split": s} for s in splits]) for splits in (TRAIN, HELD_OUT, TEST)]
        elif "train" in parameters:
            found = [part([{"train": True}]), None, part([{"train": False}])]
        else:
            found = [part([{}]), None, None]
    except Exception as error:  # no network, files that are not there or damaged: a dozen kinds
        where = "" if download else f" in {root}"
        raise UserError(
            f"torchvision:{name} could not be had{where} ({_reason(error)}); name a folder that holds its files with "
            "--data-dir, or use --data folder or --labels"
        ) from None
    if (train := found[0]) is None:
        raise UserError(f"torchvision:{name} has no part to train on that a name can say; use --data folder")
    numbers = [None if one is None else _torchvision_labels(name, one) for one in found]
    seen = np.unique(np.concatenate([n for n in numbers if n is not None]))
    classes = _class_names(getattr(train, "classes", None), seen)
    of = {number: i for i, number in enumerate(seen.tolist())}

    def made(one: Any, own: np.ndarray | None, split: str) -> Part | None:
        if own is None:
            return None
        items = [Picture(f"{name} {split} {i}", functools.partial(_picture, one, i)) for i in range(len(own))]
        return Part(items, np.array([of[number] for number in own.tolist()], np.int64))

    parts = [made(*values) for values in zip(found, numbers, ("train", "val", "test"), strict=True)]
    assert parts[0] is not None
    whole = "split" not in parameters and "train" not in parameters
    return Contents(classes, parts[0], parts[2], test_fraction=0.1 if whole else 0.0, held_out=parts[1])


def _torchvision_labels(name: str, found: Any) -> np.ndarray:
    """int64 (N,)."""
    for attribute in LABEL_LISTS:
        labels = getattr(found, attribute, None)
        if labels is not None and len(labels) == len(found):
            break
    else:
        labels = [found[i][1] for i in range(len(found))]
    try:
        numbers = np.array([int(label) for label in labels], np.int64)
    except (TypeError, ValueError):
        raise UserError(f"torchvision:{name} has no single label of an image, so it cannot be classified") from None
    return numbers


def _picture(found: Any, i: int) -> Image.Image:
    image = found[i][0]
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} where an image was expected")
    return image


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hugging_face(name: str) -> Source:
    try:
        import datasets
    except ImportError:
        raise UserError("hf: data sets need the library datasets: pip install 'ninefold[hf]'") from None
    import huggingface_hub.utils

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    path = os.path.expanduser(name)
    try:
        found = datasets.load_dataset(path)
    except Exception as error:  # no network, no such data set, one with code of its own
        raise UserError(
            f"hf:{name} could not be had ({_reason(error)}); expected a data set of images on the hub, or a folder of "
            "Parquet or WebDataset shards"
        ) from None
    splits = {"train": TRAIN, "val": (*HELD_OUT, "dev"), "test": TEST}
    parts = {part: next((found[n] for n in names if n in found), None) for part, names in splits.items()}
    if (first := parts["train"]) is None:
        raise UserError(f"hf:{name} has no split train (its splits: {', '.join(found)})")
    image, label = _columns(name, first)
    key = [(part, one.num_rows, one.cache_files) for part, one in parts.items() if one is not None]
    known = {split for names in splits.values() for split in names}
    notes = tuple(f"passed over in hf:{name}: split {split}" for split in found if split not in known)

    def load() -> Contents:
        feature = first.features[label]
        own = {part: None if one is None else list(one[label]) for part, one in parts.items()}
        if own["test"] is not None and set(own["test"]) <= {-1, None}:
            own["test"] = None  # of a competition, whose labels are not public
        seen = sorted({value for values in own.values() if values is not None for value in values}, key=_in_order)
        classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else tuple(map(str, seen))
        if len(classes) < 2 or None in seen or (isinstance(feature, datasets.ClassLabel) and -1 in seen):
            raise UserError(f"hf:{name} has images without a label, or one class; expected a label of every image")
        of = dict(zip(seen, range(len(seen)), strict=True))
        if isinstance(feature, datasets.ClassLabel):
            of = {number: number for number in range(len(classes))}

        def made(part: str) -> Part | None:
            values, table = own[part], parts[part]
            if values is None or table is None:
                return None
            rows = table.cast_column(image, datasets.Image(decode=False))
            items = [Picture(f"{part} {i}", functools.partial(_row_image, rows, image, i)) for i in range(len(values))]
            return Part(items, np.array([of[value] for value in values], np.int64))

        train = made("train")
        assert train is not None
        alone = parts["val"] is None and parts["test"] is None
        return Contents(classes, train, made("test"), test_fraction=0.1 if alone else 0.0, held_out=made("val"))

    return Source(f"hf {name} {datasets.__version__} {key}", load, notes)


def _columns(name: str, rows: Any) -> tuple[str, str]:
    """The columns of the image and of its label."""
    import datasets

    images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [column for column in LABEL_COLUMNS if column in labels] + labels
    labels += [column for column in LABEL_COLUMNS if column in rows.features]
    if not images or not labels:
        lacks = "image" if not images else "label"
        raise UserError(f"hf:{name} has no column of {lacks}s (its columns: {', '.join(rows.features)})")
    return images[0], labels[0]


def _row_image(rows: Any, column: str, i: int) -> Image.Image:
    value = rows[i][column]
    if value is None:
        raise ValueError("no image in this row")
    content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    return open_image(io.BytesIO(content))


def _in_order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value if value is not None else -1


# --- both -------------------------------------------------------------------------------------------------------------


def _class_names(names: Any, seen: np.ndarray) -> tuple[str, ...]:
    """Names of the classes where the library has one for each number, else the numbers."""
    if names is not None and len(names) > seen.max() and seen.min() >= 0:
        texts = [" or ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        if all(text.isprintable() for text in texts) and len(set(texts)) == len(texts) == len(seen):
            return tuple(texts)
    return tuple(str(number) for number in seen.tolist())


def _stats(root: Path) -> list[tuple[str, int, int]]:
    """Every file below a folder, with its size and time."""
    return sorted(
        (os.path.join(folder, name), (stat := os.stat(os.path.join(folder, name))).st_size, stat.st_mtime_ns)
        for folder, _, names in os.walk(root)
        for name in names
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
