"""Servers for tests: one that most share, and others with settings of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Server, StartServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the defaults of a small machine."""
    running = Server(tmp_path_factory.mktemp("shared") / "root", worker_slots=1).start()
    yield running
    running.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start a server with these settings (``retention_seconds=1``, …); it is stopped after the test."""
    servers: list[Server] = []

    def start(**settings: object) -> Server:
        servers.append(Server(tmp_path / f"root{len(servers)}", **settings))
        return servers[-1].start()

    yield start
    for running in servers:
        running.close()
