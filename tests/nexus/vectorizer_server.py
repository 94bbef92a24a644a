"""A real Vectorizer server for tests, where somebody says which: a program that is started here, or one that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from nexus.own_server import OwnServer
from prometheus_client import CollectorRegistry

from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.vectorizer import Vectorizer

PROGRAM, URL, KEY = (os.environ.get(f"VECTORIZER_{name}") for name in ("SERVER_BIN", "URL", "API_KEY"))
needs_vectorizer = pytest.mark.skipif(
    not (PROGRAM or URL), reason="needs a Vectorizer server: VECTORIZER_SERVER_BIN (its program) or VECTORIZER_URL"
)
needs_own_vectorizer = pytest.mark.skipif(
    not PROGRAM, reason="starts a Vectorizer server anew: needs VECTORIZER_SERVER_BIN"
)
# Without the first its binary protocol listens on all interfaces.
CONFIG = """
server: {host: 127.0.0.1, port: 15002, mcp_port: 15003}
file_watcher:
  enabled: false
  recursive: true
  debounce_delay_ms: 1000
  include_patterns: []
  exclude_patterns: []
  min_file_size_bytes: 1
  max_file_size_bytes: 10485760
  hash_validation_enabled: true
  collection_name: default_collection
logging: {level: error, log_requests: false, log_responses: false, log_errors: true}
rpc: {enabled: false}
auth:
  enabled: {auth}
  jwt_secret: ""
  jwt_expiration: 3600
  api_key_length: 32
  rate_limit_per_minute: 100
  rate_limit_per_hour: 1000
"""


class VectorizerServer(OwnServer):
    """A Vectorizer server that can be ended and started again with what it has saved."""

    HEALTH = "/status"

    def __init__(self, folder: Path, *, auth: bool = False) -> None:
        super().__init__(folder)
        (folder / "config.yml").write_text(CONFIG.replace("{auth}", str(auth).lower()))

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        assert PROGRAM is not None
        arguments = [PROGRAM, "--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self.folder / "data")]
        # It also writes below the home of whoever starts it.
        env = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), "RUST_LOG": "error"}
        return arguments, os.environ | env

    def ask(self, method: str, path: str, body: object = None, *, status: int = 200) -> Any:
        """An answer, which must have this status."""
        headers = {"X-API-Key": KEY} if KEY else {}
        answer = httpx.request(method, self.url + path, json=body, headers=headers, timeout=120, trust_env=False)
        assert answer.status_code == status, answer.text[:500]
        return answer.json()


class RunningVectorizer(VectorizerServer):
    """One that somebody else started, and that is not ended here."""

    def __init__(self) -> None:
        assert URL is not None

    @property
    def url(self) -> str:
        assert URL is not None
        return URL.rstrip("/")


@contextmanager
def connected(server: VectorizerServer) -> Iterator[Vectorizer]:
    """The adapter of a server."""
    found = Vectorizer(server.url, KEY, NexusMetrics(CollectorRegistry()), pause=0.0)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def vectorizer_server(folder: Path) -> Iterator[VectorizerServer]:
    """A Vectorizer server with no collection of ours: the program over ``folder``, else the one that runs."""
    if not PROGRAM:
        running = RunningVectorizer()
        with connected(running) as store:
            store.keep_only([])
        yield running
        return
    server = VectorizerServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
