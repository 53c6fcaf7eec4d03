"""The sweep's logic without Ray: every outcome told to the study, interrupted trials taken up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from upath import UPath

from tests.hand_sweep import climb, finish, scores, states, sweep, take, told
from trainables.job import Outcome, Result
from trainables.run_directory import CandidateInfo, remove_temporaries, write_candidate


def test_it_hands_out_as_many_trials_as_asked_for(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=3)
    jobs = [s.next() for _ in range(4)]
    assert [job and job.id for job in jobs] == ["0000", "0001", "0002", None]
    for job in jobs[:3]:
        assert job is not None
        finish(s, job)
    assert states(s) == ["finished"] * 3
    assert not s.has_more()


def test_every_outcome_has_its_state(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=8)
    jobs = {}
    for outcome in ("good", "pruned", "diverged", "out of memory", "invalid"):
        job = s.next()
        assert job is not None
        jobs[outcome] = job.id
        s.report(job.id, scores(0.3))
        if outcome == "good":
            finish(s, job, 0.9)
        else:
            s.finish(job.id, Result(Outcome(outcome), error="why"))
    assert states(s) == ["finished", "pruned", "diverged", "out of memory", "invalid"]
    # failures that the sampler shall learn from count as the worst value seen
    assert [record.value for record in s.records] == [0.9, None, 0.3, 0.3, None]
    assert [(trial.number, trial.state.name) for trial in told(s)] == [
        (0, "COMPLETE"), (1, "PRUNED"), (2, "COMPLETE"), (3, "COMPLETE")
    ]  # fmt: skip
    assert [(record.id, record.error) for record in s.failures()] == [("0002", "why"), ("0003", "why")]


def test_a_bug_is_run_again_once_and_a_lost_node_several_times(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1)
    for outcome, attempts in (("bug", 2),):
        for attempt in range(attempts):
            job = s.next()
            assert job is not None
            assert job.id == "0000"
            s.finish(job.id, Result(Outcome(outcome), error="boom", traceback="lines"))
            assert s.has_more() == (attempt + 1 < attempts)
    assert states(s) == ["bug"]
    assert s.records["0000"].traceback == "lines"


def test_ranks_that_run_out_of_memory_try_smaller_micro_batches(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1, workers=2)
    full = Result(Outcome.OUT_OF_MEMORY, error="CUDA out of memory")
    tried = []
    while s.has_more():
        job = take(s)
        tried.append(job.config.accumulate)
        s.finish(job.id, full)
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128]  # the batch size is 128
    assert states(s) == ["out of memory"]
    assert sweep(tmp_path, trials=1, workers=2).records["0000"].config.accumulate == 128  # type: ignore[union-attr]
    s = sweep(tmp_path, trials=2)  # alone a trial has tried that itself
    s.finish(take(s).id, full)
    assert states(s) == ["out of memory"] * 2


def test_interrupted_trials_are_taken_up_by_the_next_process_under_their_number(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=3)
    done, cut, killed = first.next(), first.next(), first.next()
    assert done is not None
    assert cut is not None
    assert killed is not None
    finish(first, done)
    first.report(cut.id, scores(0.4))
    first.finish(cut.id, Result(Outcome.INTERRUPTED))
    # `killed` is never heard of again: kill -9

    second = sweep(tmp_path, trials=3)
    again = [second.next(), second.next(), second.next()]
    assert [job and job.id for job in again] == [cut.id, killed.id, None]
    assert again[0] is not None
    assert again[0].config == cut.config
    for job in again[:2]:
        assert job is not None
        finish(second, job)
    assert states(second) == ["finished"] * 3


def test_a_candidate_that_was_never_recorded_counts(tmp_path: Path) -> None:
    first = sweep(tmp_path, trials=2)
    job = first.next()
    assert job is not None
    metrics = {"tune_accuracy": 0.7, "tune_log_loss": 0.3}
    first.report(job.id, scores(0.6, 1))  # and the last report was lost, too
    curve = [{**scores(accuracy, epoch), "seconds": epoch} for epoch, accuracy in ((1, 0.6), (2, 0.7))]
    config = job.config
    info = CandidateInfo(job.id, config, metrics, tuple(curve), "finished", split_fingerprint="f")
    write_candidate(first.run, info, np.full((4, 2), 0.5))
    record = sweep(tmp_path, trials=2).records["0000"]
    assert (record.value, record.scores) == (0.7, ((1, 0.6), (2, 0.7)))
    third = sweep(tmp_path, trials=2)  # and still counts for whoever comes after the one that told
    following = third.next()
    assert following is not None
    assert following.id == "0001"
    assert third.next() is None


def test_a_repeated_epoch_does_not_disturb(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    job = s.next()
    assert job is not None
    for accuracy, epoch in ((0.2, 1), (0.4, 2), (0.9, 2), (0.5, 3)):
        s.report(job.id, scores(accuracy, epoch))
    assert s.records[job.id].scores == ((1, 0.2), (2, 0.4), (3, 0.5))


def test_the_pruner_stops_the_worse_half_at_a_rung_but_never_after_the_last_epoch(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="asha")
    verdicts = []
    for accuracy in (0.9, 0.8, 0.1):
        job = s.next()
        assert job is not None
        verdicts.append([s.report(job.id, scores(accuracy, epoch)) for epoch in (1, 2, 3)])
        s.report(job.id, scores(accuracy, 4))
        s.report(job.id, scores(accuracy, 5))
        assert not s.report(job.id, scores(accuracy, 6))
        finish(s, job, accuracy)
    assert verdicts[0] == [False, False, False]
    assert verdicts[2] == [False, False, True]


def test_what_a_pruner_has_heard_outlives_a_kill(tmp_path: Path) -> None:
    s = sweep(tmp_path, pruner="asha")
    finish(s, take(s), 0.2)
    good, bad = take(s), take(s)
    for epoch in (1, 2, 3):
        assert not s.report(good.id, scores(0.5, epoch))
    s.report(bad.id, scores(0.1, 1))
    s.save()
    s = sweep(tmp_path, pruner="asha")
    assert [take(s).id, take(s).id] == [good.id, bad.id]
    assert [s.report(bad.id, scores(0.1, epoch)) for epoch in (2, 3)] == [False, True]


def test_checkpoints_of_ended_trials_are_removed_and_those_of_interrupted_ones_kept(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    ended, cut = s.next(), s.next()
    assert ended is not None
    assert cut is not None
    s.finish(ended.id, Result(Outcome.PRUNED))
    s.finish(cut.id, Result(Outcome.INTERRUPTED))
    for job in (ended, cut):
        folder = tmp_path / "checkpoints" / job.id
        folder.mkdir(parents=True)
        (folder / "state.safetensors").write_bytes(b"late")
    s.remove_stale_checkpoints()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [cut.id]


def test_a_bug_is_not_retried_again_by_the_next_process(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1)
    s.finish(take(s).id, Result(Outcome.BUG, error="boom", traceback="lines"))
    s = sweep(tmp_path, trials=1)
    s.finish(take(s).id, Result(Outcome.BUG, error="boom", traceback="lines"))
    assert not s.has_more()
    assert [(record.id, record.outcome, record.traceback) for record in s.failures()] == [("0000", "bug", "lines")]


def test_another_configurations_candidate_is_not_taken_for_a_trials_own(tmp_path: Path) -> None:
    """Before: the trial ended at once, with the score of other parameters."""
    s = sweep(tmp_path, trials=3)
    job = take(s)
    other = replace(job.config, lr=job.config.lr / 2)
    info = CandidateInfo(job.id, other, {"tune_accuracy": 0.99, "tune_log_loss": 0.1}, split_fingerprint="f")
    write_candidate(s.run, info, np.full((4, 2), 0.5))
    info = replace(info, id="0007")
    write_candidate(s.run, info, np.full((4, 2), 0.5))
    s = sweep(tmp_path, trials=3)
    assert states(s) == ["invalid"]
    assert s.records[job.id].value is None
    jobs = [take(s) for _ in range(3)]  # it cost no trial, and the other name is not taken either
    assert [job.id for job in jobs] == ["0008", "0009", "0010"]
    assert s.next() is None


def test_records_that_were_lost_are_not_made_up(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=2)
    finish(s, take(s))
    for path in (tmp_path / "trials").iterdir():
        path.unlink()
    s = sweep(tmp_path, trials=1)
    assert take(s).id == "0001"  # not under a name that a candidate has


def test_waiting_trials_go_on_when_the_budget_is_raised(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="promote")
    for accuracy in (0.5, 0.3, 0.2, 0.1):
        climb(s, take(s), accuracy)
    assert not s.has_more()
    s.close()
    assert states(s) == ["finished", "waiting", "waiting", "waiting"]
    s = sweep(tmp_path, trials=8, pruner="promote")
    for _ in range(4):
        climb(s, take(s), 0.05)
    assert take(s).id == "0001"


def test_a_sweep_that_is_stopping_ends_trials_after_their_epoch_but_for_the_last(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    job = take(s)
    assert not s.report(job.id, scores(0.5, 4))
    s.stopping = True
    assert s.report(job.id, scores(0.5, 5))
    assert not s.report(job.id, scores(0.5, 6))  # only its predictions are still to be made
    finish(s, job)
    assert states(s) == ["finished"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    s = sweep(tmp_path)
    finish(s, take(s))
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    for folder in (tmp_path, tmp_path / "candidates" / "0000"):
        (folder / ".weights.safetensors.0123abcd.tmp").write_bytes(b"half")
    remove_temporaries(UPath(tmp_path))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_a_machine_that_is_lost_behind_the_last_file_has_lost_nothing(tmp_path):
    """Before: such a trial ended as lost, and its candidate was there all the same."""
    s = sweep(tmp_path, trials=1)
    job = take(s)
    metrics = {"tune_accuracy": 0.7, "tune_log_loss": 0.3, "select_log_loss": 0.3}
    probs = np.full((4, 2), 0.5)
    info = CandidateInfo(job.id, job.config, metrics, (), "finished", split_fingerprint="f")
    write_candidate(s.run, info, probs, probs)
    ends = []
    while s.finish(job.id, Result(Outcome.LOST_NODE, error="gone")) != "finished":
        ends.append(take(s).id)
        assert len(ends) < 20
    assert set(ends) <= {job.id}
    assert (s.records[job.id].outcome, s.records[job.id].value) == (Outcome.FINISHED, 0.7)


def test_a_trial_whose_own_time_was_over_is_not_begun_again_and_again(tmp_path: Path) -> None:
    """Before: it came back at once, with less time, until the sweep's end; the lane did nothing else."""
    s = sweep(tmp_path / "run", trials=3)
    short = take(s)
    s.finish(short.id, Result(Outcome.INTERRUPTED, error="the deadline passed while features were computed"))
    others = [take(s), take(s)]
    assert short.id not in [job.id for job in others]
    for job in others:
        finish(s, job)
    assert s.next() is None
    assert not s.has_more()
    again = sweep(tmp_path / "run", trials=3)
    assert take(again).id == short.id, "the next start has time for it"
