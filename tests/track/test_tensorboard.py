"""Event files, as TensorBoard's own reader and its HParams page see them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from search.track.tracking import make_trackers
from tests.hand_sweep import finish, sweep, take
from tests.track.conftest import conclude, every_end


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in read(folder).Scalars(name)]


def test_a_trial_has_its_curve_and_its_scores(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    conclude(s)
    folder = tmp_path / "tensorboard"
    assert sorted(path.name for path in folder.iterdir()) == ["0000", "0001", "0002", "0003", "sweep"]
    assert points(folder / "0000", "curve/seconds") == [(epoch, epoch) for epoch in range(1, 7)]
    first = read(folder / "0000").Scalars("curve/seconds")[0]
    assert first.wall_time == pytest.approx(s.records["0000"].began + 1)
    assert points(folder / "0002", "curve/tune_accuracy") == [(1, 0.1), (2, 0.2)]
    assert points(folder / "0000", "select_log_loss") == [(0, 0.2)]
    (outcome,) = read(folder / "0001").Tensors("outcome/text_summary")
    assert outcome.tensor_proto.string_val == [b"diverged: loss is nan"]
    assert points(folder / "sweep", "select_claim_accuracy") == [(4, 0.75)]
    assert points(folder / "sweep", "test_ensemble_accuracy") == [(4, 0.5)]
    (text,) = read(folder / "sweep").Tensors("best.json/text_summary")[0].tensor_proto.string_val
    assert b'"id": "0000"' in text


def test_the_hyperparameters_are_on_the_hparams_page(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    conclude(s)
    for id in ("0000", "0001", "0002"):
        metadata = read(tmp_path / "tensorboard" / id).SummaryMetadata("_hparams_/session_start_info")
        params = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
        assert params["lr"].number_value == pytest.approx(s.records[id].params["lr"])
        assert params["backbone"].string_value == "resnet18"


def test_a_sweep_that_is_continued_writes_no_event_twice(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    conclude(s)
    before = sorted((tmp_path / "tensorboard" / "0000").iterdir())
    s = sweep(tmp_path, trials=5, pruner="median", trackers=make_trackers(["tensorboard"]))
    finish(s, take(s))
    conclude(s)
    folder = tmp_path / "tensorboard"
    assert sorted((folder / "0000").iterdir()) == before
    assert points(folder / "0004", "curve/seconds") == [(epoch, epoch) for epoch in range(1, 7)]
    assert points(folder / "sweep", "select_claim_accuracy") == [(5, 0.75)]


def test_a_folder_that_is_gone_or_was_cut_in_the_middle_is_written_anew(tmp_path: Path) -> None:
    s = sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    conclude(s)
    folder = tmp_path / "tensorboard"
    shutil.rmtree(folder)
    conclude(sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"])))
    assert len(list(folder.iterdir())) == 5
    (tmp_path / "tracking" / "tensorboard.json").unlink()  # killed after the events, before that was noted
    conclude(sweep(tmp_path, trials=4, pruner="median", trackers=make_trackers(["tensorboard"])))
    assert points(folder / "0000", "curve/seconds") == [(epoch, epoch) for epoch in range(1, 7)]


def test_a_disk_that_is_away_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in its place")
    s = sweep(tmp_path / "run", trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    conclude(s)
    printed = capsys.readouterr().err
    assert printed.count("tensorboard failed, the sweep continues") == 1
    assert "tensorboard lacks 4 of 4 trials and the end" in printed
    (tmp_path / "run" / "tensorboard").unlink()
    conclude(sweep(tmp_path / "run", trials=4, pruner="median", trackers=make_trackers(["tensorboard"])))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 5


@pytest.mark.parametrize("link", ["tensorboard", "tensorboard/sweep", "tensorboard/0000"])
def test_links_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture, link: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "other")
    s = sweep(tmp_path / "run", trials=4, pruner="median", trackers=make_trackers(["tensorboard"]))
    every_end(s)
    s.close()
    assert s.tracking is not None
    s.tracking.close(None, complete=True)
    assert "is a symbolic link" in capsys.readouterr().err
    assert list((tmp_path / "other").iterdir()) == []
