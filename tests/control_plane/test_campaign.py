"""A short form of the campaign of ``scripts/faults runpod``."""

from __future__ import annotations

from pathlib import Path

from runpod_faults import storm


def test_exports_all_of_whose_servers_fail_at_random_end_once_and_leave_nothing_behind(tmp_path: Path) -> None:
    result = storm(tmp_path, 12, seed=7, workers=2, short=True)
    assert result.broken == []
    assert len(result.outcomes) == 12
    assert "completed" in result.outcomes.values()
    assert sum(result.struck.times.values()) >= 10
