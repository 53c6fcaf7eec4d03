"""--pruner promote: trials wait at a rung, and the best of them go on."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from search.budget import Budget
from search.study import promotion
from search.sweep import KEPT, Sweep
from tests.hand_sweep import climb, finish, scores, states, suggest, sweep, take, told
from trainables.config import TrialConfig
from trainables.job import Outcome, Result
from trainables.run_directory import CandidateInfo, write_candidate


@pytest.fixture
def two_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a ninth and a third, one in three goes on."""
    monkeypatch.setattr(promotion, "SHARES", (1 / 9, 1 / 3))
    monkeypatch.setattr(promotion, "FACTOR", 3)


def wait_higher_up(s: Sweep, job: dict[str, Any]) -> None:
    """Reach the lower of two rungs with a good score, and the upper one with a bad one."""
    assert not s.report(job.id, scores(0.9, 1))
    assert s.report(job.id, scores(0.4, 2))
    s.finish(job.id, Result(Outcome.PRUNED))


def test_the_best_of_its_kind_and_one_in_four_go_on_from_the_one_early_rung(tmp_path: Path) -> None:
    assert [promotion.rung_epochs(epochs) for epochs in (1, 2, 9, 10, 30)] == [(), (1,), (1,), (2,), (4,)]
    s = sweep(tmp_path, trials=12, pruner="promote")
    ends = [climb(s, take(s), accuracy) for accuracy in (0.5, 0.4, 0.9, 0.45, *[0.1] * 7)]
    assert ends == [6, 1, 6, 1, *[1] * 7]
    assert climb(s, take(s), 0.1) == 1
    job = take(s)
    assert job.id == "0003"  # of twelve the third best
    assert climb(s, job, 0.45, first=2) == 6


def test_the_best_of_every_backbone_goes_on_once_there_are_four(tmp_path: Path) -> None:
    def suggest_two(trial: optuna.Trial, left: float) -> TrialConfig:
        return replace(suggest(trial), backbone="speednet" if trial.number < 2 else "vit_scratch")

    s = sweep(tmp_path, trials=6, pruner="promote", suggest=suggest_two)
    assert [climb(s, take(s), accuracy) for accuracy in (0.9, 0.8, 0.2, 0.3, 0.1)] == [6, 1, 1, 1, 1]
    assert climb(s, take(s), 0.1) == 1
    job = take(s)
    assert job.id == "0003"  # worse than all of the other backbone
    assert climb(s, job, 0.3, first=2) == 6


@pytest.mark.usefixtures("two_rungs")
def test_trials_wait_at_a_rung_and_the_best_of_it_are_promoted(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=9, pruner="promote")  # six epochs: rungs after 1 and 2
    ends = [climb(s, take(s), accuracy) for accuracy in (0.5, 0.4, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1)]
    assert ends == [6, 1, 6, 1, 1, 1, 1, 1]
    assert s.has_more()
    assert climb(s, take(s), 0.1) == 1
    job = take(s)  # nine have reached the rung, so the best three go on: with its own number
    assert job.id == "0001"
    assert climb(s, job, 0.4, first=2) == 2  # the third at the second rung
    assert s.next() is None
    assert not s.has_more()
    s.close()
    assert sorted(states(s)) == ["finished"] * 2 + ["waiting"] * 7


@pytest.mark.usefixtures("two_rungs")
def test_the_sampler_sees_a_waiting_trial_as_pruned_at_its_rung(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=9, pruner="promote", objective="log_loss")
    climb(s, take(s), 0.5)
    wait_higher_up(s, take(s))
    climb(s, take(s), 0.3)
    cut = take(s)
    seen = {trial.number: trial for trial in told(s)}
    assert [seen[n].state.name for n in range(4)] == ["COMPLETE", "PRUNED", "PRUNED", "RUNNING"]
    # lower rungs count for less: samplers rank pruned trials by step first
    assert [seen[n].intermediate_values for n in (1, 2)] == [{99: pytest.approx(0.6)}, {98: 0.7}]
    assert states(s) == ["finished", "waiting", "waiting", "running"]
    assert cut.id == "0003"


