"""What a backend works with, inside the test's process, and a Runpod endpoint that answers as a test says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import beside
import msgspec
from live_server import graph
from processes import answering
from worker_run import run_here

from common.contract import JobInput, JobOutput
from common.graph.model import GraphLimits
from common.settings import Settings
from common.storage import open_storage
from control_plane.backends.endings import Endings
from control_plane.backends.legacy_vps import LegacyVps
from control_plane.backends.port import Means
from control_plane.backends.runpod_queue import RunpodQueue
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import JobRecord, NewJob, iso
from control_plane.jobs.store import JobStore
from control_plane.operations.disk import Disk
from control_plane.operations.metrics import Metrics
from control_plane.operations.profiles import Profiles
from handler.pool import WorkerPool
from handler.protocol import ChildConfig

Found = TypeVar("Found")

THERE = "there-1"
"""What the endpoint calls every job."""
KEY = "rp-key"
SECONDS = 30.0
"""So long whatever a test waits for takes at most."""


class Workshop:
    """A job store, a storage and children over one folder."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        given = {"MEMVID_EXPORT_ROOT": str(root), "MEMVID_EXPORT_DISK_FLOOR_BYTES": "0", **env}
        self.settings = Settings.read(given, dev=True)
        self.layout = Layout(self.settings)
        self.lock = self.layout.prepare()
        self.metrics = Metrics()
        self.storage = open_storage(self.layout.storage(self.settings))
        self.database = Database(self.settings.database_url)
        self.store = self.replica("here")
        self.config = self._config()
        self.pool = WorkerPool(self.config, 2)
        self.means = Means(self.settings, self.store, self.storage, self.layout, self.metrics)
        self.endings = Endings(self.means, backend=self.settings.backend_mode)

    def replica(self, name: str) -> JobStore:
        """The job store as another server sees it."""
        return JobStore(self.database, EventHub(), queue_capacity=100, replica=name)

    def queue(self) -> RunpodQueue:
        """A backend before the endpoint that the settings name."""
        return RunpodQueue(self.means, pool=self.pool, profiles=Profiles.load(None, self.settings))

    def legacy(self) -> LegacyVps:
        """A backend that runs children."""
        disk = Disk(self.settings, self.metrics)
        return LegacyVps(self.means, pool=self.pool, profiles=Profiles.load(None, self.settings), disk=disk)

    async def submit(self, body: dict[str, Any] | None = None) -> JobRecord:
        """Queue a job whose payload lies in the storage."""
        data = json.dumps(graph(2) if body is None else body).encode()
        job_id = str(uuid4())
        ref = self.layout.payload_ref(job_id)
        await asyncio.to_thread(self.storage.write, ref, data)
        new = NewJob(
            id=job_id,
            backend=self.settings.backend_mode,
            weight=1,
            session_id="s",
            project_name="p",
            payload_ref=ref,
            payload_sha256=hashlib.sha256(data).hexdigest(),
            payload_size=len(data),
            message="Queued",
            meta={},
        )
        return (await self.store.create(new))[0]

    def publish(self, job: JobRecord, attempt: int | None = None, **more: Any) -> JobOutput:
        """Do what a worker does of a job, up to its manifest; ``more`` are other fields of its input."""
        attempt = attempt or job.attempt
        given = {
            "payload_ref": job.payload_ref,
            "output_prefix": self.layout.output_prefix(job.id, attempt),
            "attempt": attempt,
            **more,
        }
        scratch = self.layout.scratch / f"published-{job.id}"
        created = iso(job.created_at)
        return run_here(JobInput(job_id=job.id, **given), self.storage, scratch, generated_at=created)

    async def job(self, job_id: str) -> JobRecord:
        """The job as it is now."""
        found = await self.store.get(job_id)
        assert found is not None
        return found

    async def until(self, job_id: str, status: str, attempt: int | None = None) -> JobRecord:
        """Wait until a job has a status (at an attempt), answer it."""

        async def there() -> JobRecord | None:
            job = await self.job(job_id)
            return job if job.status == status and attempt in (None, job.attempt) else None

        return await eventually(there)

    async def told(self, job_id: str) -> list[str]:
        """What the job's log says, in order."""
        return [event.message for event in await self.store.events(job_id, 0, 1_000)]

    def files(self, job_id: str) -> list[str]:
        """What lies in storage of a job, by its ref."""
        prefix = self.layout.job_prefix(job_id)
        found = [each.ref for each in self.storage.found(prefix)]
        payload = self.layout.payload_ref(job_id)
        return [*found, *([payload] if self.storage.size(payload) is not None else [])]

    async def change(self, statement: str, *values: object) -> None:
        """Change the database from outside, while transactions of this process go on."""
        await beside.change(self.settings.root / "jobs.sqlite", statement, *values)

    @asynccontextmanager
    async def no_database(self) -> AsyncIterator[None]:
        """Every question about jobs fails."""
        await self.change("ALTER TABLE jobs RENAME TO away")
        try:
            yield
        finally:
            await self.change("ALTER TABLE away RENAME TO jobs")

    def _config(self) -> ChildConfig:
        return ChildConfig(
            parent_pid=os.getpid(),
            storage=self.layout.storage(self.settings),
            scratch=str(self.layout.scratch),
            writer=None,
            memory_limit=self.settings.worker_memory_bytes,
            limits=GraphLimits(),
        )


