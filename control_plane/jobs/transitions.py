"""The only module that changes the state of a job.

Every change is one guarded UPDATE: it counts only if the job is in a state from which the change is allowed, and the
event's number comes from the same statement, so numbers have no gaps and a terminal state is written once. A queued
job that goes back to the queue was handed to a platform and is handed to it again. A job that is ``completed`` may
become ``expired`` later; that change has no event, since nothing follows ``job_completed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, case, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from common.contract import Event, Progress, Status
from common.progress import EMOJI
from control_plane.jobs.notify import announce
from control_plane.jobs.records import RECORD_DAMAGED, STATUSES, TERMINAL, TERMINAL_EVENTS, JobRecord, NewEvent, iso
from control_plane.jobs.tables import events, jobs

ALLOWED: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"queued", "running", "failed", "canceled", "expired"}),
    "running": frozenset({"queued", "completed", "failed", "canceled"}),
    "completed": frozenset({"expired"}),
    "failed": frozenset(),
    "canceled": frozenset(),
    "expired": frozenset(),
}
"""From each state to those that may follow."""


async def move(
    connection: AsyncConnection,
    job_id: str,
    to: Status,
    *,
    now: int,
    event: NewEvent | None,
    attempt: int | None = None,
    sources: frozenset[Status] | None = None,
    values: dict[str, Any] | None = None,
    when: ColumnElement[bool] | None = None,
) -> tuple[JobRecord, Event | None] | None:
    """Change the state of a job and append the event that tells of it; None if the change is not allowed (any more).

    ``attempt``, ``sources`` and ``when`` narrow the guard to one attempt, to fewer states, or by any condition on the
    row; ``values`` are further columns.
    """
    allowed = {source for source, targets in ALLOWED.items() if to in targets}
    guard = [jobs.c.id == job_id, jobs.c.status.in_(sorted(allowed & (sources or allowed)))]
    if attempt is not None:
        guard.append(jobs.c.attempt == attempt)
    if when is not None:
        guard.append(when)
    changes: dict[str, Any] = {"status": to, "updated_at": now, **(values or {})}
    if to in TERMINAL and event is not None:
        changes["finished_at"] = now
    if event is not None:
        changes |= _told_by([event])
        if to == "queued":  # Back in the queue nobody drives it; who finds it there has come too late.
            guard.append((jobs.c.status != "queued") | jobs.c.owner.is_not(None))
            changes |= {"owner": None, "lease_until": None, "runpod_id": None}
    row = (await connection.execute(update(jobs).where(*guard).values(**changes).returning(*jobs.c))).one_or_none()
    if row is None:
        return None
    record = JobRecord.of(row)
    told = None if event is None else (await _append(connection, record, [event], now))[0]
    return record, told


async def advance(
    connection: AsyncConnection,
    job_id: str,
    attempt: int,
    new: Sequence[NewEvent],
    *,
    now: int,
    told: tuple[int, int] | None = None,
) -> list[Event] | None:
    """Append events of a running attempt; None if the job is not running that attempt any more.

    ``told`` is the number of the run's steps in the log before and after: two replicas that have read the same steps
    do not both append them.
    """
    guard = [jobs.c.id == job_id, jobs.c.status == "running", jobs.c.attempt == attempt]
    changes: dict[str, Any] = {"updated_at": now, **_told_by(new)}
    if told is not None:
        guard.append(jobs.c.told == told[0])
        changes["told"] = told[1]
    row = (await connection.execute(update(jobs).where(*guard).values(**changes).returning(*jobs.c))).one_or_none()
    return None if row is None else await _append(connection, JobRecord.of(row), new, now)


async def end_damaged(connection: AsyncConnection, job_id: str, *, now: int) -> tuple[JobRecord, Event | None] | None:
    """Give a job an end whose status is none of those that there are, as its row was damaged; None if it has one.

    It is what its log ends with; one whose log has not ended has failed.
    """
    query = select(events.c.seq, events.c.type).where(events.c.job_id == job_id).order_by(events.c.seq.desc()).limit(1)
    last = (await connection.execute(query)).one_or_none()
    changes: dict[str, Any] = {"updated_at": now, "owner": None, "lease_until": None}
    event = None
    if last is not None and last.type in TERMINAL_EVENTS:
        status = last.type.removeprefix("job_")
        changes |= {"status": status, "last_seq": last.seq}
    else:
        message = RECORD_DAMAGED.message
        meta = {"code": RECORD_DAMAGED.code, "retryable": RECORD_DAMAGED.retryable}
        progress = Progress(stage="failed", progress=0, stage_progress=100, message=message, meta=meta)
        event = NewEvent("job_failed", progress)
        changes |= {"status": "failed", "stage": "failed", "message": message, "stage_progress": 100}
        changes |= {"error": msgspec.json.encode(RECORD_DAMAGED).decode(), "error_code": RECORD_DAMAGED.code}
        changes |= {"last_seq": (last.seq if last else 0) + 1, "finished_at": now}
    guard = (jobs.c.id == job_id, jobs.c.status.not_in(sorted(STATUSES)))
    row = (await connection.execute(update(jobs).where(*guard).values(**changes).returning(*jobs.c))).one_or_none()
    if row is None:
        return None
    record = JobRecord.of(row)
    return record, None if event is None else (await _append(connection, record, [event], now))[0]


async def open_log(connection: AsyncConnection, record: JobRecord, event: NewEvent) -> Event:
    """Append the first event of a job that was just inserted with ``last_seq`` 1."""
    return (await _append(connection, record, [event], record.created_at))[0]


def _told_by(new: Sequence[NewEvent]) -> dict[str, ColumnElement[Any] | object]:
    last, highest = new[-1].progress, max(event.progress.progress for event in new)
    return {
        "last_seq": jobs.c.last_seq + len(new),
        "progress": case((jobs.c.progress < highest, literal(highest)), else_=jobs.c.progress),
        "stage": last.stage,
        "stage_progress": last.stage_progress,
        "message": last.message,
    }


async def _append(connection: AsyncConnection, record: JobRecord, new: Sequence[NewEvent], now: int) -> list[Event]:
    first = record.last_seq - len(new) + 1
    before = await connection.scalar(
        select(events.c.progress).where(events.c.job_id == record.id, events.c.seq == first - 1)
    )
    # A second attempt starts over below what the first one reached: what people see never falls.
    reached = list(accumulate((event.progress.progress for event in new), max, initial=before or 0))[1:]
    told = [
        Event(
            seq=first + index,
            ts=iso(now),
            job_id=record.id,
            type=event.type,
            stage=event.progress.stage,
            progress=reached[index],
            stage_progress=event.progress.stage_progress,
            emoji=EMOJI[event.progress.stage],
            message=event.progress.message,
            meta=event.progress.meta,
        )
        for index, event in enumerate(new)
    ]
    await connection.execute(
        insert(events),
        [
            {
                "job_id": event.job_id,
                "seq": event.seq,
                "ts": now,
                "type": event.type,
                "stage": event.stage,
                "progress": event.progress,
                "stage_progress": event.stage_progress,
                "message": event.message,
                "meta": msgspec.json.encode(event.meta).decode(),
            }
            for event in told
        ],
    )
    announce(connection, record.id, record.last_seq)
    return told
