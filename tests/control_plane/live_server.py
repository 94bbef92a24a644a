"""A real server process on a free port, and the client of it that tests use."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from processes import COMMAND, free_port

from control_plane.jobs.records import NewJob

KEY = "test-key"
TERMINAL = {"job_completed", "job_failed", "job_canceled", "job_expired"}
ENDED = {"completed", "failed", "canceled", "expired"}


def graph(nodes: int = 3, *, name: str = "tiny", lines: int = 0, **more: Any) -> dict[str, Any]:
    """An export request with a chain of functions; ``lines`` of text for each."""
    text = "\n".join(f"    value_{n} = compute_{n}(argument_{n})" for n in range(lines))
    return {
        "sessionId": f"session-{name}",
        "projectName": name,
        "source": {"type": "folder", "baseName": name, "displayName": name},
        "nodes": [
            {
                "id": f"Function:src/{name}.py:call_{n}",
                "label": "Function",
                "properties": {
                    "name": f"call_{n}",
                    "filePath": f"src/{name}.py",
                    "content": f"def call_{n}():\n{text}",
                },
            }
            for n in range(nodes)
        ],
        "relationships": [
            {
                "id": f"calls_{n}",
                "sourceId": f"Function:src/{name}.py:call_{n}",
                "targetId": f"Function:src/{name}.py:call_{(n + 1) % nodes}",
                "type": "CALLS",
                "confidence": 0.9,
                "reason": None,
                "step": 0,
            }
            for n in range(nodes)
        ],
        "fileContents": {},
        "options": {"semanticEnabled": False, "maxNodeFrames": 500_000, "maxRelationFrames": 500_000},
        **more,
    }


def large_graph(name: str = "large", nodes: int = 20_000) -> bytes:
    """A gzipped request that takes seconds to export."""
    return gzip.compress(json.dumps(graph(nodes, name=name, lines=12)).encode(), 1)


def new_job(*, backend: str = "legacy_vps", weight: int = 1, sha256: str = "0" * 64) -> NewJob:
    """A job for a store, whose payload is nowhere."""
    return NewJob(
        id=str(uuid.uuid4()),
        backend=backend,
        weight=weight,
        session_id="s",
        project_name="p",
        payload_ref="file:///payload",
        payload_sha256=sha256,
        payload_size=1,
        message="Queued",
        meta={},
    )


class Server:
    """``memvid-export serve`` on a root; can be stopped, killed and started again."""

    def __init__(self, root: Path, *, env: Mapping[str, str] | None = None, **settings: object) -> None:
        """``settings`` are those of ``MEMVID_EXPORT_…``; ``env`` comes on top of this process's environment."""
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = root.with_name(root.name + ".log")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMVID_")}
        given = {f"MEMVID_EXPORT_{name.upper()}": str(value) for name, value in settings.items()}
        self.env = {
            **kept,
            **(env or {}),
            "MEMVID_EXPORT_API_KEY": KEY,
            "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{self.port}",
            "MEMVID_EXPORT_ROOT": str(root),
            **given,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def start(self) -> Server:
        """Start and wait until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, COMMAND, "serve"], env=self.env, stdout=log, stderr=log)
        for _ in range(1_200):
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.025)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; answers the exit status."""
        return self._end(signal.SIGTERM)

    def close(self) -> None:
        """End in order, and the client too."""
        if self._process is not None and self._process.poll() is None:
            self.stop()
        self.client.close()

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout=30)
        finally:
            self._process.kill()
            self._process.wait()

    # --- requests -----------------------------------------------------------------------------------

    def post(self, body: dict[str, Any] | bytes, **headers: str) -> httpx.Response:
        """``POST /v1/exports``; bytes that begin like gzip are said to be gzip."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        encoding = {"content-encoding": "gzip"} if data.startswith(b"\x1f\x8b") else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(
            "/v1/exports", content=data, headers={"content-type": "application/json", **encoding, **named}
        )

    def submit(self, body: dict[str, Any] | bytes) -> str:
        """Post and answer the job's id."""
        answer = self.post(body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["jobId"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job."""
        answer = self.client.get(f"/v1/exports/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def events(self, job_id: str, since: int = 0, limit: int = 2_000) -> list[dict[str, Any]]:
        """Events by polling."""
        answer = self.client.get(f"/v1/exports/{job_id}/events", params={"sinceSeq": since, "limit": limit})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["events"])

    def frames(self, job_id: str, since: int = 0, **headers: str) -> Iterator[str]:
        """The event stream cut at LF LF, as the web client does it; ends where the server ends it."""
        url = f"/v1/exports/{job_id}/events/stream"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.client.stream("GET", url, params={"sinceSeq": since}, headers=named) as answer:
            assert answer.status_code == 200
            buffer = ""
            for text in answer.iter_text():
                *whole, buffer = (buffer + text).split("\n\n")
                yield from whole
        assert buffer == ""

    def stream(self, job_id: str, since: int = 0, **headers: str) -> Iterator[dict[str, Any]]:
        """Events of the stream; pings are ignored."""
        for frame in self.frames(job_id, since, **headers):
            data = [line[5:].strip() for line in frame.split("\n") if line.startswith("data:")]
            if data:
                yield json.loads("\n".join(data))

    def wait(self, job_id: str, *types: str) -> dict[str, Any]:
        """Follow the stream until an event of one of these types (or the end) and answer it."""
        event: dict[str, Any] = {}
        for event in self.stream(job_id):
            if event["type"] in types or event["type"] in TERMINAL:
                return event
        return event


StartServer = Callable[..., Server]
"""Starts a server with settings of its own, which ends with the test: the fixture ``start_server``."""
