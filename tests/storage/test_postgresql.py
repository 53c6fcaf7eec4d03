"""A study on a real PostgreSQL."""

from pathlib import Path

import optuna
import pytest
from upath import UPath

from search.study.mirror import open_mirror
from search.study.warm_start import read_earlier
from tests.hand_sweep import finish, suggest, sweep, take
from tests.search.study.test_mirror import (  # noqa: F401
    PostgreSQL,
    dashboard,
    free_port,
    in_database,
    postgresql,
    server,
    trials_seen,
)
from tests.search.test_pipeline import SearchProcess, arguments, in_training
from tests.tiny_space import write_space
from trainables.errors import UserError
from trainables.run_directory import list_candidates, open_run, study_name


def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://ninefold@127.0.0.1:{free_port()}/postgres"
    with pytest.raises(UserError, match="check --storage") as told:
        open_mirror(UPath(tmp_path), url, "x", True, ())
    assert "\n" not in str(told.value)


def test_a_server_that_goes_does_no_harm(server: PostgreSQL, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before: it ended the sweep."""
    s = sweep(tmp_path, storage=server.url, name=tmp_path.name)
    finish(s, take(s), 0.5)
    s.tick()
    server.stop()
    server.start()
    finish(s, take(s), 0.6)
    s.tick()  # the connections that were open are not used
    server.stop()
    try:
        finish(s, take(s), 0.7)
        s.tick()
        assert "the sweep goes on" in capsys.readouterr().err
    finally:
        server.start()
    finish(s, take(s), 0.8)
    s.close()
    assert [value for _, value in in_database(server.url, tmp_path.name).values()] == [0.5, 0.6, 0.7, 0.8]


def test_a_sweep_goes_on_while_its_database_is_away(server: PostgreSQL, tmp_path: Path, pictures: Path) -> None:
    """Before: the command ended at once, until somebody repeated it with the database there."""
    run, space, log = tmp_path / "away", tmp_path / "tiny.py", tmp_path / "log"
    write_space(space, trials=4, epochs=12)
    args = [*arguments(run, pictures, space), "--storage", server.url]
    search = SearchProcess(*args, log=log)
    search.wait_until(lambda: in_training(run))
    search.kill()
    server.stop()
    try:
        search = SearchProcess(*args, log=log)
        search.wait_until(lambda: "the study's storage failed, the sweep goes on" in log.read_text())
    finally:
        server.start()
    search.finish()
    assert in_database(server.url, study_name(open_run(run))).keys() == {"0000", "0001", "0002", "0003"}


def test_a_sweep_on_postgresql_is_killed_and_goes_on_while_the_dashboard_looks(
    postgresql: str, dashboard: str, tmp_path: Path, pictures: Path
) -> None:
    run, space, log = tmp_path / "sweep", tmp_path / "tiny.py", tmp_path / "log"
    write_space(space, trials=4, epochs=12)
    args = [*arguments(run, pictures, space), "--storage", postgresql]
    search = SearchProcess(*args, log=log)
    search.wait_until(lambda: in_training(run) and "Complete" in trials_seen(dashboard, "sweep"))
    search.kill()
    name = study_name(open_run(run))
    optuna.load_study(study_name=name, storage=postgresql).set_user_attr("begun by", "the first")
    output = SearchProcess(*args, log=log).finish()

    assert trials_seen(dashboard, "sweep") == ["Complete"] * 4
    study = optuna.load_study(study_name=name, storage=postgresql)
    assert study.user_attrs == {"begun by": "the first"}  # before: made anew with every start of the command
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    candidates = list_candidates(open_run(run))
    assert [candidate.id for candidate in candidates] == ["0000", "0001", "0002", "0003"]
    assert not (run / "study.db").exists()
    assert "ensemble     test accuracy" in output
    assert (run / "report.html").exists()
    # a later sweep learns from it, and needs no database for that
    assert len(read_earlier(str(run), "tune_accuracy", suggest)) == 4
