"""A job as the store holds it, and the texts of times."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Row

from common.contract import Event, EventType, JobError, JobOutput, Manifest, Progress, Stage, Status
from common.progress import EMOJI

TERMINAL_EVENTS: frozenset[EventType] = frozenset({"job_completed", "job_failed", "job_canceled", "job_expired"})
TERMINAL: frozenset[Status] = frozenset({"completed", "failed", "canceled", "expired"})


def iso(milliseconds: int) -> str:
    """ISO 8601 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{milliseconds % 1000:03d}Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a staged and checked payload brings along."""

    id: str
    backend: str
    weight: int
    """Nodes and relationships: what decides between a small job and a large one."""
    session_id: str
    project_name: str
    payload_ref: str
    payload_sha256: str
    payload_size: int
    message: str
    meta: dict[str, Any]
    profile: str = "default"
    base_name: str = ""
    client: str = "default"
    """Whose it is: keys of this client see it, others do not."""
    trace: str = ""
    """The request that made it, as a W3C ``traceparent``; empty: not told."""
    retry_of: str | None = None
    """The failed job that this one does again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One row of ``jobs``; times in milliseconds since 1970."""

    id: str
    backend: str
    status: Status
    stage: Stage
    progress: int
    stage_progress: int
    message: str
    last_seq: int
    attempt: int
    """Counts every time that a worker took the job."""
    lost: int
    """Counts the attempts that ended without an answer."""
    weight: int
    session_id: str
    project_name: str
    payload_ref: str
    payload_sha256: str
    payload_size: int
    created_at: int
    updated_at: int
    started_at: int | None
    finished_at: int | None
    expires_at: int | None
    error: JobError | None
    output: JobOutput | None
    manifest: Manifest | None
    profile: str
    base_name: str
    """What the client calls its source; the capsule's name is made of it."""
    owner: str | None
    """The replica that drives the job."""
    lease_until: int | None
    """Until then no other replica takes it over, by the database's clock."""
    available_at: int
    """Not taken from the queue before."""
    retries: int
    """Counts the attempts that ended in an error that may pass."""
    timeouts: int
    """Counts the attempts that ran out of time."""
    told: int
    """Steps of this attempt's run that are in the event log."""
    runpod_id: str | None
    submitted_at: int | None
    secret: str
    """Stands in the webhook's path."""
    frames: int | None
    """Of the capsule; what it was made of is in ``manifest``."""
    error_code: str | None
    """That of ``error``, for counting."""
    client: str
    trace: str
    retry_of: str | None
    read_until: int
    """Somebody downloads it at least so long; it is not removed before."""
    damage: str | None
    """What a look at its stored files found wrong with them; None: nothing."""

    @classmethod
    def of(cls, row: Row[Any]) -> JobRecord:
        """From a row with all columns."""
        values = dict(row._mapping)
        for name, kind in (("error", JobError), ("output", JobOutput), ("manifest", Manifest)):
            if values[name] is not None:
                values[name] = msgspec.json.decode(values[name], type=kind)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event before it has its number."""

    type: EventType
    progress: Progress


def event_of(row: Row[Any]) -> Event:
    """From a row of ``events`` with all columns."""
    values = dict(row._mapping)
    values["ts"] = iso(values["ts"])
    values["meta"] = msgspec.json.decode(values["meta"])
    return Event(emoji=EMOJI[row.stage], **values)
