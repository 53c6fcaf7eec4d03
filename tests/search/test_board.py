"""The board that a sweep draws, as a log shows it: plain lines."""

import re
from pathlib import Path

import pytest

from search.board import LiveBoard, WatchedSweep
from tests.hand_sweep import finish, scores, sweep, take
from trainables.config import TrialConfig
from trainables.job import Outcome, Result


def line(board: LiveBoard, capsys: pytest.CaptureFixture[str]) -> str:
    board.drawn = 0.0  # a line is due
    capsys.readouterr()
    board.refresh()
    return capsys.readouterr().out


def test_a_trial_that_goes_on_from_its_rung_waits_no_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = sweep(tmp_path)
    assert s.live is not None
    board = LiveBoard(s.live, trials=4, deadline=None, shared=False)
    for id in ("0000", "0001"):
        board.started(id, TrialConfig())
        board.ended(id, "waiting", Result(Outcome.PRUNED))
    assert line(board, capsys).startswith("trials: 2 waiting, 0 running, 4 in all; ")
    board.started("0001", TrialConfig())
    assert line(board, capsys).startswith("trials: 1 waiting, 1 running, 4 in all; ")
    board.ended("0001", "finished", Result(Outcome.FINISHED))
    assert line(board, capsys).startswith("trials: 1 waiting, 1 finished, 0 running, 4 in all; ")


def test_trials_of_earlier_starts_are_counted_but_do_not_make_this_one_look_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s = sweep(tmp_path)
    finish(s, take(s), 0.5, true=(0.9, 0.9, 0.9, 0.4))
    assert s.live is not None
    board = LiveBoard(s.live, trials=4, deadline=None, shared=False, earlier=1)
    board.started("0001", TrialConfig())
    said = line(board, capsys)
    assert said.startswith("trials: 1 from earlier starts, none finished yet, 1 running, 4 in all; ")
    assert "select split, 4 images: best single 75.00% (0000)" in said
    assert "time left: unknown yet" in said
    board.ended("0001", "pruned", Result(Outcome.PRUNED))
    board.began -= 100
    said = line(board, capsys)
    assert said.startswith("trials: 1 from earlier starts, 1 pruned, 0 running, 4 in all; ")
    left = re.search(r"trials end in about 0:(\d\d):(\d\d)", said)  # two of four remain, at 100 s each
    assert left is not None
    assert 200 <= 60 * int(left[1]) + int(left[2]) < 300


def test_a_board_sees_all_that_a_sweep_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = sweep(tmp_path, trials=2, pruner="promote")
    assert s.live is not None
    board = LiveBoard(s.live, trials=2, deadline=None, shared=False)
    watched = WatchedSweep(s, board)
    first, second = watched.next(), watched.next()
    assert first is not None
    assert second is not None
    assert line(board, capsys).startswith("trials: none finished yet, 2 running, 2 in all; ")
    assert not watched.report(first.id, scores(0.5, 1))
    assert watched.report(second.id, scores(0.4, 1))
    watched.finish(second.id, Result(Outcome.PRUNED))
    watched.finish(first.id, Result(Outcome.DIVERGED, error="nan"))
    assert line(board, capsys).startswith("trials: 1 waiting, 1 diverged, 0 running, 2 in all; ")
    watched.stopping = True  # as Ctrl-C does
    assert s.stopping
