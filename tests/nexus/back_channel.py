"""A store of what graphs tell, over a database with documents; and servers on both ends of its channel."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import uvicorn
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from nexus.told_server import Seen
from processes import answering
from prometheus_client import CollectorRegistry
from sqlalchemy import Boolean, Integer, LargeBinary, Table, func, insert, select

from control_plane.errors import to_response
from control_plane.jobs.database import Database
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.tables import collections, documents, spaces

NOW = 1_800_000_000_000
"""Milliseconds, of the clocks of tests."""
SECRET = "a-secret-of-both-sides"


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: int = NOW

    def __call__(self) -> int:
        return self.now


@dataclass
class House:
    """A store with what it stands on."""

    url: str
    database: Database
    registry: CollectorRegistry
    metrics: NexusMetrics
    store: BackStore

    async def rows(self, table: Table) -> list[dict[str, Any]]:
        """All rows of a table, in the order of its key."""
        async with self.database.read.connect() as connection:
            found = await connection.execute(select(table).order_by(*table.primary_key.columns))
            return [dict(row._mapping) for row in found]

    async def count(self, table: Table) -> int:
        async with self.database.read.connect() as connection:
            return await connection.scalar(select(func.count()).select_from(table)) or 0

    async def put(self, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, in many at a time."""
        async with self.database.write.begin() as connection:
            for start in range(0, len(rows), 5_000):
                await connection.execute(insert(table), rows[start : start + 5_000])

    def figure(self, name: str, **labels: str) -> float:
        """A figure as it is told; 0 where it was never counted."""
        return self.registry.get_sample_value(f"vectorizer_nexus_{name}", labels) or 0.0


@asynccontextmanager
async def house(url: str, *, sends: bool = True) -> AsyncIterator[House]:
    """A store over a database."""
    database, registry = Database(url), CollectorRegistry()
    metrics = NexusMetrics(registry)
    await database.migrate()
    try:
        yield House(url, database, registry, metrics, BackStore(database, metrics, sends=sends))
    finally:
        await database.close()


def run(url: str, scenario: Callable[[House], Awaitable[None]], *, sends: bool = True) -> None:
    """Run a scenario over an empty database."""

    async def inside() -> None:
        async with house(url, sends=sends) as made:
            await scenario(made)

    asyncio.run(inside())


def _row(table: Table, **given: Any) -> dict[str, Any]:
    """A row whose other columns are empty."""
    empty = {Boolean: False, LargeBinary: b""}
    rest = {
        column.name: next((value for kind, value in empty.items() if isinstance(column.type, kind)), 0)
        if isinstance(column.type, Integer | Boolean | LargeBinary)
        else ""
        for column in table.columns
        if not column.nullable
    }
    return {**rest, **given}


class Seeded(NamedTuple):
    """A collection, and the row ids of its documents by their ids."""

    collection: int
    ids: dict[str, int]


async def seed(
    house: House, doc_ids: Sequence[str], *, client: str = "red", collection: str = "books", only: Sequence[str] = ()
) -> Seeded:
    """A new collection with documents, which only these keys see."""
    async with house.database.write.begin() as connection:

        async def put(table: Table, **given: Any) -> int:
            row = {name: value for name, value in _row(table, **given).items() if name != "id"}
            found = await connection.scalar(insert(table).values(row).returning(table.c.id))
            assert found is not None
            return int(found)

        space = await put(spaces, name=f"{client}/{collection}", dimension=2)
        made = await put(collections, client=client, name=collection, space=space)
        permissions = json.dumps(list(only))
        ids = {
            doc_id: await put(documents, collection=made, space=space, doc_id=doc_id, permissions=permissions)
            for doc_id in doc_ids
        }
    return Seeded(made, ids)


def relationship(**more: Any) -> dict[str, Any]:
    """The body of a message about a relationship; ``more`` are other fields, or other values of these."""
    return {
        "eventId": "event-1",
        "origin": "graph-1",
        "version": 1,
        "action": "upsert",
        "client": "red",
        "source": {"collection": "books", "id": "a"},
        "target": {"collection": "books", "id": "b"},
        "type": "CITES",
        "properties": {"page": 12},
        **more,
    }


def node(**more: Any) -> dict[str, Any]:
    """The body of a message about a node."""
    return {
        "eventId": "event-2",
        "origin": "graph-1",
        "version": 1,
        "action": "upsert",
        "client": "red",
        "document": {"collection": "books", "id": "a"},
        "properties": {"rank": 0.5, "topics": ["law", "trade"]},
        **more,
    }


@asynccontextmanager
async def served(handlers: Sequence[HTTPRouteHandler]) -> AsyncIterator[str]:
    """The URL of a server with these routes, in this event loop."""
    app = Litestar(list(handlers), exception_handlers={Exception: to_response}, openapi_config=None)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    # With its protocol named, so that no piece of an answer waits for the one before to be acknowledged.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


Answer = Callable[[BaseHTTPRequestHandler, Seen], None]


class Receiver:
    """Who is told of events. Its next answers are those in ``answers``; then it takes everything."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.arrived: list[Seen] = []
        self.answers: list[Answer] = []
        self.came = threading.Semaphore(0)
        """Released for each request, once it is answered."""

    def status(self, *statuses: int, **headers: str) -> None:
        """Let the next answers have these statuses, with headers (``retry_after="3"``)."""
        self.answers += [lambda handler, _, status=status: say(handler, status, **headers) for status in statuses]

    @property
    def ids(self) -> list[str]:
        """The events that came, in the order in which they did."""
        return [one.body["eventId"] for one in self.arrived]

    async def wait(self, count: int) -> None:
        """Until so many more requests were answered."""
        for _ in range(count):
            assert await asyncio.to_thread(self.came.acquire, timeout=30)


def say(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """A whole answer."""
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            arrived = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, raw)
            known.arrived.append(arrived)
            try:
                if known.answers:
                    known.answers.pop(0)(self, arrived)
                else:
                    say(self, 204)
            finally:
                known.came.release()

    with answering(Handler) as url:
        known = Receiver(url)
        yield known
