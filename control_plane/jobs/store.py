"""Jobs and their events in a database. State changes are made by ``transitions`` alone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    ScalarSelect,
    Select,
    Update,
    case,
    column,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    tuple_,
    update,
    values,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.dml import ReturningUpdate

from common.contract import Event, Progress, Status
from common.errors import ExportError, InvalidRequest
from control_plane.errors import QueueFull
from control_plane.jobs.audit import AuditEntry, AuditQuery, audit_query, write_audit
from control_plane.jobs.database import Database, db_now, lock_creation
from control_plane.jobs.hub import EventHub
from control_plane.jobs.notify import announce_wake
from control_plane.jobs.quotas import check_quota, quota_used
from control_plane.jobs.records import NO_QUOTA, STATUSES, TERMINAL, JobRecord, NewEvent, NewJob, Quota, event_of
from control_plane.jobs.tables import audit, events, idempotency_keys, jobs
from control_plane.jobs.transitions import advance, end_damaged, move, open_log

LEASE_MS = 5_000
"""A replica that does not renew for so long has lost its jobs to another one."""
LONGEST_PAUSE_MS = 120_000
"""No pause before an attempt is longer; one that seems to be was begun before the clock went back."""
AUDIT_BATCH, AUDIT_BATCHES = 1_000, 20
"""Entries of the audit log that are deleted in one transaction, and how many of these there are in a sweep."""
MAX_SEQ = 2**31 - 1
"""That the column holds; clients ask for events after any number."""
ADOPTED = 200
"""Jobs taken over at a time."""
_QUEUED: frozenset[Status] = frozenset({"queued"})
_IN_FLIGHT: list[Status] = ["queued", "running"]
PACE_RUNS = 50
"""So many of the last runs say how long one takes."""
SWEPT = 100
"""Jobs that one look of a sweep takes, so that nobody waits long for the database."""
_TO_IMPORT = {"import_state": "pending", "import_at": 0, "import_attempts": 0, "import_documents": 0}
_DEAD_LETTER = (jobs.c.status == "failed") & jobs.c.expires_at.is_not(None)
"""Given up, and its payload is kept."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def started(attempt: int) -> NewEvent:
    """The event that a worker has begun."""
    message = "Export started" if attempt == 1 else f"Export started again (attempt {attempt})"
    progress = Progress(stage="transform", progress=0, stage_progress=0, message=message, meta={"attempt": attempt})
    return NewEvent("job_started", progress)


def _let_go(which: ColumnElement[bool]) -> Update:
    return update(jobs).where(which, _DEAD_LETTER).values(expires_at=None, updated_at=now_ms())


def _events(job_id: str, since: int, limit: int) -> Select[Any]:
    mine = select(events).where(events.c.job_id == job_id, events.c.seq > min(since, MAX_SEQ))
    return mine.order_by(events.c.seq).limit(limit)


def _columns(job: NewJob, now: int) -> dict[str, Any]:
    """Of a job that has just come."""
    return {
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
        "profile": job.profile,
        "base_name": job.base_name,
        "available_at": 0,
        "retries": 0,
        "timeouts": 0,
        "told": 0,
        "secret": secrets.token_urlsafe(32),
        "client": job.client,
        "trace": job.trace,
        "retry_of": job.retry_of,
        "read_until": 0,
        **({} if job.collection is None else {"collection": job.collection, **_TO_IMPORT}),
    }


class Activity(NamedTuple):
    """What happened in a span of time that begins at ``start``."""

    start: int
    submitted: int
    completed: int
    """Also those that have expired since."""
    canceled: int
    frames: int
    """Of those completed."""


class StageSpan(NamedTuple):
    """A stage of an attempt, and when its first event was written (milliseconds)."""

    stage: str
    start: int


class Waiting(NamedTuple):
    """What the figures show of the jobs of all replicas."""

    counts: dict[Status, int]
    oldest_seconds: float
    """That the oldest waiting job has waited; 0 where none does."""
    dead_letters: int
    """Failed jobs whose payload is still kept."""


def _unseen(_job: JobRecord, _event: Event) -> None:
    """Nobody watches."""


