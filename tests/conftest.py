"""Fixtures shared by the tests: a small data set of pictures that a network can learn in seconds."""

import dataclasses
import os
from pathlib import Path

# Before torch is imported anywhere: tests share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads of a trial wait for each other while others test

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, draw

# folder -> marker
SUITES = {
    "slow": "slow", "multinode": "cluster", "browser": "browser", "storage": "storage", "track": "track", "gpu": "gpu",
}  # fmt: skip
# Files that start servers, or clean processes that load what was exported
DEPLOY = {
    "ensemble/serve/test_answer.py", "ensemble/serve/test_app.py", "ensemble/serve/test_document.py",
    "ensemble/serve/test_metrics.py", "ensemble/serve/test_page.py", "ensemble/serve/test_routes.py",
    "ensemble/serve/test_siege.py", "ensemble/export/test_files.py", "ensemble/export/test_folders.py",
    "ensemble/export/test_int8.py",
}  # fmt: skip
# Files whose tests start Ray, or train for many seconds: left out of `make check`
HEAVY = {
    "cluster/test_lane.py", "cluster/test_tuner.py", "search/test_fetch.py", "search/test_distil.py",
    "data/test_pictures.py", "data/test_resume.py", "data/test_tables.py", "ensemble/test_auto.py",
    "ensemble/test_goal.py", "ensemble/test_select.py", "ensemble/test_selection.py", "security/test_damaged.py",
    "security/test_hostile.py",
    "trainables/explore/test_explore.py", "trainables/models/test_pretrained.py", "trainables/test_features.py",
    "trainables/training/test_cross_fit.py", "trainables/training/test_ddp.py", "trainables/training/test_knobs.py",
    "ensemble/test_predict.py", "ensemble/test_report.py", "search/test_pipeline.py", "search/test_refit.py",
    "search/test_run.py", "search/test_spaces.py", "security/test_fuzz.py", "test_front_door.py", "test_layers.py",
    "trainables/data/test_duplicates.py", "trainables/models/test_networks.py", "trainables/test_s3.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by its folder: what takes long or needs more than Python runs by its own make target."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        suite = SUITES.get(path.parts[0])
        if suite is not None:
            item.add_marker(getattr(pytest.mark, suite))
        elif any(item.get_closest_marker(name) for name in SUITES.values()):
            pass  # a test of another suite in a file of this one
        elif path.as_posix() in DEPLOY:
            item.add_marker(pytest.mark.deploy)
        elif path.as_posix() not in HEAVY:
            item.add_marker(pytest.mark.fast)
    # `make test` runs two files at a time: what takes minutes comes first, so that it is not waited for at the end
    items.sort(key=lambda item: item.path.relative_to(Path(__file__).parent).as_posix() not in HEAVY)


def draw_folder(root: Path, per_class: int = 30, size: int = 12, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """ROOT/<part>/<class>/*.png of two kinds of stripes with noise, all different, learnable in a few epochs."""
    rng = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(("across", "down", "grid")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 120, (size, size, 3))
                offset = rng.integers(0, 3)
                if label != 1:
                    pixels[offset::3] += 120
                if label != 0:
                    pixels[:, offset::3] += 120
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with train and test parts of three classes, 30 images of 12x12 each."""
    return draw_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def pictures_with_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with as many held-out images beside them, so that candidates are trained once, and not cross-fitted."""
    return draw_folder(tmp_path_factory.mktemp("pictures"), parts=("train", "test", "val"))


@pytest.fixture(scope="session")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """`pictures`, prepared in a cache of their own."""
    return prepare("folder", pictures, cache_dir=tmp_path_factory.mktemp("pictures-cache"))


def split_once(data: Data) -> Splits:
    """A fifth is held out, and tune and select are the same, as in runs of before December 2026."""
    (held,) = draw(data.labels, [0.2], seed=0)
    return Splits(np.setdiff1d(np.arange(len(data.labels)), held), held, held, True, data.fingerprint)


@pytest.fixture(scope="session")
def splits(data: Data) -> Splits:
    return split_once(data)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of tests does not go into the user's cache."""
    os.environ["NINEFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> UPath:
    """A run on `pictures`, stored at 12x12, of three trained candidates that differ in network, views and image size,
    with an ensemble of all three in equal shares: "equal". Tests that write to it copy it first."""
    from ensemble.file import Ensemble, Member, write_ensemble
    from trainables.config import TrialConfig
    from trainables.data.prepare import prepare
    from trainables.data.splits import save_splits
    from trainables.job import Alone, DataSource, Job, Outcome
    from trainables.run_directory import list_candidates
    from trainables.storage import write_array, write_json
    from trainables.trial import run_trial

    data = prepare("folder", pictures)
    splits = split_once(data)
    run = UPath(tmp_path_factory.mktemp("runs") / "small")
    write_json(
        run / "run.json",
        {
            "classes": list(data.classes),
            "split_fingerprint": splits.fingerprint,
            "splits": {"test": data.test_images, "shared": splits.shared},
            "data": {
                "name": data.name,
                "folder": data.path.name,
                "size": list(data.images.shape[1:3]),
                "fit": "squash",
            },
        },
    )
    save_splits(run, splits)
    write_array(run / "select_labels.npy", data.labels[splits.select])
    plain = TrialConfig(
        backbone="speednet", width=0.125, image_size=16, epochs=8, batch_size=12, lr=5e-3, precision="fp32",
        weight_decay=0.0,
    )  # fmt: skip
    configs = [
        dataclasses.replace(plain, tta="mirror_shift"),
        dataclasses.replace(plain, backbone="keras_cnn", image_size=9, lr=2e-3, tta="mirror"),
        dataclasses.replace(plain, backbone="vit_scratch", image_size=12, lr=1e-3, precision="bf16"),
    ]
    for number, config in enumerate(configs):
        job = Job(f"{number:04}", config, str(run), DataSource(str(data.path), "folder", str(pictures)))
        assert run_trial(job, Alone()).outcome is Outcome.FINISHED
    members = tuple(Member(candidate.id, 1 / 3) for candidate in list_candidates(run))
    assert len(members) == 3
    right = sum(candidate.probs("select") for candidate in list_candidates(run)).argmax(1) == data.labels[splits.select]
    scores = {"select": {"accuracy": float(right.mean()), "images": len(right)}}
    write_ensemble(run, Ensemble("equal", members, "hand", splits.fingerprint, scores))
    return run
