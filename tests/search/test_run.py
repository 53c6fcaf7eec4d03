"""What a user of search.run can get wrong: one line, exit code 2, nothing written and nothing started."""

import dataclasses
import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from upath import UPath

from cluster import capacity
from cluster.capacity import Lanes, lanes_for
from cluster.connect import Node, _like_ctrl_c, free_port
from ensemble.file import Ensemble, read_ensemble
from ensemble.show import make_console
from search import run as search_run
from search.config import SearchConfig
from search.plan import make_plan
from search.refit import Refit
from trainables.config import TrialConfig
from trainables.data.splits import load_splits
from trainables.errors import UserError
from trainables.job import LaneRequest
from trainables.models.backbones import build
from trainables.run_directory import lock_run
from trainables.storage import read_json, write_json

SPACE = """
from trainables.config import TrialConfig
TRIALS = 2
BACKBONES = {"speednet": "scratch"}
def suggest(trial, task):
    return TrialConfig(backbone="speednet", batch_size=4096)
"""


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, run: Path, *args: str) -> str:
    """The one line on stderr of a command that must be refused."""
    monkeypatch.setattr(sys, "argv", ["search.run", *args, "--run", str(run)])
    monkeypatch.setattr(Lanes, "__enter__", lambda lanes: pytest.fail("Ray was started"))
    before = sorted(run.rglob("*")) if run.exists() else []
    with pytest.raises(SystemExit) as exit:
        search_run.main()
    assert exit.value.code == 2
    assert (sorted(run.rglob("*")) if run.exists() else []) == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--backbones", "resnet118"], "near matches: resnet1"),
        (["--backbones", "vgg19"], "--weights-dir"),  # no hub here, and no random start instead
        (["--backbones", "vgg19", "--weights-dir", "nowhere"], "weights folder nowhere does not exist"),
        (["--data", "folder", "--data-dir", "nowhere"], "nowhere"),
        (["--data", "folder"], "--data-dir"),
        (["--space", "dryrun"], "dry_run"),
        (["--storage", "nonsense://host/db"], "check --storage"),
        (["--trials", "0"], "--trials is 0"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--device-hours", "0"], "--device-hours is 0"),
        (["--target-accuracy", "90"], "--target-accuracy is 90"),
        (["--stop-on-plateau", "0"], "--stop-on-plateau is 0"),
        (["--final-seeds", "1"], "--final-seeds is 1"),
        (["--keep-weights", "20 cats"], "--keep-weights is '20 cats'"),
        (["--warm-start", "nowhere"], "nowhere is not a run directory"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--workers-per-trial", "0"], "--workers-per-trial is 0"),
        (["--cpus-per-trial", "0"], "--cpus-per-trial is 0"),
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial is 1.5"),
        (["--gpus-per-trial", "2"], "raise --workers-per-trial"),
        (["--gpus-per-trial", "0.5", "--workers-per-trial", "2"], "cannot share a GPU"),
    ],
)
def test_mistakes_on_the_command_line(
    args: list[str], expected: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_hub(name: str) -> None:
        raise OSError("no hub here")

    monkeypatch.setattr("trainables.models.weights._load_hub", no_hub)
    line = refused(capsys, monkeypatch, tmp_path / "run", *args)
    assert expected in line


@pytest.mark.parametrize("tracker", ["mlflow", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)  # then it cannot be imported
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = refused(capsys, monkeypatch, tmp_path / "run", "--track", tracker)
    assert f"--track {tracker} needs the package {tracker}; pip install 'ninefold[{tracker}]'" in line


def test_unknown_option_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["search.run", "--tirals", "3"])
    with pytest.raises(SystemExit) as exit:
        search_run.main()
    assert exit.value.code == 2
    assert "--trials" in capsys.readouterr().err


def test_a_batch_larger_than_the_split(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "huge.py").write_text(SPACE)
    line = refused(capsys, monkeypatch, tmp_path / "run", "--space", str(tmp_path / "huge.py"))
    assert "batch_size 4096 is larger than the train split (302 images)" in line


def test_a_space_file_with_an_error_in_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("TRIALS = 1 / 0")
    assert "ZeroDivisionError" in refused(capsys, monkeypatch, tmp_path / "run", "--space", str(tmp_path / "broken.py"))


def test_a_space_file_that_cannot_propose(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(SPACE.replace("batch_size=4096", "learning_rate=0.1"))
    line = refused(capsys, monkeypatch, tmp_path / "run", "--space", str(tmp_path / "broken.py"))
    assert "broken.py cannot propose: TypeError" in line
    assert "learning_rate" in line


def test_a_run_directory_that_cannot_be_written(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    args = ["--data", "folder", "--data-dir", str(pictures), "--space", "auto", "--backbones", "speednet"]
    assert "cannot be written" in refused(capsys, monkeypatch, tmp_path / "file/run", *args)


def test_a_class_folder_without_images(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/train/empty").mkdir()
    args = ["--data", "folder", "--data-dir", str(tmp_path / "data")]
    assert "empty" in refused(capsys, monkeypatch, tmp_path / "run", *args)


def test_a_run_directory_of_another_data_set(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    info = {"classes": ["a", "b"], "split_fingerprint": "other", "data": {"name": "cats"}}
    (run / "run.json").write_text(json.dumps(info))
    args = ["--data", "folder", "--data-dir", str(pictures), "--space", "auto"]
    line = refused(capsys, monkeypatch, run, *args)
    assert "cats" in line
    assert "--run" in line


def test_a_run_directory_that_another_search_is_working_in(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = ["--data", "folder", "--data-dir", str(pictures), "--space", "auto", "--backbones", "speednet"]
    config = SearchConfig(data="folder", data_dir=pictures, space="auto", backbones=("speednet",), run=str(tmp_path))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    held = lock_run(plan.run)
    assert "another search is at work" in refused(capsys, monkeypatch, tmp_path, *args)
    assert held is not None
    held.release()


def test_a_run_directory_of_other_backbones(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, space="auto", backbones=("speednet",), run=str(tmp_path))
    search_run._open_run(make_plan(config), config)
    args = ["--data", "folder", "--data-dir", str(pictures), "--space", "auto", "--backbones", "keras_cnn"]
    assert "a sweep over speednet, not over keras_cnn" in refused(capsys, monkeypatch, tmp_path, *args)


def test_a_run_directory_of_another_scale(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, space="auto", scale="tiny", backbones=("speednet",))
    assert make_plan(config).run.name == "folder-auto-tiny"
    config = replace(config, run=str(tmp_path))
    search_run._open_run(make_plan(config), config)
    args = ["--data", "folder", "--data-dir", str(pictures), "--space", "auto", "--backbones", "speednet"]
    assert "at scale tiny, not of auto at full" in refused(capsys, monkeypatch, tmp_path, *args)


def test_a_study_belongs_to_one_run_whatever_its_folder_is_called(pictures: Path, tmp_path: Path) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, space="auto", run=str(tmp_path / "a/photos"))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    assert make_plan(config).study == plan.study
    (tmp_path / "a/photos").rename(tmp_path / "moved")
    assert make_plan(replace(config, run=str(tmp_path / "moved"))).study == plan.study
    assert make_plan(replace(config, run=str(tmp_path / "b/photos"))).study != plan.study  # in the same database


def test_a_run_that_goes_on_in_a_cluster_keeps_its_space_and_gets_the_data(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, run=str(tmp_path / "run"))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    assert not (tmp_path / "run/data").exists()
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert make_plan(SearchConfig(data="folder", data_dir=pictures, run=str(tmp_path / "new"))).space.name == "auto"
    again = make_plan(config)
    assert again.space.name == plan.space.name == "auto"
    search_run._open_run(again, config)
    assert (tmp_path / "run/data" / plan.data.path.name / "meta.json").exists()


def test_weights_of_another_architecture(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file(build(TrialConfig(backbone="resnet10t"), 10).state_dict(), tmp_path / "resnet18.safetensors")
    args = ["--backbones", "resnet18", "--weights-dir", str(tmp_path)]
    assert "are not resnet18's" in refused(capsys, monkeypatch, tmp_path / "run", *args)


def test_weights_by_name_from_a_folder(tmp_path: Path) -> None:
    from trainables.models.weights import find_weights, read_pretrained

    torch.manual_seed(1)
    kept = build(TrialConfig(backbone="resnet10t"), 1000)
    save_file(kept.state_dict(), tmp_path / "resnet10t.safetensors")
    source = find_weights("resnet10t", tmp_path)
    loaded = build(
        TrialConfig(backbone="resnet10t", pretrained=True), 7, read_pretrained("resnet10t", source)
    ).state_dict()
    assert loaded["fc.weight"].shape == (7, 512)
    for name, value in kept.state_dict().items():
        assert name.startswith("fc.") or torch.equal(loaded[name], value)


@pytest.mark.parametrize(
    ("machines", "config", "expected"),
    [
        ([Node(2)], {}, (1, 1.0, 0.0, 2)),
        ([Node(64)], {}, (1, 8.0, 0.0, 8)),
        ([Node(32, 4)], {}, (1, 8.0, 1.0, 4)),
        ([Node(32, 4)], {"gpus_per_trial": 0.5}, (1, 4.0, 0.5, 8)),
        ([Node(32, 2)], {"gpus_per_trial": 0.6}, (1, 16.0, 0.6, 2)),  # no trial gets parts of two GPUs
        ([Node(32, 4)], {"workers_per_trial": 2}, (2, 8.0, 1.0, 2)),
        ([Node(2)], {"cpus_per_trial": 2.0}, (1, 2.0, 0.0, 1)),
        ([Node(2)], {"workers_per_trial": 2}, (2, 1.0, 0.0, 1)),
        # several machines: a trial fits into the one with the least room for it
        ([Node(0), Node(1), Node(1)], {}, (1, 1.0, 0.0, 2)),
        ([Node(0), Node(1), Node(1)], {"workers_per_trial": 2}, (2, 1.0, 0.0, 1)),
        ([Node(0), Node(3), Node(3)], {"workers_per_trial": 2}, (2, 1.0, 0.0, 2)),  # none over two machines
        ([Node(64), Node(16)], {"cpus_per_trial": 12.0}, (1, 12.0, 0.0, 6)),
        ([Node(16), Node(4, 1), Node(32, 4)], {}, (1, 4.0, 1.0, 5)),
        ([Node(3), Node(3)], {"cpus_per_trial": 2.0}, (1, 2.0, 0.0, 2)),
    ],
)
def test_lanes_fill_the_cluster(machines: list[Node], config: dict, expected: tuple) -> None:
    machines = [dataclasses.replace(node, id=str(number)) for number, node in enumerate(machines)]
    spec, lanes = lanes_for(machines, SearchConfig(**config).lane_request())
    assert (spec.workers, spec.cpus, spec.gpus, lanes) == expected


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address} cannot be joined .*refused.*; unset it"):
        Lanes(LaneRequest()).__enter__()


def test_sigterm_ends_even_a_shells_background_job() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts those
    try:
        with pytest.raises(KeyboardInterrupt):
            _like_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("machines", [[], [Node(2)], [Node(2), Node(2)]])
def test_a_trial_that_no_node_can_hold(machines: list[Node]) -> None:
    with pytest.raises(UserError, match="lower --cpus-per-trial"):
        lanes_for(machines, LaneRequest(cpus=4))


@pytest.mark.parametrize(
    ("machines", "asked", "said"),
    [
        ([Node(8)], None, [capacity.CPUS_ALONE]),
        ([Node(8)], 0.0, []),
        ([Node(8), Node(8, 1)], None, []),
    ],
)
def test_a_cluster_without_gpus_at_the_start_is_told_of(
    monkeypatch: pytest.MonkeyPatch, machines: list[Node], asked: float | None, said: list[str]
) -> None:
    """Before: a CPU machine that joined first decided for CPUs, and nobody heard of it."""
    monkeypatch.setattr(capacity, "nodes", lambda: machines)
    monkeypatch.setattr(capacity, "in_cluster", lambda: True)
    heard: list[str] = []
    Lanes(LaneRequest(gpus=asked), heard.append)._first()
    assert heard == said


def test_gpus_that_join_get_the_trials_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: a sweep that had begun on CPUs stayed there."""
    machines = [Node(8, here=True, id="head"), Node(8, id="cpus")]
    monkeypatch.setattr(capacity, "nodes", lambda: machines)
    heard: list[str] = []
    lanes = Lanes(LaneRequest(), heard.append)
    lanes.spec, lanes.count = lanes._first()
    assert lanes.now(None) == {"head": 8, "cpus": 8}
    machines.append(Node(0.5, 1, id="too small for a trial"))
    assert lanes.now(None) == {"head": 8, "cpus": 8, "too small for a trial": 0}
    machines.append(Node(16, 2, id="gpus"))
    assert lanes.now(None) == {"head": 0, "cpus": 0, "too small for a trial": 0, "gpus": 2}
    assert (lanes.spec.gpus, lanes.spec.cpus, lanes.count) == (1, 8, 2)
    assert heard == [capacity.GPUS_CAME]

    asked = Lanes(LaneRequest(gpus=0.0), heard.append)
    asked.spec, asked.count = asked._first()
    assert asked.now(None)["cpus"]  # as was said


def test_a_run_that_cannot_go_on_says_so(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, space="auto", run=str(tmp_path / "run"))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    with pytest.raises(UserError, match="objective is metric, not log_loss"):
        search_run._open_run(plan, replace(config, objective="log_loss"))
    info = read_json(plan.run / "run.json")
    del info["format"]
    write_json(plan.run / "run.json", info)
    with pytest.raises(UserError, match="earlier version"):
        search_run._open_run(plan, config)


def test_a_refit_follows_where_there_are_images_to_add(
    small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(data="folder", data_dir=tmp_path, weights_dir=tmp_path / "weights", refit=True)
    splits = load_splits(small_run)
    asked = []

    def refit(args: Refit) -> tuple[UPath, Ensemble]:
        asked.append(args)
        if len(asked) > 1:
            raise UserError("the images have changed")
        return UPath(f"{small_run}-refit"), ensemble

    monkeypatch.setattr(search_run, "refit", refit)
    ensemble, console = read_ensemble(small_run), make_console()
    for folds in ((), (), (splits.train,)):
        plan = SimpleNamespace(run=small_run, splits=replace(splits, folds=folds))
        search_run._refit(console, plan, config, ensemble)  # type: ignore[arg-type]
    assert asked == [Refit((str(small_run),), "equal", tmp_path, None, tmp_path / "weights")] * 2
    told = " ".join(capsys.readouterr().out.split())
    assert "small-refit; the claim is of the members before, which saw fewer images" in told
    assert "not refitted: the images have changed; python -m search.refit --run" in told
    assert "the candidates are cross-fitted" in told


def test_no_password_of_an_address_is_written(pictures: Path, tmp_path: Path) -> None:
    config = SearchConfig(data="folder", data_dir=pictures, backbones=("speednet",), run=str(tmp_path / "run"))
    plan = make_plan(config)
    addresses = {"labels": "https://me:hush@host/x.csv?password=hush", "storage": "postgresql://me:hush@host/db"}
    search_run._open_run(plan, replace(config, **addresses))  # type: ignore[arg-type]
    written = (tmp_path / "run" / "run.json").read_text()
    assert "hush" not in written
    assert "https://me:***@host/x.csv" in written
