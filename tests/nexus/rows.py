"""A store of collections over an empty database, SQLite or PostgreSQL, and documents for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Table, select, text

from control_plane.jobs.database import Database
from control_plane.nexus.records import (
    Collection,
    Document,
    Graphed,
    Near,
    NewDocument,
    Related,
    Row,
    Viewer,
    Written,
    unpack_near,
)
from control_plane.nexus.store import EVERYTHING, CollectionStore

NOW = 1_800_000_000_000
"""Milliseconds, of the clocks of tests."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


def new(doc_id: str, words: str = "", *, numbers: Sequence[float] = (1, 0), **more: Any) -> NewDocument:
    """A document that says something."""
    fields: dict[str, Any] = {
        "title": f"Title of {doc_id}",
        "payload": {},
        "doc_type": "note",
        "permissions": (),
        **more,
    }
    return NewDocument(doc_id=doc_id, text=words, vector=np.array(numbers, dtype=np.float32), **fields)


@dataclass
class House:
    """A store, and the collection ``books`` of the client ``red``."""

    url: str
    database: Database
    store: CollectionStore
    books: Collection

    async def write(self, *documents: NewDocument, viewer: Viewer = EVERYTHING, now: int = NOW) -> list[Written]:
        """Write into the collection."""
        return await self.store.write(self.books, documents, now=now, viewer=viewer)

    async def put(self, *doc_ids: str) -> list[int]:
        """Write documents of these ids; answers those of their rows."""
        return [one.id for one in await self.write(*(new(doc_id) for doc_id in doc_ids))]

    async def document(self, doc_id: str, viewer: Viewer = EVERYTHING) -> Document:
        """One that is there."""
        [found] = await self.store.get(self.books, [doc_id], viewer)
        return found

    async def row(self, document: int) -> Row:
        """What the engine sees of a row."""
        [found] = await self.store.rows_after(document - 1, 1)
        assert found.id == document
        return found

    async def table(self, table: Table) -> list[dict[str, Any]]:
        """All rows of a table, in the order of its key."""
        async with self.database.read.connect() as connection:
            found = await connection.execute(select(table).order_by(*table.primary_key.columns))
            return [dict(row._mapping) for row in found]

    async def execute(self, statement: str) -> list[Any]:
        """Run a statement, as somebody who knows the tables; answers its rows."""
        async with self.database.write.begin() as connection:
            found = await connection.execute(text(statement))
            return list(found) if found.returns_rows else []

    async def relate(self, lists: Mapping[int, Sequence[Near]] | None = None, **entities: Sequence[str]) -> None:
        """Compare all that waits, as the engine would: these are the lists that change, and what documents name by
        their ids."""
        doc_ids = {row.id: row.doc_id for row in await self.store.rows_after(0, 10_000)}
        done = [
            Related(one.id, one.version, "" if one.deleted else "general", frozenset(entities.get(doc_ids[one.id], ())))
            for one in await self.store.unrelated(10_000)
        ]
        await self.store.put_related(done, lists or {})

    async def graph(self, now: int = NOW) -> list[Row]:
        """Tell a graph all that waits, as the engine would; answers that."""
        rows = await self.store.ungraphed(10_000, now)
        await self.store.put_intended({row.id: unpack_near(row.near) for row in rows})
        await self.store.put_graphed(
            [Graphed(row.id, row.wanted, row.near, row.mentions, row.version) for row in rows], now
        )
        return rows

    async def forget(self) -> None:
        """Let the graph have everything, and sweep an hour and more later."""
        await self.relate()
        await self.graph()
        while await self.store.sweep(NOW + 10_000_000_000_000):
            pass
        await self.store.sweep(NOW)


def run(url: str, scenario: Callable[[House], Awaitable[None]]) -> None:
    """Run a scenario over an empty database, by the replica that has the lease."""

    async def inside() -> None:
        database = Database(url)
        await database.migrate()
        try:
            store = CollectionStore(database, replica="first")
            assert await store.take_lease()
            books, _ = await store.put_collection("red", "books", "model", 2)
            await scenario(House(url, database, store, books))
        finally:
            await database.close()

    asyncio.run(inside())
