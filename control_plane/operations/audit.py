"""The audit log: who did what, kept for as long as the history of jobs.

What changes a job is written in the same transaction. Everything else, and what was refused, comes here: it is written
at most a second later, and what one key does again and again becomes one entry a minute with its count.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Annotated, Any

import structlog
from litestar import Controller, get
from litestar.params import Parameter
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from common.contract import AuditPage, AuditRecord
from common.errors import InvalidRequest
from control_plane.cursors import cursor_of, parse_cursor
from control_plane.errors import JobNotFound
from control_plane.jobs.audit import AuditEntry, AuditQuery
from control_plane.jobs.records import iso
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.auth import ADMIN, NEEDS
from control_plane.operations.metrics import Metrics
from control_plane.operations.openapi import REFUSALS, error_specs

log = structlog.get_logger()

MAX_WAITING = 10_000
"""Entries that wait to be written, about 5 MB; more are dropped and counted."""
MAX_KNOWN = 10_000
"""Entries that are known as said already; more are dropped and counted."""
MAX_ADDRESSES = 100
"""Addresses whose wrong keys have entries of their own in a minute; those of all others are counted together."""
MAX_MISSED = 20
"""Exports that are not there whose ids are told, of each key in a minute; what else it makes up is counted together."""
FLUSH_SECONDS = 0.5
AGAIN_SECONDS = 60.0
"""For so long the same entry is only counted."""
BATCH = 500
MAX_PAGE = 500
_OTHERS = "other addresses"
_CURSOR = re.compile(r"(-?[0-9]{1,15}):([0-9]{1,18})")
_REPEATED = re.compile(r"(.*) x([0-9]+)")


class AuditLog:
    """Takes entries at any time and writes them from a task of its own; for one thread."""

    def __init__(self, store: JobStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._waiting: deque[tuple[int, AuditEntry]] = deque()
        self._known: dict[AuditEntry, tuple[AuditEntry, float, int]] = {}
        """Without their trace: the entry itself, until when it is counted, how often it came again. Oldest first."""
        self._addresses: set[str] = set()
        """Of those of wrong keys."""
        self._missed: Counter[str] = Counter()
        self._dropped = 0
        self._away = False

    def note(self, entry: AuditEntry) -> None:
        """Take an entry. The first is written soon, and said in the log at once; those that follow are counted."""
        if entry.action == "key.refused" and entry.address not in self._addresses:
            if len(self._addresses) >= MAX_ADDRESSES:
                entry = entry._replace(address=_OTHERS)
            else:
                self._addresses.add(entry.address)
        elif entry.job_id and entry.outcome == JobNotFound.code and entry._replace(trace="") not in self._known:
            if self._missed[entry.key] >= MAX_MISSED:
                entry = entry._replace(job_id=None)
            else:
                self._missed[entry.key] += 1
        same = entry._replace(trace="")
        if found := self._known.get(same):
            first, until, again = found
            self._known[same] = first, until, again + 1
        elif len(self._known) >= MAX_KNOWN:
            self._let_go(entry)
            self._drop()
        else:
            self._known[same] = entry, time.monotonic() + AGAIN_SECONDS, 0
            self._put(entry)

    def reloaded(self, outcome: str) -> None:
        """Note that the keys were read again."""
        self.note(AuditEntry("", "", "", "keys.reload", outcome, None, ""))

    def _put(self, entry: AuditEntry) -> None:
        entry.tell()
        if len(self._waiting) >= MAX_WAITING:
            self._drop()
        else:
            self._waiting.append((now_ms(), entry))

    def _drop(self) -> None:
        self._dropped += 1
        self._metrics.audit_dropped.inc()

    async def run(self) -> None:
        """Write what comes until canceled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._close_counts(time.monotonic())
            await self._write()

    async def stop(self) -> None:
        """Write what is left."""
        self._close_counts(float("inf"))
        await self._write()

    def _close_counts(self, now: float) -> None:
        while self._known:
            same = next(iter(self._known))
            entry, until, again = self._known[same]
            if until > now:
                return
            del self._known[same]
            if again:
                self._put(entry._replace(outcome=f"{entry.outcome} x{again}"))
            self._let_go(entry)

    def _let_go(self, entry: AuditEntry) -> None:
        """Another one may be told in its place."""
        if entry.action == "key.refused":
            self._addresses.discard(entry.address)
        elif entry.job_id and entry.outcome == JobNotFound.code:
            self._missed -= Counter([entry.key])  # and forgets a key that has none left

    async def _write(self) -> None:
        if self._dropped:
            log.error("entries of the audit log were dropped", count=self._dropped)
            self._dropped = 0
        while self._waiting:
            batch = [self._waiting[place] for place in range(min(BATCH, len(self._waiting)))]
            try:
                await self._store.write_audit(batch)
            except SQLAlchemyError as error:
                if not self._away:
                    log.error("the audit log waits for the database", waiting=len(self._waiting), reason=str(error))
                self._away = True
                return
            self._away = False
            for _ in batch:
                self._waiting.popleft()


class AuditController(Controller):
    """Who did what."""

    tags = ("operations",)

    @get(
        "/v1/audit",
        opt={NEEDS: ADMIN},
        operation_id="listAudit",
        summary="The audit log, newest first",
        responses=error_specs(*REFUSALS, "INVALID_EXPORT_REQUEST", "QUEUE_UNAVAILABLE", "INTERNAL"),
    )
    async def audit(
        self,
        store: JobStore,
        *,
        cursor: str | None = None,
        limit: Annotated[int, Parameter(description=f"1 to {MAX_PAGE}")] = 100,
        client: Annotated[str | None, Parameter(description="Only what keys of this client did")] = None,
        action: Annotated[str | None, Parameter(description="Only this, such as `export.create`")] = None,
        since: Annotated[str | None, Parameter(description="Only what came then or later: ISO 8601")] = None,
    ) -> AuditPage:
        """``nextCursor`` begins the next page; null at the end."""
        limit = min(max(limit, 1), MAX_PAGE)
        before = parse_cursor(cursor, _CURSOR) if cursor else None
        wanted = AuditQuery(client, action, _moment(since) if since else None, before and (before[0], int(before[1])))
        rows = await store.audit_page(wanted, limit + 1)
        following = cursor_of(rows[limit - 1].ts, rows[limit - 1].id) if len(rows) > limit else None
        return AuditPage(entries=[_shown(row) for row in rows[:limit]], next_cursor=following)


def _shown(row: Row[Any]) -> AuditRecord:
    repeated = _REPEATED.fullmatch(row.outcome)
    return AuditRecord(
        at=iso(row.ts),
        key=row.key or None,
        client=row.client or None,
        address=row.address,
        action=row.action,
        outcome=repeated[1] if repeated else row.outcome,
        count=int(repeated[2]) if repeated else 1,
        job_id=row.job_id,
        trace_id=row.trace or None,
    )


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))  # a plus that was not encoded in the URL
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise InvalidRequest("since must be a time as ISO 8601 has it.", field="since") from None
