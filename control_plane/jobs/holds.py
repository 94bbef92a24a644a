"""Keeps the files of exports where they are while somebody reads them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import Manifest
from control_plane.errors import ArtifactMissing, ArtifactNotReady, JobExpired
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore, now_ms
from handler.job import ref_of

log = structlog.get_logger()

HOLD_SECONDS = 10.0
"""What a replica reads that was killed is held so long; one that lives says so again in time. While the store is away
nobody removes anything."""
RENEW_SECONDS = 3.0
LONGEST_SECONDS = 3_600.0
"""No reading takes longer. One that begins earlier than that before the end of the files' time needs no hold."""


class Holds:
    """Counts who reads which export here, and tells the store of those whose time ends soon."""

    def __init__(
        self, store: JobStore, *, hold_seconds: float = HOLD_SECONDS, renew_seconds: float = RENEW_SECONDS
    ) -> None:
        self._store = store
        self._hold_seconds = hold_seconds
        self._renew_seconds = renew_seconds
        self._lock = threading.Lock()
        self._readers: dict[str, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def reading(self, jobs: Collection[JobRecord]) -> AsyncIterator[None]:
        """Read the files of completed jobs: they stay for as long as the context lasts. Raises JobExpired where they
        are gone already."""
        ending = {job.id for job in jobs if _ends_soon(job)}
        if not ending:
            yield
            return
        self._count(ending, 1)
        try:
            if ending - await self._store.hold(ending, self._hold_seconds):
                raise JobExpired("The files of this export were removed after their time.")
            yield
        finally:
            self._count(ending, -1)

    @contextmanager
    def fetching(self, job: JobRecord) -> Iterator[None]:
        """The same in another thread, which does not wait for the store: what is being removed just then is missing."""
        ending = {job.id} if _ends_soon(job) else set()
        self._count(ending, 1)
        if ending and self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)
        try:
            yield
        finally:
            self._count(ending, -1)

    async def run(self) -> None:
        """Renew until canceled; a store that is away is asked again."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(self._renew_seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            with self._lock:
                ending = set(self._readers)
            if not ending:
                continue
            try:
                await self._store.hold(ending, self._hold_seconds)
            except SQLAlchemyError as error:
                log.warning("files that are read are not held", again_in_seconds=self._renew_seconds, error=str(error))

    def _count(self, job_ids: Collection[str], change: int) -> None:
        with self._lock:
            for job_id in job_ids:
                count = self._readers.pop(job_id, 0) + change
                if count > 0:
                    self._readers[job_id] = count


def manifest_of(job: JobRecord) -> Manifest:
    """What the files of a job are that are there. Raises JobExpired, ArtifactNotReady, ArtifactMissing."""
    past = job.status == "completed" and job.expires_at is not None and job.expires_at <= now_ms()
    if job.status == "expired" or past:
        raise JobExpired("The files of this export were removed after their time.")
    if job.status == "completed" and (job.damage is not None or job.manifest is None or job.output is None):
        what = job.damage or "its record is damaged"
        raise ArtifactMissing(f"The files of this export cannot be given out: {what}.", damage=what)
    if job.status != "completed" or job.manifest is None:
        state = {"failed": "The export failed", "canceled": "The export was canceled"}.get(job.status)
        raise ArtifactNotReady(f"{state or 'The export is not finished yet'}; there is nothing to download.")
    return job.manifest


def ref_beside(job: JobRecord, name: str) -> str:
    """The ref of a file of a job that has files."""
    assert job.output is not None
    return ref_of(job.output.artifact_ref.rsplit("/", 1)[0] + "/", name)


def _ends_soon(job: JobRecord) -> bool:
    return job.expires_at is not None and job.expires_at - now_ms() < LONGEST_SECONDS * 1000
