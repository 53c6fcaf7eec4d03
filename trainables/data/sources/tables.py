"""Tables of labels: a file that says of every image where it lies and what it shows (--labels).

    table.csv, .tsv, .parquet   columns path and label; if there are any, also split (train, val, test) and group
    train.txt                   a line an image: `path label`, or the path alone, whose folder is then the label;
                                val.txt and test.txt beside it are the other parts

Paths are relative to --data-dir, or else to the table's folder; absolute paths and URLs that fsspec knows will do, too.
What is remote is fetched once, into the cache.
"""

import csv
import functools
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from upath import UPath

from trainables.data.decode import Picture, open_image, suffixes
from trainables.data.sources import HELD_OUT, Contents, Part, Source
from trainables.errors import UserError
from trainables.storage import write_bytes

PATHS = ("path", "file_name", "filename", "file", "image")  # what the column is called, the first that is there
LABELS = ("label", "class", "class_name", "category")
PART_OF = {"train": "train", "training": "train", "dev": "val", "test": "test", "testing": "test"} | dict.fromkeys(
    HELD_OUT, "val"
)
TABLES = (".csv", ".tsv", ".parquet", ".txt")
GUESSED = (".jpg", ".jpeg", ".png", ".webp")  # endings that a path may lack
Columns = dict[str, list[str]]


@dataclass(frozen=True)
class Row:
    """One image of a table. `split`: "train", "val", "test", or "" if not said; `group`: "" is none."""

    path: str
    label: str
    split: str = ""
    group: str = ""


def table(labels: str, data_dir: Path | None, downloads: Path, group_by: str | None = None) -> Source:
    """The images that a table names. `group_by` is the column of the groups; without it, `group` if there is one.

    Raises UserError when the table cannot be read, has not the columns, or says what cannot be.
    """
    if not labels.lower().endswith(TABLES):
        raise UserError(f"--labels is {labels}, expected a file that ends in {', '.join(TABLES)}")
    notes: list[str] = []
    is_list = labels.lower().endswith(".txt")
    rows = _listed_rows(labels) if is_list else _table_rows(labels, group_by, notes)
    rows = _once(rows, labels, notes)
    base = str(data_dir) if data_dir is not None else str(_path(labels).parent)
    classes = _classes(rows, labels)
    places = _places(rows, base, labels)
    local = [place for place in places if "://" not in place]
    stats = [(place, *_stat(place)) for place in local]
    key = f"table {labels} {base} {group_by!r} {rows} {stats}"

    def load() -> Contents:
        of = {name: number for number, name in enumerate(classes)}

        def part(split: str) -> Part | None:
            chosen = [i for i, row in enumerate(rows) if row.split == split]
            if not chosen:
                return None
            items = [_item(places[i], downloads) for i in chosen]
            groups = [rows[i].group for i in chosen]
            numbers = np.array([of[rows[i].label] for i in chosen], np.int64)
            return Part(items, numbers, [rows[i].path for i in chosen], groups if any(groups) else None)

        if not rows[0].split:
            whole = part("")
            assert whole is not None
            return Contents(classes, whole, test_fraction=0.1)
        train = part("train")
        assert train is not None  # _classes has refused the table otherwise
        return Contents(classes, train, part("test"), held_out=part("val"))

    return Source(key, load, tuple(notes))


# --- rows -------------------------------------------------------------------------------------------------------------


def _table_rows(labels: str, group_by: str | None, notes: list[str]) -> list[Row]:
    columns = _columns(labels)
    path, label = (_column(columns, names, labels) for names in (PATHS, LABELS))
    paths, names = columns[path], columns[label]
    splits = columns.get("split", [""] * len(paths))
    if group_by in columns:
        groups = columns[group_by]
    else:
        groups = columns["group"] if group_by is None and "group" in columns else [""] * len(paths)
    if "weight" in columns:
        notes.append(f"column weight of {labels} is not used: every image counts alike")
    rows, unlabelled = [], []
    for number, values in enumerate(zip(paths, names, splits, groups, strict=True), start=2):
        where, name, split, group = values
        if not where:
            raise UserError(f"row {number} of {labels} has no {path}; fill it in or remove the row")
        if not name:
            unlabelled.append(where)
            continue
        if "split" in columns and split.lower() not in PART_OF:
            raise UserError(f"row {number} of {labels} has split {split!r}, expected train, val or test")
        rows.append(Row(where, name, PART_OF.get(split.lower(), ""), group))
    if unlabelled:
        notes.append(f"passed over in {labels}: {len(unlabelled):,} rows without a label, such as {unlabelled[0]}")
    return rows


