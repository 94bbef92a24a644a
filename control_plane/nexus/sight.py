"""What a viewer may see, by ids alone: a search asks for thousands of rows, and reads what few of them say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, FromClause, Select, String, and_, cast, func, literal_column, select

from control_plane.jobs.database import Database
from control_plane.nexus.records import MAX_ATTEMPTS, Vector, Viewer
from control_plane.nexus.statements import INSIDE, UNGRAPHED, UNRELATED
from control_plane.nexus.store import seen_by
from control_plane.nexus.tables import collections, document_contents, documents, mentions, relations, spaces

AT_ONCE = 1_000
"""Ids in one statement."""
PAGE = 1_000
"""Rows of one statement, where all are read."""
LOOKED_AT = 1_000
"""Documents of one name, at most: of more nobody looks at each, however few of them a viewer sees."""


class Scope(NamedTuple):
    """Documents that a question is about."""

    collections: Sequence[int] | None
    """Ids; None: all that the viewer sees."""
    viewer: Viewer
    doc_type: str | None = None
    """None: any."""
    domains: Sequence[str] = ()
    """None of them: any."""


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

    async def inside(self, space: str, viewer: Viewer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All rows of a space that a viewer sees, in order, and their collections; a page at a time, so that nobody
        else waits."""
        query = select(documents.c.id, documents.c.collection, seen_by(viewer)).join(collections, INSIDE)
        of = select(spaces.c.id).where(spaces.c.name == space).scalar_subquery()
        query = query.where(documents.c.space == of).order_by(documents.c.id).limit(PAGE)
        found = [np.empty((0, 2), np.int64)]
        after = 0
        while True:
            async with self._database.read.connect() as connection:
                page = (await connection.execute(query.where(documents.c.id > after))).all()
            found.append(np.array([(row, its) for row, its, seen in page if seen], np.int64).reshape(-1, 2))
            if len(page) < PAGE:
                rows, inside = np.concatenate(found).T
                return rows, inside
            after = page[-1][0]

    async def names(self, ids: Sequence[int]) -> dict[int, str]:
        """Of collections that are there."""
        query = select(collections.c.id, collections.c.name).where(collections.c.id.in_(ids), ~collections.c.deleted)
        async with self._database.read.connect() as connection:
            return {row.id: row.name for row in await connection.execute(query)}

    async def counts(self, collection: int, viewer: Viewer) -> Counts:
        """Figures of a collection. Documents that every key sees are counted in an index that has nothing else; rows
        are read of restricted ones, and of those that the graph does not have."""
        seen, open_to_all = seen_by(viewer), documents.c.permissions == literal_column("'[]'")
        living = select(func.count()).select_from(documents.join(collections, INSIDE))
        living = living.where(documents.c.collection == collection)
        # As a sum no index knows the collection: SQLite takes that of the condition.
        given_up = documents.c.attempts >= MAX_ATTEMPTS
        late = select(given_up, func.count()).group_by(given_up)
        late = late.select_from(documents.join(collections, collections.c.id == documents.c.collection + 0))
        late = late.where(documents.c.collection + 0 == collection, seen)
        behind = {False: 0, True: 0}
        async with self._database.read.connect() as connection:
            count = 0
            for some in ((open_to_all, seen_by(viewer._replace(key=None))), (~open_to_all, seen)):
                count += await connection.scalar(living.where(*some)) or 0
            for condition in (UNRELATED, and_(UNGRAPHED, ~UNRELATED)):
                for failed, several in await connection.execute(late.where(condition)):
                    behind[bool(failed)] += several
        return Counts(count, behind[False], behind[True])

    async def vector(self, document: int) -> Vector | None:
        """The vector of a document; None where it was deleted."""
        query = select(document_contents.c.vector).where(document_contents.c.document == document)
        async with self._database.read.connect() as connection:
            data = await connection.scalar(query)
        return None if data is None else np.frombuffer(data, dtype="<f4")

    async def space(self, document: int) -> str:
        """The name of the space of a document; empty where its row is gone."""
        query = select(spaces.c.name).join(documents, documents.c.space == spaces.c.id)
        async with self._database.read.connect() as connection:
            return await connection.scalar(query.where(documents.c.id == document)) or ""

    async def domains(self, rows: Sequence[int]) -> dict[int, str]:
        """Of rows that are there."""
        found: dict[int, str] = {}
        async with self._database.read.connect() as connection:
            for start in range(0, len(rows), AT_ONCE):
                query = select(documents.c.id, documents.c.domain).where(
                    documents.c.id.in_(rows[start : start + AT_ONCE])
                )
                found.update((row, domain) for row, domain in await connection.execute(query))
        return found

    # --- what hangs together -----------------------------------------------------------------------------------------

    async def entities(self, row: int, viewer: Viewer) -> list[tuple[str, int]]:
        """What a document names, and how many documents that the viewer sees do; of what more than ``LOOKED_AT`` name,
        so many of these are looked at."""
        own = select(mentions.c.entity).where(mentions.c.document == row, mentions.c.wanted).subquery()
        searched = select(collections.c.space).where(collections.c.client == viewer.client, ~collections.c.deleted)
        first = _first_of(own, searched).subquery()
        seen = documents.join(collections, INSIDE)
        count = select(func.count()).select_from(first.join(seen, documents.c.id == first.c.document))
        count = count.where(first.c.wanted, seen_by(viewer)).correlate(own)
        async with self._database.read.connect() as connection:
            found = await connection.execute(select(own.c.entity, count.scalar_subquery()))
            return sorted(((entity, count) for entity, count in found), key=lambda one: (-one[1], one[0]))

    async def naming(self, rows: Sequence[int], scope: Scope, most: int) -> list[list[int]]:
        """Of each thing that some of these rows name, the documents that name it: of those that the viewer sees in the
        spaces of the collections, and only where they are at most so many, and no more than ``LOOKED_AT`` with those
        that it does not see."""
        own = select(mentions.c.entity).where(mentions.c.document.in_(rows), mentions.c.wanted).distinct().subquery()
        of = mentions.alias()
        searched = select(collections.c.space).where(collections.c.id.in_(scope.collections or ()))
        there = (
            select(of.c.document.label("other"))
            .select_from(of.join(documents, documents.c.id == of.c.document).join(collections, INSIDE))
            .where(of.c.entity == own.c.entity, of.c.wanted, of.c.space.in_(searched), seen_by(scope.viewer))
        )
        looked_at = select(func.count()).select_from(_first_of(own, searched).offset(LOOKED_AT).limit(1).subquery())
        few = looked_at.correlate(own).scalar_subquery() == 0
        async with self._database.read.connect() as connection:
            found = await connection.scalars(select(_listed(there, own, most)).select_from(own).where(few))
            groups = [_ids(group) for group in found]
        return [group for group in groups if len(group) <= most]

    async def told(self, rows: Sequence[int], viewer: Viewer, most: int) -> dict[int, list[int]]:
        """Which documents that the viewer sees graphs told to have a relationship with these, in any direction; of rows
        that have at most so many."""
        this = select(documents.c.id).where(documents.c.id.in_(rows)).subquery()

        def others(mine: ColumnElement[int], other: ColumnElement[int]) -> Select[Any]:
            return (
                select(other.label("other"))
                .distinct()
                .select_from(relations.join(documents, documents.c.id == other).join(collections, INSIDE))
                .where(mine == this.c.id, other != mine, relations.c.deleted.is_(False), seen_by(viewer))
            )

        ends = relations.c.source, relations.c.target
        both = [_listed(others(*way), this, most) for way in (ends, ends[::-1])]
        async with self._database.read.connect() as connection:
            found = (await connection.execute(select(this.c.id, *both))).all()
        joined = {row: sorted({*_ids(out), *_ids(into)}) for row, out, into in found}
        return {row: there for row, there in joined.items() if len(there) <= most}


