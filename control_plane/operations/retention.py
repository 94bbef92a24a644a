"""Removes what is past its time.

A finished export loses its files after the retention and becomes ``expired``, once nobody reads them any more; its
event log stays as it is, since it ended with ``job_completed``. An export that nobody took for so long expires in the
queue; that one ends its log with ``job_expired``. A failed export loses its payload, with which it could be started
again, and stays failed. The record itself goes after the time of history.
"""

from __future__ import annotations

import asyncio
import time

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import Progress
from common.errors import ExportError
from common.settings import Settings
from common.storage import Storage
from control_plane.backends.port import Backend
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import NewEvent
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.recovery import Recovery

log = structlog.get_logger()

SHORTEST_SECONDS = 0.2
LONGEST_SECONDS = 60.0


class Retention:
    """A loop that looks ten times per retention, at most once a minute."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, layout: Layout, backend: Backend) -> None:
        self._retention_ms = settings.retention_seconds * 1000
        self._history_ms = settings.history_seconds * 1000
        often = min(settings.retention_seconds / 10, settings.stray_seconds / 2)
        self._pause = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, often))
        self._store = store
        self._storage = storage
        self._layout = layout
        self._backend = backend
        self.recovery = Recovery(settings, store, storage, layout)
        self._stray_seconds = settings.stray_seconds
        self._strays_due = 0.0

    async def run(self) -> None:
        """Sweep until canceled."""
        while True:
            try:
                await self.sweep()
            except (SQLAlchemyError, ExportError) as error:
                log.error("retention failed", again_in_seconds=self._pause, exc_info=error)
            await asyncio.sleep(self._pause)

    async def sweep(self) -> None:
        """Expire and forget once. First the state, then the files: a job that offers a file has it."""
        now = now_ms()
        message = "The files were removed after their time"
        for job in await self._store.expired(now, queued_before=now - self._retention_ms):
            event = None
            if job.status == "queued":
                text = "Nobody took this export in time; it was removed from the queue"
                event = NewEvent("job_expired", Progress(stage="expired", progress=0, stage_progress=100, message=text))
            values = {} if event else {"stage": "expired", "message": message}
            moved = await self._store.expire(job, event, values)
            if moved is not None and event is not None:
                await self._backend.cancel(job.id)
            elif moved is not None:
                await asyncio.to_thread(self._storage.delete, self._layout.job_prefix(job.id))
        for job_id in await self._store.let_go(before=now):
            await asyncio.to_thread(self._storage.delete, self._layout.payload_ref(job_id))
        if time.monotonic() >= self._strays_due:
            await self._remove_strays()
            self._strays_due = time.monotonic() + self._stray_seconds / 2
        await self._store.forget(now - self._history_ms)
        await self._store.forget_audit(now - self._history_ms)
        if ended := await self._store.end_damaged():
            log.error("records of jobs were damaged", count=ended)

    async def _remove_strays(self) -> None:
        aged = await asyncio.to_thread(self._layout.aged, self._storage, self._stray_seconds)
        await self.recovery.of(aged)
        # In this order: a job that ends meanwhile is in both.
        in_flight = await self._store.in_flight()
        completed, kept = await self._store.completed(), await self._store.kept_payloads()
        strays = self._layout.strays(aged, in_flight=in_flight, completed=completed, kept=kept)
        for ref in strays:
            try:
                await asyncio.to_thread(self._storage.delete, ref)
            except ExportError as error:  # An odd name that somebody else put there is no reason to stop.
                log.warning("a stray stays", ref=ref, code=error.code, reason=error.message)
        if strays:
            log.info("strays removed", count=len(strays), first=strays[0])
