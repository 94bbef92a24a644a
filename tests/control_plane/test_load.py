"""Many clients at once: the short form of ``scripts/load``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from live_server import Server
from load import Load


def test_twenty_clients_lose_nothing_and_are_refused_only_in_stated_ways(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", queue_capacity=4).start()
    load = Load(server, clients=20, seconds=12, seed=3)
    try:
        asyncio.run(load.run())
    finally:
        server.close()
    assert load.broken == []
    assert {"completed"} <= set(load.accepted.values()) <= {"completed", "canceled"}
    assert load.statuses["download"].keys() & {200, 206}
    assert load.statuses["stream"][200] > 0
