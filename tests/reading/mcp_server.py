"""A server on the loopback that answers read tools, its client, and capsules made from graph files."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import uvicorn
from litestar import Litestar
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult

from common.capsule.native import NativeWriter
from common.contract import JobOutput, Manifest
from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.embedding.static import StaticEmbedder
from common.frames import STATIC_V2, frames
from common.graph.canonical import canonical
from common.graph.read import read_graph
from common.settings import Settings
from common.sidecar.rebuild import rebuild
from common.storage import FileStorage
from control_plane.errors import to_response
from control_plane.jobs.records import JobRecord
from control_plane.operations.auth import BearerAuth
from control_plane.operations.keys import Keys
from control_plane.operations.limits import TokenBuckets
from control_plane.operations.metrics import Metrics
from control_plane.operations.origins import Origins
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.mcp_http import mcp_route
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader

KEY = "test-key"
T = TypeVar("T")
GRAPHS = ["memvid-export.graph.ndjson.gz", "runpod-python.export.json.gz", "litestar.export.json.gz"]


def write_capsule(graph: Path, capsule: Path, *, vectors: bool) -> Path:
    """The capsule of a graph file, with its sidecar beside it."""
    embedder = StaticEmbedder() if vectors else None
    given = list(
        frames(
            canonical(read_graph(graph)),
            generated_at="2026-01-02T03:04:05.000Z",
            layout=STATIC_V2 if vectors else None,
        )
    )
    writer = NativeWriter().open(
        capsule,
        timestamp=1,
        model=embedder.model.name if embedder else None,
        dimension=embedder.model.dimension if embedder else None,
        expected_frames=len(given),
    )
    for start in range(0, len(given), 1000):
        some = given[start : start + 1000]
        matrix = None
        if embedder:
            texts = [frame.embed_text for frame in some if frame.embed_text is not None]
            matrix = embedder.embed(texts).vectors
        writer.add(some, matrix)
    writer.finish()
    rebuild([capsule], capsule.with_name(f"{capsule.name}.index.v1.sqlite"))
    return capsule


class Exports:
    """Completed exports in memory, newest last."""

    def __init__(self) -> None:
        self.records: dict[str, JobRecord] = {}

    @property
    def changes(self) -> int:
        return len(self.records)

    def add(self, job_id: str, artifact_ref: str, manifest: Manifest | None = None) -> None:
        output = JobOutput(
            artifact_ref=artifact_ref, sidecar_ref="", manifest_ref="", sha256="", size_bytes=0, metrics={}
        )
        nothing = {"str": "", "int": 0}
        given = {
            "id": job_id,
            "backend": "legacy_vps",
            "status": "completed",
            "stage": "download_ready",
            "output": output,
            "manifest": manifest,
        }
        values = {field.name: nothing.get(str(field.type)) for field in dataclasses.fields(JobRecord)}
        self.records[job_id] = JobRecord(**{**values, **given})

    async def get(self, job_id: str) -> JobRecord | None:
        return self.records.get(job_id)

    async def page(
        self, *, status: Any, before: tuple[int, str] | None, limit: int, client: str | None = None
    ) -> list[JobRecord]:
        return list(reversed(self.records.values()))[:limit]


class McpServer:
    """An application that has the read tools alone, in a thread; use as a context manager."""

    def __init__(
        self,
        root: Path,
        exports: Exports,
        artifacts: Artifacts | None = None,
        engines: Engines = Engines(),  # noqa: B008 - immutable
        response_budget_bytes: int = 65_536,
        allow_external_capsules: bool = False,
        cache_capacity: int = 16,
        origins: Origins | None = None,
        buckets: TokenBuckets | None = None,
    ) -> None:
        artifacts = artifacts or Artifacts(FileStorage([]), root / "copies", 1)
        self._engines = OpenEngines(engines)
        library = Library(artifacts, self._engines.get, capacity=cache_capacity)
        settings, metrics = Settings.read({"MEMVID_EXPORT_API_KEY": KEY}), Metrics()
        places = ExportPlaces(exports, root, external=allow_external_capsules, note=lambda _entry: None)
        route = mcp_route(
            Reader(places, library, budget=response_budget_bytes), metrics, origins=origins, buckets=buckets
        )

        @asynccontextmanager
        async def closing(_app: Litestar) -> AsyncIterator[None]:
            yield
            artifacts.close()
            library.close()

        app = Litestar(
            [route.handler],
            lifespan=[closing, route.lifespan],
            middleware=[
                BearerAuth(settings, Keys(settings), Origins.of(settings), note=lambda _entry: None, metrics=metrics)
            ],
            logging_config=None,
            exception_handlers={Exception: to_response},
            openapi_config=None,
        )
        # Of protocol TCP by name: asyncio sets TCP_NODELAY on no other, and each answer would wait 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/mcp"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> McpServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._engines.close()

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        async with http, Client(streamable_http_client(self.url, http_client=http)) as client:
            yield client

    def session(self, use: Callable[[Client], Awaitable[T]]) -> T:
        """What ``use`` makes of a session of the official client."""

        async def run() -> T:
            async with self._client() as client:
                return await use(client)

        return asyncio.run(run())

    def call_all(self, calls: list[tuple[str, dict[str, Any]]]) -> list[CallToolResult]:
        """Answers of tools, asked by the official client in one session."""

        async def run() -> list[CallToolResult]:
            async with self._client() as client:
                return [await client.call_tool(name, arguments) for name, arguments in calls]

        return asyncio.run(run())

    def ask_all(self, calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """The envelopes of answers, none of which may be an error; an index that opens slowly is waited for."""
        answers = self.call_all(calls)
        for _ in range(20):
            places = [n for n, answer in enumerate(answers) if _is_opening(answer)]
            if not places:
                break
            for n, answer in zip(places, self.call_all([calls[n] for n in places]), strict=True):
                answers[n] = answer
        for answer, call in zip(answers, calls, strict=True):
            assert not answer.is_error, (call, answer.structured_content)
        return [answer.structured_content for answer in answers]

    def ask(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The envelope of one answer."""
        return self.ask_all([(tool, arguments)])[0]

    def fail(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The error that a call ends in."""
        (answer,) = self.call_all([(tool, arguments)])
        assert answer.is_error, answer.structured_content
        return answer.structured_content

    def tools(self) -> list[Any]:
        """What the server says about its tools."""

        async def run() -> list[Any]:
            async with self._client() as client:
                return (await client.list_tools()).tools

        return asyncio.run(run())


def _is_opening(answer: Any) -> bool:
    return bool(answer.is_error) and answer.structured_content.get("code") == "INDEX_BUILD_IN_PROGRESS"


def raw_graph(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Nodes and relationships as they stand in a file, read without the project's own reader."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        if ".ndjson" in path.name:
            lines = [json.loads(line) for line in file]
            nodes = [line["data"] for line in lines if line["type"] == "node"]
            edges = [line["data"] for line in lines if line["type"] == "relationship"]
            return nodes, edges
        given = json.load(file)
        return given["nodes"], given["relationships"]
