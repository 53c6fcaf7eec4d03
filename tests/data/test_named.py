"""Data sets by their name in torchvision and in Hugging Face's datasets, from files written here."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from tests.data.command import COLOURS, learned, paint, paint_folder, refused
from trainables.data.dataset import open_test
from trainables.data.prepare import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


def write_dtd(root: Path) -> Path:
    """The files of torchvision's DTD, with our classes: three lists of files."""
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for colour in COLOURS:
        (root / "dtd/dtd/images" / colour).mkdir(parents=True)
        for i in range(40):
            name = f"{colour}/{colour}_{i:04}.jpg"
            paint(colour, i, (24, 20) if i % 2 else (20, 24)).save(root / "dtd/dtd/images" / name, quality=95)
            lists["train" if i < 24 else "val" if i < 32 else "test"].append(name)
    (root / "dtd/dtd/labels").mkdir()
    for part, names in lists.items():
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names))
    return root


def test_a_set_of_torchvision_with_three_parts(tmp_path: Path) -> None:
    root = write_dtd(tmp_path / "files")
    plan = learned(tmp_path / "run", tmp_path, "--data", "torchvision:dtd", "--data-dir", str(root))
    assert plan.data.name == "torchvision_dtd"
    assert plan.data.classes == tuple(COLOURS)
    assert (len(plan.splits.train), len(plan.splits.select), plan.data.test_images) == (72, 12, 24)
    again = prepare("torchvision:dtd", root)
    assert again.path == plan.data.path
    assert open_test(again.path)[1].tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_a_set_of_torchvision_in_one_part(tmp_path: Path) -> None:
    root = tmp_path / "files"
    paint_folder(root / "eurosat/2750", 20)
    plan = learned(tmp_path / "run", tmp_path, "--data", "torchvision:EuroSAT", "--data-dir", str(root))
    assert (len(plan.data.labels), plan.data.test_images) == (54, 6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "torchvision:Flowers"], "no data set 'Flowers'; did you mean Flowers102"),
        (["--data", "torchvision:CIFAR10"], "use --data cifar10"),
        (["--data", "torchvision:LSUN"], "unpickling"),
        (["--data", "torchvision:Flowers102", "--data-dir", "."], "torchvision:Flowers102 could not be had in ."),
        (["--data", "torchvision:EMNIST", "--data-dir", "."], "torchvision:EMNIST"),
        (["--data", "torchvision:CocoDetection", "--data-dir", "."], "torchvision:CocoDetection"),
        (["--data", "torchvision:"], "no data set ''"),
        (["--data", "imagenet"], "sets by name: torchvision:NAME, hf:NAME"),
        (["--data", "torchvision:DTD", "--labels", "a.csv"], "add --data folder"),
    ],
)
def test_names_that_cannot_be_had(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, monkeypatch, tmp_path / "run", *args)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_without_network_a_set_of_torchvision_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    line = refused(capsys, monkeypatch, tmp_path / "run", "--data", "torchvision:EuroSAT")
    assert "torchvision:EuroSAT could not be had (" in line
    assert "--data-dir" in line


def test_hugging_faces_sets_need_their_library(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert "pip install 'ninefold[hf]'" in refused(capsys, monkeypatch, tmp_path / "run", "--data", "hf:org/name")


# --- with the library datasets ----------------------------------------------------------------------------------------


def write_parquet(root: Path) -> None:
    """Shards as the hub keeps them: data/train-00000-of-00001.parquet with image bytes."""
    import datasets

    (root / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    for part, start, count in (("train", 0, 24), ("validation", 100, 8), ("test", 200, 6)):
        rows = [(paint(c, start + i), label) for label, c in enumerate(COLOURS) for i in range(count)]
        images, labels = zip(*rows, strict=True)
        made = datasets.Dataset.from_dict({"image": list(images), "label": list(labels)}, features)
        made.to_parquet(root / f"data/{part}-00000-of-00001.parquet")


def write_shards(root: Path) -> None:
    """WebDataset: tar files of NNN.jpg beside NNN.cls."""
    root.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"train-{shard:03}.tar", "w") as tar:
            for i in range(36):
                number, label = shard * 36 + i, i % 3
                file = io.BytesIO()
                paint(list(COLOURS)[label], number).save(file, "JPEG", quality=95)
                for name, content in ((f"{number:04}.jpg", file.getvalue()), (f"{number:04}.cls", b"%d" % label)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def test_parquet_shards(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra hf")
    write_parquet(tmp_path / "flags")
    plan = learned(tmp_path / "run", tmp_path, "--data", f"hf:{tmp_path / 'flags'}")
    assert plan.data.classes == tuple(COLOURS)
    splits = plan.splits
    assert (len(splits.train), len(splits.tune), len(splits.select), plan.data.test_images) == (72, 12, 12, 18)
    assert prepare(f"hf:{tmp_path / 'flags'}").path == plan.data.path


def test_webdataset_shards(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra hf")
    write_shards(tmp_path / "shards")
    plan = prepare(f"hf:{tmp_path / 'shards'}")
    assert plan.classes == ("0", "1", "2")
    assert (len(plan.labels), plan.test_images) == (66, 6)


def test_what_is_no_set_of_images_on_the_hub_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="needs the extra hf")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.csv").write_text("text,label\nhello,a\nbye,b\n")
    (tmp_path / "empty").mkdir()
    for name, message in [
        (f"hf:{tmp_path / 'texts'}", "has no column of images (its columns: text, label)"),
        (f"hf:{tmp_path / 'empty'}", "could not be had"),
        (f"hf:{tmp_path / 'gone'}", "could not be had"),
    ]:
        assert message in refused(capsys, monkeypatch, tmp_path / "run", "--data", name)
