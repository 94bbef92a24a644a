"""A server with collections and the routes of their sync, in a thread, over a real database; nothing syncs but what a
test does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from litestar import Litestar
from litestar.di import Provide
from litestar.types import ASGIApp, Receive, Scope, Send
from operations.keyring import TEAMS, text_of
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from common.embedding.engine import OpenEngines
from common.settings import Settings
from control_plane.errors import to_response
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.store import JobStore, now_ms
from control_plane.nexus.admin import NexusController, Operator
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.domains import Domains
from control_plane.nexus.engine import SyncEngine
from control_plane.nexus.graph.nexus import NexusGraph
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.pace import Pace
from control_plane.nexus.records import MAX_ATTEMPTS, Graphed, Related
from control_plane.nexus.routes import CollectionController
from control_plane.nexus.service import MAX_WRITES, Collections
from control_plane.nexus.sight import Sight
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import NEVER, CollectionStore
from control_plane.nexus.texts import Texts
from control_plane.operations.audit import AuditLog
from control_plane.operations.auth import BearerAuth, caller_of
from control_plane.operations.keys import Keys
from control_plane.operations.metrics import Metrics
from control_plane.operations.origins import Origins
from control_plane.operations.shares import Shares

T = TypeVar("T")


class Request:
    """A request that the server got."""

    def __init__(self, number: int, method: str, path: str) -> None:
        self.number = number
        """Of those with its method and path; the first one is 1."""
        self.method = method
        self.path = path
        self.body = b""


class Office:
    """The server."""

    def __init__(self, url: str, database_url: str) -> None:
        self.url = url
        self.database_url = database_url
        self.loop: asyncio.AbstractEventLoop
        self.store: CollectionStore
        self.events: BackStore
        self.pace: Pace
        self.jobs: JobStore
        self.requests: list[Request] = []
        self.before: Callable[[Request], httpx.Response | None] = lambda _: None
        """Hears of a request, in a thread of its own, once it is here as a whole; what it gives is the answer."""
        self.after: Callable[[Request], None] = lambda _: None
        """Hears of a request whose answer is not sent yet."""

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Work in the server's loop, such as a question to a store."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def seen(self, method: str, path: str) -> list[Request]:
        """Requests with this method and path."""
        return [one for one in self.requests if (one.method, one.path) == (method, path)]

    def ask(self, method: str, path: str, status: int = 200, *, key: str = "operator", **more: Any) -> Any:
        """The JSON of an answer that has this status."""
        headers = {"Authorization": f"Bearer {text_of(key)}"}
        answer = httpx.request(method, f"{self.url}{path}", headers=headers, timeout=60, trust_env=False, **more)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        return answer.json()

    def write(self, collection: str, ids: Sequence[str], *, key: str = "red") -> None:
        """Write documents with vectors of two numbers, into a collection that is made where it is missing."""
        headers = {"Authorization": f"Bearer {text_of(key)}"}
        url = f"{self.url}/v1/collections/{collection}"
        with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
            assert client.put(url, json={"dimension": 2}).is_success
            documents = [{"id": one, "vector": [1, number]} for number, one in enumerate(ids)]
            assert client.post(f"{url}/documents", json={"documents": documents}).is_success

    def documents(self, collection: str, *, key: str = "red") -> dict[str, str]:
        """Titles of all documents, by id."""
        found, cursor = {}, {}
        while True:
            params = {"limit": 100, **cursor}
            page = self.ask("GET", f"/v1/collections/{collection}/documents", key=key, params=params)
            found |= {one["id"]: one["title"] for one in page["documents"]}
            if page["nextCursor"] is None:
                return found
            cursor = {"cursor": page["nextCursor"]}

    def sync(self, refused: frozenset[str] = frozenset()) -> None:
        """Tell a graph, of which there is none, all that is pending; documents with these ids are given up."""

        async def inside() -> None:
            store = self.store
            assert await store.take_lease()
            while rows := await store.unrelated(100):
                await store.put_related([Related(row.id, row.version, "general", frozenset()) for row in rows], {})
            while rows := await store.ungraphed(100, now_ms()):
                wrong = [row.id for row in rows if row.doc_id in refused]
                for _ in range(MAX_ATTEMPTS if wrong else 0):
                    await store.put_failed(wrong, "it is too strange for a graph", NEVER)
                done = [
                    Graphed(row.id, row.wanted, row.near, row.mentions, row.version)
                    for row in rows
                    if row.id not in wrong
                ]
                await store.put_graphed(done, now_ms())

        self.do(inside())


@contextmanager
def office(folder: Path, database_url: str | None = None) -> Iterator[Office]:
    """A started server with the keys of two teams and of an operator."""
    (folder / "keys.toml").write_text(TEAMS)
    (folder / "root").mkdir()
    settings = Settings.read(
        {"MEMVID_EXPORT_ROOT": str(folder / "root"), "MEMVID_EXPORT_KEYS_FILE": str(folder / "keys.toml")}
    )
    url = database_url or f"sqlite+aiosqlite:///{folder / 'jobs.sqlite'}"
    started = threading.Event()
    # What the server has to say would stand among what a command does.
    with capture_logs(), socket.create_server(("127.0.0.1", 0)) as listener:
        found = Office(f"http://127.0.0.1:{listener.getsockname()[1]}", url)
        app = _told(found, _app(found, settings, started))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            assert started.wait(30)
            yield found
        finally:
            server.should_exit = True
            thread.join()


def _told(office: Office, app: ASGIApp) -> ASGIApp:
    """The same application; the office hears of each request, and may answer itself."""

    async def telling(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        same = office.seen(scope["method"], scope["path"])
        request = Request(len(same) + 1, scope["method"], scope["path"])
        office.requests.append(request)
        more = True
        while more:
            message = await receive()
            request.body += message.get("body", b"")
            more = message.get("more_body", False)
        answer = await asyncio.to_thread(office.before, request)
        if answer is not None:
            headers = [(name.lower(), value) for name, value in answer.headers.raw]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            await send({"type": "http.response.body", "body": answer.content, "more_body": False})
            return
        handed = False

        async def whole() -> Any:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": request.body, "more_body": False}

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                await asyncio.to_thread(office.after, request)
            await send(message)

        await app(scope, whole, sending)

    return telling


def _app(office: Office, settings: Settings, started: threading.Event) -> Litestar:
    database, metrics, figures = Database(office.database_url), Metrics(), NexusMetrics(CollectorRegistry())
    engines = OpenEngines(settings.engines())
    office.store = store = CollectionStore(database, replica="office")
    office.events = BackStore(database, figures, sends=True)
    office.pace = Pace(metrics, per_minute=settings.nexus_documents_per_minute, max_pending=settings.nexus_max_pending)
    office.jobs = JobStore(database, EventHub(), queue_capacity=1)
    audit = AuditLog(office.jobs, metrics)
    spaces = Spaces(store, memory_bytes=1 << 30)

    async def told(_rows: object) -> None:
        """Nobody listens."""

    graph = NexusGraph("http://127.0.0.1:9")  # nobody asks it: the engine does not run
    engine = SyncEngine(
        store,
        spaces,
        graph,
        domains=Domains.load(None),
        metrics=figures,
        synced=told,
    )
    parts: dict[str, Any] = {
        "operator": Operator(store, engine, spaces, office.events),
        "collections": Collections(
            store,
            Sight(database),
            spaces,
            office.events,
            texts=Texts(lambda: engines.get(settings.choice())),
            wake=engine.wake,
            places=Shares("documents", MAX_WRITES, metrics, several=True),
            pace=office.pace,
            room=lambda _: None,
        ),
    }

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        office.loop = asyncio.get_running_loop()
        await database.migrate()
        writing = asyncio.create_task(audit.run())
        started.set()
        yield
        writing.cancel()
        await audit.stop()
        await database.close()
        engines.close()
        graph.close()

    return Litestar(
        [CollectionController, NexusController],
        dependencies={
            **{name: _providing(part) for name, part in parts.items()},
            "caller": Provide(caller_of, sync_to_thread=False),
        },
        middleware=[BearerAuth(settings, Keys(settings), Origins.of(settings), note=audit.note, metrics=metrics)],
        exception_handlers={Exception: to_response},
        lifespan=[lifespan],
        logging_config=None,
    )


def _providing(part: object) -> Provide:
    return Provide(lambda: part, sync_to_thread=False)
