"""The application: wiring only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import structlog
from litestar import Litestar
from litestar.di import Provide
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from common.embedding.choice import Choice, Engines
from common.embedding.engine import OpenEngines
from common.embedding.port import Embedder
from common.embedding.routing import check_question
from common.errors import ExportError
from common.graph.model import GraphLimits
from common.settings import Settings
from common.storage import open_storage
from control_plane.backends.checker import CHECKERS, PayloadChecker
from control_plane.backends.legacy_vps import LegacyVps
from control_plane.backends.port import Backend, Means
from control_plane.backends.runpod_queue import RunpodQueue
from control_plane.dashboard import dashboard_routes
from control_plane.errors import QueueUnavailable, to_response
from control_plane.exports.downloads import Downloads
from control_plane.exports.hooks import hook_route
from control_plane.exports.intake import MAX_UPLOADS, Intake
from control_plane.exports.routes import ExportController
from control_plane.exports.search import ExportSearch
from control_plane.exports.service import ExportService
from control_plane.jobs.database import Database
from control_plane.jobs.holds import Holds
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.notify import Notifier
from control_plane.jobs.records import CANARY_CLIENT
from control_plane.jobs.store import JobStore
from control_plane.nexus.part import Nexus
from control_plane.operations.audit import AuditController, AuditLog
from control_plane.operations.auth import BearerAuth, caller_of, limit_headers
from control_plane.operations.canary import RUNPOD_SECONDS, SECONDS, Canary
from control_plane.operations.disk import Disk
from control_plane.operations.health import (
    Figures,
    Health,
    HealthController,
    Probes,
    ended,
    metrics_route,
    watch_loop,
)
from control_plane.operations.http import allowed_methods, cors, preflight_refusals, security_headers
from control_plane.operations.keys import Keys
from control_plane.operations.limits import TokenBuckets
from control_plane.operations.metrics import Metrics
from control_plane.operations.openapi import MCP
from control_plane.operations.origins import Origins
from control_plane.operations.profiles import Profiles
from control_plane.operations.requests import Requests
from control_plane.operations.retention import Retention
from control_plane.operations.scrub import Scrub
from control_plane.operations.shares import Shares
from control_plane.operations.stats import StatsController
from control_plane.operations.storage import CountedStorage
from control_plane.operations.tracing import Tracing
from control_plane.operations.watch import JobWatch
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.mcp_http import mcp_route
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader
from handler.pool import WorkerPool
from handler.protocol import ChildConfig

log = structlog.get_logger()

STOP_SECONDS = 5.0
"""That what runs as long as the server may take to end."""


def create_app(settings: Settings, layout: Layout, hub: EventHub) -> Litestar:  # noqa: PLR0915 - one wire a line
    """The control plane over a prepared ``layout``; closing ``hub`` ends its open streams."""
    metrics = Metrics()
    tracing = Tracing(settings.otlp_endpoint, replica=layout.replica())
    hub.handed = metrics.event_lag.observe
    database = Database(settings.database_url)
    store = JobStore(database, hub, queue_capacity=settings.queue_capacity, replica=layout.replica())
    watch = JobWatch(store, metrics, tracing)
    store.watch = watch.saw
    storage = CountedStorage(open_storage(layout.storage(settings)), metrics)
    pool = _worker_pool(settings, layout, metrics)
    profiles = Profiles.load(settings.profiles_file, settings)
    means = Means(settings, store, storage, layout, metrics)
    disk = Disk(settings, metrics)
    keys = Keys(settings)
    origins = Origins.of(settings)
    canary = _canary(settings, keys, metrics)
    audit = AuditLog(store, metrics)
    several = bool(settings.keys or settings.keys_file)
    holds = Holds(store)
    downloads = Downloads(
        storage,
        store,
        holds=holds,
        metrics=metrics,
        shares=Shares("downloads", settings.max_downloads, metrics, several=several),
    )
    backend: Backend
    hooks: list[HTTPRouteHandler] = []
    if settings.backend_mode == "runpod_queue":
        queue = RunpodQueue(means, pool=pool, profiles=profiles)
        backend, hooks = queue, [hook_route(queue)]
    else:
        backend = LegacyVps(means, pool=pool, profiles=profiles, disk=disk)
    notifier = Notifier(database, hub, backend.wake)
    retention = Retention(settings, store, storage, layout, backend)
    scrub = Scrub(settings, store, storage, layout, metrics)
    engines = OpenEngines(settings.engines(), storage)
    allowed = _allowed(settings, engines)
    artifacts = Artifacts(storage, layout.copies, settings.mcp_cache_bytes, reading=holds.fetching, room=disk.check)
    library = Library(artifacts, allowed, capacity=settings.mcp_cache_capacity)
    places = ExportPlaces(store, settings.root, external=settings.mcp_allow_external_capsules, note=audit.note)
    mcp = mcp_route(
        Reader(places, library, budget=settings.mcp_response_budget_bytes, reading=holds.reading),
        metrics,
        origins=origins,
        buckets=TokenBuckets(per_minute=settings.mcp_rate_limit_per_minute, burst=settings.mcp_rate_limit_burst),
    )
    nexus = Nexus(
        settings,
        database,
        replica=layout.replica(),
        embedder=lambda: allowed(settings.choice()),
        metrics=metrics,
        note=audit.note,
        several=several,
        storage=storage,
        holds=holds,
        room=disk.check,
    )
    probes = Probes(store, storage, layout, disk)
    tasks: dict[str, asyncio.Task[None]] = {}
    """That run as long as the server."""
    health = Health(
        {
            "database": probes.database,
            "root": probes.root,
            "storage": probes.storage,
            "disk": probes.disk,
            "worker": _saying(lambda: backend.trouble),
            "tasks": _saying(lambda: ended({**tasks, **notifier.tasks})),
        },
        notes={"keys": lambda: keys.trouble or "ok"} | ({"canary": lambda: canary.detail} if canary else {}),
    )
    exports = ExportService(
        store,
        hub,
        backend,
        downloads=downloads,
        streams=Shares("streams", settings.max_streams, metrics, several=several),
        note=audit.note,
    )
    parts: dict[str, Any] = {
        "store": store,
        "hub": hub,
        "layout": layout,
        "backend": backend,
        "health": health,
        "figures": Figures(
            store,
            hub,
            metrics,
            disk,
            health=health,
            keys=keys,
        ),
        "exports": exports,
        "search": ExportSearch(exports, library, holds, note=audit.note),
        "intake": Intake(
            store,
            storage,
            layout,
            backend,
            checker=PayloadChecker(pool, metrics),
            profiles=profiles,
            metrics=metrics,
            disk=disk,
            uploads=Shares("uploads", MAX_UPLOADS, metrics, several=several, full=QueueUnavailable),
            capacity=settings.queue_capacity,
            max_bytes=settings.max_payload_bytes,
        ),
        "storage": storage,
        "disk": disk,
        **nexus.dependencies,
    }

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        await database.migrate()
        await store.end_damaged()
        spared: dict[str, int] = {}
        try:
            spared = await retention.recovery.all()
        except ExportError as error:
            if not layout.shared:  # what is not recovered would be removed
                raise
            log.warning("the storage cannot be listed yet", code=error.code, reason=error.message)
        removed = await asyncio.to_thread(
            layout.clear,
            in_flight=await store.in_flight(),
            completed={**spared, **await store.completed()},
            kept=await store.kept_payloads(),
        )
        log.info("server starts", replica=store.replica, backend=backend.name, stray_files_removed=removed)
        pool.start()
        await notifier.start()
        await backend.start()
        loops = {"retention": retention.run(), "holds": holds.run(), "loop": watch_loop(metrics)}
        loops |= {"keys": keys.watch(audit.reloaded), "audit": audit.run()}
        if settings.scrub_seconds:
            loops["scrub"] = scrub.run()
        if canary is not None:
            loops["canary"] = canary.run()
        tasks.update({name: asyncio.create_task(loop) for name, loop in loops.items()})
        tasks.update(nexus.start())
        try:
            yield
        finally:
            for task in tasks.values():
                task.cancel()
            # Closing a database under a statement that is being canceled may never end.
            await asyncio.wait(tasks.values(), timeout=STOP_SECONDS)
            await nexus.stop()
            await health.close()
            probes.close()
            hub.close()
            await backend.stop()
            await pool.close()
            await notifier.stop()
            await watch.close()
            await audit.stop()
            await database.close()
            artifacts.close()
            await asyncio.to_thread(library.close)
            await asyncio.to_thread(engines.close)
            await asyncio.to_thread(tracing.close)

    app = Litestar(
        route_handlers=[
            ExportController,
            *hooks,
            HealthController,
            StatsController,
            AuditController,
            *nexus.routes,
            metrics_route(need_key=settings.metrics_need_key),
            *dashboard_routes(),
            mcp.handler,
        ],
        dependencies={name: _providing(part) for name, part in parts.items()}
        | {"caller": Provide(caller_of, sync_to_thread=False)},
        middleware=[BearerAuth(settings, keys, origins, note=audit.note, metrics=metrics)],
        exception_handlers={Exception: to_response},
        before_send=[security_headers(settings.public_url), limit_headers, preflight_refusals, allowed_methods],
        cors_config=cors(settings.cors_origins),
        lifespan=[lifespan, mcp.lifespan],
        logging_config=None,
        openapi_config=OpenAPIConfig(
            title="memvid-export",
            version=version("memvid-export"),
            description="Turns GitNexus code graphs into Memvid capsules.",
            path="/schema",
            render_plugins=[JsonRenderPlugin()],
            components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
            security=[{"key": []}],
        ),
    )
    app.state.canary = canary
    app.asgi_handler = Requests(app.asgi_handler, metrics, tracing)
    # The framework leaves plain ASGI routes out.
    app.openapi_schema.paths = {**(app.openapi_schema.paths or {}), "/mcp": MCP}
    return app


def _worker_pool(settings: Settings, layout: Layout, metrics: Metrics) -> WorkerPool:
    config = ChildConfig(
        parent_pid=os.getpid(),
        storage=layout.storage(settings),
        scratch=str(layout.scratch),
        writer=settings.writer,
        memory_limit=settings.worker_memory_bytes,
        limits=GraphLimits(max_payload_bytes=settings.max_payload_bytes),
        stage_seconds=settings.stage_seconds,
        choice=settings.choice(),
        models=settings.allowed_models(),
        # Where Runpod's workers embed, children here only check payloads and need no keys.
        engines=settings.engines() if settings.embeds_here else Engines(),
    )
    slots = settings.worker_slots if settings.backend_mode == "legacy_vps" else 0
    told = "legacy_vps" if slots else "checks"
    return WorkerPool(config, slots + CHECKERS, started=metrics.cold_start.labels(told).observe)


def _canary(settings: Settings, keys: Keys, metrics: Metrics) -> Canary | None:
    """The server's canaries, where there are to be any; the server says where it listens."""
    if not settings.canary_seconds:
        return None
    key = keys.add_own(CANARY_CLIENT, frozenset({"export", "read"}))
    seconds = RUNPOD_SECONDS if settings.backend_mode == "runpod_queue" else SECONDS
    return Canary(settings.canary_seconds, metrics, key=key, seconds=seconds)


def _allowed(settings: Settings, opened: OpenEngines) -> Callable[[Choice], Embedder]:
    """The engines that embed questions, where a capsule may ask for them here."""

    def engine(choice: Choice) -> Embedder:
        check_question(choice, settings.engines(), mode=settings.embedding_mode, allowed=settings.allowed_models())
        return opened.get(choice)

    return engine


def _saying(trouble: Callable[[], str | None]) -> Callable[[], Awaitable[str | None]]:
    """A check of what is known at once."""

    async def said() -> str | None:
        return trouble()

    return said


def _providing(part: Any) -> Provide:
    return Provide(lambda: part, sync_to_thread=False)
