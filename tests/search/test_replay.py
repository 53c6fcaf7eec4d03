"""The search benchmark's parts on a small table: its grid, its clock, and every method it compares."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recorded.curves import EPOCHS, GRID, NETWORKS, POINTS, QUANTUM, Curves, config_of, load_curves
from benchmarks.recorded.replay import Ours, replay
from benchmarks.search import METHODS, ensemble_loss, interval, run_once

IMAGES = 40  # of each split
DIVERGED = 7  # the point whose training diverges in its third epoch


@pytest.fixture(scope="module")
def curves() -> Curves:
    """A made-up recording: networks and rates differ, a point's curve falls, and an epoch takes 1 to 3 s by network."""
    random = np.random.default_rng(0)
    best = np.array([0.2 * point[0] + 0.3 * abs(point[1] - 3) for point in POINTS])
    best += random.uniform(0, 0.3, len(POINTS))
    losses = best[:, None] + 2 / np.arange(1, EPOCHS + 1)
    losses[DIVERGED, 2:] = np.nan
    seconds = np.repeat([[1.0 + point[0]] for point in POINTS], EPOCHS, axis=1)
    probs = {
        split: np.exp(-np.abs(random.normal(best[:, None], 0.5, (len(POINTS), IMAGES))))
        for split in ("tune", "select", "test")
    }
    return Curves(1 / (1 + losses), losses, seconds, probs)


class Script:
    """A method that hands out trials by a list of (name, index, epochs already had), and remembers what it hears."""

    def __init__(self, *jobs: tuple[str, int, int], stop: tuple[str, int] | None = None) -> None:
        self.jobs, self.stop = list(jobs), stop
        self.heard: list[tuple[str, int]] = []
        self.ends: list[tuple[str, str]] = []
        self.asked_at: list[float] = []

    def next(self, now: float) -> tuple[str, int, int] | None:
        self.asked_at.append(now)
        return self.jobs.pop(0) if self.jobs else None

    def report(self, name: str, epoch: int, loss: float) -> bool:
        self.heard.append((name, epoch))
        return (name, epoch) == self.stop

    def end(self, name: str, index: int, outcome: str) -> None:
        self.ends.append((name, outcome))


def first_of(network: int) -> int:
    return next(index for index, point in enumerate(POINTS) if point[0] == network)


def test_the_grid_is_whole_and_its_points_are_different_configurations() -> None:
    assert len(POINTS) == len(set(POINTS)) == np.prod([len(levels) for levels in GRID.values()]) >= 300
    configs = [config_of(point) for point in POINTS]
    assert len({str({**config.to_dict(), "seed": 0}) for config in configs}) == len(POINTS)
    assert [config.seed for config in configs] == list(range(len(POINTS)))
    assert {config.epochs for config in configs} == {EPOCHS}
    middle = list(GRID["lr"]).index(1.0)
    for network, (name, base) in enumerate(NETWORKS.items()):
        config = config_of((network, middle, 0, 1, 1, 0))
        assert (config.backbone, config.lr, config.optimizer) == (base.backbone, base.lr, base.optimizer), name
        assert (config.batch_size, config.label_smoothing) == (GRID["batch_size"][1], GRID["label_smoothing"][1])


def test_a_table_is_read_as_it_was_recorded(tmp_path: Path, curves: Curves) -> None:
    logs = {name: -np.log(probs) for name, probs in curves.true_probs.items()}
    codes = {name: np.round(values / QUANTUM).clip(0, 255).astype(np.uint8) for name, values in logs.items()}
    scores = {name: getattr(curves, name).astype(np.float32) for name in ("accuracy", "log_loss", "seconds")}
    np.savez_compressed(tmp_path / "curves.npz", **codes, **scores)
    read = load_curves(tmp_path / "curves.npz")
    for name, values in scores.items():
        np.testing.assert_array_equal(getattr(read, name), values)
    for name, probs in curves.true_probs.items():
        np.testing.assert_allclose(np.log(read.true_probs[name]), np.log(probs), atol=QUANTUM / 2 + 1e-9)


