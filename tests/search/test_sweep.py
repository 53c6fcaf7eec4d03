"""The sweep's logic without Ray: every outcome told to the study, interrupted trials taken up, budgets kept."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from upath import UPath

from ensemble.pool import load_pool
from search.budget import Budget, parse_keep
from search.config import Task
from search.spaces.recipes import intel_lites
from search.study.proposals import Queued
from tests.hand_sweep import climb, finish, scores, states, suggest, sweep, take, told
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.job import Outcome, Result, WeightSource
from trainables.run.records import Records
from trainables.run_directory import CandidateInfo, list_candidates, remove_temporaries, write_candidate
from trainables.storage import write_json


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


def test_invalid_proposals_cost_no_trial(tmp_path: Path) -> None:
    def picky(trial: optuna.Trial, left: float) -> TrialConfig:
        if trial.number % 2 == 0:
            raise UserError("even")
        return suggest(trial)

    s = sweep(tmp_path, trials=2, suggest=picky)
    assert [job and job.id for job in (s.next(), s.next(), s.next())] == ["0001", "0003", None]
    assert (s.records["0000"].outcome, s.records["0000"].error) == ("invalid", "even")


def test_a_space_that_yields_nothing_valid_is_told(tmp_path: Path) -> None:
    def never(trial: optuna.Trial, left: float) -> TrialConfig:
        raise UserError("batch_size is too large")

    s = sweep(tmp_path, suggest=never)
    with pytest.raises(UserError, match="batch_size is too large"):
        s.next()


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


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        ("tpe", "asha"),
        ("gp", "none"),
        ("random", "hyperband"),
        ("random", "median"),
        ("tpe", "wilcoxon"),
    ],
)
def test_samplers_and_pruners_by_name(tmp_path: Path, sampler: str, pruner: str) -> None:
    s = sweep(tmp_path, trials=3, sampler=sampler, pruner=pruner)
    for _ in range(3):
        job = s.next()
        assert job is not None
        s.report(job.id, scores(0.5))
        finish(s, job)
    assert states(s) == ["finished"] * 3


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


def test_the_sampler_is_told_what_candidates_add_to_the_ensemble_as_it_is_now(tmp_path: Path) -> None:
    s = sweep(tmp_path, objective="ensemble")
    good, twin, other = (0.9, 0.9, 0.4, 0.4), (0.89, 0.9, 0.4, 0.4), (0.35, 0.35, 0.9, 0.9)
    for true in (good, twin, other):
        finish(s, take(s), true=true)
    take(s)
    recorded = [record.value for record in s.records]
    seen = [trial.value for trial in told(s)[:3]]
    assert recorded[0] == pytest.approx(-np.log(good).mean() - np.log(2))  # alone when it ended: better than guessing
    assert seen[2] == pytest.approx(-np.log(np.add(good, other) / 2).mean() + np.log(good).mean())
    assert seen[2] < seen[1]  # weaker than the twin, but different
    again = sweep(tmp_path, objective="ensemble")
    assert [trial.value for trial in told(again)[:3]] == seen


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


def test_a_bug_is_not_retried_again_by_the_next_process(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=1)
    s.finish(take(s).id, Result(Outcome.BUG, error="boom", traceback="lines"))
    s = sweep(tmp_path, trials=1)
    s.finish(take(s).id, Result(Outcome.BUG, error="boom", traceback="lines"))
    assert not s.has_more()
    assert [(record.id, record.outcome, record.traceback) for record in s.failures()] == [("0000", "bug", "lines")]


def test_a_sampler_that_repeats_itself_is_made_to_explore(tmp_path: Path) -> None:
    grid = [TrialConfig(batch_size=size, epochs=2) for size in (8, 16, 32)]
    bounds = [0, 2]
    s = sweep(tmp_path, trials=3, sampler="tpe", suggest=lambda trial, left: grid[trial.suggest_int("size", *bounds)])
    s.proposals.queue += [Queued({"size": 1}), Queued({"size": 1})]
    first, second = take(s), take(s)
    assert first.config.batch_size == 16
    assert states(s) == ["running", "invalid", "running"]
    assert s.records["0001"].error == "these parameters have been tried"
    assert second.id == "0002"
    bounds[:] = 1, 1
    assert take(s).config.batch_size == 16  # nothing else is left: better again than not at all


def _probe_or_more(trial: optuna.Trial, left: float) -> TrialConfig:
    """Half of the proposals are probes, of which there are two; the others take 60 epochs."""
    backbone = trial.suggest_categorical("backbone", ["resnet18", "resnet34"])
    if trial.suggest_categorical("way", ["probe", "tuned"]) == "probe":
        return TrialConfig(backbone=backbone, pretrained=True, epochs=0)
    return TrialConfig(backbone=backbone, epochs=60, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True))


@pytest.mark.parametrize("seed", [0, 13, 19, 36])  # the last three fell on it
def test_a_budget_that_ends_among_repeated_and_slow_proposals_is_no_fault_of_the_space(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sweep(tmp_path, trials=None, deadline=time.time() + 3600, suggest=_probe_or_more, seed=seed, sampler="tpe")
    monkeypatch.setattr(s.time, "fit", lambda config: config if config.is_probe else None)
    taken = []
    while (job := s.next()) is not None:
        taken.append(job.config)
        s.finish(job.id, Result(Outcome.DIVERGED, error="loss is nan"))
    assert sorted(config.backbone for config in taken) == ["resnet18", "resnet34"]
    assert all(config.is_probe for config in taken)
    assert not s.has_more()


def test_a_space_that_has_been_tried_in_full_ends_the_sweep(tmp_path: Path) -> None:
    def probes(trial: optuna.Trial, left: float) -> TrialConfig:
        backbone = trial.suggest_categorical("backbone", ["resnet18", "resnet34", "resnet50"])
        return TrialConfig(backbone=backbone, pretrained=True, epochs=0)

    s = sweep(tmp_path, trials=10, suggest=probes)
    for _ in range(3):
        s.finish(take(s).id, Result(Outcome.DIVERGED, error="loss is nan"))
    assert s.next() is None
    assert not s.has_more()


def test_fixed_recipes_are_taken_in_turn(tmp_path: Path) -> None:
    """They suggest no parameters: that is no repetition, and a number passed over would be a recipe passed over."""
    names = list(intel_lites.BACKBONES)
    task = Task(dict.fromkeys(names, WeightSource("offline")), 6, 14_033, 11_233, 96, "cpu", None, {})
    s = sweep(tmp_path, trials=3, suggest=lambda trial, left: intel_lites.suggest(trial, task))
    jobs = [take(s) for _ in range(3)]
    assert [job.id for job in jobs] == ["0000", "0001", "0002"]
    assert [job.config.backbone for job in jobs] == names


def test_first_configurations_are_proposed_once_over_processes(tmp_path: Path) -> None:
    first = [{"lr": 0.02}, {"lr": 0.03}]
    s = sweep(tmp_path)
    s.proposals.enqueue(first)
    assert take(s).config.lr == 0.02
    s = sweep(tmp_path)
    s.proposals.enqueue(first)
    assert [take(s).config.lr for _ in range(2)] == [0.02, 0.03]  # the one that was cut, and then the other
    assert take(s).config.lr not in (0.02, 0.03)


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
