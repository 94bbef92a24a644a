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
    """A loop: renew, see what was lost, take over what lapsed."""

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
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what this replica drove before a restart, then begin the loop."""
        await self._adopt(own=True)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the loop and let others have the jobs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            try:
                await self._store.release()
            except SQLAlchemyError as error:
                log.warning("leases lapse by themselves", exc_info=error)

    @property
    def alive(self) -> bool:
        """Leases are renewed, as far as the database lets them."""
        return self._task is not None and not self._task.done()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                driven = self._driven()
                for job_id in driven - await self._store.renew(driven):
                    self._lost(job_id)
                await self._adopt()
            except SQLAlchemyError as error:
                log.error("leases cannot be renewed", again_in_seconds=RENEW_SECONDS, exc_info=error)

    async def _adopt(self, *, own: bool = False) -> None:
        while jobs := await self._store.adopt(own=own):
            for job in jobs:
                if job.id in self._driven():  # the clock went ahead between two renewals
                    continue
                log.info("job taken over", job_id=job.id, attempt=job.attempt, status=job.status)
                with structlog.contextvars.bound_contextvars(**job_context(job.id, job.trace)):
                    try:
                        await self._adopted(job)
                    except ExportError as error:  # Nobody drives it: its lease lapses, and it is taken over again.
                        log.warning("a job cannot be taken up yet", code=error.code, reason=error.message)
            own = False
