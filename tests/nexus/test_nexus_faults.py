"""A short form of the campaign of ``scripts/faults nexus``."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live_server import Server
from nexus.graph_faults import OF_NEXUS, SERVER_KILLED, SERVER_STOPPED, Embedded, House, Nexus, run
from nexus.nexus_server import needs_own_nexus


@pytest.mark.parametrize(
    ("make", "faults"),
    [
        (Embedded, [SERVER_KILLED, SERVER_STOPPED, SERVER_KILLED]),
        pytest.param(Nexus, [*OF_NEXUS], marks=[needs_own_nexus, pytest.mark.timeout(1_200)]),
    ],
)
def test_faults_at_random_moments_leave_documents_and_graph_equal(
    tmp_path: Path, make: Callable[..., House], faults: list[str]
) -> None:
    rounds = run(tmp_path, make, faults, seed=7)
    assert [what for one in rounds for what in one.broken] == []
    assert sum(one.accepted for one in rounds) > len(faults)
    assert all(one.documents > 20 and one.pairs > 100 and one.seconds is not None for one in rounds)


def test_a_look_that_a_killed_server_had_begun_keeps_no_other_one_away(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1).start()
    try:
        server.client.put("/v1/collections/code", json={"dimension": 2}).raise_for_status()
        server.client.put("/v1/collections/code/documents/a", json={"vector": [1, 2]}).raise_for_status()
        server.kill()
        with closing(sqlite3.connect(server.root / "jobs.sqlite")) as database, database:
            begun = '{"kind":"verify","done":0,"total":1}'
            database.execute("update sync_state set asked = null, progress = ?", (begun,))
        started = int(time.time() * 1_000)
        server.start()
        first = _look(server, started)
        assert server.client.post("/v1/nexus/verify").status_code == 202
        assert _look(server, first["startedAt"] + 1)["documents"] == 1
    finally:
        server.close()


def _look(server: Server, since: int) -> dict[str, Any]:
    """The report of the first look that began since then."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        now = server.client.get("/v1/nexus").raise_for_status().json()
        if now["progress"] is None and now["last"] is not None and now["last"]["startedAt"] >= since:
            return dict(now["last"])
        time.sleep(0.05)
    raise AssertionError(f"no look ended: {now}")
