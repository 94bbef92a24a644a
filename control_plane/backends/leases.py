"""Keeps the jobs that this replica drives, and takes over those of replicas that died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.errors import ExportError
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore
from handler.logs import job_context

log = structlog.get_logger()

RENEW_SECONDS = 1.5
"""A lease (``store.LEASE_MS``) lasts over three times as long: jobs of a dead replica are driven again within 7 s."""


class Leases:
    """Two loops: renew and see what was lost; take over what lapsed. Storage may be slow in the second."""

    def __init__(
        self,
        store: JobStore,
        *,
        driven: Callable[[], set[str]],
        adopted: Callable[[JobRecord], Awaitable[None]],
        lost: Callable[[str], None],
    ) -> None:
        """``driven`` says which jobs this replica believes to drive, ``adopted`` is told of each that it drives from
        now on, ``lost`` of each that it does not drive any more."""
        self._store = store
        self._driven = driven
        self._lost = lost
        self._adopted = adopted
        self._tasks: list[asyncio.Task[None]] = []
        self._own = True
        """What this replica drove before a restart is still to be taken up."""

    def start(self) -> None:
        """Begin the loops. The server is up meanwhile: what it drove before may take a while to be taken up."""
        self._tasks = [asyncio.create_task(self._loop(step)) for step in (self._adopt, self._renew)]

    async def stop(self) -> None:
        """End the loops and let others have the jobs."""
        if self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            try:
                await self._store.release()
            except SQLAlchemyError as error:
                log.warning("leases lapse by themselves", exc_info=error)

    @property
    def alive(self) -> bool:
        """Leases are renewed, as far as the database lets them."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def _loop(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except SQLAlchemyError as error:
                log.error("leases cannot be kept", again_in_seconds=RENEW_SECONDS, exc_info=error)
            await asyncio.sleep(RENEW_SECONDS)

    async def _renew(self) -> None:
        if driven := self._driven():
            for job_id in driven - await self._store.renew(driven):
                self._lost(job_id)

    async def _adopt(self) -> None:
        while True:
            jobs = await self._store.adopt(own=self._own)
            self._own = False
            if not jobs:
                return
            for job in jobs:
                if job.id in self._driven():  # the clock went ahead between two renewals
                    continue
                log.info("job taken over", job_id=job.id, attempt=job.attempt, status=job.status)
                with structlog.contextvars.bound_contextvars(**job_context(job.id, job.trace)):
                    try:
                        await self._adopted(job)
                    except ExportError as error:  # Nobody drives it: its lease lapses, and it is taken over again.
                        log.warning("a job cannot be taken up yet", code=error.code, reason=error.message)