def _listed(query: Select[Any], of: FromClause, most: int) -> ColumnElement[Any]:
    """The column ``other`` of a query that is asked for each row of something, as text; one more than ``most``, so
    that no more rows are read."""
    few = query.limit(most + 1).correlate(of).subquery()
    return select(func.aggregate_strings(cast(few.c.other, String), ",")).correlate(of).scalar_subquery()


def _first_of(own: FromClause, inside: Select[Any]) -> Select[Any]:
    """Who names each entity of ``own`` in some spaces, as far as they are looked at."""
    of = mentions.alias()
    found = select(of.c.document, of.c.wanted).where(of.c.entity == own.c.entity, of.c.space.in_(inside))
    return found.limit(LOOKED_AT).correlate(own)


def _ids(listed: str | None) -> list[int]:
    return sorted(map(int, listed.split(","))) if listed else []


def _inside(scope: Scope) -> Select[Any]:
    query = select(documents.c.id).join(collections, INSIDE).where(seen_by(scope.viewer))
    if scope.collections is not None:
        query = query.where(documents.c.collection.in_(scope.collections))
    if scope.doc_type is not None:
        query = query.where(documents.c.doc_type == scope.doc_type)
    return query.where(documents.c.domain.in_(scope.domains)) if scope.domains else query
