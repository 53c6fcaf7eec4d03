"""Benchmarks are run by hand, now and then: what is moved or renamed must not break them unseen."""

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks.parts import draw_part
from benchmarks.selectors.pools import of_run
from tests.ensemble.test_select import make_run
from trainables.data.prepare import prepare


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_benchmark_can_be_imported(name: str) -> None:
    """Before: benchmarks.freeze asked for a class that had gone."""
    importlib.import_module(f"benchmarks.{name}")


def test_a_part_of_a_data_set_has_its_own_images_and_labels(pictures: Path, tmp_path: Path) -> None:
    data = prepare("folder", pictures)
    part, (learned, held) = draw_part(data, [18, 9], 3, tmp_path)
    assert (len(learned), len(held), len(part.images), len(part.labels)) == (18, 9, 27, 27)
    assert not set(learned) & set(held)
    assert [np.bincount(part.labels[rows]).tolist() for rows in (learned, held)] == [[6, 6, 6], [3, 3, 3]]
    where = {data.images[row].tobytes(): data.labels[row] for row in range(len(data.labels))}
    assert all(where[part.images[row].tobytes()] == part.labels[row] for row in range(27))
    assert part.cache == tmp_path
    assert part.fingerprint not in (data.fingerprint, draw_part(data, [18, 9], 4, tmp_path)[0].fingerprint)


def test_a_sweep_is_a_pool_of_selection_quality(tmp_path: Path) -> None:
    """Before: run.json was read as a dictionary, which it no longer is."""
    run, probs, labels = make_run(tmp_path / "mine", models=3, rows=50, data={"name": "trash"})
    pool = of_run(str(run))
    assert pool.name == "sweep trash mine"
    np.testing.assert_array_equal(pool.labels, labels)
    assert pool.probs.shape == probs.shape
