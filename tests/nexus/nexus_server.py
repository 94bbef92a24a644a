"""A real Nexus server for tests, where somebody says which: a program that is started here, or one that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from nexus.own_server import OwnServer

from control_plane.nexus.graph.nexus import NexusGraph

PROGRAM, URL, KEY = (os.environ.get(name) for name in ("NEXUS_SERVER_BIN", "NEXUS_URL", "NEXUS_API_KEY"))
needs_nexus = pytest.mark.skipif(
    not (PROGRAM or URL), reason="needs a Nexus server: NEXUS_SERVER_BIN (its program) or NEXUS_URL"
)
needs_own_nexus = pytest.mark.skipif(not PROGRAM, reason="starts a Nexus server anew: needs NEXUS_SERVER_BIN")


class NexusServer(OwnServer):
    """A Nexus server that can be ended and started again with what it holds."""

    # Its folder is without config.yml, whose settings would be taken from where it is started.
    HEALTH = "/health"

    @property
    def data(self) -> Path:
        """The folder of its files."""
        return self.folder / "data"

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        assert PROGRAM is not None
        env = {
            "NEXUS_ADDR": f"127.0.0.1:{self.port}",
            "NEXUS_RPC_ENABLED": "false",
            "NEXUS_DATA_DIR": str(self.data),
            "RUST_LOG": "error",
        }
        return [PROGRAM], os.environ | env

    def query(self, statement: str, **parameters: Any) -> list[list[Any]]:
        """Rows of an answer; raises RuntimeError for an error, under whatever status."""
        answer = httpx.post(
            f"{self.url}/cypher",
            json={"query": statement, "parameters": parameters},
            headers={"X-API-Key": KEY} if KEY else {},
            timeout=120,
            trust_env=False,
        )
        if answer.status_code != 200 or answer.json().get("error"):
            raise RuntimeError(answer.text[:500])
        rows: list[list[Any]] = answer.json()["rows"]
        return rows


class RunningNexus(NexusServer):
    """One that somebody else started, and that is not ended here: it is only left and met again."""

    def __init__(self) -> None:
        assert URL is not None

    @property
    def url(self) -> str:
        assert URL is not None
        return URL.rstrip("/")

    def restart(self, *, kill: bool = False) -> None:
        """It runs on."""

    def clear(self) -> None:
        """Empty its graph."""
        graph = NexusGraph(self.url, KEY)
        graph.clear()
        graph.close()


@contextmanager
def nexus_server(folder: Path) -> Iterator[NexusServer]:
    """An empty Nexus server: the program over ``folder``, else the one that runs."""
    if not PROGRAM:
        running = RunningNexus()
        running.clear()
        yield running
        return
    server = NexusServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