def _column(columns: Columns, names: Sequence[str], labels: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise UserError(
        f"{labels} has no column {names[0]} (its columns: {', '.join(list(columns)[:8]) or 'none'}); expected the "
        "columns path and label, and if you like split and group"
    )


def _columns(labels: str) -> Columns:
    """Every column as texts without blanks around them; names in small letters."""
    content = _read(labels)
    if labels.lower().endswith(".parquet"):
        return _parquet_columns(content, labels)
    try:
        text = content.decode("utf-8-sig")
        delimiter = "\t" if labels.lower().endswith(".tsv") else ","
        head = text.split("\n", 1)[0]
        if (
            delimiter == "," and "," not in head and ";" in head
        ):  # as spreadsheets write it where , is the decimal point
            delimiter = ";"
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{labels} cannot be read as a table ({error}); expected UTF-8 text, a line an image") from None
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if not lines:
        raise UserError(f"{labels} is empty; expected a line of column names and a line an image")
    header, *rows = lines
    names = [name.strip().lower() for name in header]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"row {number} of {labels} has {len(row)} cells, expected {len(header)}")
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(names)}


def _parquet_columns(content: bytes, labels: str) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(io.BytesIO(content))
        return {
            name.lower(): ["" if value is None else str(value).strip() for value in found.column(name).to_pylist()]
            for name in found.column_names
            if not pyarrow.types.is_nested(found.schema.field(name).type)
        }
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{labels} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _listed_rows(labels: str) -> list[Row]:
    """Of a list of files, and of its siblings when it is train.txt."""
    first = _path(labels)
    if first.name != "train.txt":
        return [_listed(line, number, labels, "") for number, line in _lines(labels)]
    siblings = {"train": [first]} | {
        split: [path for name in names if (path := first.parent / f"{name}.txt").exists()]
        for split, names in (("val", HELD_OUT), ("test", ("test",)))
    }
    if len(siblings["val"]) > 1:
        names = " and ".join(path.name for path in siblings["val"])
        raise UserError(f"{first.parent} has {names}, expected one list of what is held out; merge them")
    return [
        _listed(line, number, str(path), split)
        for split, paths in siblings.items()
        for path in paths
        for number, line in _lines(str(path))
    ]


def _lines(labels: str) -> list[tuple[int, str]]:
    try:
        text = _read(labels).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{labels} cannot be read as a list of files ({error}); expected UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    if not any(line for _, line in lines):
        raise UserError(f"{labels} is empty; expected a line an image: its path, or path and label")
    return [(number, line) for number, line in lines if line]


def _listed(line: str, number: int, labels: str, split: str) -> Row:
    path, label = line, ""
    if os.path.splitext(line)[1].lower() not in suffixes() and (cut := re.fullmatch(r"(.+?)[\s,;]+([^\s,;]+)", line)):
        path, label = cut[1], cut[2]
    if not label:
        folders = path.replace("\\", "/").split("/")[:-1]
        if not folders or folders[-1] in (".", "..", "images", ""):
            raise UserError(
                f"line {number} of {labels} has no label; expected `path label`, or a path in a class folder"
            )
        label = folders[-1]
    return Row(path, label, split)


