"""Removes what is past its time.

A finished export loses its files after the retention and becomes ``expired``, once nobody reads them any more; its
event log stays as it is, since it ended with ``job_completed``. An export that nobody took for so long expires in the
queue; that one ends its log with ``job_expired``. A failed export loses its payload, with which it could be started
again, and stays failed. The record itself goes after the time of history.

Nothing is removed by a clock that jumps: where the wall clock has gained more than a minute, since the last sweep, on
one that counts every second and is never set, sweeps remove nothing until it is back, or has stood for an hour. So a
clock that is put right removes an hour late; one that goes back removes as much later. What is not noticed: a clock
that was wrong when the server started, less than a minute between two sweeps, and the time of an export that ended
while the clock was wrong, which counts from then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from common.contract import Progress
from common.errors import ExportError
from common.settings import Settings
from common.storage import Storage
from control_plane.backends.port import Backend
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import NewEvent
from control_plane.jobs.store import SWEPT, JobStore
from control_plane.operations.recovery import Recovery

log = structlog.get_logger()

SHORTEST_SECONDS = 0.2
LONGEST_SECONDS = 60.0
JUMP_SECONDS = 60.0
"""What the wall clock may gain between two sweeps."""
BELIEVED_SECONDS = 3_600.0
"""A new time counts once it has stood for so long."""


def _steady() -> float:
    """Seconds since the machine's start, with those it slept; never set, unlike the wall clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class WallClock:
    """Says whether the wall clock can be believed when something is removed for good."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = _steady) -> None:
        """Both in seconds. The wall clock as it is now is believed."""
        self._wall = wall
        self._steady = steady
        self._offset = wall() - steady()
        self._claim: tuple[float, float] | None = None
        """An offset that is not believed, and since when it stands."""

    def now(self) -> float | None:
        """Seconds since 1970; None where it jumped ahead since this was asked last, which the log says once."""
        wall, steady = self._wall(), self._steady()
        offset = wall - steady
        if offset - self._offset > JUMP_SECONDS:
            if self._claim is None or abs(offset - self._claim[0]) > JUMP_SECONDS:
                self._claim = offset, steady
                ahead = round(offset - self._offset)
                log.warning(
                    "the clock jumped; nothing is removed", seconds=ahead, believed_after_seconds=BELIEVED_SECONDS
                )
            if steady - self._claim[1] < BELIEVED_SECONDS:
                return None
        self._offset, self._claim = offset, None
        return wall


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
        self._clock = WallClock()

    async def run(self) -> None:
        """Sweep until canceled."""
        while True:
            try:
                await self.sweep()
            except Exception as error:  # one odd row or object, and nothing would ever be removed again
                log.error("retention failed", again_in_seconds=self._pause, exc_info=error)
            await asyncio.sleep(self._pause)

    async def sweep(self) -> None:
        """Expire and forget once. First the state, then the files: a job that offers a file has it."""
        if (seconds := self._clock.now()) is None:
            return
        now = int(seconds * 1000)
        while await self._expire(now) == SWEPT:
            pass
        while gone := await self._store.let_go(before=now):
            for job_id in gone:
                await self._remove(self._layout.payload_ref(job_id))
        while await self._store.forget(now - self._history_ms) == SWEPT:
            pass
        await self._store.forget_audit(now - self._history_ms)
        if ended := await self._store.end_damaged():
            log.error("records of jobs were damaged", count=ended)
        if time.monotonic() >= self._strays_due:  # last: a storage that cannot be listed keeps nothing else
            await self._remove_strays()
            self._strays_due = time.monotonic() + self._stray_seconds / 2

    async def _expire(self, now: int) -> int:
        """Expire what one look finds; answers how many. One that cannot be expired is left to the next sweep."""
        count = 0
        for job in await self._store.expired(now, queued_before=now - self._retention_ms):
            event = None
            if job.status == "queued":
                text = "Nobody took this export in time; it was removed from the queue"
                event = NewEvent("job_expired", Progress(stage="expired", progress=0, stage_progress=100, message=text))
            values = {} if event else {"stage": "expired", "message": "The files were removed after their time"}
            moved = await self._store.expire(job, event, values)
            count += moved is not None
            if moved is not None and event is not None:
                await self._backend.cancel(job.id)
            elif moved is not None:
                await self._remove(self._layout.job_prefix(job.id))
        return count

    async def _remove(self, ref: str) -> None:
        """What cannot be removed now is a stray, and removed as one."""
        try:
            await asyncio.to_thread(self._storage.delete, ref)
        except ExportError as error:
            log.warning("a stray stays", ref=ref, code=error.code, reason=error.message)

    async def _remove_strays(self) -> None:
        aged = await asyncio.to_thread(self._layout.aged, self._storage, self._stray_seconds)
        spared = await self.recovery.of(aged)
        if self._clock.now() is None:  # by which files were aged
            return
        # In this order: a job that ends meanwhile is in both.
        in_flight = await self._store.in_flight()
        completed, kept = {**spared, **await self._store.completed()}, await self._store.kept_payloads()
        strays = self._layout.strays(aged, in_flight=in_flight, completed=completed, kept=kept)
        for ref in strays:
            await self._remove(ref)
        if strays:
            log.info("strays removed", count=len(strays), first=strays[0])
