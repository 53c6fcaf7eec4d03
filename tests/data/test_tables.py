"""Tables of labels and lists of files, written by pandas and by hand."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas
import pytest

from tests.data.command import COLOURS, explored, learned, paint, planned, refused
from trainables.data.dataset import open_test, open_units
from trainables.data.origin import find_origin
from trainables.data.prepare import prepare
from trainables.data.sources.tables import table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frame(root: Path, per_class: int = 30) -> pandas.DataFrame:
    """A shuffled table of pictures that lie in one folder, ROOT/images/0017.png."""
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(3 * per_class):
        colour = list(COLOURS)[i % 3]
        paint(colour, i).save(root / "images" / f"{i:04}.png")
        split = ["train", "train", "val", "test"][i // 9 % 4]
        row = {"path": f"images/{i:04}.png", "label": colour, "split": split, "group": f"patient {i // 9}"}
        rows.append(row | {"weight": 1.0})
    return pandas.DataFrame(rows).sample(frac=1, random_state=0)


def write(rows: pandas.DataFrame, path: Path) -> str:
    if path.suffix == ".parquet":
        rows.to_parquet(path, index=False)
    else:
        rows.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_of_paths_and_labels_is_split(ending: str, tmp_path: Path) -> None:
    file = write(frame(tmp_path / "set")[["path", "label"]], tmp_path / "set" / f"labels.{ending}")
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--labels", file)
    assert plan.data.classes == ("blue", "green", "red")
    assert (len(plan.data.labels), plan.data.test_images) == (81, 9)
    assert plan.notes == []


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_with_splits_and_groups(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = frame(tmp_path / "set", 48)
    rows.loc[rows.path == "images/0018.png", "split"] = "train"  # of a patient of val
    file = write(rows, tmp_path / "set" / f"labels.{ending}")
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--labels", file, "--ignore-twins")
    assert "column weight" in capsys.readouterr().err
    counts = rows.split.value_counts()
    assert (plan.data.held_out, plan.data.test_images) == (counts["val"], counts["test"])
    held = len(plan.splits.tune) + len(plan.splits.select)
    assert held == counts["val"] - 8, "a patient of val that is in train as well is trained on"
    units = open_units(plan.data)
    assert units is not None
    assert not np.isin(units[plan.splits.select], units[plan.splits.train]).any()
    found = explored(tmp_path / "page.html", "--data", "folder", "--labels", file)
    assert found["splits"]["test"] == counts["test"]


def test_a_column_makes_groups(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set").rename(columns={"group": "person"}).drop(columns=["split", "weight"])
    args = ["--data", "folder", "--labels", write(rows, tmp_path / "set/labels.csv"), "--group-by", "person"]
    plan = planned(tmp_path / "run", *args)[1]
    units = open_units(plan.data)
    assert units is not None
    assert len(np.unique(units)) == 9
    names = find_origin("folder", labels=args[3], group_by="person")
    people = rows.set_index("path").person
    test = {people[name] for name in names.test}
    for fold, held in enumerate(plan.splits.folds):
        train = {people[names.train[row]] for row in plan.splits.without(fold).train}
        assert not train & {people[names.train[row]] for row in held}
        assert not train & test


def test_rows_keep_their_pixels_labels_and_names(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set")
    file = write(rows, tmp_path / "set/labels.csv")
    data = prepare("folder", labels=file)
    origin = find_origin("folder", labels=file)
    assert origin.root == tmp_path / "set"
    labels = rows.set_index("path").label
    assert [data.classes[label] for label in data.labels] == [labels[name] for name in origin.train]
    test = open_test(data.path)[1]
    assert [data.classes[label] for label in test] == [labels[name] for name in origin.test]


def test_paths_are_relative_to_the_data_dir_or_whole(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set")[["path", "label"]]
    (tmp_path / "tables").mkdir()
    file = write(rows, tmp_path / "tables/labels.csv")
    beside = prepare("folder", tmp_path / "set", labels=file)
    rows.path = [str(tmp_path / "set" / path) for path in rows.path]
    whole = prepare("folder", labels=write(rows, tmp_path / "tables/whole.csv"))
    assert beside.fingerprint == whole.fingerprint


def test_numbers_as_labels_are_in_their_order(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set")[["path", "label"]]
    rows.label = [{"blue": 2, "green": 10, "red": 1}[name] for name in rows.label]
    assert prepare("folder", labels=write(rows, tmp_path / "set/labels.parquet")).classes == ("1", "2", "10")


def test_a_spreadsheet_with_semicolons_other_names_and_a_mark_at_its_start(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set")[["path", "label"]].rename(columns={"path": "File_Name", "label": " Class"})
    rows.to_csv(tmp_path / "set/labels.csv", index=False, sep=";", encoding="utf-8-sig")
    assert len(prepare("folder", labels=str(tmp_path / "set/labels.csv")).labels) == 81


def test_a_list_of_files_with_labels(tmp_path: Path) -> None:
    """As ImageNet's and Caffe's lists: `path label`."""
    rows = frame(tmp_path / "set")
    lines = [f"{path} {label}" for path, label in zip(rows.path, rows.label, strict=True)]
    (tmp_path / "set/all.txt").write_text("\n".join(lines) + "\n")
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--labels", str(tmp_path / "set/all.txt"))
    assert (len(plan.data.labels), plan.data.test_images) == (81, 9)


def class_folders(root: Path, counts: dict[str, int]) -> dict[str, list[str]]:
    """ROOT/images/<class>/NNN.jpg, and the paths below images of each part."""
    paths: dict[str, list[str]] = {part: [] for part in counts}
    for colour in COLOURS:
        (root / "images" / colour).mkdir(parents=True)
        for i, part in enumerate(part for part, count in counts.items() for _ in range(count)):
            paint(colour, i).save(root / f"images/{colour}/{i:03}.jpg", quality=95)
            paths[part].append(f"{colour}/{i:03}.jpg")
    return paths


def test_lists_of_files_as_torchvision_reads_them(tmp_path: Path) -> None:
    """Food-101's meta/train.txt and test.txt: class/name without an ending, beside images/."""
    paths = class_folders(tmp_path / "food", {"train": 20, "test": 5})
    (tmp_path / "food/meta").mkdir()
    for part, names in paths.items():
        (tmp_path / f"food/meta/{part}.txt").write_text("\n".join(name.removesuffix(".jpg") for name in names))
    args = ["--data", "folder", "--labels", str(tmp_path / "food/meta/train.txt")]
    plan = learned(tmp_path / "run", tmp_path, *args)
    assert (len(plan.data.labels), plan.data.held_out, plan.data.test_images) == (60, 0, 15)


