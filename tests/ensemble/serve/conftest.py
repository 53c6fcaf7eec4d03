"""Real servers on a free port of the loopback interface, one for each file of tests."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import Member, read_ensemble, write_ensemble
from ensemble.risk import Risk
from ensemble.serve.drift import Reference
from tests.server import Server
from trainables.run_directory import list_candidates
from trainables.storage import write_array


@pytest.fixture(scope="module")
def run(small_run: UPath, tmp_path_factory: pytest.TempPathFactory) -> UPath:
    """A run whose ensemble has temperatures, as `auto` chooses them."""
    run = UPath(shutil.copytree(str(small_run), tmp_path_factory.mktemp("runs") / "tempered"))
    ensemble = read_ensemble(run)
    members = zip(ensemble.members, (0.5, 0.3, 0.2), (0.7, 1.0, 2.5), strict=True)
    tempered = tuple(Member(m.id, weight, temperature=temperature) for m, weight, temperature in members)
    write_ensemble(run, dataclasses.replace(ensemble, members=tempered, temperature=0.6))
    return run


@pytest.fixture(scope="module")
def picture(pictures: Path) -> Image.Image:
    image = Image.open(pictures / "test/grid/0.png")
    image.load()
    return image


@contextlib.contextmanager
def healthy(run: UPath, temporary: Path, *options: str) -> Iterator[Server]:
    """A server that must stay up, and say nothing."""
    with Server(run, temporary, *options) as server:
        yield server
        assert server.process.poll() is None, "it stayed up"
        assert server.stop() == "", "nothing went wrong unseen"


@pytest.fixture(scope="module")
def server(run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with healthy(run, tmp_path_factory.mktemp("temporary"), "--most-mib", "2") as server:
        yield server
    assert server.process.returncode == 0
    assert list(server.temporary.iterdir()) == []


@pytest.fixture(scope="module")
def hasty(run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits 2 s for a request, with the largest upload and picture that it allows by default."""
    with healthy(run, tmp_path_factory.mktemp("temporary"), "--most-seconds", "2") as server:
        yield server


@pytest.fixture(scope="module")
def wary_run(run: UPath, tmp_path_factory: pytest.TempPathFactory) -> UPath:
    """A run whose ensemble is unsure of half of the select split, which has enough images to compare answers with."""
    wary = UPath(shutil.copytree(str(run), tmp_path_factory.mktemp("runs") / "wary"))
    ensemble = read_ensemble(wary)
    select = Reference.of([wary], ensemble)
    assert select is not None
    risk = Risk(0.05, in_set=0.2, sure=float(np.median(select.confidence)))
    write_ensemble(wary, dataclasses.replace(ensemble, risk=risk))
    for candidate in list_candidates(wary):
        write_array(candidate.path / "select_probs.npy", np.tile(candidate.probs("select"), (20, 1)))
    return wary


@pytest.fixture(scope="module")
def wary(wary_run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with healthy(wary_run, tmp_path_factory.mktemp("temporary"), "--most-mib", "2") as server:
        yield server
