"""Every search space: its proposals can be trained, with and without pretrained weights; tiny ones run end to end."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from search.config import Cost, Task
from search.plan import checked
from search.spaces import TINY_TRIALS, known_spaces, load_space
from trainables.job import WeightSource
from trainables.models.backbones import check_backbone
from trainables.models.speed import native_size

ROOT = Path(__file__).parents[2]
SEEDS = ("cifar10_nine", "intel_scenes", "cifar100_transfer", "cifar10_keras_cnn", "cifar10_from_scratch")
SPACES = ("auto", "dry_run", *SEEDS)
RECIPES = ("speednet_cifar10", "lite0_intel", "intel_lites", "lites_cifar10")


def test_every_space_is_tried_here() -> None:
    assert {*SPACES, *RECIPES} == set(known_spaces())


def task(name: str, found: bool, device: str) -> Task:
    """With every pretrained weight found, or with none but the offline package's."""
    backbones: dict[str, WeightSource | None] = {}
    for backbone, start in load_space(name).backbones.items():
        if start != "scratch" and (found or backbone == "tf_efficientnet_lite0"):
            backbones[backbone] = WeightSource("hub")
        elif start in ("scratch", "or scratch"):
            backbones[backbone] = None
    costs = {name: Cost(native_size(name), 0.001, 0.003) for name, weights in backbones.items() if weights is not None}
    return Task(backbones, 10, 50_000, 40_000, 32, device, 1200.0, costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_backbone_is_proposed_with_a_trainable_configuration(name: str, found: bool, device: str) -> None:
    space, where = load_space(name), task(name, found, device)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    proposed = [checked(space.suggest(study.ask(), where), where) for _ in range(max(60, 10 * len(where.backbones)))]
    assert {config.backbone for config in proposed} == set(where.backbones)
    for config in proposed:
        check_backbone(config.backbone)
        assert config.pretrained == (where.backbones[config.backbone] is not None)
        assert config.progressive == () or config.progressive[-1] == config.image_size
        assert config.pretrained or config.freeze_epochs == 0
    searched = [config for config in proposed if not config.is_probe]
    assert len({config.lr for config in searched}) > len(searched) / 2, "the learning rate is searched"


@pytest.mark.parametrize("name", RECIPES)
def test_a_fixed_recipe_varies_nothing_but_backbone_and_seed(name: str) -> None:
    space, where = load_space(name), task(name, found=True, device="cpu")
    study = optuna.create_study()
    proposed = [checked(space.suggest(study.ask(), where), where) for _ in range(space.trials)]
    assert {config.backbone for config in proposed} == set(where.backbones)
    assert [config.seed for config in proposed] == list(range(space.trials))
    assert len({replace(config, backbone="", seed=0) for config in proposed}) == 1


def test_tiny_trials_are_few_and_short() -> None:
    full, tiny = load_space("cifar10_keras_cnn"), load_space("cifar10_keras_cnn", "tiny")
    where = task("cifar10_keras_cnn", found=False, device="cpu")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    before, after = full.suggest(study.ask(), where), tiny.suggest(study.ask(), where)
    assert (full.trials, tiny.trials) == (16, TINY_TRIALS)
    assert before.epochs > 2 == after.epochs
    assert before.width > 0.25 == after.width