def test_lists_of_files_as_ultralytics_writes_them(tmp_path: Path) -> None:
    """train.txt, val.txt and test.txt of lines like ./images/red/001.jpg, the folder being the class."""
    paths = class_folders(tmp_path / "set", {"train": 20, "val": 6, "test": 5})
    for part, names in paths.items():
        (tmp_path / f"set/{part}.txt").write_text("".join(f"./images/{name}\n" for name in names))
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--labels", str(tmp_path / "set/train.txt"))
    assert (len(plan.data.labels), plan.data.held_out, plan.data.test_images) == (78, 18, 15)


# --- from elsewhere ---------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server over tmp_path/site; its address, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "site").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site"))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_table_and_images_on_a_server_are_fetched_once(site: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = site
    rows = frame(tmp_path / "site/set")[["path", "label"]]
    write(rows, tmp_path / "site/set/labels.csv")
    args = ["--data", "folder", "--labels", f"{address}/set/labels.csv"]
    plan = learned(tmp_path / "run", tmp_path, *args)
    images = [path for path in asked if path.endswith(".png")]
    assert len(images) == len(set(images)) == 90
    prepare("folder", labels=args[3], size=8)  # decoded anew, from the copies
    assert len([path for path in asked if path.endswith(".png")]) == 90
    assert len(plan.data.labels) == 81
    rows.path = [f"{address}/set/{path}" for path in rows.path]
    local = prepare("folder", labels=write(rows, tmp_path / "local.csv"))
    assert local.path == plan.data.path, "the same images, by a table of URLs on this machine"


