"""Opening the job database, SQLite or PostgreSQL, and bringing its schema up to date."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from psycopg.abc import Buffer
from psycopg.types.string import StrDumperUnknown
from sqlalchemy import URL, BigInteger, ColumnElement, Connection, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from control_plane.jobs import sqlite

SQLITE_READERS = 4
POSTGRES_READERS = 8
POSTGRES_WRITERS = 8
"""With the connection that listens a replica takes 17; PostgreSQL allows 100 unless told otherwise."""
CONNECT_SECONDS = 5
POOL_SECONDS = 10
"""A caller waits so long for a connection of a busy pool."""
STATEMENT_SECONDS = 30
LOCK_SECONDS = 10
MIGRATION_SECONDS = 300
"""A replica waits so long while another one migrates."""
MIGRATION_LOCK, CREATION_LOCK = 0x6D76_0001, 0x6D76_0002
"""Keys of advisory locks: who migrates, who adds to the queue."""

NOTICES, COMMITTED = "notices", "committed notices"

T = TypeVar("T")

AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""What a database raises that is away or too busy: the same may work later."""
READ_ONLY, IDLE = "25006", "25P03"
"""PostgreSQL takes no writes, as after a failover; it ended a transaction in which nothing came for too long."""

POSTGRES_OPTIONS = (
    f"-c statement_timeout={STATEMENT_SECONDS}s -c lock_timeout={LOCK_SECONDS}s "
    f"-c idle_in_transaction_session_timeout={STATEMENT_SECONDS}s"
)
# A server that vanished without a word is noticed within 11 s, not after the two hours of a TCP default.
POSTGRES_KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 11_000}


class _Now(FunctionElement[int]):
    type = BigInteger()
    inherit_cache = True


@compiles(_Now, "sqlite")
def _sqlite_now(_element: _Now, _compiler: SQLCompiler, **_more: Any) -> str:
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


@compiles(_Now, "postgresql")
def _postgres_now(_element: _Now, _compiler: SQLCompiler, **_more: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000 AS BIGINT)"


def db_now() -> ColumnElement[int]:
    """Milliseconds since 1970 by the database's clock, the one that all replicas share, at the statement's begin."""
    return _Now()


class _Words(StrDumperUnknown):
    """Text for PostgreSQL, which cannot hold the character NUL; clients send it in names, and in ids they ask for."""

    def dump(self, obj: str) -> Buffer | None:
        return super().dump(obj.replace("\0", "\ufffd"))


