"""What a split that tears bursts apart claims, and what is true; printed by `python -m benchmarks.bursts`."""

from pathlib import Path

from benchmarks.bursts import measure


def test_with_bursts_the_claim_is_too_high_without_groups_and_holds_with_them(tmp_path: Path) -> None:
    """Printed by `python -m benchmarks.bursts`; here smaller."""
    rows = measure(tmp_path, scenes=60, frames=6, draws=6)
    ignored, kept = rows["without regard to bursts"], rows["bursts on one side"]
    assert ignored.leaked > 0.9
    assert kept.leaked == 0
    assert ignored.claim - ignored.truth > 0.1
    assert ignored.holds == 0
    assert abs(kept.claim - kept.truth) < 0.06
    assert kept.holds >= 5 / 6
