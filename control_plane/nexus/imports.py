"""Which finished exports are still to become a collection, and how far each is: columns of their jobs.

All but ``due`` and ``newer`` count only for the replica that has the lease of the graph.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import or_, select, tuple_, update

from common.contract import JobError
from common.errors import Tries
from control_plane.jobs.database import Database, db_now
from control_plane.jobs.records import TERMINAL, JobRecord
from control_plane.jobs.tables import jobs
from control_plane.nexus.store import LeaseLost
from control_plane.nexus.tables import sync_state

TRIES = Tries(12, 1.0, 300.0)
"""With the waits between, a storage or an engine may be away for a quarter of an hour."""


class Imports:
    """The rows of jobs, as far as they speak of collections."""

    def __init__(self, database: Database, *, replica: str) -> None:
        self._database = database
        self._replica = replica

    async def due(self) -> JobRecord | None:
        """The job that was made first of those that have ended and whose collection is due."""
        at = jobs.c.import_at
        query = select(jobs).where(
            at.is_not(None),  # in the words of the index
            or_(at <= db_now(), at > db_now() + int(TRIES.longest_wait * 1_000)),  # or the clock went back since
            jobs.c.status.in_(sorted(TERMINAL)),
        )
        async with self._database.read.connect() as connection:
            found = await connection.execute(query.order_by(jobs.c.created_at, jobs.c.id).limit(1))
            row = found.one_or_none()
        return None if row is None else JobRecord.of(row)

    async def newer(self, job: JobRecord) -> str | None:
        """The id of a job that was made later and that is in the same collection already."""
        query = select(jobs.c.id).where(
            jobs.c.client == job.client,
            jobs.c.collection == job.collection,
            jobs.c.import_state == "done",
            tuple_(jobs.c.created_at, jobs.c.id) > (job.created_at, job.id),
        )
        async with self._database.read.connect() as connection:
            return (await connection.scalars(query.limit(1))).one_or_none()

    async def begin(self, job: JobRecord) -> int:
        """One more attempt begins; answers which."""
        attempt = (job.import_attempts or 0) + 1
        await self._put(job, import_state="importing", import_attempts=attempt, import_documents=0)
        return attempt

    async def brought(self, job: JobRecord, documents: int) -> None:
        """So many documents are in the collection."""
        await self._put(job, import_documents=documents)

    async def done(self, job: JobRecord) -> None:
        """The collection holds what the export does."""
        await self._put(job, import_state="done", import_at=None, import_error=None)

    async def failed(self, job: JobRecord, error: JobError) -> None:
        """It is given up."""
        await self._put(job, import_state="failed", import_at=None, import_error=_json(error))

    async def again(self, job: JobRecord, error: JobError, seconds: float) -> None:
        """It is tried again after so many seconds."""
        at = db_now() + int(seconds * 1_000)
        await self._put(job, import_state="pending", import_at=at, import_error=_json(error))

    async def _put(self, job: JobRecord, **values: Any) -> None:
        """Raises LeaseLost."""
        leads = select(sync_state.c.owner).scalar_subquery() == self._replica
        put = update(jobs).where(jobs.c.id == job.id, jobs.c.import_at.is_not(None), leads).values(**values)
        async with self._database.write.begin() as connection:
            if not (await connection.execute(put)).rowcount:
                raise LeaseLost("Another replica brings exports into collections, or none does.")


def _json(error: JobError) -> str:
    return msgspec.json.encode(error).decode()
