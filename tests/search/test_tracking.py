"""What trackers are told, and that one that is away does no harm; real trackers are in tests/track/."""

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from ensemble.file import Ensemble, Member, write_ensemble
from search.config import SearchConfig
from search.sweep import Sweep
from search.track import tracking
from search.track.tracker import EndedTrial, SweepEnd, SweepInfo
from search.track.tracking import Sent, Tracking, flat_scores, stretches
from tests.hand_sweep import climb, finish, sweep, take
from trainables.errors import UserError
from trainables.job import Outcome, Result
from trainables.storage import read_json, write_json

PATIENCE = 60  # seconds for a thread to do what it is to do


class Notebook:
    """A tracker of its own: it keeps what it was told, and may be away."""

    name = "notebook"
    registers = False

    def __init__(self) -> None:
        self.runs: dict[str, list[EndedTrial]] = {}
        self.end: SweepEnd | None = None
        self.is_away = False
        self.hangs = threading.Event()  # while it is not set
        self.hangs.set()
        self.refused = 0
        self.run = ""

    def where(self, sweep: SweepInfo) -> str:
        return "here"

    def open(self, sweep: SweepInfo, key: str) -> str:
        self._answer()
        self.run = key if key in self.runs else uuid.uuid4().hex
        self.runs.setdefault(self.run, [])
        return self.run

    def add(self, trial: EndedTrial) -> None:
        self._answer()
        self.runs[self.run].append(trial)

    def conclude(self, end: SweepEnd) -> None:
        self._answer()
        self.end = end

    def _answer(self) -> None:
        assert self.hangs.wait(PATIENCE)
        if self.is_away:
            self.refused += 1
            raise ConnectionError("nobody at postgres://me:secret@host\nand more")

    @property
    def ids(self) -> list[str]:
        return sorted(trial.id for trial in self.runs.get(self.run, []))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def close(s: Sweep, ensemble: Ensemble | None = None, complete: bool = True) -> None:
    s.close()
    assert s.tracking is not None
    s.tracking.close(ensemble, complete)


def test_a_tracker_gets_every_trial_once_with_its_curve_and_its_scores(tmp_path: Path) -> None:
    notebook = Notebook()
    s = sweep(tmp_path, trials=6, trackers=[notebook], pruner="promote")
    for accuracy in (0.5, 0.3, 0.2):  # two of them wait at their rung, and are pruned in the end
        climb(s, take(s), accuracy)
    s.finish(take(s).id, Result(Outcome.DIVERGED, error="why: sqlite://me:secret@host", traceback="where"))
    finish(s, take(s), 0.8)
    close(s)
    trials = {trial.id: trial for trial in notebook.runs[notebook.run]}
    assert {id: trial.outcome.value for id, trial in trials.items()} == {
        record.id: str(record.outcome) for record in s.records if record.outcome is not None
    }
    best = trials["0004"]
    assert best.params["backbone"] == "resnet18"
    assert best.params["lr"] == pytest.approx(s.records["0004"].params["lr"])
    assert [row["epoch"] for row in best.curve] == [1, 2, 3, 4, 5, 6]
    assert best.time_of(best.curve[2]) == best.began + 3
    assert best.scores["select_log_loss"] == pytest.approx(0.2)
    assert best.scores["seconds"] == 6
    assert trials["0003"].error == "why: sqlite://me:***@host"
    assert trials["0003"].scores == {}
    assert read_json(UPath(tmp_path) / "tracking" / "notebook.json")["run"] == notebook.run
    assert notebook.end is not None
    assert notebook.end.trials == len(trials)


def test_a_stopped_trials_curve_is_that_of_its_record(tmp_path: Path) -> None:
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], pruner="median", trials=1)
    job = take(s)
    for epoch in (1, 2):
        s.report(job.id, {"epoch": epoch, "tune_accuracy": epoch / 10, "tune_log_loss": 1.0})
    s.finish(job.id, Result(Outcome.PRUNED))
    close(s)
    (trial,) = notebook.runs[notebook.run]
    assert trial.curve == ({"epoch": 1, "tune_accuracy": 0.1}, {"epoch": 2, "tune_accuracy": 0.2})


