"""What a sweep proposes, driven by hand: samplers, spaces, what comes first, what repeats itself."""

import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from search.config import Task
from search.spaces.recipes import intel_lites
from search.study.proposals import Queued
from tests.hand_sweep import finish, scores, states, suggest, sweep, take, told
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.job import Outcome, Result, WeightSource


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


def test_a_sampler_that_repeats_itself_is_made_to_explore(tmp_path: Path) -> None:
    grid = [TrialConfig(batch_size=size, epochs=2) for size in (8, 16, 32)]
    bounds = [0, 2]
    s = sweep(tmp_path, trials=3, sampler="tpe", suggest=lambda trial, left: grid[trial.suggest_int("size", *bounds)])
    s.proposals.queue += [Queued({"size": 1}), Queued({"size": 1})]
    first, second = take(s), take(s)
    assert first.config.batch_size == 16
    assert states(s) == ["running", "repeated", "running"]
    assert s.records["0001"].outcome is Outcome.REPEATED
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
