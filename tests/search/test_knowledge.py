"""What a sweep knows before its first trial: earlier sweeps, and the first configurations of its space."""

from pathlib import Path

import optuna
import pytest

from search.config import Cost, Task
from search.spaces import load_space
from search.study.proposals import with_backbones
from search.study.warm_start import read_earlier
from tests.hand_sweep import finish, sweep, take, told
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

    def narrower(trial: optuna.Trial) -> TrialConfig:
        trial.suggest_categorical("other", ["a", "b"])
        return TrialConfig(lr=trial.suggest_float("lr", 5e-3, 1e-1, log=True), epochs=6)

    rates = [record.params["lr"] for record in first.records]
    inside = [rate for rate in rates if rate >= 5e-3]
    assert 0 < len(inside) < 8
    warm = read_earlier(str(old), "tune_accuracy", narrower)
    assert [trial.params for trial in warm] == [{"lr": rate} for rate in inside]

    s = sweep(new, trials=9, warm=warm)
    assert s.counted == 0  # they cost nothing
    assert [trial.value for trial in told(s)] == [trial.value for trial in warm]
    for number in range(5):
        job = take(s)
        assert int(job.id) == number
        finish(s, job, 0.9 + 0.01 * number)
    values = [trial.value for trial in told(s)[5:]]
    assert len(values) == len(warm)
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
    first = space.first(task)
    own = with_backbones(first, list(where))
    assert own == first
    s = sweep(tmp_path, trials=None, suggest=lambda trial, left: space.suggest(trial, task))
    s.proposals.enqueue(own)
    study = optuna.create_study()
    for params in own:
        take(s)
        study.enqueue_trial(params)
        trial = study.ask()
        space.suggest(trial, task)
        assert trial.params == params
        for key, value in params.items():
            assert trial.distributions[key]._contains(trial.distributions[key].to_internal_repr(value))
    assert [record.params for record in s.records] == own
    assert len(with_backbones(first, [b for b, weights in where.items() if weights is None])) == 1
