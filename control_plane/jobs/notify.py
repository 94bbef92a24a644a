"""Word from one replica to the others, through the database that they share.

Inside the transaction that appends events of a job, the store calls

    announce(connection, job_id, last_seq)

and wherever there is work for whoever drives jobs (a job was queued, a webhook gave a hint),

    announce_wake(connection)            # look into the queue
    announce_wake(connection, job_id)    # look at this job

On PostgreSQL the other replicas hear of both soon after the commit, and of neither after a rollback. On SQLite, where
one process is alone, they do nothing. A replica does not hear itself: it calls its own hub and backend directly.

The words go out by NOTIFY in a transaction of their own, all that came up meanwhile in one. Inside the transaction
that they tell of they would be atomic, but PostgreSQL lets such transactions commit one after the other, each with its
wait for the disk: eight writers at once then made a quarter of the commits. So a word may be lost, when its sender dies
right after the commit or while a connection is away. Therefore the notifier looks into the database every 1.5 s: for
the newest events of all jobs that someone streams, and it calls ``on_wake(None)``.

The application makes one ``Notifier(database, hub, on_wake)``, starts it after ``database.migrate()`` and stops it
before ``database.close()``. ``on_wake(job_id or None)`` is called on the event loop and must not block.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import psycopg
import structlog
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.jobs.database import Database, postgres_arguments, tell_others
from control_plane.jobs.hub import EventHub
from control_plane.jobs.tables import jobs

log = structlog.get_logger()

CHANNEL = "memvid_export"
LOOK_SECONDS = 1.5
"""A stream is so late at most when word was lost."""
LOOKED_AT = 500
"""Jobs asked for in one query."""
PROBE_SECONDS = 10.0
"""After so long without word the connection is tried."""
CANCEL_SECONDS = 1.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 5.0


def announce(connection: AsyncConnection, job_id: str, last_seq: int) -> None:
    """Tell the other replicas, once this transaction is committed, that a job has events up to ``last_seq``."""
    tell_others(connection, f"events {job_id}", last_seq)


def announce_wake(connection: AsyncConnection, job_id: str | None = None) -> None:
    """Tell the other replicas, once this transaction is committed, to look at a job, or into the queue."""
    tell_others(connection, f"wake {job_id or '-'}")


class Notifier:
    """Listens to the other replicas, and looks after the streams in case that word was lost."""

    def __init__(self, database: Database, hub: EventHub, on_wake: Callable[[str | None], None]) -> None:
        self._database = database
        self._hub = hub
        self._on_wake = on_wake
        self.listening = asyncio.Event()
        """Set while word of other replicas arrives at once."""
        self._missed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tasks(self) -> dict[str, asyncio.Task[None]]:
        """That run as long as the server."""
        return {f"notifier {number}": task for number, task in enumerate(self._tasks)}

    async def start(self) -> None:
        """Listen from now on; a database that is away is tried again and again."""
        loops = [self._look(), *([self._listen(), self._send()] if self._database.postgres else [])]
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(_ended)

    async def stop(self) -> None:
        """Listen no more."""
        left = set(self._tasks)
        while left:  # again, as a connection that breaks meanwhile raises in place of the cancellation
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=CANCEL_SECONDS)

    async def _listen(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                async with await self._connect() as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    log.info("listening to other replicas")
                    wait = FIRST_WAIT_SECONDS
                    self.listening.set()
                    self._missed.set()
                    while True:
                        async for notice in connection.notifies(timeout=PROBE_SECONDS):
                            self._hear(notice.payload)
                        await connection.execute("SELECT 1")
            except psycopg.Error as error:
                if wait == FIRST_WAIT_SECONDS:
                    log.warning("cannot listen to other replicas", error=str(error))
            self.listening.clear()
            await asyncio.sleep(wait * random.uniform(0.5, 1))  # noqa: S311
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    async def _connect(self) -> psycopg.AsyncConnection:
        url = self._database.url
        given, named = self._database.read.dialect.create_connect_args(url)
        return await psycopg.AsyncConnection.connect(*given, **{**named, **postgres_arguments(url)}, autocommit=True)

    def _hear(self, payload: str) -> None:
        match payload.split(" "):
            case [self._database.origin, *_]:
                pass
            case [_, "events", job_id, seq] if seq.isdigit():
                self._hub.reaches(job_id, int(seq))
            case [_, "wake", job_id, _]:
                self._on_wake(None if job_id == "-" else job_id)
            case _:
                log.warning("word that this version does not know", payload=payload[:200])

    async def _send(self) -> None:
        query = text("SELECT pg_notify(:channel, payload) FROM unnest(CAST(:payloads AS text[])) AS payload")
        while True:
            await self._database.outbox.filled.wait()
            notices = self._database.outbox.take()
            payloads = [f"{self._database.origin} {words} {seq}" for words, seq in notices.items()]
            try:
                async with self._database.write.begin() as connection:
                    await connection.execute(query, {"channel": CHANNEL, "payloads": payloads})
            except SQLAlchemyError as error:  # The others look for themselves.
                log.warning("other replicas could not be told", notices=len(payloads), error=str(error))

    async def _look(self) -> None:
        away = False
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._missed.wait()
            except TimeoutError:
                pass
            self._missed.clear()
            try:
                await self._look_once()
            except SQLAlchemyError as error:
                if not away:
                    log.warning("the database is away", error=str(error))
                away = True
            else:
                if away:
                    log.info("the database is back")
                away = False
                if self._database.postgres:
                    self._on_wake(None)

    async def _look_once(self) -> None:
        ids = self._hub.job_ids
        for start in range(0, len(ids), LOOKED_AT):
            query = select(jobs.c.id, jobs.c.last_seq).where(jobs.c.id.in_(ids[start : start + LOOKED_AT]))
            async with self._database.read.connect() as connection:
                for job_id, last_seq in await connection.execute(query):
                    self._hub.reaches(job_id, last_seq)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.error("the notifier ended", exc_info=task.exception())
