"""A sweep whose run lies in an object store and whose study in PostgreSQL, hit again and again; see tests/faults.py."""

from pathlib import Path

from upath import UPath

from tests.faults import check, drivers_of, storm
from tests.search.study.test_mirror import PostgreSQL, server  # noqa: F401
from tests.trainables.test_s3 import Store, store  # noqa: F401


def test_kills_and_stores_that_go_away_lose_nothing_and_repeat_nothing(
    server: PostgreSQL, store: Store, tmp_path: Path
) -> None:
    run = UPath("s3://bucket/storm")
    with drivers_of(run, tmp_path, "--storage", server.url) as drivers:
        struck = storm(drivers, run, {"store": store.away, "database": server.away})
        check(drivers, run, struck, server.url)