def _once(rows: Sequence[Row], labels: str, notes: list[str]) -> list[Row]:
    """Every path once; raises UserError when a path has two labels or is in two parts."""
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.path, row)
        if (other.label, other.split) != (row.label, row.split):
            what = "labels" if other.label != row.label else "parts"
            one, two = (other.label, row.label) if what == "labels" else (other.split, row.split)
            raise UserError(f"{row.path} is in {labels} twice, with different {what} ({one} and {two}); remove one")
    if len(seen) < len(rows):
        notes.append(f"passed over in {labels}: {len(rows) - len(seen):,} rows that repeat another")
    return list(seen.values())


def _classes(rows: Sequence[Row], labels: str) -> tuple[str, ...]:
    """Class names, in the order of numbers when all of them are; raises UserError when a part lacks one."""
    names = {row.label for row in rows}
    classes = sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,18}", n) for n in names) else sorted(names)
    if len(classes) < 2:
        raise UserError(f"{labels} has {len(classes)} class{'es' * (not classes)}, expected at least 2")
    if odd := [name for name in classes if not name.isprintable()]:
        raise UserError(f"class {odd[0]!r} of {labels} has a name that cannot be printed; rename it")
    parts: dict[str, set[str]] = {}
    for row in rows:
        parts.setdefault(row.split, set()).add(row.label)
    if "" not in parts and "train" not in parts:
        raise UserError(f"{labels} has no row of split train; expected some to learn from")
    for split, own in parts.items():
        if missing := sorted(names - own):
            few = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(f"{labels} has no image of {few} in split {split}; expected every class in every part")
    return tuple(classes)


# --- places -----------------------------------------------------------------------------------------------------------


def _path(labels: str) -> UPath:
    try:
        return UPath(labels)
    except (ValueError, ImportError) as error:
        raise UserError(f"--labels {labels} cannot be reached ({error}); check the address and its client") from None


def _read(labels: str) -> bytes:
    try:
        return _path(labels).read_bytes()
    except Exception as error:  # every store's client has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--labels {labels} cannot be read ({reason}); expected a table or a list of files") from None


def _places(rows: Sequence[Row], base: str, labels: str) -> list[str]:
    """Where each image lies: an absolute path or a URL. Raises UserError when none of the first is there."""
    whole = [row.path for row in rows if "://" in row.path or os.path.isabs(row.path)]
    if len(whole) == len(rows):
        return whole
    roots = [base, f"{base}/images", str(UPath(base).parent), f"{UPath(base).parent}/images"]
    if "://" in base:
        return [row.path if "://" in row.path else f"{base}/{row.path.removeprefix('./')}" for row in rows]
    sample = [row.path for row in rows if "://" not in row.path][:20]
    for root in roots:
        if any(os.path.exists(_with_ending(os.path.join(root, path))) for path in sample):
            return [
                row.path if "://" in row.path else _with_ending(os.path.normpath(os.path.join(root, row.path)))
                for row in rows
            ]
    raise UserError(
        f"none of the images of {labels} is there, the first being {os.path.join(base, sample[0])}; paths are relative "
        "to the table's folder, or to --data-dir"
    )


def _with_ending(place: str) -> str:
    """The path, with the ending that it lacks if there is such a file."""
    if os.path.splitext(place)[1].lower() in suffixes() or os.path.exists(place):
        return place
    return next((place + ending for ending in GUESSED if os.path.exists(place + ending)), place)


def _stat(place: str) -> tuple[int, int]:
    try:
        status = os.stat(place)
    except OSError:
        return 0, 0  # told when it is to be decoded
    return status.st_size, status.st_mtime_ns


def _item(place: str, downloads: Path) -> Path | Picture:
    if "://" not in place:
        return Path(place)
    return Picture(place, functools.partial(_open_remote, place, downloads))


def _open_remote(url: str, downloads: Path):  # type: ignore[no-untyped-def]
    """The image at a URL, fetched unless it was before."""
    name = hashlib.sha256(url.encode()).hexdigest()[:32] + os.path.splitext(url)[1][:8]
    copy = downloads / "files" / name[:2] / name
    if not copy.exists():
        write_bytes(UPath(copy), UPath(url).read_bytes())
    return open_image(io.BytesIO(copy.read_bytes()))
