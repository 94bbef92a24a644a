"""A store, an engine and a graph of its own, and what the graph should hold by a computation of the slow kind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nexus.brute_force import pairs
from prometheus_client import CollectorRegistry

from control_plane.jobs.database import Database
from control_plane.jobs.store import now_ms
from control_plane.nexus.domains import Domains
from control_plane.nexus.engine import MARK, SyncEngine
from control_plane.nexus.entities import entities
from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.graph.port import Change, GraphStore, Held
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.overview import LookReport
from control_plane.nexus.records import Collection, NewDocument, Row, Vector
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import EVERYTHING, CollectionStore
from control_plane.nexus.verify import Verifier

DIMENSION = 16
WAIT_SECONDS = 30.0


def around(rng: np.random.Generator, centre: Vector, spread: float) -> Vector:
    """A unit vector near another one."""
    found = centre + spread * rng.normal(size=centre.shape)
    return np.asarray(found / np.linalg.norm(found), dtype=np.float32)


class Tricky:
    """A graph that does what a test says instead of, or after a part of, what it is told."""

    def __init__(self, graph: GraphStore) -> None:
        self.graph = graph
        self.before: Callable[[Change], None] = lambda _: None
        """Hears of each change; what it raises comes from ``apply``."""
        self.idle = threading.Lock()
        """Held during a change: a thread goes on with it where the engine was ended."""

    def prepare(self) -> None:
        self.graph.prepare()

    def apply(self, change: Change) -> None:
        with self.idle:
            self.before(change)
            self.graph.apply(change)

    def read(self, ids: Sequence[int]) -> dict[int, Held]:
        return self.graph.read(ids)

    def documents(self, after: int, limit: int) -> list[int]:
        return self.graph.documents(after, limit)

    def entities(self, after: str, limit: int) -> list[str]:
        return self.graph.entities(after, limit)

    def clear(self) -> None:
        self.graph.clear()

    def probe(self) -> str:
        return self.graph.probe()

    def close(self) -> None:
        self.graph.close()


class Synced:
    """All parts of a server that sync."""

    def __init__(self, database: Database, graph: Tricky, replica: str) -> None:
        self.database = database
        self.graph = graph
        self.store = CollectionStore(database, replica=replica)
        self.registry = CollectorRegistry()
        self.told: list[Row] = []
        spaces = Spaces(self.store, memory_bytes=1 << 28)
        self.engine = SyncEngine(
            self.store,
            spaces,
            graph,
            domains=Domains.load(None),
            metrics=NexusMetrics(self.registry),
            synced=self._hear,
        )
        self.verifier = Verifier(self.engine, every_seconds=0)
        self.vectors: dict[int, Vector] = {}
        """Of living documents, by their rows."""
        self.texts: dict[int, str] = {}

    async def _hear(self, rows: Sequence[Row]) -> None:
        self.told += rows

    async def collection(self, name: str = "code", model: str = "own", client: str = "red") -> Collection:
        return (await self.store.put_collection(client, name, model, DIMENSION))[0]

    async def write(self, collection: Collection, **documents: Vector | tuple[Vector, str]) -> dict[str, int]:
        """Write documents by their ids; answers their rows."""
        new = []
        for doc_id, said in documents.items():
            vector, text = said if isinstance(said, tuple) else (said, "")
            new.append(NewDocument(doc_id, doc_id.title(), text, {}, "", (), vector))
        written = await self.store.write(collection, new, now=now_ms())
        for one, put in zip(new, written, strict=True):
            self.vectors[put.id], self.texts[put.id] = one.vector, f"{one.title}\n{one.text}"
        self.engine.wake()
        return {put.doc_id: put.id for put in written}

    async def delete(self, collection: Collection, *doc_ids: str) -> None:
        rows = {one.doc_id: one.id for one in await self.store.get(collection, doc_ids, EVERYTHING)}
        await self.store.delete(collection, doc_ids, now=now_ms())
        for row in rows.values():
            self.vectors.pop(row, None)
            self.texts.pop(row, None)
        self.engine.wake()

    async def settled(self) -> None:
        """Wait until nothing is pending."""
        async with asyncio.timeout(WAIT_SECONDS):
            while any(one.pending for one in await self.store.counts()):
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine's loops."""
        async with meanwhile(self.engine.run()):
            yield

    async def verify(self) -> LookReport:
        """One comparison."""
        return await self.verifier.look("verify")

    def held(self) -> dict[int, Held]:
        """All that the graph holds."""
        ids = self.graph.documents(MARK, 100_000)
        return self.graph.read(ids)

    def check(self) -> None:
        """The graph holds the documents, pairs and mentions that it should, and nothing else."""
        held = self.held()
        assert held.keys() == self.vectors.keys()
        assert all(one.node is not None and not one.lopsided for one in held.values())
        found = {(row, other): score for row, one in held.items() for other, score in one.similar.items()}
        right: dict[tuple[int, int], float] = {}
        for (a, b), score in pairs(self.vectors).items():
            right[a, b] = right[b, a] = score
        assert found == right
        named = {row: entities(text) for row, text in self.texts.items()}
        assert {row: one.mentions for row, one in held.items()} == named
        assert set(self.graph.entities("", 100_000)) == {key for keys in named.values() for key in keys}


@asynccontextmanager
async def meanwhile(loop: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """It runs, and is ended; what it raised comes out."""
    task = asyncio.create_task(loop)
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextmanager
def tricky(folder: Path) -> Iterator[Tricky]:
    """An embedded graph."""
    graph = Tricky(LadybugGraph(folder / "graph"))
    try:
        yield graph
    finally:
        graph.close()


@asynccontextmanager
async def synced(url: str, graph: Tricky, *, replica: str = "one") -> AsyncIterator[Synced]:
    """The parts, over a database with its tables."""
    database = Database(url)
    try:
        await database.migrate()
        yield Synced(database, graph, replica)
    finally:
        await database.close()


T = TypeVar("T")


def play(url: str, folder: Path, story: Callable[[Synced], Awaitable[T]]) -> T:
    """Play a story with the parts and an embedded graph."""

    async def inside(graph: Tricky) -> T:
        async with synced(url, graph) as parts:
            return await story(parts)

    with tricky(folder) as graph:
        return asyncio.run(inside(graph))
