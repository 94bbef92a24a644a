"""A server with the routes of collections and nothing else, in a thread, over a real database."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import uvicorn
from clocks import Ahead
from litestar import Litestar
from litestar.di import Provide
from numpy.typing import NDArray
from operations.keyring import entry, text_of
from prometheus_client import CollectorRegistry

from common.embedding.engine import OpenEngines
from common.embedding.port import Embedder
from common.settings import Settings
from control_plane.errors import to_response
from control_plane.jobs.audit import AuditEntry
from control_plane.jobs.database import Database
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.pace import Pace
from control_plane.nexus.routes import CollectionController
from control_plane.nexus.service import MAX_WRITES, Collections
from control_plane.nexus.sight import Sight
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import CollectionStore
from control_plane.nexus.texts import Texts
from control_plane.operations.auth import BearerAuth, caller_of
from control_plane.operations.disk import Disk
from control_plane.operations.keys import Keys
from control_plane.operations.metrics import Metrics
from control_plane.operations.origins import Origins
from control_plane.operations.shares import Shares

KEYS = "\n".join(
    [
        *(entry(name, "export", "read", client="'red'") for name in ("red", "red2", "Red", "r", "re_")),
        entry("blue", "export", "read", client="'blue'"),
        entry("chief", "admin", client="'red'"),
        entry("operator", "admin"),
    ]
)
"""Several keys of one client, whose names are much alike, and those of others."""


class Shelf:
    """The server, and its clients."""

    def __init__(self, url: str, database_url: str) -> None:
        self.url = url
        self.loop: Ahead
        self.database_url = database_url
        self.notes: list[AuditEntry] = []
        self.people: dict[str, Person] = {}
        self.woken = 0
        """How often the engine was told that documents were written."""

    def as_(self, key: str) -> Person:
        """Who has a key."""
        return self.people.get(key) or self.people.setdefault(key, Person(self, key))

    def put_on(self, seconds: float) -> None:
        """Let time pass for the server."""
        self.loop.seconds += seconds
        self.loop.call_soon_threadsafe(lambda: None)  # it looks at its clock


class Person:
    """Talks to the server with one key."""

    def __init__(self, shelf: Shelf, key: str) -> None:
        headers = {"Authorization": f"Bearer {text_of(key)}"}
        self.http = httpx.Client(base_url=shelf.url, headers=headers, timeout=60, trust_env=False)

    def ask(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        """The JSON of an answer that has this status; None where it has no body."""
        answer = self.http.request(method, f"/v1/collections{path}", **more)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def refused(self, method: str, path: str, status: int, **more: Any) -> dict[str, Any]:
        """The error of an answer that has this status."""
        return dict(self.ask(method, path, status, **more)["error"])

    def make(self, name: str, dimension: int | None = None, **more: Any) -> dict[str, Any]:
        """A new collection."""
        return dict(self.ask("PUT", f"/{name}", 201, json={"dimension": dimension, **more}))

    def write(self, collection: str, documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write documents at once."""
        return list(self.ask("POST", f"/{collection}/documents", json={"documents": documents})["documents"])

    def document(self, collection: str, doc_id: str, **params: Any) -> dict[str, Any]:
        """One document."""
        return dict(self.ask("GET", f"/{collection}/documents/{quote(doc_id, safe='')}", params=params))

    def listed(self, collection: str) -> list[str]:
        """Ids of all that are listed."""
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = self.ask("GET", f"/{collection}/documents", params={"limit": 100, **cursor})
            found += [one["id"] for one in page["documents"]]
            if page["nextCursor"] is None:
                return found
            cursor = {"cursor": page["nextCursor"]}

    def search(self, collection: str, **question: Any) -> dict[str, Any]:
        """What fits a question."""
        return dict(self.ask("POST", f"/{collection}/search", json=question))

    def found(self, collection: str, **question: Any) -> list[str]:
        """Ids of what fits, best first."""
        return [hit["id"] for hit in self.search(collection, **question)["hits"]]


@contextmanager
def shelf(
    folder: Path,
    database_url: str | None = None,
    *,
    writes: int = MAX_WRITES,
    engine: Callable[[], Embedder] | None = None,
    **env: str,
) -> Iterator[Shelf]:
    """A started server, with as many requests that write at once, and an engine other than the settings'; these are
    read from ``env``."""
    (folder / "keys.toml").write_text(KEYS)
    (folder / "root").mkdir()
    settings = Settings.read(
        {"MEMVID_EXPORT_ROOT": str(folder / "root"), "MEMVID_EXPORT_KEYS_FILE": str(folder / "keys.toml"), **env}
    )
    url = database_url or f"sqlite+aiosqlite:///{folder / 'jobs.sqlite'}"
    started = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Shelf(f"http://127.0.0.1:{listener.getsockname()[1]}", url)
        server = uvicorn.Server(uvicorn.Config(_app(found, settings, writes, engine), log_config=None, lifespan="on"))

        def serve() -> None:
            with asyncio.Runner(loop_factory=Ahead) as runner:
                loop = runner.get_loop()
                assert isinstance(loop, Ahead)
                found.loop = loop
                runner.run(_serve(server, listener, started))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert started.wait(30)
            yield found
        finally:
            for person in found.people.values():
                person.http.close()
            server.should_exit = True
            thread.join()


async def _serve(server: uvicorn.Server, listener: socket.socket, started: threading.Event) -> None:
    # The listener takes connections already: a client that is early waits.
    started.set()
    await server.serve(sockets=[listener])


def _app(found: Shelf, settings: Settings, writes: int, engine: Callable[[], Embedder] | None) -> Litestar:
    database, metrics = Database(found.database_url), Metrics()
    engines = OpenEngines(settings.engines())
    store = CollectionStore(database)

    def wake() -> None:
        found.woken += 1

    collections = Collections(
        store,
        Sight(database),
        Spaces(store, memory_bytes=1 << 30),
        BackStore(database, NexusMetrics(CollectorRegistry()), sends=False),
        texts=Texts(engine or (lambda: engines.get(settings.choice()))),
        wake=wake,
        places=Shares("documents", writes, metrics, several=True),
        pace=Pace(metrics, per_minute=settings.nexus_documents_per_minute, max_pending=settings.nexus_max_pending),
        room=Disk(settings, metrics).check,
    )

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        await database.migrate()
        yield
        await database.close()
        engines.close()

    auth = BearerAuth(settings, Keys(settings), Origins.of(settings), note=found.notes.append, metrics=metrics)
    return Litestar(
        [CollectionController],
        dependencies={
            "collections": Provide(lambda: collections, sync_to_thread=False),
            "caller": Provide(caller_of, sync_to_thread=False),
        },
        middleware=[auth],
        exception_handlers={Exception: to_response},
        lifespan=[lifespan],
        logging_config=None,
    )


def directions(count: int, dimension: int, seed: int = 7) -> NDArray[np.float64]:
    """Random numbers of this shape, the same ones for a seed."""
    return np.random.default_rng(seed).normal(size=(count, dimension))


def cosines(rows: NDArray[np.float64], question: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of each row to a question, computed in the plainest way."""
    made: NDArray[np.float64] = (rows @ question) / (np.linalg.norm(rows, axis=1) * np.linalg.norm(question))
    return made