def test_time_is_what_the_devices_take(curves: Curves) -> None:
    slow, fast = first_of(2), first_of(0)  # 3 s and 1 s an epoch
    script = Script(("a", slow, 0), ("b", fast, 0), ("c", fast, EPOCHS - 2))
    ended = list(replay(script, curves, devices=2))
    # both devices are paid for until the end; c has had all but two epochs before
    assert ended == [(2 * 1.0 * EPOCHS, fast), (2 * (EPOCHS + 2.0), fast), (2 * 3.0 * EPOCHS, slow)]
    assert script.ends == [("b", "finished"), ("c", "finished"), ("a", "finished")]
    assert [epoch for name, epoch in script.heard if name == "c"] == [EPOCHS - 1, EPOCHS]
    assert sorted(script.asked_at)[:2] == [0.0, 0.0]


def test_a_stopped_or_diverged_trial_frees_its_device_at_once(curves: Curves) -> None:
    fast = first_of(0)
    script = Script(("stopped", fast, 0), ("diverged", DIVERGED, 0), ("last", fast, 0), stop=("stopped", 2))
    cost = curves.seconds[DIVERGED, :3].sum()  # the epoch that showed it is paid for
    assert list(replay(script, curves, devices=1)) == [(2.0 + cost + EPOCHS, fast)]
    assert script.ends == [("stopped", "stopped"), ("diverged", "diverged"), ("last", "finished")]
    assert ("diverged", 3) not in script.heard


@pytest.mark.parametrize("name", METHODS)
def test_every_method_searches_and_repeats_itself_for_a_seed(name: str, curves: Curves) -> None:
    def some(seed: int) -> list[tuple[float, int]]:
        return list(itertools.islice(replay(METHODS[name](curves, seed), curves, devices=2), 12))

    found = some(0)
    assert found == some(0)
    assert found != some(1)
    times = [now for now, _ in found]
    assert times == sorted(times)
    assert times[0] > 0
    assert DIVERGED not in [index for _, index in found]


def test_ours_goes_on_with_a_promoted_trial_where_it_waited(curves: Curves) -> None:
    method = Ours(curves, 0, "promote")
    heard: dict[str, list[int]] = {}
    told = method.report
    method.report = lambda name, epoch, loss: heard.setdefault(name, []).append(epoch) or told(name, epoch, loss)  # type: ignore[method-assign, func-returns-value]
    list(itertools.islice(replay(method, curves, devices=2), 6))
    assert max(len(epochs) for epochs in heard.values()) == EPOCHS
    assert min(len(epochs) for epochs in heard.values()) < EPOCHS
    assert all(epochs == list(range(1, len(epochs) + 1)) for epochs in heard.values())  # no epoch is paid for twice


def test_what_is_measured(curves: Curves) -> None:
    final = np.nan_to_num(curves.log_loss[:, -1], nan=np.inf)
    best, cost = int(final.argmin()), float(curves.seconds[int(final.argmin())].sum())
    # the best point is found with the second trial; the third ends after the budget
    run = run_once(Script(("a", 0, 0), ("b", best, 0), ("c", 1, 0)), curves, 1, cap=1e9, budget=EPOCHS + cost)
    assert run["seconds"] == EPOCHS + cost
    assert run["candidates"] == 2
    assert run["log_loss"] == ensemble_loss(sorted({0, best}), curves)
    assert run_once(Script(("a", int(final.argmax()) - 1, 0)), curves, 1, cap=1.0, budget=1e9)["seconds"] is None
    alone = -np.log(curves.true_probs["test"][best]).mean()
    assert ensemble_loss([best], curves) == pytest.approx(alone)
    low, high = interval(np.arange(100.0))
    assert low < 49.5 < high
    assert interval(np.full(5, 3.0)) == (3.0, 3.0)
