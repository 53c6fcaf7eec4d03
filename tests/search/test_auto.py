"""Where the default space lets a budget go, and what it is told of the devices."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.trial import FixedTrial
from upath import UPath

from search.budget import Budget
from search.config import Cost, SearchConfig, Task
from search.costs import Costs
from search.plan import checked, with_budget
from search.spaces import auto
from search.timing import Timing
from tests.hand_sweep import finish, scores, states, sweep, take
from trainables.config import TrialConfig
from trainables.job import WeightSource
from trainables.models.speed import gflops, native_size, training_rate
from trainables.run.records import Spent
from trainables.run_directory import Candidate, CandidateInfo

LITES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")


def task(left: float | None = 430.0, images: int = 2019, stored: int = 256, seconds: float = 0.013) -> Task:
    """Two cores and so many photographs; `seconds` of a forward pass of lite0 at its own size."""
    costs = {LITES[i]: Cost((224, 240, 260)[i], (1 + 0.6 * i) * seconds, (1 + 0.6 * i) * 6 * seconds) for i in range(3)}
    backbones: dict[str, WeightSource | None] = {name: WeightSource("offline", "x") for name in LITES}
    device: Literal["cuda", "cpu"] = "cuda" if left is None else "cpu"
    return Task({"speednet": None, **backbones}, 6, images, round(0.8 * images), stored, device, left, costs)


def proposed(where: Task, **params: Any) -> TrialConfig:
    usual = auto.USUAL | {"conv_lr": 5e-4, "conv_decay": 1.0}
    return auto.suggest(FixedTrial({**usual, **params}), where)  # type: ignore[arg-type]


def test_only_small_images_are_learned_from_scratch() -> None:
    assert not auto.takes(task(stored=128), "speednet")
    assert auto.takes(task(stored=32), "speednet")
    assert not auto.takes(task(stored=32, images=200), "speednet")  # too few to learn from nothing


def test_a_backbone_that_the_time_is_too_short_for_takes_no_part() -> None:
    assert auto.takes(task(left=430), LITES[2])
    assert not auto.takes(task(left=10), LITES[2])
    assert auto.takes(task(left=None), LITES[2])


def test_probes_are_made_at_the_native_size_or_the_largest_affordable() -> None:
    sizes = [proposed(task(left), backbone=LITES[2], way="probe").image_size for left in (100, 430, 3600, None)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 160
    assert sizes[-1] == 260


def test_many_photographs_are_tuned_small_where_the_time_is_short() -> None:
    """100,000 of them in half an hour: an epoch at half the native size would take an hour."""
    where = task(left=1729.0, images=100_000)
    tuned = proposed(where, backbone=LITES[0], way="tuned")
    cost = where.costs[LITES[0]]
    assert 1 <= tuned.epochs <= 2
    assert tuned.image_size < 112
    assert tuned.frozen_norm
    assert cost.features(100_000, tuned.image_size) + cost.epoch(80_000, tuned.image_size) <= 1729
    assert proposed(task(left=8000.0, images=100_000), backbone=LITES[0], way="tuned").image_size > tuned.image_size
    few = proposed(task(left=20.0, images=2000), backbone=LITES[0], way="tuned")
    assert few.image_size >= 112, "one epoch of few images would teach nothing, however small they are"


def test_more_time_buys_epochs_and_then_pixels() -> None:
    tuned = [proposed(task(left), backbone=LITES[0], way="tuned") for left in (100, 430, 3600, 36_000, None)]
    work = [config.epochs * config.image_size**2 for config in tuned]
    assert work == sorted(work)
    assert tuned[0].image_size == 128
    assert tuned[-1].image_size == 224
    assert all(config.epochs >= 3 for config in tuned)
    for left, config in zip((430, 3600, 36_000), tuned[1:], strict=False):
        cost = task().costs[LITES[0]]
        assert cost.features(2019, config.image_size) + config.epochs * cost.epoch(1615, config.image_size) <= left


def test_half_an_hour_has_room_for_images_of_the_native_size() -> None:
    """Before: lite0 at 160 pixels for nine epochs, then many short trials that added nothing to the ensemble."""
    tuned = [proposed(task(1620.0, seconds=0.0085), backbone=name, way="tuned") for name in LITES]
    assert [config.image_size for config in tuned] == [224, 240, 260]
    assert all(config.epochs >= 6 for config in tuned)
    smaller = proposed(task(1620.0, seconds=0.0085), backbone=LITES[0], way="tuned", smaller=True)
    assert smaller.image_size < 224


def test_the_first_tuned_trial_leaves_no_rest_that_is_too_short_for_another() -> None:
    cost, config = task().costs[LITES[0]], proposed(task(430), backbone=LITES[0], way="tuned")
    epoch = cost.epoch(1615 + round(auto.REFIT * 2019), config.image_size)  # with its part of the last ones
    assert 430 - cost.features(2019, config.image_size) - config.epochs * epoch < epoch


def test_without_a_limit_a_trial_on_a_cpu_is_no_days_work() -> None:
    endless = replace(task(None), device="cpu")
    assert proposed(endless, backbone=LITES[0], way="tuned") == proposed(task(3600), backbone=LITES[0], way="tuned")
    assert auto.takes(endless, LITES[2])


def test_large_data_need_few_epochs_and_small_data_many() -> None:
    assert proposed(task(None, images=100_000), backbone=LITES[0], way="tuned").epochs == 3
    assert proposed(task(None, images=200), backbone=LITES[0], way="tuned").epochs == 30


def test_what_is_tried_first_is_what_the_space_proposes() -> None:
    first = auto.first(task())
    kinds = [proposed(task(), **params) for params in first if params["backbone"] != "speednet"]
    assert [config.is_probe for config in kinds] == [False, True, True, True, False, False]
    assert [config.backbone for config in kinds] == [LITES[0], *LITES, *LITES[1:]]


def test_on_few_images_the_probes_come_first_and_can_be_made() -> None:
    """Before: a batch of 128, which a probe does not have, was larger than the train split, and so all were refused."""
    few = task(images=60)
    first = [proposed(few, **params) for params in auto.first(few) if params["backbone"] != "speednet"]
    assert [config.is_probe for config in first] == [True] * 3 + [False] * 3
    for config in first:
        assert checked(config, few) == config


# --- what trials cost ---


def candidate(config: TrialConfig, *rows: dict[str, float]) -> Candidate:
    return Candidate("0000", UPath("/nowhere"), CandidateInfo("0000", config, {}, rows))


def costs(rate: float = 10.0) -> Costs:
    return Costs(dict.fromkeys(LITES, 224), {LITES[0]: 1.0, LITES[1]: 2.0, LITES[2]: 3.0}, rate, 1000, 800)


def test_costs_are_guessed_from_operations_and_then_measured() -> None:
    known = costs(rate=10.0)
    assert known.of(LITES[1]).training == pytest.approx(3 * 2.0 / 10)
    tuned = TrialConfig(backbone=LITES[0], pretrained=True, image_size=112, epochs=2)
    rows = [{"epoch": e, "seconds": 5.0 * e, "images_per_second": 20.0} for e in (1, 2)]
    known.learn(candidate(tuned, *rows))
    assert known.of(LITES[0]).training * (112 / 224) ** 2 == pytest.approx(1 / 20)
    assert known.of(LITES[1]).training == pytest.approx(2 * known.of(LITES[0]).training)
    assert known.of(LITES[0]).epoch(800, 112) == pytest.approx(40.0)


def test_features_that_were_stored_already_are_no_measurement() -> None:
    known, probe = costs(), TrialConfig(backbone=LITES[0], pretrained=True, image_size=224, epochs=0)
    known.learn(candidate(probe, {"epoch": 0, "seconds": 50.0}))
    measured = known.of(LITES[0]).forward
    assert known.of(LITES[0]).features(1000, 224) == pytest.approx(50.0)
    known.learn(candidate(probe, {"epoch": 0, "seconds": 1.0}))
    assert known.of(LITES[0]).forward == measured


def test_a_trial_whose_like_was_never_seen_is_fitted_into_the_time_left() -> None:
    time = Timing(Spent(), Budget(deadline=1000.0), clock=lambda: 900.0)
    config = TrialConfig(backbone=LITES[0], pretrained=True, image_size=224, epochs=50)
    assert time.fit(config) == config
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 300.0, 1000, 800))  # 8 s an epoch, 4.4 s of features
    shortened = time.fit(config)
    assert shortened is not None
    assert shortened.epochs == 11
    assert time.room_for(config) == pytest.approx(100 / (50 * 8 + 2000 / 450))
    probe = replace(config, epochs=0)
    assert time.fit(probe) == probe
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 1.0, 1000, 800))
    assert time.fit(probe) is None
    assert time.fit(config) is None


def test_a_part_of_an_epoch_of_many_images_is_worth_a_trial() -> None:
    """Before: of 80,000 photographs a half-hour sweep only made a probe, and left the rest of its time unused."""
    time = Timing(Spent(), Budget(deadline=1000.0), clock=lambda: 0.0)
    config = TrialConfig(backbone=LITES[0], pretrained=True, image_size=224, epochs=3)
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 100.0, 50_000, 40_000))  # 1,200 s an epoch, 667 s of features
    shortened = time.fit(config)
    assert shortened is not None
    assert shortened.epochs == 1
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 75.0, 50_000, 40_000))  # time for a tenth of one
    assert time.fit(config) is None


def test_no_network_is_tuned_for_less_than_half_of_its_epochs_beside_others() -> None:
    """Before: the last minutes of a half-hour sweep went into networks of one epoch, far below their own probes."""
    time = Timing(Spent(), Budget(deadline=1000.0), clock=lambda: 985.0)
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 300.0, 1000, 800))  # 8 s an epoch, 4.4 s of features
    config = TrialConfig(backbone=LITES[0], pretrained=True, image_size=224, epochs=3)
    shortened = time.fit(config)
    assert shortened is not None, "better than nothing"
    assert shortened.epochs == 1
    time.candidates.append(Candidate("0000", UPath("/nowhere"), CandidateInfo("0000", replace(config, epochs=0))))
    assert time.fit(config) is None
    assert time.fit(replace(config, epochs=2)) == replace(config, epochs=1)
    time.know(Costs({LITES[0]: 224}, {LITES[0]: 1.0}, 30_000.0, 100_000, 80_000))
    assert time.fit(config) == replace(config, epochs=1), "80,000 images teach a network in one epoch"


def test_what_was_seen_before_the_costs_were_known_teaches_them() -> None:
    time, known = Timing(Spent(), Budget()), costs()
    probe = TrialConfig(backbone=LITES[0], pretrained=True, image_size=224, epochs=0)
    time.learn(candidate(probe, {"epoch": 0, "seconds": 50.0}))
    time.know(known)
    assert known.of(LITES[0]).features(1000, 224) == pytest.approx(50.0)


def test_operations_and_rates_are_measured() -> None:
    assert gflops(LITES[0], 224) == pytest.approx(0.77, abs=0.02)  # as published: 407 M multiply-adds, head included
    assert gflops(LITES[0], 112) < 0.3 * gflops(LITES[0], 224)
    assert [native_size(name) for name in (*LITES, "speednet")] == [224, 240, 260, 224]
    assert training_rate("cpu", 1) > 0.1


# --- in a sweep ---


def test_a_probe_is_made_once(tmp_path: Path) -> None:
    def suggest(trial: optuna.Trial, left: float) -> TrialConfig:
        if trial.suggest_categorical("way", ["probe", "tuned"]) == "probe":
            return TrialConfig(backbone=LITES[0], pretrained=True, epochs=0)
        return TrialConfig(backbone=LITES[0], pretrained=True, lr=trial.suggest_float("lr", 1e-4, 1e-2), epochs=2)

    s = sweep(tmp_path, trials=6, sampler="tpe", suggest=suggest)
    s.proposals.enqueue([{"way": "probe"}])
    probes = 0
    for _ in range(6):
        job = take(s)
        probes += job.config.is_probe
        finish(s, job, 0.9 if job.config.is_probe else 0.5)  # the sampler would take it again
    assert probes == 1


def test_there_is_no_rung_where_no_others_fit_into_the_time(tmp_path: Path) -> None:
    """Before: of three trials that a budget had room for, one waited for ever at its first rung."""
    s = sweep(tmp_path, trials=None, pruner="promote", deadline=None)
    assert take(s).stops_at == (1,)
    s.time.budget = replace(s.time.budget, deadline=s.time.clock() + 300)
    job = take(s)
    finish(s, job, 0.9, seconds=60.0)
    assert take(s).stops_at == (1,)  # room for five
    s.time.budget = replace(s.time.budget, deadline=s.time.clock() + 200)
    late = take(s)
    assert late.stops_at == ()
    assert not s.report(late.id, scores(0.1, 1))  # the worst so far goes on all the same
    assert states(s)[int(late.id)] == "running"


def test_without_a_budget_the_default_space_takes_an_hour(pictures: Path) -> None:
    photos = SearchConfig(data="folder", data_dir=pictures)
    assert with_budget(photos).minutes == 60
    assert with_budget(replace(photos, trials=3)).minutes is None
    assert with_budget(replace(photos, scale="tiny")).minutes is None
    assert with_budget(SearchConfig()).minutes is None  # digits: the dry run's own trials
