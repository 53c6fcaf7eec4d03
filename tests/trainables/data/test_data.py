"""Data sets and their cache, on images of a few pixels."""

import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data import decode
from trainables.data import prepare as data
from trainables.data.dataset import open_data, open_test
from trainables.data.prepare import prepare
from trainables.data.sources import folder
from trainables.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded."""
    items = []
    real = decode._read
    monkeypatch.setattr(decode, "_read", lambda item, shape: items.append(item) or real(item, shape))
    return items


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def class_folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), seed: int = 0) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(1000 * label + i + seed, size).save(root / name / f"{i:03}.png")
    return root


# --- data sets: one contract ------------------------------------------------------------------------------------------


def make_train_and_test(root: Path) -> tuple[str, Path | None, dict]:
    class_folders(root / "train", {"cat": 12, "dog": 9})
    class_folders(root / "test", {"cat": 3, "dog": 4}, seed=500)
    return "folder", root, {"classes": ("cat", "dog"), "train": 21, "test": 7, "size": (8, 8)}


def make_train_only(root: Path) -> tuple[str, Path | None, dict]:
    class_folders(root / "train", {"cat": 12, "dog": 9})
    return "folder", root, {"classes": ("cat", "dog"), "train": 21, "test": 0, "size": (8, 8)}


def make_one_root(root: Path) -> tuple[str, Path | None, dict]:
    class_folders(root, {"cat": 20, "dog": 30})
    return "folder", root, {"classes": ("cat", "dog"), "train": 45, "test": 5, "size": (8, 8)}


def make_digits(root: Path) -> tuple[str, Path | None, dict]:
    return "digits", None, {"classes": tuple("0123456789"), "train": 1078, "test": 719, "size": (8, 8)}


def make_cifar10_folders(root: Path) -> tuple[str, Path | None, dict]:
    class_folders(root / "train", dict.fromkeys(CIFAR10, 3), size=(32, 32))
    (root / "unlabeled").mkdir()
    return "cifar10", root, {"classes": CIFAR10, "train": 30, "test": 0, "size": (32, 32)}


def make_cifar10_binary(root: Path) -> tuple[str, Path | None, dict]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        _write_records(folder / name, range(10))
    return "cifar10", root, {"classes": CIFAR10, "train": 50, "test": 10, "size": (32, 32)}


def make_cifar100_binary(root: Path) -> tuple[str, Path | None, dict]:
    folder = root / "cifar-100-binary"
    folder.mkdir()
    names = [f"class_{i:02}" for i in range(100)]
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    _write_records(folder / "train.bin", [*range(100)] * 3, before=[7])
    _write_records(folder / "test.bin", range(100), before=[7])
    return "cifar100", folder, {"classes": tuple(names), "train": 300, "test": 100, "size": (32, 32)}


def _write_records(path: Path, labels, before=()) -> None:
    random = np.random.default_rng(zlib.crc32(path.name.encode()))
    records = [bytes([*before, label]) + random.integers(0, 256, 3072, np.uint8).tobytes() for label in labels]
    path.write_bytes(b"".join(records))


@pytest.mark.parametrize(
    "make",
    [
        make_train_and_test,
        make_train_only,
        make_one_root,
        make_digits,
        make_cifar10_folders,
        make_cifar10_binary,
        make_cifar100_binary,
    ],
)
def test_every_data_set_keeps_the_contract(make, tmp_path, decoded):
    (tmp_path / "source").mkdir()
    name, root, expected = make(tmp_path / "source")
    found = prepare(name, root)
    assert (found.name, found.classes) == (name, expected["classes"])
    assert found.images.shape == (expected["train"], *expected["size"], 3)
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    assert not found.images.flags.writeable
    assert set(found.labels) == set(range(len(found.classes)))
    assert found.test_images == expected["test"]
    scaled = found.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, scaled.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.std, scaled.std(0), atol=1e-6)
    assert isinstance(found.mean, tuple)
    assert isinstance(found.std, tuple)
    if expected["test"]:
        images, labels = open_test(found.path)
        assert images.shape == (expected["test"], *expected["size"], 3)
        assert set(labels) == set(range(len(found.classes)))
        pixels = {image.tobytes() for image in found.images}
        assert not any(image.tobytes() in pixels for image in images)
    else:
        with pytest.raises(UserError, match="no test part"):
            open_test(found.path)
    # a second time nothing is decoded, and the same comes back
    assert len(decoded) == expected["train"] + expected["test"]
    again = prepare(name, root)
    assert len(decoded) == expected["train"] + expected["test"]
    assert (again.fingerprint, again.path) == (found.fingerprint, found.path)


def test_pixels_arrive_unchanged_in_the_order_of_the_paths(tmp_path):
    root = class_folders(tmp_path / "photos" / "train", {"b": 3, "a": 4}).parent
    found = prepare("folder", root)
    paths = sorted(root.rglob("*.png"))
    assert found.labels.tolist() == [0] * 4 + [1] * 3
    for stored, path in zip(found.images, paths, strict=True):
        assert np.array_equal(stored, np.asarray(Image.open(path)))


def test_cifar_binary_pixels_are_channels_first_in_the_file(tmp_path):
    name, root, _ = make_cifar10_binary(tmp_path)
    first = np.fromfile(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin", np.uint8)[1:3073]
    assert np.array_equal(prepare(name, root).images[0], first.reshape(3, 32, 32).transpose(1, 2, 0))


def test_subfolders_count_and_hidden_files_do_not(tmp_path):
    root = class_folders(tmp_path / "photos" / "train", {"a": 4, "b": 4}).parent
    (root / "train" / "a" / "more").mkdir()
    picture(77).save(root / "train" / "a" / "more" / "x.PNG")
    (root / "train" / "a" / "._000.png").write_bytes(b"a macOS companion file")
    (root / "train" / "a" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    found = prepare("folder", root)
    assert found.classes == ("a", "b")
    assert np.bincount(found.labels).tolist() == [5, 4]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_content_and_not_place_or_time(tmp_path):
    one = class_folders(tmp_path / "one", {"a": 12, "b": 12})
    first = prepare("folder", one)
    moved = prepare("folder", shutil.copytree(one, tmp_path / "two"))
    os.utime(one / "a" / "000.png", (1, 1))
    touched = prepare("folder", one)
    assert first.path == moved.path == touched.path
    sized = prepare("folder", one, size=4)
    picture(4242).save(one / "a" / "000.png")
    changed = prepare("folder", one)
    (one / "b").rename(one / "c")
    renamed = prepare("folder", one)
    assert len({found.fingerprint for found in (first, sized, changed, renamed)}) == 4
    assert sized.images.shape[1:] == (4, 4, 3)


def test_a_lost_cache_folder_is_made_again(tmp_path, decoded):
    root = class_folders(tmp_path / "photos", {"a": 12, "b": 12})
    found = prepare("folder", root)
    (found.path / "meta.json").unlink()
    with pytest.raises(UserError, match="no prepared data set"):
        open_data(found.path)
    again = prepare("folder", root)
    assert again.path == found.path
    assert len(decoded) == 48
    (found.path / "images.npy").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        open_data(found.path)
    (found.path / "test_labels.npy").unlink()
    with pytest.raises(UserError, match="damaged"):
        open_test(found.path)
    with pytest.raises(UserError, match="no prepared data set"):
        open_test(tmp_path / "elsewhere")


def test_no_array_is_ever_unpickled(tmp_path):
    found = prepare("folder", class_folders(tmp_path / "photos", {"a": 12, "b": 12}))
    np.save(found.path / "labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        open_data(found.path)


def _prepare_there(root: Path, cache: Path, barrier, results) -> None:
    barrier.wait()
    results.put(prepare("folder", root, cache_dir=cache).fingerprint)


def test_two_processes_prepare_at_once(tmp_path):
    root = class_folders(tmp_path / "photos", {"a": 60, "b": 60})
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_prepare_there, args=(root, tmp_path / "cache", barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert fingerprints == {prepare("folder", root).fingerprint}
    assert len(list((tmp_path / "cache" / "data").glob("folder-*"))) == 1


def test_the_slower_of_two_without_a_lock_takes_the_other_result(tmp_path):
    """Locks do not hold on every network file system; the rename does."""
    root = class_folders(tmp_path / "photos", {"a": 12, "b": 12})
    found = prepare("folder", root)
    before = (found.path / "meta.json").stat().st_ino
    again, *_ = data._decode("folder", folder(root), found.path.parent, None, "squash", progress=False)
    assert again == found.path
    assert (found.path / "meta.json").stat().st_ino == before
    assert not list(found.path.parent.glob("*.tmp"))


def test_failure_leaves_nothing_and_old_leftovers_go(tmp_path, cache, monkeypatch):
    root = class_folders(tmp_path / "photos", {"a": 12, "b": 12})
    killed, running = cache / "data" / "killed.tmp", cache / "data" / "running.tmp"
    for leftover in (killed, running):
        leftover.mkdir(parents=True)
    os.utime(killed, (1, 1))

    def out_of_space(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data, "channel_statistics", out_of_space)
        with pytest.raises(OSError, match="No space"):
            prepare("folder", root)
    assert [path.name for path in (cache / "data").iterdir() if path.name != "listings"] == ["running.tmp"]
    assert prepare("folder", root).images.shape == (22, 8, 8, 3)


# --- stored size and unreadable images --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "stored"),
    [
        ([(8, 8)] * 9, (8, 8)),
        ([(12, 8)] * 9, (8, 12)),
        ([(300, 280)] * 9, (256, 274)),
        ([(1000, 280)] * 9, (256, 512)),
        ([(20, 30), (40, 30), (25, 90)] * 3, (38, 25)),
    ],
)
def test_stored_size(sizes, stored, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            picture(i, size).save(tmp_path / "train" / name / f"{i}.png")
    assert prepare("folder", tmp_path).images.shape[1:3] == stored


def damage(root: Path, count: int) -> None:
    """Damage that many images of class "a", every third by cutting it short."""
    for i in range(count):
        path = root / "a" / f"{i:03}.png"
        path.write_bytes([b"", b"not an image", path.read_bytes()[:-60]][i % 3])


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    root = class_folders(tmp_path / "photos" / "train", {"a": 16, "b": 16})
    damage(root, 10)
    found = prepare("folder", root.parent)
    assert np.bincount(found.labels).tolist() == [6, 16]
    assert len(found.images) == 22
    for image, path in zip(found.images, sorted((root / "a").iterdir())[10:], strict=False):
        assert np.array_equal(image, np.asarray(Image.open(path)))
    message = capsys.readouterr().err
    assert "left out 10 of 32 images" in message
    assert "000.png" in message
    assert "and 7 more" in message
    prepare("folder", root.parent)
    assert capsys.readouterr().err == ""


def test_too_many_unreadable_images_are_an_error(tmp_path, cache):
    root = class_folders(tmp_path / "photos" / "train", {"a": 16, "b": 16})
    damage(root, 11)
    with pytest.raises(UserError, match=r"11 of 32 images cannot be read.*000\.png .not an image.*and 8 more"):
        prepare("folder", root.parent)
    assert [path.name for path in (cache / "data").iterdir()] == ["listings"]


# --- what users get wrong ---------------------------------------------------------------------------------------------


def wrong(message: str, name: str, root: Path | None = None, **options) -> None:
    """The call fails with one line that matches, and leaves no data set behind."""
    with pytest.raises(UserError, match=message) as caught:
        prepare(name, root, **options)
    assert "\n" not in str(caught.value)
    left = list((data.default_cache() / "data").glob("*-*"))
    assert not left


def test_unknown_data_set():
    wrong("unknown data set 'cifar1'; did you mean cifar10", "cifar1")
    wrong("unknown data set 'imagenet'; expected digits, cifar10, cifar100, folder", "imagenet")


def test_wrong_data_dir(tmp_path):
    wrong("missing does not exist", "folder", tmp_path / "missing")
    wrong("missing does not exist", "cifar10", tmp_path / "missing")
    wrong("needs --data-dir", "folder")
    wrong("digits takes no --data-dir; .* --data folder", "digits", tmp_path)
    wrong("holds no cifar10; expected train/<class>/\\*, cifar-10-batches-bin or", "cifar10", tmp_path)
    wrong("has 0 class folders, expected at least 2", "folder", tmp_path)


def test_wrong_classes(tmp_path):
    wrong("has 1 class folder, expected at least 2", "folder", class_folders(tmp_path / "one", {"a": 9}))
    empty = class_folders(tmp_path / "empty" / "train", {"a": 9, "b": 0, "c": 9, "d": 0}).parent
    wrong(r"no images in class folder .*b and 1 others .looked for .*\.", "folder", empty)
    wrong("has 2 images for 3 classes", "folder", class_folders(tmp_path / "few", {"a": 2, "b": 0, "c": 0}))
    small = class_folders(tmp_path / "small" / "train", {"a": 9, "b": 2}).parent
    other = class_folders(tmp_path / "other" / "train", {"a": 9, "b": 9}).parent
    class_folders(other / "test", {"a": 3, "c": 3})
    wrong(r"train and test of .* have different classes .b, c only", "folder", other)
    wrong("has 2 class folders, cifar10 has 10; use --data folder", "cifar10", small)


def test_a_class_whose_images_are_unreadable(tmp_path):
    root = class_folders(tmp_path / "photos" / "train", {"a": 5, "b": 9})
    damage(root, 5)
    wrong("class 'a' has 0 readable train images", "folder", root.parent)


def test_no_readable_image(tmp_path):
    root = class_folders(tmp_path / "photos" / "train", {"a": 3, "b": 3})
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    wrong("none of the images can be read", "folder", root.parent)


def test_wrong_size_and_cache(tmp_path):
    wrong("size is 0, expected 1 to 4096", "digits", size=0)
    (tmp_path / "file").write_text("")
    wrong("cannot write to the cache .* NINEFOLD_CACHE", "digits", cache_dir=tmp_path / "file")


def test_damaged_binary_files(tmp_path):
    name, root, _ = make_cifar10_binary(tmp_path)
    batch = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    wrong("incomplete or damaged", name, root)
    batch.unlink()
    wrong(r"incomplete or damaged .*data_batch_3", name, root)
    _write_records(batch, [200])
    wrong("damaged: expected 10 classes", name, root)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("opened"),)


def test_pickles_that_torchvision_does_not_know_stay_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Attack()))
    wrong("is not what torchvision downloads", "cifar10", tmp_path)
    assert not (tmp_path / "opened").exists()


def test_torchvision_files_are_read_when_their_md5_is_right(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class_{i:02}" for i in range(100)]
    random = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(count: int) -> dict:
        return {
            "data": random.integers(0, 256, (count, 3072), np.uint8),
            "fine_labels": [i % 100 for i in range(count)],
        }

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", write("train", batch(300))]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", write("test", batch(100))]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": write("meta", {"fine_label_names": names})}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    found = prepare("cifar100", tmp_path)
    assert (found.classes, len(found.images), found.test_images) == (tuple(names), 300, 100)


def test_without_network_a_download_is_one_error(monkeypatch):
    import urllib.error

    from torchvision.datasets import utils

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(utils, "download_and_extract_archive", offline)
    wrong(re.escape("cifar10 could not be downloaded") + ".*not known.* with --data-dir", "cifar10")


def test_quiet_unless_a_terminal(tmp_path, capfd):
    prepare("folder", class_folders(tmp_path / "photos", {"a": 12, "b": 12}))
    assert capfd.readouterr() == ("", "")
