"""Progress: a bar on a terminal, lines elsewhere, nothing for what is quick. Options: see tests/test_front_door.py."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trainables import command
from trainables.command import progress

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
CODE = """
from trainables.command import progress
with progress("counting sheep", 10) as advance:
    for _ in range(10):
        advance(1)
with progress("dreaming", None):
    pass
print("done")
"""


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LINE_S", 0.0)
    with progress("counting sheep", 4000, done=1000) as advance:
        for _ in range(3):
            advance(1000)
    out, err = capsys.readouterr()
    assert err == "counting sheep: 2,000 of 4,000\ncounting sheep: 3,000 of 4,000\n"
    assert out == ""


@pytest.mark.parametrize(("seconds", "total", "shown"), [(600.0, 10, True), (0.0, None, True), (0.0, 10, False)])
def test_what_is_quick_unknown_or_unwanted_tells_nothing(
    seconds: float, total: int | None, shown: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LINE_S", seconds)
    with progress("counting sheep", total, shown=shown) as advance:
        advance(5)
    assert capsys.readouterr() == ("", "")


def test_an_error_goes_through() -> None:
    with pytest.raises(ZeroDivisionError), progress("counting sheep", 3) as advance:
        advance(1 // 0)


def test_on_a_terminal_there_is_a_bar_on_stderr() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 65536):
            drawn += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.communicate()[0] == "done\n"
    assert process.returncode == 0
    assert b"counting sheep" in drawn
    assert b"100%" in drawn
    assert b"dreaming" in drawn


def test_a_notebook_without_widgets_gets_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would only warn there that ipywidgets are missing, and show nothing."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(command, "LINE_S", 0.0)
    with progress("counting sheep", 2) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err == "counting sheep: 1 of 2\n"