class Database:
    """Two pools over one database. SQLite takes one writer at a time, and a pool queues more fairly than its lock."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.postgres = self.url.get_backend_name() == "postgresql"
        self.origin = secrets.token_hex(4)
        """Names this replica in the notices that it sends."""
        self.outbox = Outbox()
        self._letting_go: set[asyncio.Future[None]] = set()
        self.write = self._engine(POSTGRES_WRITERS if self.postgres else 1)
        self.read = self._engine(POSTGRES_READERS if self.postgres else SQLITE_READERS)

    async def migrate(self) -> None:
        """Bring the schema to the newest revision; of several replicas that start at once, one does."""
        async with self.write.begin() as connection:
            if self.postgres:
                for name in ("lock_timeout", "statement_timeout"):
                    await connection.execute(text(f"SET LOCAL {name} = '{MIGRATION_SECONDS}s'"))
                await _lock(connection, MIGRATION_LOCK)
            await connection.run_sync(_upgrade)

    async def at_once(self, work: Callable[[AsyncConnection], Coroutine[Any, Any, T]], *, relaxed: bool = False) -> T:
        """A transaction of ``write`` in which ``work`` awaits nothing but methods of the connection. On SQLite it has
        the lock from its begin on, and is one visit to the connection's thread, so that who waits to write does not
        wait for turns of a busy event loop.

        ``relaxed``: on SQLite it may be on no disk when it is committed, for what is found out again after a power cut;
        that takes it back only with all that was committed since. On PostgreSQL, whose end is not that of this process,
        it is as any other."""
        if self.postgres:
            async with self.write.begin() as connection:
                return await work(connection)
        async with self.write.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, sqlite.SqliteConnection)
            return await driver.transaction(work, relaxed=relaxed)

    async def close(self) -> None:
        """Close all connections."""
        await self.read.dispose()
        await self.write.dispose()

    def _engine(self, size: int) -> AsyncEngine:
        engine = create_async_engine(
            self.url,
            poolclass=AsyncAdaptedQueuePool,
            pool_size=size,
            max_overflow=0,
            pool_timeout=POOL_SECONDS,
            pool_pre_ping=self.postgres,
            hide_parameters=True,  # errors are logged, and the secrets of webhooks are among them
            connect_args=postgres_arguments(self.url) if self.postgres else {"async_creator_fn": sqlite.connect},
        )
        event.listen(engine.sync_engine, "connect", self._connected)
        if self.postgres:
            event.listen(engine.sync_engine, "handle_error", _not_now)
            event.listen(engine.sync_engine, "commit", _commits)
            event.listen(engine.sync_engine, "rollback", _rolls_back)
            event.listen(engine.sync_engine, "checkin", self._returned)
        else:
            event.listen(engine.sync_engine, "invalidate", self._let_go)
        return engine

    def _connected(self, connection: Any, record: Any) -> None:
        if self.postgres:
            connection.driver_connection.adapters.register_dumper(str, _Words)
            return
        # An answer of 202 promises that the job survives a power cut: FULL syncs the log at every commit.
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def _let_go(self, connection: Any, _record: object, _error: object) -> None:
        """Of a statement that was canceled somebody may hold the cursor still; as long as that is so, closing the
        connection leaves its transaction open, and with it the lock that all writers wait for."""
        if connection is not None:
            task = asyncio.ensure_future(connection.driver_connection.rollback())
            self._letting_go.add(task)
            task.add_done_callback(self._let_gone)

    def _let_gone(self, task: asyncio.Future[None]) -> None:
        self._letting_go.discard(task)
        if not task.cancelled():
            task.exception()  # it had no transaction, or was closed already

    def _returned(self, _connection: object, record: Any) -> None:
        record.info.pop(NOTICES, None)
        for words, seq in record.info.pop(COMMITTED, {}).items():
            self.outbox.put(words, seq)


class Outbox:
    """What other replicas are to be told of transactions that are committed; ``notify`` sends it."""

    def __init__(self) -> None:
        self.filled = asyncio.Event()
        self._notices: dict[str, int] = {}

    def put(self, words: str, seq: int) -> None:
        """Of the same words the higher number is enough."""
        self._notices[words] = max(seq, self._notices.get(words, 0))
        self.filled.set()

    def take(self) -> dict[str, int]:
        """All that was put since the last time."""
        taken, self._notices = self._notices, {}
        self.filled.clear()
        return taken


def tell_others(connection: AsyncConnection, words: str, seq: int = 0) -> None:
    """Tell other replicas once this transaction is committed; on SQLite, where there are none, nothing."""
    if connection.dialect.name == "postgresql":
        connection.info.setdefault(NOTICES, {})[words] = seq


def _not_now(context: ExceptionContext) -> OperationalError | None:
    """An error that the driver files under internal ones, as what it is: ``AWAY``."""
    error = context.sqlalchemy_exception
    state = getattr(context.original_exception, "sqlstate", None)
    if error is None or state not in (READ_ONLY, IDLE):
        return None
    # The next connection may lead to a server that takes writes.
    context.is_disconnect = True
    return OperationalError(
        error.statement, error.params, context.original_exception, hide_parameters=True, connection_invalidated=True
    )


def _commits(connection: Connection) -> None:
    connection.info.setdefault(COMMITTED, {}).update(connection.info.pop(NOTICES, {}))


def _rolls_back(connection: Connection) -> None:
    if not connection.invalidated:  # asking one that was lost raises, in place of why it was lost or of a cancellation
        connection.info.pop(NOTICES, None)


def postgres_arguments(url: URL) -> dict[str, Any]:
    """What each connection to PostgreSQL is opened with beyond ``url``: every wait has an end."""
    given = url.query.get("options", "")
    options = " ".join([POSTGRES_OPTIONS, *([given] if isinstance(given, str) else given)]).strip()
    return {"connect_timeout": CONNECT_SECONDS, "options": options, **POSTGRES_KEEPALIVE}


async def lock_creation(connection: AsyncConnection) -> None:
    """Until the transaction ends nobody else passes here: whoever counts the queue sees every job in it.

    On SQLite nothing: its one writer holds the lock already.
    """
    if connection.dialect.name == "postgresql":
        await _lock(connection, CREATION_LOCK)


async def _lock(connection: AsyncConnection, key: int) -> None:
    await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
