"""Images on their way to the device: the same batches, wherever they lie and whoever reads them."""

import threading

import numpy as np
import pytest
import torch

from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.training import feed
from trainables.training.feed import Feed, resident, rows_on
from trainables.training.learner import Learner

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
MORE = np.random.default_rng(1).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_resident() -> None:
    feed._resident.clear()


def batches(seed: int, n: int = 50) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(n), 7)


@pytest.mark.parametrize("ahead", [False, True])
def test_every_batch_is_the_images_of_its_indices(ahead: bool) -> None:
    own = Feed(IMAGES, None, CPU, "a", ahead)
    for epoch in range(3):
        own.begin(batches(epoch))
        for batch in batches(epoch):
            np.testing.assert_array_equal(own(batch), IMAGES[batch])


def test_images_without_labels_are_counted_on() -> None:
    both = np.concatenate([IMAGES, MORE])
    own = Feed(IMAGES, MORE, CPU, "a", ahead=True)
    own.begin(batches(0, 70))
    for batch in batches(0, 70):
        np.testing.assert_array_equal(own(batch), both[batch])


def test_the_next_batches_are_read_by_another_thread_before_they_are_asked_for() -> None:
    read: list[tuple[int, str]] = []
    enough = threading.Event()

    class Slow:
        shape, nbytes = IMAGES.shape, IMAGES.nbytes

        def __len__(self) -> int:
            return len(IMAGES)

        def __getitem__(self, key: np.ndarray) -> np.ndarray:
            read.append((int(key[0]), threading.current_thread().name))
            if len(read) == feed.AHEAD:
                enough.set()
            return IMAGES[key]

    own = Feed(Slow(), None, CPU, "slow", ahead=True)  # type: ignore[arg-type]
    own.begin(batches(3))
    assert enough.wait(20), "nobody asked, and they are there"
    assert [first for first, _ in read] == [int(batch[0]) for batch in batches(3)[: feed.AHEAD]], (
        "and no more than those"
    )
    assert all(name.startswith("images") for _, name in read)


def test_an_epoch_that_ends_early_leaves_nothing_behind() -> None:
    own = Feed(IMAGES, None, CPU, "a", ahead=True)
    own.begin(batches(0))
    own(batches(0)[0])
    own.begin(batches(1))
    for batch in batches(1):
        np.testing.assert_array_equal(own(batch), IMAGES[batch])


def test_a_batch_that_nobody_named_is_read_all_the_same() -> None:
    own = Feed(IMAGES, None, CPU, "a", ahead=True)
    own.begin(batches(0))
    other = np.array([3, 1, 4])
    np.testing.assert_array_equal(own(other), IMAGES[other])
    np.testing.assert_array_equal(own(batches(0)[0]), IMAGES[batches(0)[0]])


def test_what_fits_lies_on_the_device_once() -> None:
    free = round(IMAGES.nbytes / feed.SHARE)
    assert resident(IMAGES, "a", CPU, free=free - 10) is None
    assert resident(IMAGES, "a", CPU) is None, "a CPU has them in memory as it is"
    there = resident(IMAGES, "a", CPU, free=free + 10)
    assert there is not None
    np.testing.assert_array_equal(there, IMAGES)
    assert resident(IMAGES, "a", CPU, free=0) is there, "the next trial finds it"
    rows = np.array([7, 0, 7])
    np.testing.assert_array_equal(rows_on(there, rows, CPU), IMAGES[rows])
    assert resident(MORE, "b", CPU, free=0) is None
    assert resident(IMAGES, "a", CPU, free=0) is None, "another data set took its place"


def test_an_epoch_from_the_device_is_the_epoch_from_memory(data: Data, splits: Splits) -> None:
    config = TrialConfig(
        backbone="speednet", width=0.125, image_size=16, batch_size=12, optimizer="muon", lr=0.1, momentum=0.6,
        flip="alternating", crop=2, precision="fp32", accumulate=2,
    )  # fmt: skip

    def losses(placed: bool) -> list[float]:
        feed._resident.clear()
        if placed:
            assert resident(data.images, data.fingerprint, CPU, free=10**12) is not None
        learner = Learner(config, data, splits)
        found = []
        for epoch in range(2):
            for batch in learner.begin_epoch(epoch):
                learner.set_lr(epoch)
                found.append(float(learner.step(batch, 0.1)))
        assert isinstance(learner.feed.images, torch.Tensor) is placed
        return found

    assert losses(True) == losses(False)