# --- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "has 0 classes"),
        ("name,kind\n1.png,a\n", "has no column path (its columns: name, kind)"),
        ("path,kind\n1.png,a\n", "has no column label"),
        ("path,label\n1.png,a\n2.png\n", "row 3 of"),
        ("path,label\n1.png,a\n,b\n", "row 3 of"),
        ("path,label\n1.png,a\n2.png,a\n", "has 1 class, expected at least 2"),
        ("path,label\n1.png,a\n1.png,b\n", "different labels (a and b)"),
        ("path,label,split\n1.png,a,train\n1.png,a,test\n2.png,b,train", "different parts (train and test)"),
        ("path,label,split\n1.png,a,later\n2.png,b,train", "split 'later', expected train, val or test"),
        ("path,label,split\n1.png,a,test\n2.png,b,test", "has no row of split train"),
        ("path,label,split\n1.png,a,train\n2.png,b,train\n3.png,a,val", "has no image of b in split val"),
        ("path,label\n1.png,a\n2.png,b\n", "none of the images of"),
        ('path,label\n"1.png,a\n', "cannot be read as a table"),
        (b"path,label\n\xff\xfe,a\n", "cannot be read as a table"),
        ("path,label\n1.png,a\x07\n2.png,b\n", "cannot be printed"),
    ],
)
def test_tables_that_cannot_be_read(
    content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(capsys, monkeypatch, tmp_path / "run", "--data", "folder", "--labels", str(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.xlsx", "", "expected a file that ends in .csv"),
        ("labels.parquet", "no parquet", "cannot be read as Parquet"),
        ("list.txt", "\n", "is empty"),
        ("list.txt", "1.png\n", "line 1 of"),
        ("list.txt", b"\xff\xfe\xff", "cannot be read as a list"),
        ("gone.csv", None, "cannot be read"),
    ],
)
def test_files_that_are_no_tables(
    name: str, content: str | bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(capsys, monkeypatch, tmp_path / "run", "--data", "folder", "--labels", str(file))


def test_options_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(frame(tmp_path / "set"), tmp_path / "set/labels.csv")
    for args, message in [
        (["--labels", file], "add --data folder (it is digits)"),
        (["--data", "folder", "--labels", file, "--data-dir", str(tmp_path / "gone")], "does not exist"),
        (["--data", "folder", "--labels", file, "--group-by", "person"], "--group-by 'person' gives no group"),
        (["--data", "folder", "--labels", "nosuch://host/labels.csv"], "cannot be reached"),
        (["--data", "folder", "--labels", "http://127.0.0.1:9/labels.csv"], "cannot be read"),
    ]:
        assert message in refused(capsys, monkeypatch, tmp_path / "run", *args)


def test_rows_that_are_passed_over_are_named(tmp_path: Path) -> None:
    rows = frame(tmp_path / "set")[["path", "label"]]
    rows.iloc[3, 1] = None
    rows = pandas.concat([rows, rows.iloc[5:8]])
    notes = table(write(rows, tmp_path / "set/labels.csv"), None, tmp_path).notes
    assert "1 rows without a label, such as images/" in notes[0]
    assert "3 rows that repeat another" in notes[1]


def test_missing_files_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = frame(tmp_path / "set")[["path", "label"]]
    (tmp_path / "set/images/0007.png").unlink()
    data = prepare("folder", labels=write(rows, tmp_path / "set/labels.csv"))
    assert len(data.labels) + data.test_images == 89
    assert "left out 1 of 90 images" in capsys.readouterr().err
