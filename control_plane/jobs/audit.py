"""The rows of the audit log: who did what, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import structlog
from sqlalchemy import Select, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.jobs.tables import audit

log = structlog.get_logger()

Action = Literal[
    "export.create",
    "export.cancel",
    "export.retry",
    "export.read",
    "export.search",
    "export.download",
    "export.sidecar",
    "export.manifest",
    "collection.create",
    "collection.delete",
    "collection.read",
    "collection.search",
    "document.write",
    "document.delete",
    "nexus.enable",
    "nexus.disable",
    "nexus.trigger",
    "nexus.verify",
    "nexus.rebuild",
    "nexus.events",
    "nexus.webhook",
    "key.refused",
    "access.forbidden",
    "keys.reload",
]
"""``export.read`` is a look at the job of another client, which ``admin`` allows; ``export.search`` is a search or a
read tool, whoever's export it is. ``collection.read`` is a look at a collection, or at documents of it.
``nexus.webhook`` is a change that a graph told, whose client it is about; a wrong signature is
``key.refused``."""


class AuditEntry(NamedTuple):
    """What somebody did. Never a key, nor anything of what was exported."""

    key: str
    """The key's name; empty: nobody's."""
    client: str
    address: str
    action: Action
    outcome: str
    """``ok``, or the code of the error; ``<outcome> x<n>`` for n of the same that came soon after the first."""
    job_id: str | None
    trace: str

    def tell(self) -> None:
        """Say it in the log of the server."""
        log.info(
            "audit",
            key=self.key,
            client=self.client,
            address=self.address,
            action=self.action,
            outcome=self.outcome,
            job_id=self.job_id,
            trace_id=self.trace,
        )


async def write_audit(connection: AsyncConnection, entries: Sequence[tuple[int, AuditEntry]]) -> None:
    """Append entries with their times, in milliseconds since 1970, in the transaction of whoever did it."""
    rows = [
        {
            "ts": ts,
            "key": entry.key,
            "client": entry.client,
            "address": entry.address[:64],
            "action": entry.action,
            "outcome": entry.outcome[:64],
            "job_id": entry.job_id,
            "trace": entry.trace,
        }
        for ts, entry in entries
    ]
    await connection.execute(insert(audit), rows)


class AuditQuery(NamedTuple):
    """Which rows of the audit log; None: whatever it is."""

    client: str | None
    action: str | None
    since: int | None
    """Not older, in milliseconds since 1970."""
    before: tuple[int, int] | None
    """Older than the row of (time, id)."""


def audit_query(wanted: AuditQuery) -> Select[Any]:
    """Rows, newest first."""
    query = select(audit).order_by(audit.c.ts.desc(), audit.c.id.desc())
    if wanted.client is not None:
        query = query.where(audit.c.client == wanted.client)
    if wanted.action is not None:
        query = query.where(audit.c.action == wanted.action)
    if wanted.since is not None:
        query = query.where(audit.c.ts >= wanted.since)
    if wanted.before is not None:
        query = query.where(tuple_(audit.c.ts, audit.c.id) < wanted.before)
    return query
