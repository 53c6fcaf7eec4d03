"""What a sweep knows before its first trial: earlier sweeps, and the first configurations of its space."""

from pathlib import Path

import optuna
import pytest

from search.config import Cost, Task
from search.spaces import load_space
from search.study.warm_start import add_earlier, enqueue_first, read_earlier
from tests.hand_sweep import finish, sweep, take
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.speed import native_size


def test_the_sampler_learns_from_an_earlier_sweep(tmp_path: Path) -> None:
    old, new = tmp_path / "test", tmp_path / "new"  # a study has the name of its run directory
    old.mkdir()
    new.mkdir()
    first = sweep(old, trials=8)
    for number in range(8):
        finish(first, take(first), 0.1 * number)
    s = sweep(new, trials=9)

    def narrower(trial: optuna.Trial) -> TrialConfig:
        trial.suggest_categorical("other", ["a", "b"])
        return TrialConfig(lr=trial.suggest_float("lr", 5e-3, 1e-1, log=True), epochs=6)

    rates = [trial.params["lr"] for trial in first.study.trials]
    inside = [rate for rate in rates if rate >= 5e-3]
    assert 0 < len(inside) < 8
    earlier = read_earlier(str(old), "tune_accuracy", narrower)
    for _ in range(2):  # adding them twice adds them once
        add_earlier(s.study, earlier)
    warm = s.study.trials
    assert [trial.params for trial in warm] == [{"lr": rate} for rate in inside]
    assert warm[0].user_attrs["warm"] == f"test/{rates.index(inside[0]):04d}"

    s = sweep(new, trials=9)
    assert s.counted == 0  # they cost nothing
    for number in range(5):
        job = take(s)
        assert int(job.id) == len(warm) + number
        finish(s, job, 0.9 + 0.01 * number)
    take(s)
    seen = s.study.sampler.view.get_trials()  # type: ignore[attr-defined]
    values = [trial.value for trial in seen[: len(warm)]]
    assert sorted(values) == values  # their order stays
    assert 0.9 <= min(values) <= max(values) <= 0.94  # on the scale of this sweep
    with pytest.raises(UserError, match="none of its candidates"):
        read_earlier(str(old), "tune_accuracy", lambda trial: TrialConfig(dropout=trial.suggest_float("d", 0, 0.1)))


@pytest.mark.parametrize("name", ["auto", "cifar100_transfer", "cifar10_keras_cnn", "cifar10_from_scratch"])
def test_the_first_configurations_of_a_space_are_whole_and_come_first(tmp_path: Path, name: str) -> None:
    space = load_space(name)
    where = {b: None if weights == "scratch" else WeightSource("hub", "") for b, weights in space.backbones.items()}
    costs = {name: Cost(native_size(name), 0.001, 0.003) for name, weights in where.items() if weights is not None}
    task = Task(where, 10, 50_000, 40_000, 32, "cpu", None, costs)
    study, first = optuna.create_study(), space.first(task)
    enqueue_first(study, first, list(where))
    enqueue_first(study, first, list(where))
    for params in first:
        trial = study.ask()
        space.suggest(trial, task)
        assert trial.params == params
        for key, value in params.items():
            assert trial.distributions[key]._contains(trial.distributions[key].to_internal_repr(value))
    assert len(study.trials) == len(first)
    without = optuna.create_study()
    enqueue_first(without, first, [b for b, weights in where.items() if weights is None])
    assert len(without.trials) == 1
