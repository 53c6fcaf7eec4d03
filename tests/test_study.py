"""The sweep's logic without Ray: every outcome told to the study, interrupted trials taken up, budgets kept."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from upath import UPath

from search.study import SECONDS_USED, Sweep, open_study
from trainables.candidate import write_candidate
from trainables.config import TrialConfig
from trainables.errors import UserError


class NoBoard:
    def started(self, id: str, config: TrialConfig) -> None: ...
    def epoch(self, id: str, metrics: dict[str, Any]) -> None: ...
    def ended(self, id: str, outcome: str, result: dict[str, Any]) -> None: ...
    def refresh(self) -> None: ...


def suggest(trial: optuna.Trial) -> TrialConfig:
    return TrialConfig(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True), epochs=6, seed=trial.number)


def sweep(run: Path, trials: int | None = 4, deadline: float | None = None, **study: Any) -> Sweep:
    options = {"objective": "accuracy", "sampler": "random", "pruner": "none", "seed": 0} | study
    opened = open_study(f"sqlite:///{run}/study.db", "test", **options)
    promote = options["pruner"] == "promote"
    made = Sweep(opened, UPath(run), {"run": str(run)}, trials, deadline, {}, NoBoard(), promote)
    made.propose_with(suggest)
    return made


def scores(accuracy: float, epoch: int = 1) -> dict[str, Any]:
    return {"epoch": epoch, "tune_accuracy": accuracy, "tune_log_loss": 1 - accuracy}


def finish(s: Sweep, job: dict[str, Any], accuracy: float = 0.5, seconds: float = 6.0) -> None:
    """As a lane would: the candidate on disk first, then the result."""
    metrics = {"tune_accuracy": accuracy, "tune_log_loss": 1 - accuracy}
    epochs = job["config"]["epochs"]
    curve = [{"epoch": e + 1, "seconds": seconds * (e + 1) / epochs} for e in range(epochs)]
    info = {"id": job["id"], "config": job["config"], "metrics": metrics, "curve": curve, "seconds": seconds}
    write_candidate(s.run, info, np.full((2, 2), 0.5))
    s.finish(job["id"], {"outcome": "finished", **metrics, "seconds": seconds})


def states(s: Sweep) -> list[str]:
    return [trial.state.name for trial in s.study.trials]


def test_it_hands_out_as_many_trials_as_asked_for(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=3)
    jobs = [s.next() for _ in range(4)]
    assert [job and job["id"] for job in jobs] == ["0000", "0001", "0002", None]
    for job in jobs[:3]:
        assert job is not None
        finish(s, job)
    assert states(s) == ["COMPLETE"] * 3
    assert not s.has_more()


def test_every_outcome_has_its_state(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=8)
    jobs = {}
    for outcome in ("good", "pruned", "diverged", "out of memory", "invalid"):
        job = s.next()
        assert job is not None
        jobs[outcome] = job["id"]
        s.report(job["id"], scores(0.3))
        if outcome == "good":
            finish(s, job, 0.9)
        else:
            s.finish(job["id"], {"outcome": outcome, "error": "why"})
    by_id = {f"{t.number:04d}": t for t in s.study.trials}
    assert by_id[jobs["good"]].value == 0.9
    assert by_id[jobs["pruned"]].state == TrialState.PRUNED
    # failures that the sampler shall learn from count as the worst value seen
    assert by_id[jobs["diverged"]].value == 0.3
    assert by_id[jobs["out of memory"]].value == 0.3
    assert by_id[jobs["out of memory"]].user_attrs["outcome"] == "out of memory"
    assert by_id[jobs["invalid"]].state == TrialState.FAIL
    assert ("0002", "diverged: why") in s.failures()


def test_a_bug_is_run_again_once_and_a_lost_node_several_times(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1)
    for outcome, attempts in (("bug", 2),):
        for attempt in range(attempts):
            job = s.next()
            assert job is not None
            assert job["id"] == "0000"
            s.finish(job["id"], {"outcome": outcome, "error": "boom", "traceback": "lines"})
            assert s.has_more() == (attempt + 1 < attempts)
    assert s.study.trials[0].state == TrialState.FAIL
    assert s.study.trials[0].user_attrs["traceback"] == "lines"


def test_interrupted_trials_are_taken_up_by_the_next_process_under_their_number(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=3)
    done, cut, killed = first.next(), first.next(), first.next()
    assert done is not None
    assert cut is not None
    assert killed is not None
    finish(first, done)
    first.report(cut["id"], scores(0.4))
    first.finish(cut["id"], {"outcome": "interrupted"})
    # `killed` is never heard of again: kill -9

    second = sweep(tmp_path, trials=3)
    again = [second.next(), second.next(), second.next()]
    assert [job and job["id"] for job in again] == [cut["id"], killed["id"], None]
    assert again[0] is not None
    assert again[0]["config"] == cut["config"]
    for job in again[:2]:
        assert job is not None
        finish(second, job)
    assert states(second) == ["COMPLETE"] * 3


def test_a_candidate_that_the_study_was_never_told_of_counts(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=2)
    job = first.next()
    assert job is not None
    metrics = {"tune_accuracy": 0.7, "tune_log_loss": 0.3}
    write_candidate(first.run, {"id": job["id"], "config": job["config"], "metrics": metrics}, np.full((2, 2), 0.5))
    assert sweep(tmp_path, trials=2).study.trials[0].value == 0.7
    third = sweep(tmp_path, trials=2)  # and still counts for whoever comes after the one that told
    following = third.next()
    assert following is not None
    assert following["id"] == "0001"
    assert third.next() is None


def test_a_repeated_epoch_does_not_disturb_the_study(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    job = s.next()
    assert job is not None
    for accuracy, epoch in ((0.2, 1), (0.4, 2), (0.9, 2), (0.5, 3)):
        s.report(job["id"], scores(accuracy, epoch))
    assert s.study.trials[0].intermediate_values == {1: 0.2, 2: 0.4, 3: 0.5}


def test_the_pruner_stops_the_worse_half_at_a_rung_but_never_after_the_last_epoch(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="asha")
    verdicts = []
    for accuracy in (0.9, 0.8, 0.1):
        job = s.next()
        assert job is not None
        verdicts.append([s.report(job["id"], scores(accuracy, epoch)) for epoch in (1, 2, 3)])
        s.report(job["id"], scores(accuracy, 4))
        s.report(job["id"], scores(accuracy, 5))
        assert not s.report(job["id"], scores(accuracy, 6))
        finish(s, job, accuracy)
    assert verdicts[0] == [False, False, False]
    assert verdicts[2] == [False, False, True]


def test_invalid_proposals_cost_no_trial(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=2)

    def picky(trial: optuna.Trial) -> TrialConfig:
        if trial.number % 2 == 0:
            raise UserError("even")
        return suggest(trial)

    s.propose_with(picky)
    assert [job and job["id"] for job in (s.next(), s.next(), s.next())] == ["0001", "0003", None]
    assert s.study.trials[0].user_attrs == {"outcome": "invalid", "error": "even"}


def test_a_space_that_yields_nothing_valid_is_told(tmp_path: Path) -> None:
    s = sweep(tmp_path)

    def never(trial: optuna.Trial) -> TrialConfig:
        raise UserError("batch_size is too large")

    s.propose_with(never)
    with pytest.raises(UserError, match="batch_size is too large"):
        s.next()


def test_the_last_trials_are_shortened_to_the_time_left(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 1000)
    job = s.next()
    assert job is not None
    finish(s, job, seconds=6 * 300.0)  # 300 s an epoch: three fit into what is left
    job = s.next()
    assert job is not None
    assert job["config"]["epochs"] == 3
    finish(s, job, seconds=3 * 300.0)
    s.deadline = time.time() + 100  # not even one
    assert s.next() is None
    assert not s.has_more()


def test_time_is_counted_over_processes(tmp_path: Path) -> None:
    first = sweep(tmp_path)
    first._started -= 100
    first._saved -= 100
    first.tick()
    assert sweep(tmp_path).study.user_attrs[SECONDS_USED] >= 100


def test_another_objective_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path)
    with pytest.raises(UserError, match="objective is accuracy"):
        sweep(tmp_path, objective="log_loss")


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        ("tpe", "asha"),
        ("gp", "none"),
        ("random", "hyperband"),
        ("qmc", "median"),
        ("cmaes", "none"),
        ("nsga2", "wilcoxon"),
    ],
)
def test_samplers_and_pruners_by_name(tmp_path: Path, sampler: str, pruner: str) -> None:
    s = sweep(tmp_path, trials=3, sampler=sampler, pruner=pruner)
    for _ in range(3):
        job = s.next()
        assert job is not None
        s.report(job["id"], scores(0.5))
        finish(s, job)
    assert states(s) == ["COMPLETE"] * 3


def test_checkpoints_of_ended_trials_are_removed_and_those_of_interrupted_ones_kept(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    ended, cut = s.next(), s.next()
    assert ended is not None
    assert cut is not None
    s.finish(ended["id"], {"outcome": "pruned"})
    s.finish(cut["id"], {"outcome": "interrupted"})
    for job in (ended, cut):
        folder = tmp_path / "checkpoints" / job["id"]
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"late")
    s.remove_stale_checkpoints()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [cut["id"]]


def test_a_database_that_was_killed_in_its_making_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite commits every CREATE by itself: cut after the tables, the index of study names would be missing."""

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sqlalchemy.sql.ddl.SchemaGenerator.visit_index", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path)
    for _ in range(3):
        assert states(sweep(tmp_path)) == []


