"""The learning-rate range test."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainables import lr_find
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.prepare import prepare
from trainables.data.splits import Splits, split_data
from trainables.lr_find import range_test, smooth, suggest
from trainables.train import train

CONFIG = TrialConfig(
    backbone="speednet", width=0.125, image_size=16, epochs=6, batch_size=12, optimizer="sgd", momentum=0.9,
    weight_decay=0.0, precision="fp32",
)  # fmt: skip


def test_the_suggestion_is_where_the_loss_falls_most_steeply() -> None:
    lrs = np.geomspace(1e-5, 10, 121)
    falling = 2.3 - 1.5 / (1 + np.exp(-4 * (np.log10(lrs) + 2)))  # steepest at 1e-2
    losses = np.where(lrs > 0.5, falling + 10 * (lrs - 0.5), falling)
    found = suggest(lrs, losses)
    assert found is not None
    assert 0.01 <= found < 0.03  # smoothing lags behind
    assert suggest(lrs, np.linspace(1, 2, 121)) is None


def test_smoothing_has_no_bias_towards_its_start() -> None:
    np.testing.assert_allclose(smooth(np.full(10, 3.0)), 3.0)
    np.testing.assert_allclose(smooth([1.0, 2.0]), [1.0, (0.9 * 1 + 2) / 1.9])


def test_the_range_test_stops_where_the_loss_diverges_and_its_suggestion_trains(data: Data, splits: Splits) -> None:
    config = replace(CONFIG, weight_decay=1.0)  # lr x decay > 2 explodes
    lrs, losses = range_test(config, data, splits, 1e-5, 100.0, 80)
    assert 20 < len(lrs) < 80
    assert lrs[0] == pytest.approx(1e-5)
    assert np.isfinite(losses).all()
    found = suggest(lrs, losses)
    assert found is not None
    config = replace(CONFIG, epochs=8)
    good, slow = (train(replace(config, lr=lr), data, splits).curve[-1]["train_loss"] for lr in (found, found / 1000))
    assert good < slow - 0.1


def test_the_same_test_twice_gives_the_same_losses(data: Data, splits: Splits) -> None:
    first, second = (range_test(CONFIG, data, splits, 1e-4, 1.0, 20) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_command_prints_a_suggestion_and_writes_a_page_of_its_own(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "plot.html"
    arguments = ["--data", "folder", "--data-dir", str(pictures), "--backbone", "speednet", "--width", "0.125"]
    arguments += ["--image-size", "16", "--batch-size", "12", "--optimizer", "sgd", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["lr_find", *arguments, "--steps", "40", "--low", "1e-4", "--out", str(page)])
    lr_find.main()
    out = capsys.readouterr().out
    assert "90 train images in batches of 12" in out
    assert "falls most steeply" in out
    html = page.read_text()
    assert "Plotly.newPlot" in html
    assert '<script src="http' not in html


def test_the_command_reads_a_table_and_keeps_groups_together(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Before: it knew neither --labels nor --group-by, and so trained on other images than the sweep."""
    rows = [f"{path},{path.parent.name},{i // 3}" for i, path in enumerate(sorted(pictures.rglob("*.png")))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,burst", *rows]) + "\n")
    options = ["--labels", str(tmp_path / "labels.csv"), "--group-by", "burst", "--fit", "crop", "--split-seed", "3"]
    net = ["--backbone", "speednet", "--width", "0.125", "--image-size", "16", "--batch-size", "12"]
    monkeypatch.setattr(sys, "argv", ["lr_find", *options, *net, "--steps", "30", "--out", str(tmp_path / "a.html")])
    with contextlib.suppress(SystemExit):  # whatever the loss does
        lr_find.main()
    data = prepare("folder", labels=str(tmp_path / "labels.csv"), group_by="burst", fit="crop")
    assert f"{len(split_data(data, 3).train)} train images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--low", "1", "--high", "0.1"], "expected 0 < low < high"),
        (["--steps", "3"], "at least 20"),
        (["--backbone", "speednit"], "near matches: speednet"),
        (["--batch-size", "100000"], "batch_size is 100000"),
    ],
)
def test_mistakes_are_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], complaint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lr_find", *arguments])
    with pytest.raises(SystemExit) as exit:
        lr_find.main()
    assert exit.value.code == 2
    assert complaint in capsys.readouterr().err
