"""Short forms of the campaigns of ``scripts/faults runpod`` and ``scripts/faults replicas``."""

from __future__ import annotations

from pathlib import Path

from runpod_faults import REPLICA_KILLED, kills, storm


def test_exports_all_of_whose_servers_fail_at_random_end_once_and_leave_nothing_behind(tmp_path: Path) -> None:
    result = storm(tmp_path, 12, seed=7, workers=2, short=True)
    assert result.broken == []
    assert len(result.outcomes) == 12
    assert "completed" in result.outcomes.values()
    assert sum(result.struck.times.values()) >= 10


def test_jobs_of_a_replica_that_is_killed_go_on_through_the_other_one(tmp_path: Path) -> None:
    result, _ = kills(tmp_path, 1, seed=7)
    assert result.broken == []
    assert result.struck.times[REPLICA_KILLED] == 1
    assert set(result.outcomes.values()) == {"completed"}