def take(s: Sweep) -> dict[str, Any]:
    job = s.next()
    assert job is not None
    return job


def climb(s: Sweep, job: dict[str, Any], accuracy: float, first: int = 1) -> int:
    """Report epochs until the trial is to stop, or has finished; returns the last epoch."""
    for epoch in range(first, job["config"]["epochs"] + 1):
        if s.report(job["id"], scores(accuracy, epoch)):
            s.finish(job["id"], {"outcome": "pruned"})
            return epoch
    finish(s, job, accuracy)
    return job["config"]["epochs"]


def test_trials_wait_at_a_rung_and_the_best_of_it_are_promoted(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=9, pruner="promote")  # six epochs: rungs after 1 and 2
    for accuracy in (0.5, 0.9):
        assert climb(s, take(s), accuracy) == 1
    assert climb(s, take(s), 0.3) == 1
    job = take(s)  # three have reached the rung, so the best of them goes on: with its own number
    assert job["id"] == "0001"
    assert climb(s, job, 0.9, first=2) == 2  # the only one at the second rung
    for accuracy in (0.4, 0.2):
        assert climb(s, take(s), accuracy) == 1
    assert climb(s, take(s), 0.95) == 2  # in the best third at once, so it need not wait
    assert s.has_more()
    for accuracy in (0.1, 0.1, 0.1):
        climb(s, take(s), accuracy)
    assert take(s)["id"] == "0000"  # of nine the third best
    assert climb(s, {"id": "0000", "config": {"epochs": 6}}, 0.5, first=2) == 2
    assert climb(s, take(s), 0.95, first=3) == 6  # three at the second rung
    assert s.next() is None
    assert not s.has_more()
    s.close()
    assert sorted(states(s)) == ["COMPLETE"] + ["PRUNED"] * 8
    assert not s.waiting


