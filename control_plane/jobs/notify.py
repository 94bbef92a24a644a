"""Word from one replica to the others, through the database that they share.

Inside the transaction that appends events of a job, the store calls

    await announce(connection, job_id, last_seq)

and wherever there is work for whoever drives jobs (a job was queued, a webhook gave a hint),

    await announce_wake(connection)            # look into the queue
    await announce_wake(connection, job_id)    # look at this job

On PostgreSQL both are NOTIFY: they reach the other replicas after the commit, or never if it fails. On SQLite, where
one process is alone, they do nothing. A replica does not hear itself: it calls its own hub and backend directly.

The application makes one ``Notifier(database, hub, on_wake)``, starts it after ``database.migrate()`` and stops it
before ``database.close()``. ``on_wake(job_id or None)`` is called on the event loop and must not block. Word may be
lost while the connection is away: when it is back, every open stream looks into the database and ``on_wake(None)`` is
called; besides, the notifier asks for the newest numbers of all jobs that someone streams, every 1.5 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub

CHANNEL = "memvid_export"


async def announce(connection: AsyncConnection, job_id: str, last_seq: int) -> None:
    """Tell the other replicas, once this transaction is committed, that a job has events up to ``last_seq``."""
    await _notify(connection, f"events {job_id} {last_seq}")


async def announce_wake(connection: AsyncConnection, job_id: str | None = None) -> None:
    """Tell the other replicas, once this transaction is committed, to look at a job, or into the queue."""
    await _notify(connection, f"wake {job_id or '-'}")


async def _notify(connection: AsyncConnection, message: str) -> None:
    if connection.dialect.name != "postgresql":
        return
    payload = f"{connection.info['origin']} {message}"
    await connection.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": CHANNEL, "payload": payload})


class Notifier:
    """Listens to the other replicas."""

    def __init__(self, database: Database, hub: EventHub, on_wake: Callable[[str | None], None]) -> None:
        self._database = database
        self._hub = hub
        self._on_wake = on_wake
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen from now on; a database that is away is tried again and again."""

    async def stop(self) -> None:
        """Listen no more."""
