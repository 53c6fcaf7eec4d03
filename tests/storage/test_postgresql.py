"""A study on a real PostgreSQL."""

from pathlib import Path

import optuna
import pytest

from ensemble.report.trials import load_study as load_study_for_report
from search.study.open import open_study
from search.study.warm_start import read_earlier
from tests.hand_sweep import climb, scores, suggest, take
from tests.search.test_pipeline import SearchProcess, arguments, in_training
from tests.search.test_study_storage import (  # noqa: F401
    PostgreSQL,
    dashboard,
    free_port,
    open_sweep,
    postgresql,
    server,
    trials_seen,
)
from tests.tiny_space import write_space
from trainables.errors import UserError
from trainables.run_directory import list_candidates, open_run, study_name


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    url = f"postgresql+psycopg://ninefold@127.0.0.1:{free_port()}/postgres"
    with pytest.raises(UserError, match="check --storage") as told:
        open_study(url, "x", "accuracy", "tpe", "none", 0)
    assert "\n" not in str(told.value)


def test_a_server_may_be_started_again_and_one_that_is_gone_ends_the_sweep(server: PostgreSQL, tmp_path: Path) -> None:
    sweep = open_sweep(server.url, tmp_path, tmp_path.name)
    first = take(sweep)
    server.stop()
    server.start()
    climb(sweep, first, 0.5)  # the connections that were open are not used
    second = take(sweep)
    server.stop()
    try:
        with pytest.raises(optuna.exceptions.StorageInternalError):
            sweep.report(second.id, scores(0.5))
    finally:
        server.start()
    again = open_sweep(server.url, tmp_path, tmp_path.name)
    assert take(again).id == second.id
    assert [trial.state.name for trial in again.study.trials] == ["COMPLETE", "RUNNING"]


def test_a_sweep_on_postgresql_is_killed_and_goes_on_while_the_dashboard_looks(
    postgresql: str, dashboard: str, tmp_path: Path, pictures: Path
) -> None:
    run, space, log = tmp_path / "sweep", tmp_path / "tiny.py", tmp_path / "log"
    write_space(space, trials=4, epochs=12)
    args = [*arguments(run, pictures, space), "--storage", postgresql]
    search = SearchProcess(*args, log=log)
    search.wait_until(lambda: in_training(run) and "Complete" in trials_seen(dashboard, "sweep"))
    assert "Running" in trials_seen(dashboard, "sweep")
    search.kill()
    output = SearchProcess(*args, log=log).finish()

    assert trials_seen(dashboard, "sweep") == ["Complete"] * 4
    name = study_name(open_run(run))
    study = optuna.load_study(study_name=name, storage=postgresql)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    candidates = list_candidates(open_run(run))
    assert [candidate.id for candidate in candidates] == ["0000", "0001", "0002", "0003"]
    assert not (run / "study.db").exists()
    assert "ensemble     test accuracy" in output
    assert (run / "report.html").exists()
    # a report and a later sweep read the study there
    assert len(load_study_for_report(postgresql, name).trials) == 4
    assert len(read_earlier(str(run), "tune_accuracy", suggest)) == 4
