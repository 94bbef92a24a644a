"""Is the server alive, can it take jobs, what does it count."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import structlog
from litestar import Controller, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import Operation
from sqlalchemy.exc import SQLAlchemyError

from common.errors import ExportError
from common.storage import Storage
from control_plane.errors import QueueUnavailable
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import iso
from control_plane.jobs.store import JobStore, Waiting, now_ms
from control_plane.operations.auth import ADMIN, NEEDS, OPEN
from control_plane.operations.disk import Disk
from control_plane.operations.keys import Keys
from control_plane.operations.metrics import Metrics
from control_plane.operations.openapi import OpenOperation, error_specs

log = structlog.get_logger()

CHECK_SECONDS = 5.0
"""A check that takes longer says so; it is not begun again before it ends."""
FRESH_SECONDS = 1.0
"""What was found answers everybody who asks within so long."""
PROBE_SECONDS = 10.0
"""Between two writes to the storage that went well: at most 8,640 a day of each replica, each a PUT, a GET and a
removal, and only while somebody asks. That it answers is looked at each time, by one HEAD."""
LAG_SECONDS = 0.25
"""Between two looks at how late the event loop is."""

Check = Callable[[], Awaitable[str | None]]
"""None: all is well; else what is not. Raises nothing that is foreseen."""


class Alive(msgspec.Struct):
    """``GET /healthz``."""

    ok: bool
    timestamp: str


class Readiness(msgspec.Struct):
    """``GET /readyz``; each check says ``ok`` or what is wrong. ``notes`` do not decide whether the server is ready."""

    ok: bool
    checks: dict[str, str]
    notes: dict[str, Any]


class Health:
    """Looks at all that jobs need, at once, at most once a second, however many ask."""

    def __init__(self, checks: Mapping[str, Check], notes: Mapping[str, Callable[[], Any]]) -> None:
        self._checks = checks
        self._notes = notes
        self._running: dict[str, asyncio.Task[str | None]] = {}
        self._since: dict[str, float] = {}
        self._looking: asyncio.Task[None] | None = None
        self._found: dict[str, str] = {}
        self._found_at = -FRESH_SECONDS

    async def look(self) -> Readiness:
        """What is well and what is not, not older than a second."""
        if time.monotonic() - self._found_at >= FRESH_SECONDS:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)
        notes = {name: note() for name, note in self._notes.items()}
        return Readiness(ok=all(said == "ok" for said in self._found.values()), checks=self._found, notes=notes)

    async def _look(self) -> None:
        try:
            said = await asyncio.gather(*(self._ask(name, check) for name, check in self._checks.items()))
            self._found = dict(zip(self._checks, said, strict=True))
            self._found_at = time.monotonic()
        finally:
            self._looking = None

    async def _ask(self, name: str, check: Check) -> str:
        now = time.monotonic()
        if (task := self._running.get(name)) is None:
            task = self._running[name] = asyncio.ensure_future(check())
            self._since[name] = now
        left = self._since[name] + CHECK_SECONDS - now
        await asyncio.wait([task], timeout=max(left, 0.0))
        if not task.done():
            return f"does not answer within {CHECK_SECONDS:.0f} seconds"
        del self._running[name]
        try:
            return task.result() or "ok"
        except Exception as error:
            log.exception("a check failed", check=name)
            return f"cannot be checked: {type(error).__name__}"

    async def close(self) -> None:
        """Ask no more."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


