"""The records of a sweep's trials: durable, packed, read as they were written."""

from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from trainables.config import TrialConfig
from trainables.job import Outcome
from trainables.run.records import PACKED, Records, Spent, Stage, TrialRecord, read_records
from trainables.storage import Damaged


def proposed(number: int) -> TrialRecord:
    params = {"lr": 0.1 * number, "backbone": "speednet", "flip": None}
    return TrialRecord(number, params, config=TrialConfig(lr=0.1 + number / 10, freeze_epochs=2), began=5.0)


def test_what_is_put_is_read_again(tmp_path: Path) -> None:
    records = Records(UPath(tmp_path))
    running = records.put(proposed(0).scored(1, 0.5).scored(2, 0.25).scored(2, 0.9))
    waiting = records.put(proposed(1).scored(1, 0.1).waits())
    bug = records.put(proposed(2).retried().ends(Outcome.BUG, error="boom", traceback="lines", seconds=3.5, ended=9.0))
    refused = records.put(replace(proposed(3), config=None).ends(Outcome.INVALID, error="why"))
    best = records.put(
        replace(proposed(4), seed_of="0001", ensemble={"tried": 3}).ends(Outcome.FINISHED, value=0.75, seconds=1.0)
    )
    records.spend(Spent(12.5, 50.0))
    again = Records(UPath(tmp_path))
    assert list(again) == [running, waiting, bug, refused, best]
    assert running.scores == ((1, 0.5), (2, 0.25)), "the first report of an epoch stands"
    assert (waiting.stage, running.stage, best.stage) == (Stage.WAITING, Stage.RUNNING, Stage.ENDED)
    assert (again.next_number, again.spent) == (5, Spent(12.5, 50.0))
    assert [record.counts for record in again] == [True, True, True, False, True]


def test_many_trials_are_few_files(tmp_path: Path) -> None:
    records = Records(UPath(tmp_path))
    count = 5 * PACKED + 3
    for number in range(count):
        records.put(proposed(number))
        records.put(records[f"{number:04d}"].ends(Outcome.FINISHED, value=float(number)))
    assert len(list((tmp_path / "trials").iterdir())) == 5 + 3
    assert [record.value for record in read_records(UPath(tmp_path))] == list(map(float, range(count)))
    again = Records(UPath(tmp_path))
    for number in range(count, count + PACKED):
        again.put(proposed(number).ends(Outcome.PRUNED))
    assert len(list(Records(UPath(tmp_path)))) == count + PACKED
    assert len(list((tmp_path / "trials").glob("ended-*"))) == 6


def test_a_kill_while_packing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(UPath(tmp_path))
    for number in range(PACKED - 1):
        records.put(proposed(number).ends(Outcome.FINISHED, value=0.5))

    def killed(path: UPath, action: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainables.run.records.patiently", killed)
        with pytest.raises(KeyboardInterrupt):
            records.put(proposed(PACKED - 1).ends(Outcome.FINISHED, value=0.5))
    again = Records(UPath(tmp_path))
    assert len(list(again)) == PACKED
    again.put(proposed(PACKED))
    again.put(again["0064"].ends(Outcome.PRUNED))
    assert len(read_records(UPath(tmp_path))) == PACKED + 1


def test_changes_are_counted_where_a_sampler_has_to_look_again(tmp_path: Path) -> None:
    records = Records(UPath(tmp_path))
    record = records.put(proposed(0))
    records.note(record.scored(1, 0.5))
    assert records.changes == 0
    records.put(record.waits())
    records.put(record.goes_on())
    records.put(record.ends(Outcome.PRUNED))
    assert records.changes == 3


@pytest.mark.parametrize("name", ["0007x.json", "notes.json", "ended-x.json"])
def test_what_is_no_record_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / name).write_text("{}")
    with pytest.raises(Damaged, match="no record of a trial"):
        Records(UPath(tmp_path))


def test_a_record_under_another_name_or_behind_a_link_is_told(tmp_path: Path) -> None:
    records = Records(UPath(tmp_path))
    records.put(proposed(0))
    (tmp_path / "trials" / "0000.json").rename(tmp_path / "trials" / "0001.json")
    with pytest.raises(Damaged, match="another trial, 0000"):
        read_records(UPath(tmp_path))
    (tmp_path / "trials" / "0001.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "trials" / "0000.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(Damaged, match="symbolic link"):
        read_records(UPath(tmp_path))
