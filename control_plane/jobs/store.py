"""Jobs and their events in a database. State changes are made by ``transitions`` alone."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, func, insert, select, text, tuple_
from sqlalchemy.exc import IntegrityError

from common.contract import Event, Progress, Status
from common.errors import InvalidRequest
from control_plane.errors import QueueUnavailable
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import TERMINAL, JobRecord, NewEvent, NewJob, event_of
from control_plane.jobs.tables import events, idempotency_keys, jobs
from control_plane.jobs.transitions import advance, move, open_log


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class JobStore:
    """All that is known about jobs; a promise is given only after the commit that holds it."""

    def __init__(self, database: Database, hub: EventHub, *, queue_capacity: int) -> None:
        self._database = database
        self._hub = hub
        self._capacity = queue_capacity

    async def create(self, job: NewJob, idempotency_key: str | None = None) -> tuple[JobRecord, bool]:
        """Queue a job; with a key that was used before for the same body, answer that job and False.

        Raises QueueUnavailable when the queue is full, InvalidRequest when the key came with another body.
        """
        try:
            record, event = await self._insert(job, idempotency_key)
        except IntegrityError:
            if idempotency_key is None or (first := await self.find_key(idempotency_key, job.payload_sha256)) is None:
                raise
            return first, False
        self._hub.publish(record.id, [event])
        return record, True

    async def _insert(self, job: NewJob, key: str | None) -> tuple[JobRecord, Event]:
        now = now_ms()
        progress = Progress(stage="queued", progress=0, stage_progress=0, message=job.message, meta=job.meta)
        values: dict[str, Any] = {
            "id": job.id,
            "backend": job.backend,
            "status": "queued",
            "stage": "queued",
            "progress": 0,
            "stage_progress": 0,
            "message": job.message,
            "last_seq": 1,
            "attempt": 0,
            "lost": 0,
            "weight": job.weight,
            "session_id": job.session_id,
            "project_name": job.project_name,
            "payload_ref": job.payload_ref,
            "payload_sha256": job.payload_sha256,
            "payload_size": job.payload_size,
            "created_at": now,
            "updated_at": now,
        }
        async with self._database.write.begin() as connection:
            row = (await connection.execute(insert(jobs).values(**values).returning(*jobs.c))).one()
            if key is not None:
                await connection.execute(
                    insert(idempotency_keys).values(key=key, job_id=job.id, body_sha256=job.payload_sha256)
                )
            queued = await connection.scalar(select(func.count()).where(jobs.c.status == "queued"))
            if queued is not None and queued > self._capacity:
                raise self._full()
            record = JobRecord.of(row)
            return record, await open_log(connection, record, NewEvent("stage_progress", progress))

    async def check_capacity(self) -> None:
        """Raise QueueUnavailable when the queue is full now."""
        async with self._database.read.connect() as connection:
            queued = await connection.scalar(select(func.count()).where(jobs.c.status == "queued"))
        if queued is not None and queued >= self._capacity:
            raise self._full()

    def _full(self) -> QueueUnavailable:
        return QueueUnavailable(f"The queue is full ({self._capacity:,} jobs are waiting). Try again later.")

    async def find_key(self, key: str, body_sha256: str) -> JobRecord | None:
        """The job that a key stands for. Raises InvalidRequest when it came with another body."""
        async with self._database.read.connect() as connection:
            used = (
                await connection.execute(select(idempotency_keys).where(idempotency_keys.c.key == key))
            ).one_or_none()
        if used is None:
            return None
        if used.body_sha256 != body_sha256:
            raise InvalidRequest(
                "This Idempotency-Key was used before with another body; use a new key for a new export.",
                field="Idempotency-Key",
            )
        return await self.get(used.job_id)

    async def get(self, job_id: str) -> JobRecord | None:
        """One job, None if there is none of that id."""
        async with self._database.read.connect() as connection:
            row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).one_or_none()
        return None if row is None else JobRecord.of(row)

    async def page(self, *, status: Status | None, before: tuple[int, str] | None, limit: int) -> list[JobRecord]:
        """Jobs, newest first, older than the one of (creation time, id)."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < before)
        async with self._database.read.connect() as connection:
            return [JobRecord.of(row) for row in await connection.execute(query)]

    async def events(self, job_id: str, since: int, limit: int) -> list[Event]:
        """Events with a number above ``since``, in order."""
        query = (
            select(events).where(events.c.job_id == job_id, events.c.seq > since).order_by(events.c.seq).limit(limit)
        )
        async with self._database.read.connect() as connection:
            return [event_of(row) for row in await connection.execute(query)]

    async def claim(self, *, max_weight: int | None) -> JobRecord | None:
        """Take the oldest queued job (of at most ``max_weight``) for a new attempt; None if there is none."""
        query = select(jobs.c.id, jobs.c.attempt, jobs.c.progress).where(jobs.c.status == "queued")
        if max_weight is not None:
            query = query.where(jobs.c.weight <= max_weight)
        query = query.order_by(jobs.c.created_at, jobs.c.id).limit(1)
        while True:
            async with self._database.write.begin() as connection:
                found = (await connection.execute(query)).one_or_none()
                if found is None:
                    return None
                attempt, now = found.attempt + 1, now_ms()
                message = "Export started" if attempt == 1 else f"Export started again (attempt {attempt})"
                progress = Progress(
                    stage="transform", progress=0, stage_progress=0, message=message, meta={"attempt": attempt}
                )
                moved = await move(
                    connection,
                    found.id,
                    "running",
                    now=now,
                    event=NewEvent("job_started", progress),
                    attempt=found.attempt,
                    values={"attempt": attempt, "started_at": now},
                )
            if moved is not None:
                return self._publish(moved)

    async def advance(self, job_id: str, attempt: int, new: list[NewEvent]) -> bool:
        """Append events of a running attempt in order; False if that attempt is over."""
        async with self._database.write.begin() as connection:
            told = await advance(connection, job_id, attempt, new, now=now_ms())
        if told is None:
            return False
        self._hub.publish(job_id, told)
        return True

    async def move(
        self,
        job_id: str,
        to: Status,
        event: NewEvent | None,
        *,
        attempt: int | None = None,
        sources: frozenset[Status] | None = None,
        values: dict[str, Any] | None = None,
    ) -> JobRecord | None:
        """Change a job's state (see ``transitions.move``); None if the change is not allowed (any more)."""
        async with self._database.write.begin() as connection:
            moved = await move(
                connection, job_id, to, now=now_ms(), event=event, attempt=attempt, sources=sources, values=values
            )
        return None if moved is None else self._publish(moved)

    def _publish(self, moved: tuple[JobRecord, Event | None]) -> JobRecord:
        record, event = moved
        if event is not None:
            self._hub.publish(record.id, [event])
        return record

    async def in_state(self, status: Status) -> list[JobRecord]:
        """All jobs in a state, oldest first."""
        query = select(jobs).where(jobs.c.status == status).order_by(jobs.c.created_at, jobs.c.id)
        async with self._database.read.connect() as connection:
            return [JobRecord.of(row) for row in await connection.execute(query)]

    async def ids_in_state(self, *states: Status) -> dict[str, int]:
        """Ids of all jobs in any of the states, with the number of the attempt."""
        query = select(jobs.c.id, jobs.c.attempt).where(jobs.c.status.in_(states))
        async with self._database.read.connect() as connection:
            return {row.id: row.attempt for row in await connection.execute(query)}

    async def counts(self) -> dict[Status, int]:
        """How many jobs are in each state that has any."""
        query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        async with self._database.read.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    async def expired(self, now: int, *, queued_before: int, limit: int = 100) -> list[JobRecord]:
        """Finished jobs past their time, and queued ones that nobody took since ``queued_before``."""
        past = (jobs.c.status == "completed") & (jobs.c.expires_at <= now)
        forgotten = (jobs.c.status == "queued") & (jobs.c.created_at <= queued_before)
        async with self._database.read.connect() as connection:
            return [
                JobRecord.of(row) for row in await connection.execute(select(jobs).where(past | forgotten).limit(limit))
            ]

    async def forget(self, finished_before: int, *, limit: int = 100) -> int:
        """Delete the records of jobs that ended long ago; completed ones only once they have expired."""
        over = sorted(TERMINAL - {"completed"})
        old = select(jobs.c.id).where(jobs.c.status.in_(over), jobs.c.finished_at <= finished_before).limit(limit)
        async with self._database.write.begin() as connection:
            ids = list(await connection.scalars(old))
            if ids:
                for table, column in ((events, events.c.job_id), (idempotency_keys, idempotency_keys.c.job_id)):
                    await connection.execute(delete(table).where(column.in_(ids)))
                await connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
        return len(ids)

    async def check_writable(self) -> None:
        """Take the write lock once; raises when the database cannot be written."""
        async with self._database.write.begin() as connection:
            await connection.execute(delete(idempotency_keys).where(text("1 = 0")))