@asynccontextmanager
async def workshop(root: Path, **env: str) -> AsyncIterator[Workshop]:
    """A workshop with an empty database; ``env`` are variables beyond the root."""
    made = Workshop(root, env)
    await made.database.migrate()
    try:
        yield made
    finally:
        await made.pool.close()
        await made.database.close()
        os.close(made.lock)


Scenario = Callable[[Workshop], Awaitable[None]]


def run(root: Path, scenario: Scenario, **env: str) -> None:
    """Play a scenario in a workshop."""

    async def inside() -> None:
        async with workshop(root, **env) as shop:
            await scenario(shop)

    asyncio.run(inside())


class Endpoint:
    """What each route answers next, and what came."""

    def __init__(self) -> None:
        self.base = ""
        self.came: list[tuple[str, Any]] = []
        """Routes (``run``, ``status``, ``cancel``) with the body of each request."""
        self.answers: dict[str, list[tuple[int, object]]] = {"run": [], "status": [], "cancel": []}
        """The next ones; the last one stays."""
        self.held: set[str] = set()
        """Routes whose requests wait."""
        self.changed = threading.Condition()
        self.says("run", "IN_QUEUE")
        self.says("status", "IN_QUEUE")
        self.says("cancel", "CANCELLED")

    @property
    def env(self) -> dict[str, str]:
        """What a server needs to use it."""
        return {
            "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue",
            "RUNPOD_API_BASE": self.base,
            "RUNPOD_ENDPOINT_ID": "ep",
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_POLL_INTERVAL_SECONDS": "0.05",
        }

    def says(self, route: str, status: str, code: int = 200, **more: object) -> None:
        """From now on a route answers so."""
        self.answers[route] = [(code, {"id": THERE, "status": status, **more})]

    def refuses(self, route: str, code: int, *, once: bool = False) -> None:
        """A route answers with an error, from now on or the next time."""
        self.answers[route] = [(code, {"error": "because"}), *(self.answers[route] if once else [])]

    def count(self, route: str) -> int:
        """How many requests came to a route."""
        return sum(name == route for name, _ in self.came)

    def hold(self, route: str) -> None:
        """Requests to a route wait for their answers."""
        with self.changed:
            self.held.add(route)

    def let_go(self, route: str) -> None:
        """They are answered."""
        with self.changed:
            self.held.discard(route)
            self.changed.notify_all()

    def take(self, route: str, body: Any) -> tuple[int, object]:
        """Answer a request."""
        with self.changed:
            self.came.append((route, body))
            self.changed.wait_for(lambda: route not in self.held, SECONDS)
            answers = self.answers[route]
            return answers.pop(0) if len(answers) > 1 else answers[0]


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    """An endpoint on this machine."""
    made = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            assert self.headers["Authorization"] == f"Bearer {KEY}"
            code, body = made.take(self.path.split("/")[3], json.loads(data) if data else None)
            answer = msgspec.json.encode(body)
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with answering(Handler) as url:
        made.base = f"{url}/v2"
        try:
            yield made
        finally:
            for route in made.answers:
                made.let_go(route)


async def eventually(look: Callable[[], Awaitable[Found | None]]) -> Found:
    """Look until something is found, answer it."""
    async with asyncio.timeout(SECONDS):
        while (found := await look()) is None:
            await asyncio.sleep(0.02)
    return found


async def until(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.02)
