"""A job as the store holds it, and the texts of times."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, get_args

import msgspec
from sqlalchemy import Row

from common.contract import (
    MALFORMED,
    Event,
    EventType,
    ImportStatus,
    JobError,
    JobOutput,
    Manifest,
    Progress,
    Stage,
    Status,
)
from common.progress import EMOJI

TERMINAL_EVENTS: frozenset[EventType] = frozenset({"job_completed", "job_failed", "job_canceled", "job_expired"})
CANARY_CLIENT = "canary"
"""Of the exports that a server makes to try itself; no key that is given to anybody stands for it."""
TERMINAL: frozenset[Status] = frozenset({"completed", "failed", "canceled", "expired"})
STATUSES: frozenset[Status] = frozenset(get_args(Status))
_STAGES: frozenset[Stage] = frozenset(get_args(Stage))
_STAGE_OF: dict[Status, Stage] = {
    "queued": "queued",
    "running": "transform",
    "completed": "download_ready",
    "failed": "failed",
    "canceled": "canceled",
    "expired": "expired",
}
_COUNTS = (
    *("progress", "stage_progress", "last_seq", "attempt", "lost", "weight", "payload_size", "available_at"),
    *("retries", "timeouts", "told", "read_until"),
)
_TIMES = ("created_at", "updated_at", "started_at", "finished_at", "expires_at", "submitted_at")
_DECODED = (("error", JobError), ("import_error", JobError), ("output", JobOutput), ("manifest", Manifest))
_LATEST = 253_402_300_799_999
"""The last millisecond of the year 9999."""


def iso(milliseconds: int) -> str:
    """ISO 8601 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{milliseconds % 1000:03d}Z"


def _is_time(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= _LATEST


RECORD_DAMAGED = JobError(
    code="INTERNAL", message="The record of this export is damaged; its state is lost. Send it again.", retryable=False
)


class Quota(NamedTuple):
    """How many jobs the client of a key may have; None: as many as the queue takes."""

    active_jobs: int | None = None
    """Waiting or running at once."""
    jobs_per_day: int | None = None
    """Made in any 24 hours."""


NO_QUOTA = Quota()


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
    collection: str | None = None
    """Of the client, that is to hold the nodes."""


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
    collection: str | None
    """That is to hold the nodes; where there is none, the following are None too."""
    import_state: ImportStatus | None
    import_at: int | None
    """Not brought into the collection before, by the database's clock; None: never (again)."""
    import_attempts: int | None
    import_documents: int | None
    """Nodes brought there so far."""
    import_error: JobError | None

    @classmethod
    def of(cls, row: Row[Any]) -> JobRecord:
        """From a row with all columns; what cannot be read of it is left out and named in ``damage``: one bad row is
        no reason to hide all others. One whose status is none has failed."""
        values = dict(row._mapping)
        wrong = []
        for name, kind in _DECODED:
            if values[name] is not None:
                try:
                    values[name] = msgspec.json.decode(values[name], type=kind)
                except (*MALFORMED, UnicodeError, TypeError):
                    values[name] = None
                    wrong.append(name)
        for name in _COUNTS:
            if not isinstance(values[name], int):
                values[name] = 0
                wrong.append(name)
        for name in _TIMES:
            if values[name] is not None and not _is_time(values[name]):
                # At the far end, so that the next page of a list has no fewer jobs.
                values[name] = _LATEST if name in ("created_at", "updated_at") else None
                wrong.append(name)
        if values["status"] not in STATUSES:
            values["status"] = "failed"
            wrong.append("status")
            values["error"] = RECORD_DAMAGED
        if values["stage"] not in _STAGES:
            values["stage"] = _STAGE_OF[values["status"]]
            wrong.append("stage")
        if wrong:
            values["damage"] = f"its record is damaged ({', '.join(wrong)})"
        return cls(**values)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event before it has its number."""

    type: EventType
    progress: Progress


def event_of(row: Row[Any]) -> Event:
    """From a row of ``events`` with all columns."""
    values = dict(row._mapping)
    # Of no time that there is: long ago, so that no stream counts it as one that came late.
    values["ts"] = iso(values["ts"] if _is_time(values["ts"]) else 0)
    try:
        values["meta"] = msgspec.json.decode(values["meta"], type=dict[str, Any])
    except (*MALFORMED, UnicodeError, TypeError):
        values["meta"] = {"damaged": True}
    return Event(emoji=EMOJI.get(row.stage, ""), **values)
