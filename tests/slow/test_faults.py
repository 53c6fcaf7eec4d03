"""A sweep that is hit again and again on this machine; see tests/faults.py."""

from pathlib import Path

from upath import UPath

from tests.faults import check, drivers_of, storm


def test_many_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    run = UPath(tmp_path / "run")
    with drivers_of(run, tmp_path) as drivers:
        struck = storm(drivers, run, {})
        check(drivers, run, struck, f"sqlite:///{run}/study.db")
