"""The driver of SQLite: aiosqlite with one visit to the connection's thread for each statement.

aiosqlite itself takes four (cursor, execute, fetch, close), and one to roll back what only read. Each is a turn of a
busy event loop, and they were most of the time that a small answer took.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import aiosqlite
from sqlalchemy import Connection, CursorResult, Engine, ScalarResult, StaticPool, create_engine

T = TypeVar("T")


class _Done(NamedTuple):
    """What a statement has left when its cursor is closed."""

    rows: list[Any]
    description: Any
    rowcount: int
    lastrowid: int | None


def connect(database: str, **options: Any) -> SqliteConnection:
    """A connection to be awaited; the arguments are those of ``sqlite3.connect``."""
    return SqliteConnection(lambda: sqlite3.connect(database, **options))


class SqliteConnection(aiosqlite.Connection):
    """As SQLAlchemy's dialect ``sqlite+aiosqlite`` wants it."""

    def __init__(self, connector: Any) -> None:
        super().__init__(connector, iter_chunk_size=0)
        self._thread.daemon = True
        self._unknown = False
        """A statement was not waited for, so nobody knows whether a transaction is open or will be."""
        self._engine: Engine | None = None
        """Over this connection, for its thread."""

    def cursor(self) -> Any:
        """A cursor for one statement."""
        return _Cursor(self)

    async def run(self, call: Callable[..., Any], sql: str, parameters: Any) -> _Done:
        """Run a statement by a method of ``sqlite3.Cursor`` and fetch all its rows."""
        self._unknown = True
        visit: Any = self._execute  # which has no types
        done: _Done = await visit(_run, self._conn, call, sql, parameters)
        self._unknown = False
        return done

    async def transaction(self, work: Callable[[Any], Coroutine[Any, Any, T]], *, relaxed: bool) -> T:
        """Run a whole transaction in one visit to the thread: ``work`` gets an ``Inline`` and may await nothing else.
        ``relaxed``: its commit does not wait for the disk."""
        self._unknown = True
        visit: Any = self._execute
        found: T = await visit(self._transaction, work, relaxed)
        self._unknown = False
        return found

    def _transaction(self, work: Callable[[Any], Coroutine[Any, Any, T]], relaxed: bool) -> T:
        if self._engine is None:
            self._engine = create_engine(
                "sqlite://", creator=lambda: self._conn, poolclass=StaticPool, hide_parameters=True
            )
        with self._engine.connect() as connection:
            if relaxed:
                connection.exec_driver_sql("PRAGMA synchronous=NORMAL")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                found = _whole(work(Inline(connection)))
                connection.commit()
                return found
            finally:
                connection.rollback()
                if relaxed:
                    connection.exec_driver_sql("PRAGMA synchronous=FULL")

    async def rollback(self) -> None:
        """Roll back, where there may be anything to."""
        if self._unknown or self.in_transaction:
            await super().rollback()
            self._unknown = False


def _run(connection: sqlite3.Connection, call: Callable[..., Any], sql: str, parameters: Any) -> _Done:
    with closing(connection.cursor()) as cursor:
        call(cursor, sql, parameters)
        rows = cursor.fetchall() if cursor.description else []
        return _Done(rows, cursor.description, cursor.rowcount, cursor.lastrowid)


def _whole(work: Coroutine[Any, Any, T]) -> T:
    try:
        work.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    work.close()
    raise RuntimeError("A transaction that is one visit waits for something else than its connection.")


class Inline:
    """A connection of SQLAlchemy in the thread that it belongs to, with the methods of one that is awaited; none of
    them waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def execute(self, *statement: Any) -> CursorResult[Any]:
        """See ``AsyncConnection``, here and below."""
        return self._connection.execute(*statement)

    async def scalar(self, *statement: Any) -> Any:
        return self._connection.scalar(*statement)

    async def scalars(self, *statement: Any) -> ScalarResult[Any]:
        return self._connection.scalars(*statement)

    async def exec_driver_sql(self, statement: str) -> CursorResult[Any]:
        return self._connection.exec_driver_sql(statement)


class _Cursor:
    arraysize = 1

    def __init__(self, connection: SqliteConnection) -> None:
        self._connection = connection
        self._done = _Done([], None, -1, None)

    async def __aenter__(self) -> _Cursor:
        return self

    async def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        self._done = await self._connection.run(sqlite3.Cursor.execute, sql, parameters)
        return self

    async def executemany(self, sql: str, parameters: Any) -> _Cursor:
        self._done = await self._connection.run(sqlite3.Cursor.executemany, sql, parameters)
        return self

    async def fetchall(self) -> list[Any]:
        return self._done.rows

    async def close(self) -> None:
        """It is closed already."""

    @property
    def description(self) -> Any:
        return self._done.description

    @property
    def rowcount(self) -> int:
        return self._done.rowcount

    @property
    def lastrowid(self) -> int | None:
        return self._done.lastrowid
