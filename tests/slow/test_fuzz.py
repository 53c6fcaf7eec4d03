"""Two thousand damaged runs."""

from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from tests.security.test_fuzz import check, origin  # noqa: F401


@given(seed=st.integers(2**40, 2**50))
@hypothesis.settings(
    max_examples=2000, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_two_thousand_damaged_runs_are_opened_safely(seed: int, origin: Path, pictures: Path, tmp_path: Path) -> None:
    check(seed, origin, pictures, tmp_path / "case")
