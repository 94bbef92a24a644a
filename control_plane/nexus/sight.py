"""What a viewer may see, by ids alone: a search asks for thousands of rows, and reads what few of them say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, case, func, or_, select

from control_plane.jobs.database import Database
from control_plane.nexus.records import MAX_ATTEMPTS, Vector, Viewer
from control_plane.nexus.store import seen_by
from control_plane.nexus.tables import collections, document_contents, documents

AT_ONCE = 1_000
"""Ids in one statement."""
_PENDING = or_(documents.c.related < documents.c.version, documents.c.graphed < documents.c.wanted)
_FAILED = and_(_PENDING, documents.c.attempts >= MAX_ATTEMPTS)


class Scope(NamedTuple):
    """Documents that a question is about."""

    collections: Sequence[int]
    """Ids."""
    viewer: Viewer
    doc_type: str | None
    """None: any."""


class Counts(NamedTuple):
    """Documents of a collection that a viewer sees."""

    documents: int
    pending: int
    """Of these, those that the graph does not have as they are, and will be told."""
    failed: int
    """Those that were given up."""


class Sight:
    """Reads ids and figures of living documents."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def among(self, rows: Sequence[int], scope: Scope) -> set[int]:
        """Those of these rows that are in scope."""
        found: set[int] = set()
        async with self._database.read.connect() as connection:
            for start in range(0, len(rows), AT_ONCE):
                some = rows[start : start + AT_ONCE]
                found.update(await connection.scalars(_inside(scope).where(documents.c.id.in_(some))))
        return found

    async def rows(self, scope: Scope) -> NDArray[np.int64]:
        """All rows that are in scope, in order."""
        async with self._database.read.connect() as connection:
            found = (await connection.scalars(_inside(scope))).all()
        return np.sort(np.array(found, dtype=np.int64))

    async def counts(self, collection: int, viewer: Viewer) -> Counts:
        """Figures of a collection."""
        query = (
            select(func.count(), func.sum(case((_PENDING, 1), else_=0)), func.sum(case((_FAILED, 1), else_=0)))
            .select_from(documents.join(collections, collections.c.id == documents.c.collection))
            .where(documents.c.collection == collection, seen_by(viewer))
        )
        async with self._database.read.connect() as connection:
            living, pending, failed = (await connection.execute(query)).one()
        return Counts(living, int(pending or 0) - int(failed or 0), int(failed or 0))

    async def vector(self, document: int) -> Vector | None:
        """The vector of a document; None where it was deleted."""
        query = select(document_contents.c.vector).where(document_contents.c.document == document)
        async with self._database.read.connect() as connection:
            data = await connection.scalar(query)
        return None if data is None else np.frombuffer(data, dtype="<f4")


def _inside(scope: Scope) -> Select[Any]:
    query = (
        select(documents.c.id)
        .join(collections, collections.c.id == documents.c.collection)
        .where(documents.c.collection.in_(scope.collections), seen_by(scope.viewer))
    )
    return query if scope.doc_type is None else query.where(documents.c.doc_type == scope.doc_type)
