"""A short form of the campaign of ``scripts/faults host``: one of each fault."""

from __future__ import annotations

from pathlib import Path

from host_faults import HOUSES, run


def test_faults_of_the_host_and_of_what_is_stored_lose_nothing_and_serve_nothing_wrong(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 1, seed=7, houses=HOUSES)
    assert [what for outcome in outcomes for what in outcome.broken] == []
    assert {"server SIGKILL", "stored file damaged", "job's row damaged", "S3 gone and back"} <= {
        outcome.fault for outcome in outcomes
    }
    assert sum(outcome.ends["completed"] for outcome in outcomes) >= len(outcomes) // 2