def test_a_tracker_that_is_away_catches_up_and_the_sweep_does_not_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "AGAIN_S", 0.05)
    notebook = Notebook()
    s = sweep(tmp_path, trials=6, trackers=[notebook])
    finish(s, take(s))
    wait_until(lambda: notebook.ids == ["0000"])
    notebook.is_away = True
    finish(s, take(s))
    wait_until(lambda: notebook.refused >= 3)
    notebook.is_away = False
    wait_until(lambda: notebook.ids == ["0000", "0001"])
    notebook.hangs.clear()  # it takes the connection and says nothing: the next trials end all the same
    for _ in range(3):
        finish(s, take(s))
    assert len([record for record in s.records if record.outcome is not None]) == 5
    assert notebook.ids == ["0000", "0001"]
    notebook.hangs.set()
    finish(s, take(s))
    close(s)
    assert notebook.ids == [f"000{i}" for i in range(6)]
    assert len(notebook.runs) == 1
    printed = capsys.readouterr().err
    assert printed.count("notebook failed, the sweep continues: nobody at postgres://me:***@host") == 1
    assert "secret" not in printed
    assert "and more" not in printed


def test_what_a_tracker_lacks_at_the_end_is_sent_when_the_sweep_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], trials=3)
    finish(s, take(s))
    wait_until(lambda: notebook.ids == ["0000"])
    notebook.is_away = True
    for _ in range(2):
        finish(s, take(s))
    close(s, complete=False)
    assert "notebook lacks 2 of 3 trials and the end; the same command sends them" in capsys.readouterr().err
    assert notebook.end is None
    notebook.is_away = False
    s = sweep(tmp_path, trackers=[notebook], trials=4)
    finish(s, take(s))
    close(s)
    assert notebook.ids == ["0000", "0001", "0002", "0003"]
    assert len(notebook.runs) == 1
    close(sweep(tmp_path, trackers=[notebook], trials=4))  # the same command once more
    assert notebook.ids == ["0000", "0001", "0002", "0003"]


def test_a_tracker_that_hangs_at_the_end_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "STUCK_S", 0.2)
    notebook = Notebook()
    notebook.hangs.clear()
    s = sweep(tmp_path, trackers=[notebook], trials=1)
    finish(s, take(s))
    close(s)
    assert "notebook lacks 1 of 1 trials and the end; the same command sends them: it does not answer" in (
        capsys.readouterr().err
    )
    notebook.hangs.set()


def test_a_sweep_that_fails_leaves_its_trackers_without_waiting(tmp_path: Path) -> None:
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], trials=2)
    notebook.hangs.clear()
    finish(s, take(s))
    assert s.tracking is not None
    s.tracking.leave()
    assert notebook.end is None
    notebook.hangs.set()
    wait_until(lambda: notebook.end is not None and not notebook.end.complete)
    assert notebook.ids == ["0000"]


def test_a_trial_that_a_tracker_refuses_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Choosy(Notebook):
        def add(self, trial: EndedTrial) -> None:
            if trial.id in ("0000", "0002"):
                raise ValueError("no such name")
            super().add(trial)

    monkeypatch.setattr(tracking, "AGAIN_S", 0.05)
    choosy = Choosy()
    s = sweep(tmp_path, trackers=[choosy], trials=4)
    for _ in range(4):
        finish(s, take(s))
    wait_until(lambda: choosy.ids == ["0001", "0003"])
    close(s)
    assert choosy.end is not None
    assert "notebook lacks 2 of 4 trials; the same command sends them: no such name" in capsys.readouterr().err


