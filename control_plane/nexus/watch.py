"""How far the graph is behind, looked at all the time: for the figures, and for who writes faster than it follows."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.engine import SyncEngine
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.overview import LookReport
from control_plane.nexus.pace import Pace
from control_plane.nexus.store import CollectionStore

log = structlog.get_logger()

SHORTEST_PAUSE, LONGEST_PAUSE = 2.0, 4.0
"""Seconds between two looks. A look reads the rows that are pending, a million of them in a second: with many it is a
tenth of the time, as long as what it found is no older than 5 s."""
SHARE = 10


class Watch:
    """Every replica watches: of the rows each tells the same."""

    def __init__(
        self, store: CollectionStore, events: BackStore, engine: SyncEngine, pace: Pace, metrics: NexusMetrics
    ) -> None:
        self._store = store
        self._events = events
        self._engine = engine
        self._pace = pace
        self._metrics = metrics

    async def run(self) -> None:
        """Look until canceled."""
        while True:
            began = time.monotonic()
            try:
                await self.look()
            except SQLAlchemyError as error:
                self._metrics.unknown()
                log.error("nobody knows how far the graph is behind", exc_info=error)
            took = time.monotonic() - began
            await asyncio.sleep(min(max(SHORTEST_PAUSE, (SHARE - 1) * took), LONGEST_PAUSE))

    async def look(self) -> None:
        """Look once."""
        behind, state = await self._store.backlogs(), await self._store.state()
        events = await self._events.outbound_counts()
        self._pace.looked({client: one.written for client, one in behind.items()})
        since = [one.pending_since for one in behind.values() if one.pending_since is not None]
        last = None if state.report is None else msgspec.json.decode(state.report, type=LookReport)
        status, metrics = self._engine.status, self._metrics
        metrics.queue_depth.set(sum(one.pending for one in behind.values()))
        metrics.oldest.set(max(0, now_ms() - min(since)) / 1_000 if since else 0)
        metrics.given_up.set(sum(one.failed for one in behind.values()))
        metrics.trouble.set(status.leads and status.trouble is not None)
        metrics.differences.set(sum(last.different.values()) if last else 0)
        metrics.events.labels("waiting").set(events.waiting)
        metrics.events.labels("dead").set(events.dead)
