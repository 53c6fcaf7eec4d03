"""A sweep's budget, driven by hand: time, devices, targets, weights on disk."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from ensemble.pool import load_pool
from search.budget import Budget, parse_keep
from search.timing import Speed
from tests.hand_sweep import finish, scores, sweep, take
from trainables.errors import UserError
from trainables.job import Outcome, Result
from trainables.run.records import Records
from trainables.run_directory import list_candidates
from trainables.storage import write_json


def test_the_last_trials_are_shortened_to_the_time_left(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 1000)
    job = s.next()
    assert job is not None
    finish(s, job, seconds=6 * 300.0)  # 300 s an epoch: three fit into what is left
    job = s.next()
    assert job is not None
    assert job.config.epochs == 3
    finish(s, job, seconds=3 * 300.0)
    s.time.budget = Budget(deadline=time.time() + 100)  # not even one
    assert s.next() is None
    assert not s.has_more()


def test_time_is_counted_over_processes(tmp_path: Path) -> None:
    first = sweep(tmp_path)
    first.time._started -= 100
    first.saved -= 100
    first.tick()
    assert sweep(tmp_path).records.spent.seconds >= 100


def test_it_ends_when_more_trials_do_not_raise_the_ensemble(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, plateau=2)
    finish(s, take(s), true=(0.6,) * 4)
    finish(s, take(s), true=(0.9,) * 4)
    finish(s, take(s), true=(0.4,) * 4)
    s = sweep(tmp_path, trials=None, plateau=2)  # the curve outlives a kill
    assert [round(loss, 3) for *_, loss in s.live.curve] == [0.511, 0.105, 0.105]  # type: ignore[union-attr]
    last, running = take(s), take(s)
    s.finish(last.id, Result(Outcome.DIVERGED, error="nan"))
    assert s.enough() == "2 more trials have not raised the ensemble"
    assert s.next() is None
    assert s.report(running.id, scores(0.9))  # what still runs is stopped
    s.finish(running.id, Result(Outcome.PRUNED))
    assert not s.has_more()


def test_it_ends_at_the_target(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, target_accuracy=0.75)
    finish(s, take(s), true=(0.9, 0.9, 0.4, 0.4))
    assert s.has_more()
    finish(s, take(s), true=(0.8, 0.4, 0.7, 0.8))
    assert not s.has_more()


def test_device_seconds_are_counted_over_processes(tmp_path: Path) -> None:
    now = [time.time()]
    s = sweep(tmp_path, trials=None, device_seconds=1000)
    s.time.clock = lambda: now[0]
    s.time.place(lanes=2, devices=2)
    first, _second = take(s), take(s)
    now[0] += 100
    assert s.time.device_seconds() == 400
    assert s.time.left() == 150  # four devices are busy
    s.finish(first.id, Result(Outcome.PRUNED))
    now[0] += 100
    assert s.time.device_seconds() == 600
    s.tick()
    s = sweep(tmp_path, trials=None, device_seconds=1000)
    assert s.time.device_seconds() == 600
    assert s.time.left() == 400


def test_the_last_part_goes_to_new_seeds_of_the_members(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=8, final_seeds=0.5, pruner="promote")
    configs = {}
    for true in ((0.9, 0.9, 0.4, 0.4), (0.3,) * 4, (0.3, 0.3, 0.9, 0.9), (0.2,) * 4):
        job = take(s)
        configs[job.id] = job.config
        finish(s, job, true=true)
    assert s.live is not None
    s.live.members = {"0000": 0.5, "0002": 0.5}  # four images are too few to prefer them to one
    seeded = [take(s), take(s)]
    assert {s.proposals.seeds[job.id] for job in seeded} == {"0000", "0002"}
    for job in seeded:
        same = replace(configs[s.proposals.seeds[job.id]], seed=int(job.id))
        assert job.config == same
    assert not s.report(seeded[0].id, scores(0.1, 1))  # it does not wait at a rung
    assert sweep(tmp_path, trials=8, final_seeds=0.5).proposals.seeds == s.proposals.seeds


def test_weights_that_can_no_longer_matter_are_dropped(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, keep="3")
    write_json(UPath(tmp_path / "ensembles" / "mine.json"), {"members": [{"id": "0001", "weight": 1.0}]})
    for accuracy, true in ((0.6, 0.9), (0.1, 0.1), (0.5, 0.3), (0.7, 0.4), (0.4, 0.2), (0.8, 0.4)):
        finish(s, take(s), accuracy, true=(true,) * 4)
    assert set(s.live.members) == {"0000"}  # type: ignore[union-attr]
    kept = [c.id for c in list_candidates(s.run) if c.has_weights]
    assert kept == ["0000", "0001", "0005"]  # the live member, the saved one, and the best of the others
    assert all((c.path / "select_probs.npy").exists() for c in list_candidates(s.run))
    left_out = load_pool([s.run]).left_out  # an ensemble that is chosen later can predict new images
    assert {id for id, why in left_out.items() if "--keep-weights" in why} == {"0002", "0003", "0004"}


def test_what_was_spent_outlives_a_kill_while_a_long_trial_runs(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1)
    now = time.time()
    s.time.clock = lambda: now
    take(s)
    for _ in range(300):
        now += 1
        s.tick()
    assert Records(UPath(tmp_path)).spent.seconds > 290


def test_time_counts_from_where_the_process_began(tmp_path: Path) -> None:
    s = sweep(tmp_path, began=time.time() - 1000)
    assert s.time.spent().seconds >= 1000


def test_sizes_of_weights_to_keep() -> None:
    assert parse_keep("30").candidates == 30
    assert parse_keep("1.5GB").bytes == 1_500_000_000
    for wrong in ("", "1.5", "-3", "20 cats"):
        with pytest.raises(UserError, match="--keep-weights"):
            parse_keep(wrong)


def test_what_trials_took_on_cpus_says_nothing_about_gpus(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 1000)
    finish(s, take(s), seconds=6 * 300.0)
    (candidate,) = s.time.candidates
    config = candidate.info.config
    assert config is not None
    s.time.place(1, 1, "cpu")
    assert s.time.seconds(config) is not None  # a candidate of an older run does not say where
    s.time.candidates = [replace(candidate, info=replace(candidate.info, device="cpu"))]
    s.time.place(1, 1, "cuda")
    assert s.time.seconds(config) is None
    s.time.place(1, 1, "cpu")
    assert s.time.seconds(config) is not None


def test_epochs_that_a_trial_ran_elsewhere_say_nothing_either(tmp_path: Path) -> None:
    """A trial that began on CPUs and was promoted to a GPU has epochs of both."""
    s = sweep(tmp_path, trials=None, deadline=time.time() + 1000)
    finish(s, take(s), seconds=6.0)
    (candidate,) = s.time.candidates
    config = candidate.info.config
    assert config is not None
    curve = tuple({"epoch": n, "seconds": 100.0 * min(n, 3) + 2.0 * max(0, n - 3)} for n in range(1, 7))
    mixed = replace(candidate.info, curve=curve, device="cuda", resumed_after_epochs=(2.4,))
    s.time.candidates = [replace(candidate, info=mixed)]
    s.time.place(1, 1, "cuda")
    assert s.time.seconds(config) == Speed(0.0, 2.0)
    assert s.time.seconds_of_trials == [12.0]
    s.time.candidates = [replace(candidate, info=replace(mixed, device="mps"))]  # a Mac's, which has no CUDA
    s.time.place(1, 1, "cpu")
    assert s.time.seconds(config) is not None