class JobStore:
    """All that is known about jobs; a promise is given only after the commit that holds it."""

    def __init__(self, database: Database, hub: EventHub, *, queue_capacity: int, replica: str = "replica") -> None:
        """``replica`` names the server among those that share the database."""
        self.replica = replica
        self._database = database
        self._hub = hub
        self.capacity = queue_capacity
        """Jobs that may wait at once."""
        self.watch: Callable[[JobRecord, Event], None] = _unseen
        """Is told of each change of state that this replica made and that has an event."""

    @property
    def changes(self) -> int:
        """Grows with every job that ends, as far as this replica hears of it."""
        return self._hub.changes

    async def create(
        self,
        job: NewJob,
        idempotency_key: str | None = None,
        *,
        quota: Quota = NO_QUOTA,
        entry: AuditEntry | None = None,
    ) -> tuple[JobRecord, bool]:
        """Queue a job; with a key that was used before for the same body, answer that job and False. One that does a
        failed job again takes over its payload: of several at once the first one does.

        The job counts against ``quota`` of its client, and ``entry`` is written with it.

        Raises QueueFull, QuotaReached, InvalidRequest when the key came with another body.
        """
        try:
            record, event = await self._insert(job, idempotency_key, quota, entry)
        except IntegrityError:
            if job.retry_of is not None and (first := await self.retry_of(job.retry_of)) is not None:
                return first, False
            if (
                idempotency_key is None
                or (first := await self.find_key(job.client, idempotency_key, job.payload_sha256)) is None
            ):
                raise
            return first, False
        self._hub.publish(record.id, [event])
        if entry is not None:
            entry.tell()
        return record, True

    async def _insert(
        self, job: NewJob, key: str | None, quota: Quota, entry: AuditEntry | None
    ) -> tuple[JobRecord, Event]:
        now = now_ms()
        progress = Progress(stage="queued", progress=0, stage_progress=0, message=job.message, meta=job.meta)
        values = _columns(job, now)
        async with self._database.write.begin() as connection:
            await lock_creation(connection)
            row = (await connection.execute(insert(jobs).values(**values).returning(*jobs.c))).one()
            if key is not None:
                await connection.execute(
                    insert(idempotency_keys).values(
                        client=job.client, key=key, job_id=job.id, body_sha256=job.payload_sha256
                    )
                )
            queued = await connection.scalar(select(func.count()).where(jobs.c.status == "queued"))
            if queued is not None and queued > self.capacity:
                raise self._full()
            # Nobody else makes a job until this one is committed, so what is counted here holds.
            await check_quota(connection, job.client, quota, now=now, made=1)
            if entry is not None:
                await write_audit(connection, [(now, entry)])
            if job.retry_of is not None:
                await connection.execute(_let_go(jobs.c.id == job.retry_of))
            record = JobRecord.of(row)
            announce_wake(connection)
            return record, await open_log(connection, record, NewEvent("stage_progress", progress))

    def _full(self) -> QueueFull:
        return QueueFull(f"The queue is full ({self.capacity:,} jobs are waiting). Try again later.")

    async def check_quota(self, client: str, quota: Quota) -> None:
        """Raise QuotaReached where a client may make no job now; another one may take the last place until it does."""
        if quota != NO_QUOTA:
            async with self._database.read.connect() as connection:
                await check_quota(connection, client, quota, now=now_ms(), made=0)

    async def quota_used(self, client: str, quota: Quota) -> Quota:
        """How many jobs count against each quota that there is."""
        if quota == NO_QUOTA:
            return NO_QUOTA
        async with self._database.read.connect() as connection:
            return await quota_used(connection, client, quota, now_ms())

    async def find_key(self, client: str, key: str, body_sha256: str) -> JobRecord | None:
        """The job that a client's key stands for. Raises InvalidRequest when it came with another body."""
        async with self._database.read.connect() as connection:
            query = select(idempotency_keys).where(idempotency_keys.c.client == client, idempotency_keys.c.key == key)
            used = (await connection.execute(query)).one_or_none()
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

    async def retry_of(self, job_id: str) -> JobRecord | None:
        """The job that does this one again, None if there is none."""
        async with self._database.read.connect() as connection:
            row = (await connection.execute(select(jobs).where(jobs.c.retry_of == job_id))).one_or_none()
        return None if row is None else JobRecord.of(row)

    async def retried_by(self, job_ids: Collection[str]) -> dict[str, str]:
        """Of those jobs that were done again, the ids of the jobs that did."""
        if not job_ids:
            return {}
        query = select(jobs.c.retry_of, jobs.c.id).where(jobs.c.retry_of.in_(job_ids))
        async with self._database.read.connect() as connection:
            return {row.retry_of: row.id for row in await connection.execute(query)}

    async def page(
        self, *, status: Status | None, before: tuple[int, str] | None, limit: int, client: str | None = None
    ) -> list[JobRecord]:
        """Jobs (of one client), newest first, older than the one of (creation time, id)."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if client is not None:
            query = query.where(jobs.c.client == client)
        if before is not None:
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < before)
        async with self._database.read.connect() as connection:
            return [JobRecord.of(row) for row in await connection.execute(query)]

    async def events(self, job_id: str, since: int, limit: int) -> list[Event]:
        """Events with a number above ``since``, in order."""
        async with self._database.read.connect() as connection:
            return [event_of(row) for row in await connection.execute(_events(job_id, since, limit))]

    async def log(self, job_id: str, since: int, limit: int) -> tuple[list[Event], JobRecord | None]:
        """The same, and the job as it was right after them: it never says that it is completed before the event that
        tells so is among them, if there was room."""
        async with self._database.read.connect() as connection:
            found = [event_of(row) for row in await connection.execute(_events(job_id, since, limit))]
            row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).one_or_none()
        return found, None if row is None else JobRecord.of(row)

    async def stages(self, job_id: str, *, before: int) -> list[StageSpan]:
        """The wait for the last attempt that has events below the number ``before``, and its stages as they came."""
        mine = (events.c.job_id == job_id) & (events.c.seq < before)
        waited = select(func.max(events.c.seq)).where(mine, events.c.stage == "queued").scalar_subquery()
        query = (
            select(events.c.stage, func.min(events.c.ts))
            .where(mine, events.c.seq >= waited)
            .group_by(events.c.stage)
            .order_by(func.min(events.c.seq))
        )
        async with self._database.read.connect() as connection:
            return [StageSpan(stage, start) for stage, start in await connection.execute(query)]

    async def claim(self, *, max_weight: int | None) -> JobRecord | None:
        """Take the oldest queued job (of at most ``max_weight``) and run it here; None if there is none."""
        return await self._take(max_weight, start=True)

    async def hand_over(self) -> JobRecord | None:
        """Take the oldest queued job to hand it to a platform; it stays queued until that starts it."""
        return await self._take(None, start=False)

    async def _take(self, max_weight: int | None, *, start: bool) -> JobRecord | None:
        query = select(jobs.c.id, jobs.c.attempt).where(
            jobs.c.status == "queued",
            jobs.c.owner.is_(None),
            (jobs.c.available_at <= db_now()) | (jobs.c.available_at > db_now() + LONGEST_PAUSE_MS),
        )
        if max_weight is not None:
            query = query.where(jobs.c.weight <= max_weight)
        query = query.order_by(jobs.c.created_at, jobs.c.id).limit(1).with_for_update(skip_locked=True)
        while True:
            async with self._database.write.begin() as connection:
                found = (await connection.execute(query)).one_or_none()
                if found is None:
                    return None
                attempt, now = found.attempt + 1, now_ms()
                mine = {
                    "attempt": attempt,
                    "owner": self.replica,
                    "lease_until": db_now() + LEASE_MS,
                    "told": 0,
                    "runpod_id": None,
                    "submitted_at": None,
                }
                event = started(attempt) if start else None
                moved = await move(
                    connection,
                    found.id,
                    "running" if start else "queued",
                    now=now,
                    event=event,
                    attempt=found.attempt,
                    sources=frozenset({"queued"}),
                    values={**mine, "started_at": now} if start else mine,
                )
            if moved is not None:
                return self._publish(moved)

    async def hint(self, job_id: str) -> None:
        """Let the replica that drives a job look at it."""
        async with self._database.write.begin() as connection:
            announce_wake(connection, job_id)

    async def submitted(self, job_id: str, attempt: int, runpod_id: str) -> JobRecord | None:
        """Note what the platform calls an attempt; None if that attempt is over."""
        values = {"runpod_id": runpod_id, "submitted_at": now_ms()}
        return await self.move(job_id, "queued", None, attempt=attempt, sources=_QUEUED, values=values)

    async def start(self, job_id: str, attempt: int, *, at: int) -> JobRecord | None:
        """A platform has started an attempt ``at`` that time; None if it had before, or the attempt is over."""
        values = {"started_at": min(at, now_ms())}
        return await self.move(job_id, "running", started(attempt), attempt=attempt, sources=_QUEUED, values=values)

    # --- leases -------------------------------------------------------------------------------------

    async def renew(self, driven: set[str]) -> set[str]:
        """Renew the leases of jobs that this replica drives; answers those of which it has them. What it owns and does
        not drive lapses, and is taken over like that of any other."""
        query = (
            update(jobs)
            .where(jobs.c.owner == self.replica, jobs.c.status.in_(_IN_FLIGHT), jobs.c.id.in_(driven))
            .values(lease_until=db_now() + LEASE_MS)
            .returning(jobs.c.id)
        )
        async with self._database.write.begin() as connection:
            return set(await connection.scalars(query))

    async def adopt(self, *, own: bool = False) -> list[JobRecord]:
        """Take over the jobs whose replica lets its lease lapse; with ``own`` also those of this one, which it drove
        before a restart."""
        free = (jobs.c.lease_until < db_now()) | ((jobs.c.status == "running") & jobs.c.owner.is_(None))
        if own:
            free |= jobs.c.owner == self.replica
        found = (
            select(jobs.c.id)
            .where(jobs.c.status.in_(_IN_FLIGHT), free)
            .order_by(jobs.c.created_at, jobs.c.id)
            .limit(ADOPTED)
            .with_for_update(skip_locked=True)
        )
        async with self._database.write.begin() as connection:
            ids = list(await connection.scalars(found))
            if not ids:
                return []
            query = (
                update(jobs)
                .where(jobs.c.id.in_(ids), jobs.c.status.in_(_IN_FLIGHT))
                .values(owner=self.replica, lease_until=db_now() + LEASE_MS)
                .returning(*jobs.c)
            )
            return [JobRecord.of(row) for row in await connection.execute(query)]

    async def release(self) -> None:
        """Let other replicas have all jobs that this one drives."""
        query = update(jobs).where(jobs.c.owner == self.replica, jobs.c.status.in_(_IN_FLIGHT)).values(lease_until=0)
        async with self._database.write.begin() as connection:
            await connection.execute(query)

    async def advance(
        self, job_id: str, attempt: int, new: list[NewEvent], *, told: tuple[int, int] | None = None
    ) -> bool:
        """Append events of a running attempt in order (see ``transitions.advance``); False if that attempt is over, or
        its log has these steps."""
        async with self._database.write.begin() as connection:
            events = await advance(connection, job_id, attempt, new, now=now_ms(), told=told)
        if events is None:
            return False
        self._hub.publish(job_id, events)
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
        entry: AuditEntry | None = None,
    ) -> JobRecord | None:
        """Change a job's state (see ``transitions.move``) and write ``entry`` with it; None if the change is not
        allowed (any more)."""
        now = now_ms()
        async with self._database.write.begin() as connection:
            moved = await move(
                connection, job_id, to, now=now, event=event, attempt=attempt, sources=sources, values=values
            )
            if moved is not None and entry is not None:
                await write_audit(connection, [(now, entry)])
        if moved is None:
            return None
        if entry is not None:
            entry.tell()
        return self._publish(moved)

    def _publish(self, moved: tuple[JobRecord, Event | None]) -> JobRecord:
        record, event = moved
        if event is not None:
            self._hub.publish(record.id, [event])
            self.watch(record, event)
        return record

    async def in_flight(self) -> dict[str, int]:
        """Ids of all jobs that have not ended, with the number of the attempt."""
        return await self._attempts(_IN_FLIGHT)

    async def completed(self) -> dict[str, int]:
        """Ids of all jobs that have files, with the number of the attempt that made them."""
        return await self._attempts(["completed"])

    async def kept_payloads(self) -> set[str]:
        """Ids of the failed jobs whose payload is kept, so that they can be done again."""
        async with self._database.read.connect() as connection:
            return set(await connection.scalars(select(jobs.c.id).where(_DEAD_LETTER)))

    async def let_go(self, *, job_id: str | None = None, before: int | None = None) -> list[str]:
        """Keep the payload of a job no longer, or those of all that were kept until ``before``; answers their ids."""
        if job_id is not None:
            which = jobs.c.id == job_id
        else:
            past = select(jobs.c.id).where(_DEAD_LETTER, jobs.c.expires_at <= before).limit(SWEPT)
            which = jobs.c.id.in_(past)
        async with self._database.write.begin() as connection:
            return list(await connection.scalars(_let_go(which).returning(jobs.c.id)))

    async def _attempts(self, states: list[Status]) -> dict[str, int]:
        query = select(jobs.c.id, jobs.c.attempt).where(jobs.c.status.in_(states))
        async with self._database.read.connect() as connection:
            return {row.id: row.attempt for row in await connection.execute(query)}

    async def queued(self, profile: str | None) -> tuple[int, float]:
        """How many jobs (of a profile) wait, and the seconds that the oldest has waited."""
        query = select(func.count(), func.min(jobs.c.created_at)).where(jobs.c.status == "queued")
        if profile is not None:
            query = query.where(jobs.c.profile == profile)
        async with self._database.read.connect() as connection:
            count, oldest = (await connection.execute(query)).one()
        return count, 0.0 if oldest is None else max(0.0, (now_ms() - oldest) / 1000)

    async def pace(self, profile: str | None, seconds: float) -> tuple[int, float | None]:
        """How many jobs (of a profile) run, and the mean seconds of the last runs that a worker brought to an end
        within ``seconds``; None where there was none."""
        since = now_ms() - int(seconds * 1000)
        of = [] if profile is None else [jobs.c.profile == profile]
        running = select(func.count()).where(jobs.c.status == "running", *of)
        ended: tuple[Status, ...] = ("completed", "failed")
        took = select((jobs.c.finished_at - jobs.c.started_at).label("took")).where(
            jobs.c.status.in_(ended), jobs.c.finished_at >= since, jobs.c.started_at <= jobs.c.finished_at, *of
        )
        last = took.order_by(jobs.c.finished_at.desc()).limit(PACE_RUNS).subquery()
        async with self._database.read.connect() as connection:
            count = await connection.scalar(running) or 0
            mean = await connection.scalar(select(func.avg(last.c.took)))
        return count, None if mean is None else float(mean) / 1000

    async def running(self) -> int:
        """How many jobs run."""
        async with self._database.read.connect() as connection:
            return await connection.scalar(select(func.count()).where(jobs.c.status == "running")) or 0

    async def activity(self, starts: Sequence[int], step: int) -> list[Activity]:
        """What happened in spans of ``step`` milliseconds that begin at these times."""
        spans = values(column("start", BigInteger), column("stop", BigInteger), name="spans")
        span = spans.data([(start, start + step) for start in starts]).cte()

        def within(counted: ColumnElement[int], time: ColumnElement[int], *status: Status) -> ScalarSelect[int]:
            of = [jobs.c.status.in_(status)] if status else []
            query = select(counted).where(*of, time >= span.c.start, time < span.c.stop)
            return query.correlate(span).scalar_subquery()

        frames = jobs.c.frames  # one that nobody took expires without any
        made: tuple[Status, ...] = ("completed", "expired")
        query = select(
            span.c.start,
            within(func.count(), jobs.c.created_at),
            within(func.count(frames), jobs.c.finished_at, *made),
            within(func.count(), jobs.c.finished_at, "canceled"),
            within(func.sum(frames), jobs.c.finished_at, *made),
        )
        async with self._database.read.connect() as connection:
            rows = await connection.execute(query)
            return [Activity(start, came, done, off, int(total or 0)) for start, came, done, off, total in rows]

    async def failures(self, since: int, step: int) -> list[tuple[int, str, int]]:
        """(span, error code, jobs) of those that failed at ``since`` or later, in spans of ``step`` milliseconds."""
        span = ((jobs.c.finished_at - since) // literal(step, literal_execute=True)).label("span")
        query = (
            select(span, jobs.c.error_code, func.count())
            .where(jobs.c.status == "failed", jobs.c.finished_at >= since)
            .group_by("span", jobs.c.error_code)
        )
        async with self._database.read.connect() as connection:
            return [(row[0], row[1] or ExportError.code, row[2]) for row in await connection.execute(query)]

    async def counts(self) -> dict[Status, int]:
        """How many jobs are in each state that has any."""
        query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        async with self._database.read.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    # --- files that are read, or damaged ----------------------------------------------------------------

    async def hold(self, job_ids: Collection[str], seconds: float) -> set[str]:
        """Keep the files of completed jobs for so long from now on, by the database's clock; answers those of which
        there are files. A reader that does not say so again lets go of them."""
        until = db_now() + int(seconds * 1000)
        query = (
            update(jobs)
            .where(jobs.c.id.in_(job_ids), jobs.c.status == "completed")
            .values(read_until=case((jobs.c.read_until > until, jobs.c.read_until), else_=until))
            .returning(jobs.c.id)
        )
        async with self._database.write.begin() as connection:
            return set(await connection.scalars(query))

    async def damaged(self, job_id: str, what: str) -> bool:
        """Note what is wrong with the stored files of a completed job: from now on nobody is given them. False where
        something was noted before, or the job has no files."""
        query = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status == "completed", jobs.c.damage.is_(None))
            .values(damage=what)
            .returning(jobs.c.id)
        )
        return await self._noted(query)

    async def whole(self, job: JobRecord) -> bool:
        """Note that the stored files of a job are what its manifest says, whatever was noted before; ``output`` and
        ``manifest`` of its row are written anew where they were damaged. False if it has no files any more."""
        assert job.output is not None
        assert job.manifest is not None
        values = {
            "damage": None,
            "output": msgspec.json.encode(job.output).decode(),
            "manifest": msgspec.json.encode(job.manifest).decode(),
            "stage": "download_ready",
        }
        query = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.status == "completed", jobs.c.attempt == job.attempt)
            .values(**values)
            .returning(jobs.c.id)
        )
        return await self._noted(query)

    async def _noted(self, query: ReturningUpdate[Any]) -> bool:
        """Change at most one job, and let whoever keeps what it found of jobs look again; False if there is none."""
        async with self._database.write.begin() as connection:
            noted = await connection.scalar(query) is not None
        self._hub.changes += noted
        return noted

    async def end_damaged(self, *, limit: int = 100) -> int:
        """Give jobs an end whose rows have a status that is none (see ``transitions``); answers how many."""
        query = select(jobs.c.id).where(jobs.c.status.not_in(sorted(STATUSES))).limit(limit)
        async with self._database.read.connect() as connection:
            found = list(await connection.scalars(query))
        for job_id in found:
            async with self._database.write.begin() as connection:
                moved = await end_damaged(connection, job_id, now=now_ms())
            if moved is not None:
                self._publish(moved)
        return len(found)

    # --- files that nobody knows ------------------------------------------------------------------------

    async def unknown(self, job_ids: Collection[str]) -> set[str]:
        """Those of these ids that no job has."""
        left = sorted(job_ids)
        known: set[str] = set()
        async with self._database.read.connect() as connection:
            for start in range(0, len(left), 500):
                query = select(jobs.c.id).where(jobs.c.id.in_(left[start : start + 500]))
                known |= set(await connection.scalars(query))
        return set(left) - known

    async def recover(self, job: NewJob, attempt: int, values: dict[str, Any], event: NewEvent) -> bool:
        """Make the record of a job whose files were found, ``completed`` from its first event on; False if there is
        one by now. ``values`` are further columns."""
        row = {
            **_columns(job, values["finished_at"]),
            "status": "completed",
            "stage": event.progress.stage,
            "progress": event.progress.progress,
            "stage_progress": event.progress.stage_progress,
            "attempt": attempt,
            **values,
        }
        try:
            async with self._database.write.begin() as connection:
                made = (await connection.execute(insert(jobs).values(**row).returning(*jobs.c))).one()
                record = JobRecord.of(made)
                await open_log(connection, record, event)
        except IntegrityError:
            return False
        self._hub.changes += 1
        return True

    async def expire(self, job: JobRecord, event: NewEvent | None, values: dict[str, Any]) -> JobRecord | None:
        """Expire a job that ``expired`` told of; None where it has moved meanwhile, or somebody reads it."""
        async with self._database.write.begin() as connection:
            moved = await move(
                connection,
                job.id,
                "expired",
                now=now_ms(),
                event=event,
                sources=frozenset({job.status}),
                attempt=job.attempt if job.status == "queued" else None,
                values=values,
                when=jobs.c.read_until <= db_now(),
            )
        return None if moved is None else self._publish(moved)

    async def waiting(self) -> Waiting:
        """What the figures show, by indexes alone: a look at 100,000 jobs takes milliseconds."""
        counts = await self.counts()
        _, oldest = await self.queued(None)
        dead = select(func.count()).where(jobs.c.status == "failed", jobs.c.expires_at > now_ms())
        async with self._database.read.connect() as connection:
            return Waiting(counts, oldest, await connection.scalar(dead) or 0)

    async def expired(self, now: int, *, queued_before: int) -> list[JobRecord]:
        """At most ``SWEPT`` finished jobs past their time that nobody reads, or queued ones that lie there since
        ``queued_before``: who came back to the queue has all its time again."""
        past = (jobs.c.status == "completed") & (jobs.c.expires_at <= now) & (jobs.c.read_until <= db_now())
        # The index has when a job was made, which is never after it moved.
        forgotten = (jobs.c.status == "queued") & (jobs.c.created_at <= queued_before)
        forgotten &= jobs.c.updated_at <= queued_before
        async with self._database.read.connect() as connection:
            return [
                JobRecord.of(row) for row in await connection.execute(select(jobs).where(past | forgotten).limit(SWEPT))
            ]

    async def forget(self, before: int) -> int:
        """Delete the records of at most ``SWEPT`` jobs of which nothing is left since ``before``: that ended, and have
        expired if they were completed, and whose payload is not kept any more if they failed. Answers how many."""
        over = sorted(TERMINAL - {"completed"})
        old = select(jobs.c.id).where(jobs.c.status.in_(over), jobs.c.finished_at <= before, ~_DEAD_LETTER)
        old = old.where(jobs.c.updated_at <= before).limit(SWEPT)
        async with self._database.write.begin() as connection:
            ids = list(await connection.scalars(old))
            if ids:
                for table, column in ((events, events.c.job_id), (idempotency_keys, idempotency_keys.c.job_id)):
                    await connection.execute(delete(table).where(column.in_(ids)))
                await connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
        return len(ids)

    async def write_audit(self, entries: Sequence[tuple[int, AuditEntry]]) -> None:
        """Append entries of the audit log that belong to no change of a job."""
        async with self._database.write.begin() as connection:
            await write_audit(connection, entries)

    async def audit_page(self, wanted: AuditQuery, limit: int) -> list[Row[Any]]:
        """Rows of the audit log, newest first."""
        async with self._database.read.connect() as connection:
            return list(await connection.execute(audit_query(wanted).limit(limit)))

    async def forget_audit(self, before: int) -> None:
        """Delete the oldest entries of the audit log that are from ``before``, so many at most that nobody waits for
        the database."""
        old = select(audit.c.id).where(audit.c.ts < before).order_by(audit.c.ts, audit.c.id).limit(AUDIT_BATCH)
        for _ in range(AUDIT_BATCHES):
            async with self._database.write.begin() as connection:
                ids = list(await connection.scalars(old))
                if ids:
                    await connection.execute(delete(audit).where(audit.c.id.in_(ids)))
            if len(ids) < AUDIT_BATCH:
                return

    async def check_writable(self) -> None:
        """Take the write lock once; raises when the database cannot be written."""
        async with self._database.write.begin() as connection:
            await connection.execute(delete(idempotency_keys).where(text("1 = 0")))
