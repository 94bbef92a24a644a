"""Collections and their graph as one part of a server: wiring only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx
import structlog
from litestar.handlers import HTTPRouteHandler
from litestar.types import ControllerRouterHandler
from sqlalchemy.exc import SQLAlchemyError

from common.embedding.port import Embedder
from common.settings import Settings
from common.storage import Storage
from control_plane.jobs.audit import AuditEntry
from control_plane.jobs.database import Database
from control_plane.jobs.holds import Holds
from control_plane.jobs.store import now_ms
from control_plane.nexus.admin import NexusController, Operator
from control_plane.nexus.backstore import BackStore, OwnEvent
from control_plane.nexus.context import ContextController, Contexts, DuplicatesController
from control_plane.nexus.domains import Domains
from control_plane.nexus.engine import SyncEngine
from control_plane.nexus.exported import Importer
from control_plane.nexus.finding import Finder
from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.graph.nexus import NexusGraph
from control_plane.nexus.graph.port import GraphStore
from control_plane.nexus.imports import Imports
from control_plane.nexus.indexing import Indexing, Snapshots
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.outbound import Outbound
from control_plane.nexus.pace import Pace
from control_plane.nexus.records import Row
from control_plane.nexus.routes import CollectionController
from control_plane.nexus.service import MAX_WRITES, Collections
from control_plane.nexus.sight import Sight
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import STEP, CollectionStore
from control_plane.nexus.texts import Texts
from control_plane.nexus.vectorizer import Vectorizer
from control_plane.nexus.verify import Verifier
from control_plane.nexus.watch import Watch
from control_plane.nexus.webhooks import webhook_routes
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares

log = structlog.get_logger()

GRAPH_FILE = "graph.ladybug"
"""Below the root, where no Nexus server is named."""
SNAPSHOTS = "spaces"
"""A folder below the root, for indexes of spaces, where no Vectorizer server is named."""
IMPORTS = "imports"
"""A folder below the root, for the files of exports that become collections."""
SWEEP_SECONDS = 60.0
SWEEP_PAUSE = 0.1
"""Seconds between two steps of many, for who else writes."""


class Nexus:
    """Everything of collections that a server has."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        replica: str,
        embedder: Callable[[], Embedder],
        metrics: Metrics,
        note: Callable[[AuditEntry], None],
        several: bool,
        storage: Storage,
        holds: Holds,
        room: Callable[[int], None],
    ) -> None:
        """``embedder`` gives the engine of this server's texts; ``note`` gets what belongs into the audit log;
        ``several`` clients share the server. The files of exports lie in ``storage``, ``holds`` keeps them there,
        and ``room`` raises where the disk has none for so many bytes. Raises InvalidSettings for a file of domains that
        cannot be used."""
        secret = settings.nexus_webhook_secret.get_secret_value() if settings.nexus_webhook_secret else None
        figures = NexusMetrics(metrics.registry)
        self._store = CollectionStore(database, replica=replica)
        self._events = BackStore(database, figures, sends=settings.nexus_outbound_url is not None)
        self._graph = _graph(settings)
        self._vectorizer = _vectorizer(settings, figures)
        mirrored = self._vectorizer is not None
        spaces = Spaces(self._store, memory_bytes=settings.nexus_memory_bytes, mirrored=mirrored)
        snapshots = Snapshots(settings.root / SNAPSHOTS, figures)
        self._indexing = Indexing(self._store, spaces, snapshots, self._vectorizer)
        self._engine = SyncEngine(
            self._store,
            spaces,
            self._graph,
            domains=Domains.load(settings.nexus_domains_file),
            metrics=figures,
            synced=self._announce,
        )
        texts = Texts(embedder)
        self._importer = Importer(
            Imports(database, replica=replica),
            self._store,
            storage,
            settings.root / IMPORTS,
            reading=holds.reading,
            room=room,
            texts=texts,
            wake=self._engine.wake,
            metrics=figures,
        )
        self._verifier = Verifier(self._engine, every_seconds=settings.nexus_verify_seconds)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._http: httpx.AsyncClient | None = None
        self._outbound: Outbound | None = None
        if settings.nexus_outbound_url is not None and secret is not None:
            self._http = httpx.AsyncClient(trust_env=False)
            self._outbound = Outbound(self._events, settings.nexus_outbound_url, secret, figures, self._http)
        sight = Sight(database)
        pace = Pace(metrics, per_minute=settings.nexus_documents_per_minute, max_pending=settings.nexus_max_pending)
        self._watch = Watch(self._store, self._events, self._engine, pace, figures)
        self.dependencies: dict[str, Any] = {
            "collections": Collections(
                self._store,
                sight,
                spaces,
                self._events,
                texts=texts,
                wake=self._engine.wake,
                places=Shares("documents", MAX_WRITES, metrics, several=several),
                pace=pace,
                room=room,
            ),
            "contexts": Contexts(
                self._store,
                sight,
                Finder(self._store, sight, spaces),
                self._events,
                metrics=figures,
            ),
            "operator": Operator(self._store, self._engine, spaces, self._events),
        }
        hooks: list[HTTPRouteHandler] = webhook_routes(self._events, secret, figures, note=note)
        self.routes: list[ControllerRouterHandler] = [
            CollectionController,
            ContextController,
            DuplicatesController,
            NexusController,
            *hooks,
        ]

    def start(self) -> dict[str, asyncio.Task[None]]:
        """Begin what runs as long as the server."""
        loops: dict[str, Coroutine[Any, Any, None]] = {
            "nexus": self._engine.run(),
            "nexus_verify": self._verifier.run(),
            "nexus_sweep": self._sweep(),
            "nexus_imports": self._engine.while_leading(self._importer.run),
            "nexus_watch": self._watch.run(),
        }
        # A server's indexes are changed by one replica; those in memory are each replica's own.
        alone = self._vectorizer is not None
        loops["nexus_indexes"] = self._engine.while_leading(self._indexing.run) if alone else self._indexing.run()
        if self._outbound is not None:
            loops["nexus_outbound"] = self._engine.while_leading(self._outbound.run)
        self._tasks = {name: asyncio.create_task(loop) for name, loop in loops.items()}
        return self._tasks

    async def stop(self) -> None:
        """End that, and let go of the graph and of connections."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
        await self._indexing.save()
        if self._vectorizer is not None:
            self._vectorizer.close()
        await asyncio.to_thread(self._graph.close)

    async def _announce(self, rows: Sequence[Row]) -> None:
        events = [
            OwnEvent(
                "document.deleted" if row.deleted else "document.synced",
                row.client,
                row.version,
                {"document": {"collection": row.collection, "id": row.doc_id}},
            )
            for row in rows
        ]
        await self._events.announce(events, now_ms())

    async def _sweep(self) -> None:
        while True:
            swept = 0
            try:
                swept = await self._store.sweep(now_ms())
                await self._events.sweep(now_ms())
            except SQLAlchemyError as error:
                log.error("collections are not swept now", exc_info=error)
            await asyncio.sleep(SWEEP_SECONDS if swept < STEP else SWEEP_PAUSE)


def _graph(settings: Settings) -> GraphStore:
    if settings.nexus_url is None:
        return LadybugGraph(settings.root / GRAPH_FILE)
    key = settings.nexus_api_key.get_secret_value() if settings.nexus_api_key else None
    return NexusGraph(settings.nexus_url, key)


def _vectorizer(settings: Settings, metrics: NexusMetrics) -> Vectorizer | None:
    if settings.vectorizer_url is None:
        return None
    key = settings.vectorizer_api_key.get_secret_value() if settings.vectorizer_api_key else None
    return Vectorizer(settings.vectorizer_url, key, metrics)
