"""What only PostgreSQL shows: replicas that share a database, and a database that goes away and comes back."""

from __future__ import annotations

import asyncio

from sqlalchemy import func, select

from control_plane.jobs.database import Database
from control_plane.jobs.tables import jobs


def test_replicas_that_start_at_once_on_an_empty_database_all_find_the_tables(postgres_url: str) -> None:
    async def inside() -> None:
        replicas = [Database(postgres_url) for _ in range(4)]
        await asyncio.gather(*(replica.migrate() for replica in replicas))
        for replica in replicas:
            async with replica.read.connect() as connection:
                assert await connection.scalar(select(func.count()).select_from(jobs)) == 0
            await replica.close()

    asyncio.run(inside())