def test_the_sampler_sees_a_waiting_trial_as_pruned_at_its_rung(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=9, pruner="promote", objective="log_loss")
    for accuracy in (0.5, 0.9, 0.3):
        climb(s, take(s), accuracy)
    climb(s, take(s), 0.9, first=2)
    cut = take(s)
    seen = {t.number: t for t in s.study.sampler.view.get_trials()}  # type: ignore[attr-defined]
    assert [seen[n].state.name for n in range(4)] == ["PRUNED"] * 3 + ["RUNNING"]
    # lower rungs count for less: samplers rank pruned trials by step first
    assert [seen[n].intermediate_values for n in range(3)] == [{-2: 0.5}, {-1: pytest.approx(0.1)}, {-2: 0.7}]
    assert [t.state.name for t in s.study.trials] == ["RUNNING"] * 4
    assert cut["id"] == "0003"


def test_waiting_trials_survive_a_kill(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=9, pruner="promote")
    for accuracy in (0.5, 0.9, 0.3):
        climb(first, take(first), accuracy)
    job = take(first)
    assert job["id"] == "0001"
    climb(first, job, 0.9, first=2)
    cut = take(first)  # never heard of again

    second = sweep(tmp_path, trials=9, pruner="promote")
    assert second.rungs is not None
    assert first.rungs is not None
    assert second.rungs.scores == first.rungs.scores
    assert second.rungs.waiting == first.rungs.waiting == {"0000": 2, "0001": 1, "0002": 2}
    assert take(second)["id"] == cut["id"]
    assert second.counted == 4
    # another pruner takes them for interrupted ones: nothing is lost
    third = sweep(tmp_path, trials=4, pruner="none")
    for _ in range(4):
        finish(third, take(third))
    assert states(third) == ["COMPLETE"] * 4


def test_when_time_runs_short_the_best_waiting_trial_goes_on(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 10_000, pruner="promote")
    for accuracy in (0.5, 0.9, 0.3):
        climb(s, take(s), accuracy)
    job = take(s)
    finish(s, job, 0.9, seconds=6 * 100.0)
    s.deadline = time.time() + 550  # not enough for a whole trial, but for the five epochs that 0000 lacks
    assert take(s)["id"] == "0000"
    s.deadline = time.time() + 250
    assert take(s)["config"]["epochs"] == 2  # no waiting trial could end: a new one is shortened