@pytest.mark.usefixtures("two_rungs")
def test_waiting_trials_survive_a_kill(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=9, pruner="promote")
    climb(first, take(first), 0.5)
    wait_higher_up(first, take(first))
    climb(first, take(first), 0.3)
    cut = take(first)  # never heard of again

    second = sweep(tmp_path, trials=9, pruner="promote")
    assert second.rungs is not None
    assert first.rungs is not None
    assert second.rungs.scores == first.rungs.scores
    assert second.rungs.waiting == first.rungs.waiting == {"0001": 1, "0002": 2}
    assert take(second).id == cut.id
    assert second.counted == 4
    # another pruner takes them for interrupted ones: nothing is lost
    third = sweep(tmp_path, trials=4, pruner="none")
    for _ in range(3):
        finish(third, take(third))
    assert states(third) == ["finished"] * 4


def test_the_best_of_those_that_wait_at_the_end_keep_their_checkpoints_and_no_others(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, pruner="promote")
    while len(waiting := s.waiting()) < KEPT + 3:
        job = take(s)
        folder = tmp_path / "checkpoints" / job.id
        folder.mkdir(parents=True, exist_ok=True)
        climb(s, job, 0.9 - 0.01 * int(job.id), first=1 + len(s.records[job.id].scores))
        if str(s.records[job.id].outcome) == "finished":
            folder.rmdir()  # as the lane does
    s.close()
    kept = {record.id for record in s.records if record.stage == "waiting"}
    assert kept == set(waiting[:KEPT])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == kept
    assert {str(s.records[id].outcome) for id in waiting[KEPT:]} == {"pruned"}


@pytest.mark.parametrize("outcome", [Outcome.TIME, Outcome.FINISHED, Outcome.LOST_NODE, Outcome.INTERRUPTED])
def test_a_trial_that_ends_as_a_candidate_where_it_was_to_wait_has_ended(tmp_path: Path, outcome: Outcome) -> None:
    """Before: it waited, and was pruned in the end, while its candidate stayed: on disk, and in no record."""
    s = sweep(tmp_path, trials=3, pruner="promote")
    climb(s, take(s), 0.9)
    job = take(s)
    said = scores(0.1) | ({"last": 1.0} if outcome.leaves_candidate else {})
    assert s.report(job.id, said) != outcome.leaves_candidate  # those that are lost could not say so
    info = CandidateInfo(
        job.id, job.config, scores(0.1) | {"select_log_loss": 0.9}, ({**scores(0.1), "seconds": 1.0},),
        str(outcome if outcome.leaves_candidate else Outcome.TIME), split_fingerprint="f",
    )  # fmt: skip
    write_candidate(s.run, info, [[0.5, 0.5]] * 4, [[0.5, 0.5]] * 4)
    s.finish(job.id, Result(outcome))
    assert s.records[job.id].outcome in (Outcome.TIME, Outcome.FINISHED)
    assert s.records[job.id].value == 0.1
    assert s.waiting() == []
    assert take(s).id == "0002"
    s.close()
    assert s.records[job.id].outcome in (Outcome.TIME, Outcome.FINISHED)


def test_when_time_runs_short_the_best_waiting_trial_goes_on(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 10_000, pruner="promote")
    job = take(s)
    assert not s.report(job.id, scores(0.9))
    finish(s, job, 0.9, seconds=6 * 100.0)
    for accuracy in (0.3, 0.5):
        assert climb(s, take(s), accuracy) == 1
    s.time.budget = Budget(deadline=time.time() + 550)  # no whole trial fits, but what 0002 still lacks
    assert take(s).id == "0002"
    s.time.budget = Budget(deadline=time.time() + 250)
    assert take(s).config.epochs == 2  # no waiting trial could end: a new one is shortened