class Probes:
    """The checks of what this process writes to; in threads of their own, as those of others may all hang."""

    def __init__(self, store: JobStore, storage: Storage, layout: Layout, disk: Disk) -> None:
        self._store = store
        self._storage = storage
        self._layout = layout
        self._disk = disk
        self._ref = layout.payload_ref(f"ready-{store.replica}")
        self._written = -PROBE_SECONDS
        self._threads = ThreadPoolExecutor(3, thread_name_prefix="readiness")

    async def database(self) -> str | None:
        """It takes a write."""
        try:
            await self._store.check_writable()
        except SQLAlchemyError as error:
            return f"cannot be written: {type(error).__name__}"
        return None

    async def root(self) -> str | None:
        """The export root takes a file."""
        return await self._threaded(self._write_root)

    async def storage(self) -> str | None:
        """The storage takes an object, gives it back and removes it."""
        return await self._threaded(self._write_storage)

    async def disk(self) -> str | None:
        """There is room above the floor."""
        return await self._threaded(lambda: self._disk.trouble)

    async def _threaded(self, work: Callable[[], str | None]) -> str | None:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _write_root(self) -> str | None:
        path = self._layout.scratch / f".ready-{secrets.token_hex(8)}"
        try:
            path.write_bytes(b"ok")
            path.unlink()
        except OSError as error:
            return f"cannot be written: {os.strerror(error.errno or 0)}"
        return None

    def _write_storage(self) -> str | None:
        try:
            self._storage.size(self._ref)
            if time.monotonic() - self._written >= PROBE_SECONDS:
                word = secrets.token_bytes(16)
                self._storage.write(self._ref, word)
                read = b"".join(self._storage.read(self._ref, 0, len(word)))
                self._storage.delete(self._ref)
                if read != word:
                    return "gives back other bytes than were written"
                self._written = time.monotonic()
        except ExportError as error:
            return error.message
        return None

    def close(self) -> None:
        """Wait for nothing that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def watch_loop(metrics: Metrics) -> None:
    """Measure how late the event loop wakes this task, until it is canceled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        metrics.loop_lag.observe(max(0.0, loop.time() - due))


def ended(tasks: Mapping[str, asyncio.Task[None]]) -> str | None:
    """Which of the tasks that run as long as the server have ended."""
    names = [name for name, task in tasks.items() if task.done()]
    return f"ended: {', '.join(names)}" if names else None


class HealthController(Controller):
    """Routes for whoever keeps the server running."""

    tags = ("operations",)

    @get(
        "/healthz",
        opt={OPEN: True},
        operation_class=OpenOperation,
        operation_id="health",
        summary="The process answers",
    )
    async def health(self) -> Alive:
        """Always true: a process that hangs does not answer."""
        return Alive(ok=True, timestamp=iso(now_ms()))

    @get(
        "/readyz",
        opt={OPEN: True},
        operation_class=OpenOperation,
        operation_id="ready",
        summary="Jobs can be taken and kept",
        responses=error_specs("INTERNAL", "QUEUE_UNAVAILABLE"),
    )
    async def ready(self, health: Health) -> Readiness:
        """Database, root and storage take writes, a worker is up, the disk has room, and whoever moves jobs is at work;
        each is looked at for at most 5 seconds, and at most once a second."""
        found = await health.look()
        if not found.ok:
            raise QueueUnavailable("The server cannot take jobs now.", checks=found.checks, notes=found.notes)
        return found


class Figures:
    """What ``/metrics`` shows beyond what was counted."""

    def __init__(
        self, store: JobStore, hub: EventHub, metrics: Metrics, disk: Disk, *, health: Health, keys: Keys
    ) -> None:
        self._store = store
        self._hub = hub
        self._metrics = metrics
        self._disk = disk
        self._health = health
        self._keys = keys

    async def text(self) -> bytes:
        """The exposition text, after ``CHECK_SECONDS`` at most. Without the database it is shorter, not missing."""
        waiting, ready = await asyncio.gather(self._waiting(), self._health.look())  # which asks the disks
        troubles = {part: said != "ok" for part, said in ready.checks.items()} | {
            "keys": self._keys.trouble is not None
        }
        return self._metrics.text(waiting, streams=self._hub.listeners, free=self._disk.free, troubles=troubles)

    async def _waiting(self) -> Waiting | None:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return await self._store.waiting()
        except (SQLAlchemyError, TimeoutError) as error:
            log.warning("the jobs cannot be counted", reason=type(error).__name__)
            return None


def metrics_route(*, need_key: bool) -> HTTPRouteHandler:
    """``GET /metrics``, behind the key where a setting says so."""

    @get(
        "/metrics",
        media_type="text/plain",
        opt={NEEDS: ADMIN} if need_key else {OPEN: True},
        operation_class=Operation if need_key else OpenOperation,
        responses=error_specs("INTERNAL", *(["UNAUTHORIZED", "FORBIDDEN", "RATE_LIMITED"] if need_key else [])),
        operation_id="metrics",
        summary="Figures for Prometheus",
        tags=["operations"],
    )
    async def route(figures: Figures) -> Response[bytes]:
        """Jobs by status, queue depth and delay, durations, errors, what the process uses."""
        # The framework adds the charset to text.
        return Response(await figures.text(), media_type="text/plain; version=0.0.4")

    return route