def test_a_disk_that_is_full_makes_no_trial_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker has the trial, but that it has cannot be noted, until there is room again."""
    monkeypatch.setattr(tracking, "AGAIN_S", 0.05)
    failures = ["no space left"]

    def write(path: UPath, value: object) -> None:
        if failures:
            raise OSError(failures.pop())
        write_json(path, value)

    monkeypatch.setattr(tracking, "write_json", write)
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], trials=1)
    finish(s, take(s))
    memory = UPath(tmp_path) / "tracking" / "notebook.json"
    wait_until(lambda: memory.exists() and read_json(memory)["trials"] == [[0, 0]])
    close(s)
    assert notebook.ids == ["0000"]


@pytest.mark.parametrize("content", ["", "{", '{"trials": [[0, 1e300]]}', '{"run": 3}', '{"trials": "all"}'])
def test_a_damaged_memory_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "notebook.json").write_text(content)
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], trials=2)
    for _ in range(2):
        finish(s, take(s))
    close(s)
    assert notebook.ids == ["0000", "0001"]


def test_a_tracker_that_has_lost_the_sweep_gets_all_of_it_again(tmp_path: Path) -> None:
    s = sweep(tmp_path, trackers=[Notebook()], trials=2)
    for _ in range(2):
        finish(s, take(s))
    close(s)
    other = Notebook()
    close(sweep(tmp_path, trackers=[other], trials=2))
    assert other.ids == ["0000", "0001"]


def test_the_memory_of_many_trials_is_small(tmp_path: Path) -> None:
    assert stretches([5, 2, 0, 1]) == ((0, 2), (5, 5))
    assert stretches([]) == ()
    assert stretches(range(20_000)) == ((0, 19_999),)
    sent = Sent("x", ((0, 2), (5, 10**18)))
    assert [number for number in range(8) if sent.has(number)] == [0, 1, 2, 5, 6, 7]


def test_the_end_has_the_claim_the_test_scores_and_the_files(tmp_path: Path) -> None:
    notebook = Notebook()
    s = sweep(tmp_path, trackers=[notebook], trials=2)
    for _ in range(2):
        finish(s, take(s))
    score = {"split": "select", "images": 4, "accuracy": 0.75, "interval": [0.3, 0.9], "shared": False}
    scores = {"claim": {**score, "gain": {"accuracy": 0.25, "interval": [-0.1, 0.5]}}, "select": score}
    ensemble = Ensemble("best", (Member("0000", 1.0),), "hand", "f", scores)
    write_ensemble(UPath(tmp_path), ensemble)
    write_json(UPath(tmp_path) / "report.json", {"test": {"ensemble": {"split": "test", "accuracy": 0.5}}})
    (tmp_path / "report.html").write_text("<p>ä</p>")
    close(s, ensemble)
    assert notebook.end is not None
    assert notebook.end.scores == {
        "select_claim_images": 4, "select_claim_accuracy": 0.75, "select_claim_low": 0.3, "select_claim_high": 0.9,
        "select_claim_shared": 0.0, "select_claim_gain_accuracy": 0.25, "select_claim_gain_low": -0.1,
        "select_claim_gain_high": 0.5, "test_ensemble_accuracy": 0.5,
    }  # fmt: skip
    assert set(notebook.end.files) == {"best.json", "report.html", "report.json"}
    assert notebook.end.files["report.html"] == "<p>ä</p>"
    assert json.loads(notebook.end.files["best.json"])["members"] == [{"id": "0000", "weight": 1.0}]
    close(sweep(tmp_path, trackers=[notebook], trials=2), ensemble, complete=False)
    assert notebook.end.files == {}  # a report of before it was continued is none of this sweep


def test_scores_are_named_after_their_split() -> None:
    assert flat_scores(
        "select_claim", {"accuracy": 1, "split": "select", "metric": {"name": "auroc", "value": 0.5}}
    ) == {
        "select_claim_accuracy": 1.0,
        "select_claim_metric_value": 0.5,
    }


def test_the_sweep_is_described_without_passwords(tmp_path: Path) -> None:
    write_json(
        UPath(tmp_path) / "run.json",
        {
            "classes": ["a"], "split_fingerprint": "f", "study": "it's mine/α-1234", "data": {"name": "folder"},
            "search": {"labels": "https://me:secret@host/x.csv", "backbones": ["a", "b"], "minutes": None, "top_k": 9},
        },
    )  # fmt: skip
    found = Tracking([], UPath(tmp_path), [], "tune_accuracy").sweep
    assert found.key == "it-s-mine---1234"
    assert found.options == {
        "labels": "https://me:***@host/x.csv", "backbones": "a, b", "top_k": 9, "data": "folder",
        "split_fingerprint": "f",
    }  # fmt: skip


def test_event_files_need_a_folder() -> None:
    with pytest.raises(UserError, match="--track tensorboard writes event files"):
        SearchConfig(track=("tensorboard",), run="s3://bucket/run")
    assert "--track mlflow wandb" in replace(SearchConfig(), track=("mlflow", "wandb")).command()
