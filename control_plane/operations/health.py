"""Is the server alive, can it take jobs, what does it count."""

from __future__ import annotations

import asyncio
import os
import uuid

import msgspec
from litestar import Controller, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import Operation
from sqlalchemy.exc import SQLAlchemyError

from common.errors import ExportError
from common.storage import Storage
from control_plane.backends.port import Backend
from control_plane.errors import QueueUnavailable
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import iso
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.auth import OPEN
from control_plane.operations.metrics import Metrics
from control_plane.operations.openapi import OpenOperation, error_specs


class Alive(msgspec.Struct):
    """``GET /healthz``."""

    ok: bool
    timestamp: str


class Readiness(msgspec.Struct):
    """``GET /readyz``; each check says ``ok`` or what is wrong."""

    ok: bool
    checks: dict[str, str]


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
    async def ready(self, store: JobStore, layout: Layout, storage: Storage, backend: Backend) -> Readiness:
        """Writes to the database and to the export root, asks the storage, and looks for a worker."""
        checks = {
            "database": await _database(store),
            "root": await asyncio.to_thread(_root, layout),
            "storage": await asyncio.to_thread(_storage, storage, layout),
            "worker": backend.trouble or "ok",
        }
        if any(value != "ok" for value in checks.values()):
            raise QueueUnavailable("The server cannot take jobs now.", checks=checks)
        return Readiness(ok=True, checks=checks)


async def _database(store: JobStore) -> str:
    try:
        await store.check_writable()
    except SQLAlchemyError as error:
        return f"cannot be written: {type(error).__name__}"
    return "ok"


def _storage(storage: Storage, layout: Layout) -> str:
    try:
        storage.size(layout.payload_ref("ready"))
    except ExportError as error:
        return error.message
    return "ok"


def _root(layout: Layout) -> str:
    path = layout.scratch / f".ready-{uuid.uuid4()}"
    try:
        path.write_bytes(b"ok")
        path.unlink()
    except OSError as error:
        return f"cannot be written: {os.strerror(error.errno or 0)}"
    return "ok"


def metrics_route(*, need_key: bool) -> HTTPRouteHandler:
    """``GET /metrics``, behind the key where a setting says so."""

    @get(
        "/metrics",
        media_type="text/plain",
        opt={OPEN: not need_key},
        operation_class=Operation if need_key else OpenOperation,
        responses=error_specs("INTERNAL", *(["UNAUTHORIZED"] if need_key else [])),
        operation_id="metrics",
        summary="Figures for Prometheus",
        tags=["operations"],
    )
    async def route(store: JobStore, hub: EventHub, metrics: Metrics) -> Response[bytes]:
        """Jobs by status, queue depth and delay, durations."""
        body = metrics.text(await store.counts(), hub.listeners)
        # The framework adds the charset to text.
        return Response(body, media_type="text/plain; version=0.0.4")

    return route
