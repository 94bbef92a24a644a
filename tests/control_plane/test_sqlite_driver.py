"""The driver under SQLAlchemy's dialect of SQLite."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import beside
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.jobs.database import Database

NORMAL, FULL = 1, 2
"""Levels of ``PRAGMA synchronous``."""


def _with_database(root: Path, scenario: Callable[[Database], Awaitable[None]]) -> None:
    async def inside() -> None:
        database = Database(f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}")
        try:
            async with database.write.begin() as connection:
                await connection.execute(text("CREATE TABLE numbers (number INTEGER PRIMARY KEY)"))
                await connection.execute(text("INSERT INTO numbers VALUES (1), (2)"))
            async with database.read.connect() as connection:
                await connection.execute(text("SELECT 1"))
            await scenario(database)
        finally:
            await database.close()

    asyncio.run(inside())


def _visits(caplog: pytest.LogCaptureFixture) -> int:
    """How often a connection's thread was gone to since the last time."""
    count = sum(record.getMessage().startswith("executing") for record in caplog.records)
    caplog.clear()
    return count


def test_each_statement_and_each_commit_is_one_visit_to_the_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(database: Database) -> None:
        with caplog.at_level(logging.DEBUG, logger="aiosqlite"):
            async with database.read.connect() as connection:
                rows = (await connection.execute(text("SELECT number FROM numbers ORDER BY number"))).all()
            assert ([*map(tuple, rows)], _visits(caplog)) == ([(1,), (2,)], 1)
            async with database.write.begin() as connection:
                done = await connection.execute(text("INSERT INTO numbers VALUES (3) RETURNING number"))
                assert (done.scalar_one(), _visits(caplog)) == (3, 1)
                done = await connection.execute(text("UPDATE numbers SET number = number + 10 WHERE number > 1"))
                assert (done.rowcount, _visits(caplog)) == (2, 1)
                many = [{"number": number} for number in range(100, 300)]
                await connection.execute(text("INSERT INTO numbers VALUES (:number)"), many)
                assert _visits(caplog) == 1
            assert _visits(caplog) == 1

    _with_database(tmp_path, scenario)


def test_a_statement_that_fails_takes_its_transaction_along(tmp_path: Path) -> None:
    async def scenario(database: Database) -> None:
        async def add(*numbers: int) -> None:
            async with database.write.begin() as connection:
                for number in numbers:
                    await connection.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})

        with pytest.raises(IntegrityError):
            await add(3, 1)
        await beside.change(tmp_path / "jobs.sqlite", "INSERT INTO numbers VALUES (4)")  # nothing is locked
        async with database.read.connect() as connection:
            assert list(await connection.scalars(text("SELECT number FROM numbers"))) == [1, 2, 4]

    _with_database(tmp_path, scenario)


def test_a_transaction_may_be_one_visit_to_the_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(database: Database) -> None:
        async def add(connection: AsyncConnection) -> list[int]:
            await connection.execute(text("INSERT INTO numbers VALUES (:number)"), [{"number": 3}, {"number": 4}])
            assert await connection.scalar(text("SELECT max(number) FROM numbers")) == 4
            return list(await connection.scalars(text("SELECT number FROM numbers ORDER BY number")))

        with caplog.at_level(logging.DEBUG, logger="aiosqlite"):
            assert await database.at_once(add) == [1, 2, 3, 4]
            assert _visits(caplog) == 1
        async with database.read.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM numbers")) == 4

    _with_database(tmp_path, scenario)


@pytest.mark.parametrize("relaxed", [False, True])
def test_such_a_transaction_happens_as_a_whole_and_the_next_one_waits_for_the_disk_again(
    tmp_path: Path, *, relaxed: bool
) -> None:
    levels: list[int] = []

    async def scenario(database: Database) -> None:
        async def put(connection: AsyncConnection, *numbers: int) -> None:
            levels.append((await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one())
            for number in numbers:
                await connection.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})

        async def put_and_wait(connection: AsyncConnection) -> None:
            await put(connection, 5)
            await asyncio.sleep(0)

        await database.at_once(lambda connection: put(connection, 3), relaxed=relaxed)
        with pytest.raises(IntegrityError):
            await database.at_once(lambda connection: put(connection, 4, 1), relaxed=relaxed)
        with pytest.raises(RuntimeError, match="waits for something else"):
            await database.at_once(put_and_wait, relaxed=relaxed)
        canceled = asyncio.create_task(database.at_once(lambda connection: put(connection, 6), relaxed=relaxed))
        await asyncio.sleep(0)
        canceled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await canceled
        await beside.change(tmp_path / "jobs.sqlite", "INSERT INTO numbers VALUES (7)")  # nothing is locked
        async with database.write.begin() as connection:
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one() == FULL
            assert set(await connection.scalars(text("SELECT number FROM numbers"))) - {6} == {1, 2, 3, 7}

    _with_database(tmp_path, scenario)
    assert set(levels) == {NORMAL if relaxed else FULL}
