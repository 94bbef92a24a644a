"""A real server answers as its OpenAPI document says, whatever it is sent: the short form of ``scripts/fuzz api``."""

from __future__ import annotations

from pathlib import Path

from api import exports_there, run


def test_no_answer_is_outside_the_document(tmp_path: Path) -> None:
    with exports_there(tmp_path / "root") as (server, ids):
        found = run(server, ids, tmp_path, cases=100, seed=1, phases="coverage,fuzzing")
        log = server.log.read_text()
    assert found.failures == [], found.said[-2_000:]
    assert sum(sum(counts.values()) for counts in found.statuses.values()) > 300
    assert {"200", "202", "400", "401", "404", "409"} <= {
        status for counts in found.statuses.values() for status in counts
    }
    assert '"level":"error"' not in log
