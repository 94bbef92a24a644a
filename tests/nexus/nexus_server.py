"""A real Nexus server for tests, where somebody says which: a program that is started here, or one that runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import free_port

from control_plane.nexus.graph.nexus import NexusGraph

PROGRAM, URL, KEY = (os.environ.get(name) for name in ("NEXUS_SERVER_BIN", "NEXUS_URL", "NEXUS_API_KEY"))
needs_nexus = pytest.mark.skipif(
    not (PROGRAM or URL), reason="needs a Nexus server: NEXUS_SERVER_BIN (its program) or NEXUS_URL"
)
needs_own_nexus = pytest.mark.skipif(not PROGRAM, reason="starts a Nexus server anew: needs NEXUS_SERVER_BIN")


class NexusServer:
    """A Nexus server that can be ended and started again with what it holds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)  # without config.yml, whose settings would be taken from where it is started
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        """The folder of its files."""
        return self.folder / "data"

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert PROGRAM is not None
        env = {
            **os.environ,
            "NEXUS_ADDR": f"127.0.0.1:{self.port}",
            "NEXUS_RPC_ENABLED": "false",
            "NEXUS_DATA_DIR": str(self.data),
            "RUST_LOG": "error",
        }
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [PROGRAM], cwd=self.folder, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        for _ in range(1_200):
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"the Nexus server did not start:\n{log.read_text(errors='replace')[-4_000:]}")

    def stop(self) -> None:
        """End in order."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End at once, whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self, *, kill: bool = False) -> None:
        """End, in order or at once, and start with what it holds."""
        self.kill() if kill else self.stop()
        self.start()

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
