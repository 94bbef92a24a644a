"""Collections and their documents in a database, and how far the graph is behind them.

Every change of a document has a number of its own from one counter, which a transaction holds until its end: whoever
has seen a number has seen all smaller ones. What people ask takes a ``Viewer``; what that may not see is in no answer.
What the graph was told is put here by the replica that has the lease, and by no other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, cast

import msgspec
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Delete,
    Insert,
    ScalarSelect,
    Select,
    String,
    TableValuedAlias,
    TextClause,
    Update,
    and_,
    any_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy import Row as Found
from sqlalchemy.ext.asyncio import AsyncConnection

from common.errors import ExportError, InvalidRequest, Retry
from control_plane.errors import CollectionDiffers, CollectionNotFound, DocumentNotFound
from control_plane.jobs.database import Database, db_now
from control_plane.nexus.domains import MAX_CHARS as CLASSIFIED
from control_plane.nexus.entities import MAX_CHARS as SEARCHED
from control_plane.nexus.records import (
    HELD,
    MAX_ATTEMPTS,
    MAX_COLLECTIONS,
    MAYBE_HELD,
    NOT_HELD,
    Backlog,
    Collection,
    CollectionCounts,
    Document,
    Failure,
    Graphed,
    LookKind,
    Mentioned,
    Near,
    NewDocument,
    Related,
    Row,
    SyncState,
    Told,
    Unrelated,
    VectorRow,
    Viewer,
    Written,
    pack_near,
    unpack_near,
)
from control_plane.nexus.statements import (
    BURY,
    CHANGE_MENTION,
    DISTRUSTED,
    DROP_MENTION,
    GIVEN_UP,
    INSIDE,
    LIVES,
    MERGE_WORDS,
    NEVER,
    NEXT_VERSIONS,
    NOTE_CHANGE,
    NOTE_MENTION,
    PENDING,
    PUT_CONTENTS,
    PUT_GRAPHED,
    PUT_INTENDED,
    PUT_MENTION,
    PUT_NEAR,
    PUT_RELATED,
    ROWS,
    TOMBSTONE,
    UNGRAPHED,
    UNRELATED,
    WRITTEN,
    Place,
    lexical,
    put_document,
    spaces_with,
)
from control_plane.nexus.tables import (
    client_changes,
    collections,
    document_contents,
    documents,
    last_version,
    mentions,
    node_changes,
    relations,
    spaces,
    sync_state,
)

T = TypeVar("T")

EVERYTHING = Viewer(None, None)
"""Sees all documents of all clients."""
HIDDEN = "there is a document of this id that the key does not see; use another id"
LEASE_MS = 5_000
"""A replica that does not renew for so long may lose the lease to another one."""
TOMBSTONE_MS = 3_600_000
"""The row of a deleted document stays for so long, so that the memory of other replicas hears of it."""
STEP = 1_000
"""Documents of one transaction, where something is done to all: so nobody waits long for the database."""
SPACES = 10
"""Whose documents are taken at once, where more wait than are taken."""
NO_BACKLOG = Backlog(0, 0, None, 0)
MAX_ERROR = 1_000
"""Characters kept of what a graph said."""

_HALF = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON may bring and UTF-8 does not know."""
_Mentions = dict[tuple[int, str], tuple[bool, int]]
"""By document and entity: whether it is wanted, and what the graph holds."""


class LeaseLost(ExportError):
    """Another replica keeps the graph in step, or none does."""

    code = "LEASE_LOST"
    retry = Retry.later


def seen_by(viewer: Viewer) -> ColumnElement[bool]:
    """Which documents live and are there for a viewer; of a query of ``documents`` joined with ``collections``."""
    mine = [] if viewer.client is None else [collections.c.client == viewer.client]
    if viewer.key is not None:
        shown = documents.c.permissions == "[]", Place(documents.c.permissions, literal(_quoted(viewer.key))) > 0
        mine.append(or_(*shown))
    return and_(LIVES, *mine)


class CollectionStore:
    """All that is known about collections and their documents."""

    def __init__(self, database: Database, *, replica: str = "replica") -> None:
        """``replica`` names the server among those that share the database."""
        self.replica = replica
        self._database = database
        self._postgres = database.postgres
        self._put, self._put_one = put_document(postgres=self._postgres)

    # --- collections -------------------------------------------------------------------------------------------------

    async def put_collection(self, client: str, name: str, model: str, dimension: int) -> tuple[Collection, bool]:
        """The collection of this name, and whether it is new. Raises CollectionDiffers where it has another model or
        dimension, and InvalidRequest where the client may have no new one."""
        if (found := await self._collection(client, name)) is None:
            space = f"{client}/{model}/{dimension}"
            async with self._database.write.begin() as connection:
                await _versions(connection, 0)
                inside = await connection.scalar(select(spaces.c.id).where(spaces.c.name == space))
                if inside is None:
                    made = insert(spaces).values(name=space, dimension=dimension).returning(spaces.c.id)
                    inside = await connection.scalar(made)
                known = await connection.scalar(select(collections.c.id).where(*_named(client, name)))
                if known is None:
                    await _check_room(connection, client)
                    row = {"client": client, "name": name, "space": inside, "model": model, "dimension": dimension}
                    values = insert(collections).values(**row, created_at=db_now(), deleted=False)
                    made = values.returning(collections.c.id, collections.c.created_at)
                    number, created_at = (await connection.execute(made)).one()
                    return Collection(number, client, name, space, model, dimension, created_at), True
            found = await self.collection(client, name)
        if (found.model, found.dimension) != (model, dimension):
            raise CollectionDiffers(
                f"There is a collection {name} of the model {found.model} with {found.dimension} numbers a vector; "
                "use another name, or delete it first.",
                model=found.model,
                dimension=found.dimension,
            )
        return found, False

    async def collection(self, client: str, name: str) -> Collection:
        """One collection. Raises CollectionNotFound."""
        if (found := await self._collection(client, name)) is None:
            raise _no_collection()
        return found

    async def _collection(self, client: str, name: str) -> Collection | None:
        async with self._database.read.connect() as connection:
            row = (await connection.execute(_collections().where(*_named(client, name)))).one_or_none()
        return None if row is None else Collection(*row)

    async def collections(self, client: str | None, after: str, limit: int) -> list[Collection]:
        """Those after the one named ``after``, by name; where ``client`` is None those of all clients, by name and
        client, after ``name/client``."""
        query = _collections().where(~collections.c.deleted).order_by(collections.c.name, collections.c.client)
        if client is None:
            name, _, owner = after.rpartition("/")
            query = query.where(tuple_(collections.c.name, collections.c.client) > (name, owner))
        else:
            query = query.where(collections.c.client == client, collections.c.name > after)
        async with self._database.read.connect() as connection:
            return [Collection(*row) for row in await connection.execute(query.limit(limit))]

    async def drop_collection(self, collection: Collection) -> int:
        """Delete a collection; answers how many documents it had. Nobody sees these from the first moment on; they are
        deleted some at a time, and what is left where this does not come to its end, ``sweep`` deletes.

        Raises CollectionNotFound.
        """
        async with self._database.write.begin() as connection:
            await _versions(connection, 0)
            gone = update(collections).where(collections.c.id == collection.id, ~collections.c.deleted)
            if not (await connection.execute(gone.values(deleted=True))).rowcount:
                raise _no_collection()
            living = select(func.count()).where(documents.c.collection == collection.id, ~documents.c.deleted)
            count = await connection.scalar(living) or 0
            await note_changes(connection, [collection.client])
        while await self._bury_some(collection.id):
            pass
        return count

    # --- documents ---------------------------------------------------------------------------------------------------

    async def write(
        self,
        collection: Collection,
        new: Sequence[NewDocument],
        *,
        now: int,
        viewer: Viewer = EVERYTHING,
        leading: bool = False,
    ) -> list[Written]:
        """Write documents, as many as fit into one transaction, each in place of the one that has its id, all of them
        or none; ``leading``: only as the replica that has the lease.

        Raises LeaseLost, CollectionNotFound where it was deleted, DocumentNotFound where an id is that of a document
        that the viewer does not see, or that a client wrote while this one is of an export, and InvalidRequest for an
        id that comes twice or that no database takes, or a vector of another dimension.
        """
        if not new:
            return []
        _check(collection, new)
        rows = [_document_row(collection, one, now, viewer) for one in new]
        contents = [_contents_row(one) for one in new]

        async def work(connection: AsyncConnection) -> dict[int, Any]:
            base = await _versions(connection, len(rows))
            for version, row in enumerate(rows, base + 1):
                row["version"] = version
            if len(rows) == 1:
                found = await connection.execute(self._put_one, rows[0])
            else:
                if self._postgres:  # in the order in which the sync engine locks them
                    mine = self._of(collection, [one.doc_id for one in new])
                    there = select(documents.c.id).where(mine, ~documents.c.deleted)
                    await connection.execute(there.order_by(documents.c.id).with_for_update())
                await connection.execute(self._put, rows)
                found = await connection.execute(WRITTEN, {"collection": collection.id, "base": base})
            put = {row.version: row for row in found}
            if len(put) < len(rows):
                living = select(collections.c.id).where(collections.c.id == collection.id, ~collections.c.deleted)
                if await connection.scalar(living) is None:
                    raise _no_collection()
                refused = next(number for number, row in enumerate(rows) if row["version"] not in put)
                field = f"documents[{refused}].id"
                raise DocumentNotFound(f"{field}: {HIDDEN}", field=field)
            for row, content in zip(rows, contents, strict=True):
                content["document"] = put[row["version"]].id
            await connection.execute(PUT_CONTENTS, contents)
            await note_changes(connection, [collection.client])
            return put

        put = await (self._led(work) if leading else self._database.at_once(work))
        written = (put[row["version"]] for row in rows)
        return [
            Written(one.doc_id, row.id, row.version, row.first_version == row.version)
            for one, row in zip(new, written, strict=True)
        ]

    async def delete(
        self,
        collection: Collection,
        doc_ids: Sequence[str],
        *,
        now: int,
        viewer: Viewer = EVERYTHING,
        exported: bool = False,
    ) -> int:
        """Delete those that are there for the viewer; answers how many. ``exported``: those alone that an export wrote,
        as the replica that has the lease (raises LeaseLost). What they said is gone with that. Of the names
        that they mention those stay that the graph holds, until it does not any more."""
        async with self._writing(leading=exported) as connection:
            base = await _versions(connection, len(doc_ids))
            query = select(documents.c.id).join(collections, collections.c.id == documents.c.collection)
            query = query.where(self._of(collection, doc_ids), seen_by(viewer)).with_for_update(of=documents)
            if exported:
                query = query.where(documents.c.exported != "")
            # As a sum no index has this order: SQLite would read the whole collection in it.
            ids = list(await connection.scalars(query.order_by(documents.c.id + 0)))
            await self._bury(connection, ids, base, now)
            await note_changes(connection, [collection.client] if ids else [])
            return len(ids)

    async def exported(self, collection: Collection, doc_ids: Sequence[str]) -> dict[str, str]:
        """Of those that live what exports wrote, by id; empty where a client did."""
        query = select(documents.c.doc_id, documents.c.exported)
        query = query.where(self._of(collection, doc_ids), ~documents.c.deleted)
        async with self._database.read.connect() as connection:
            return {row.doc_id: row.exported for row in await connection.execute(query)}

    async def exported_after(self, collection: Collection, after: int, limit: int) -> list[tuple[int, str]]:
        """Rows and ids of those that live and that exports wrote, with ids of rows above ``after``, in their order."""
        query = select(documents.c.id, documents.c.doc_id).where(
            documents.c.collection == collection.id,
            documents.c.id > after,
            ~documents.c.deleted,
            documents.c.exported != "",
        )
        async with self._database.read.connect() as connection:
            found = await connection.execute(query.order_by(documents.c.id).limit(limit))
            return [(row.id, row.doc_id) for row in found]

    async def get(self, collection: Collection, doc_ids: Sequence[str], viewer: Viewer) -> list[Document]:
        """Those that are there for the viewer, in the order that was asked for."""
        async with self._database.read.connect() as connection:
            query = _documents(viewer, texts=True).where(self._of(collection, doc_ids))
            found = await connection.execute(query)
            by_id = {row.doc_id: _document_of(row) for row in found}
        return [by_id[doc_id] for doc_id in doc_ids if doc_id in by_id]

    async def by_ids(self, ids: Sequence[int], viewer: Viewer) -> dict[int, Document]:
        """Those that are there for the viewer, by the ids of their rows; without their texts."""
        async with self._database.read.connect() as connection:
            found = await connection.execute(_documents(viewer).where(self._among(documents.c.id, ids)))
            return {row.id: _document_of(row) for row in found}

    async def listing(self, collection: Collection, viewer: Viewer, *, after: int, limit: int) -> list[Document]:
        """Those with ids of rows above ``after``, in their order; without their texts."""
        query = _documents(viewer).where(documents.c.collection == collection.id, documents.c.id > after)
        async with self._database.read.connect() as connection:
            found = await connection.execute(query.order_by(documents.c.id).limit(limit))
            return [_document_of(row) for row in found]

    async def count(self, collection: Collection, viewer: Viewer) -> int:
        """How many are there for the viewer."""
        query = select(func.count()).select_from(documents.join(collections, INSIDE)).where(seen_by(viewer))
        async with self._database.read.connect() as connection:
            return await connection.scalar(query.where(documents.c.collection == collection.id)) or 0

    async def words(
        self,
        inside: Sequence[int],
        query: str,
        viewer: Viewer,
        limit: int,
        *,
        doc_type: str | None = None,
        domains: Sequence[str] = (),
    ) -> list[tuple[int, float]]:
        """Rows of these collections with any word of a question in title or text, and how well they fit (more is
        better, and no other scale), best first; of one type, of some domains, where these are given."""
        if (found := lexical(query, postgres=self._postgres)) is None:
            return []
        # A sum, for the same reason as there.
        found = found.where(self._among(documents.c.collection + 0, inside), seen_by(viewer)).limit(limit)
        if doc_type is not None:
            found = found.where(documents.c.doc_type == doc_type)
        if domains:
            found = found.where(documents.c.domain.in_(domains))
        async with self._database.read.connect() as connection:
            return [(number, float(score)) for number, score in await connection.execute(found)]

    # --- what is to be compared --------------------------------------------------------------------------------------

    async def spaces(self) -> list[tuple[str, int]]:
        """Names and dimensions of spaces that have documents."""
        query = select(spaces.c.name, spaces.c.dimension).where(exists().where(documents.c.space == spaces.c.id))
        async with self._database.read.connect() as connection:
            return [(name, dimension) for name, dimension in await connection.execute(query.order_by(spaces.c.name))]

    async def changed_since(self, space: str, version: int, limit: int) -> list[VectorRow]:
        """Documents that have changed after a version, in the order of their last changes."""
        query = (
            select(documents.c.id, documents.c.version, documents.c.deleted, document_contents.c.vector)
            .select_from(documents.outerjoin(document_contents))
            .where(documents.c.space == _space(space), documents.c.version > version)
            .order_by(documents.c.version)
            .limit(limit)
        )
        async with self._database.read.connect() as connection:
            return [VectorRow(*row[:3], row[3] or b"") for row in await connection.execute(query)]

    async def lists(self, space: str, after: int, limit: int) -> list[tuple[int, bytes]]:
        """Packed lists of those that live and were compared once, with ids of rows above ``after``, in their order."""
        query = select(documents.c.id, documents.c.near).where(
            documents.c.space == _space(space), documents.c.id > after, documents.c.related > 0, ~documents.c.deleted
        )
        async with self._database.read.connect() as connection:
            found = await connection.execute(query.order_by(documents.c.id).limit(limit))
            return [(number, near) for number, near in found]

    async def near_of(self, ids: Sequence[int]) -> dict[int, list[Near]]:
        """Lists of rows that are there."""
        return {number: unpack_near(near) for number, near in await self._column(documents.c.near, ids)}

    async def unrelated(self, limit: int, turn: int = 0) -> list[Unrelated]:
        """Changes that were not compared yet, by their spaces and in their order. Where there are more, of several
        spaces as many, of others at the next ``turn``: nobody waits for what another one writes."""
        contents = document_contents.c
        query = (
            select(
                documents.c.id,
                documents.c.version,
                documents.c.deleted,
                spaces.c.name,
                collections.c.name,
                documents.c.doc_type,
                func.coalesce(contents.title, ""),
                func.coalesce(func.substr(contents.text, 1, max(CLASSIFIED, SEARCHED)), ""),
            )
            .select_from(ROWS)
            .where(UNRELATED)
            .order_by(documents.c.space, documents.c.version)
        )
        async with self._database.read.connect() as connection:
            return [Unrelated._make(row) for row in await _in_turn(connection, query, UNRELATED, limit, turn)]

    async def put_related(self, done: Sequence[Related], lists: Mapping[int, Sequence[Near]]) -> None:
        """What came of comparing: changes that were, and new lists of any documents. One that changed meanwhile is
        compared again later; one that was deleted has no list and names nothing. Raises LeaseLost."""

        async def work(connection: AsyncConnection) -> None:
            there = await self._locked(connection, [*lists, *(one.id for one in done)])
            near = [
                {"row": row, "list": pack_near(one)}
                for row, one in lists.items()
                if row in there and not there[row].deleted
            ]
            await _for_each(connection, PUT_NEAR, near)
            found = [
                one._replace(domain="", entities=frozenset()) if there[one.id].deleted else one
                for one in done
                if one.id in there and there[one.id].related < one.version
            ]
            compared = [{"row": one.id, "of": one.version, "kind": one.domain} for one in found]
            await _for_each(connection, PUT_RELATED, compared)
            known = await self._mentions(connection, [one.id for one in found])
            # Of one that is not wanted any more the graph may be told just now.
            dropped = {key: (False, held or MAYBE_HELD) for key, (_, held) in known.items()}
            wanted = [(one.id, entity) for one in found for entity in one.entities]
            target = dropped | {key: (True, known.get(key, (True, NOT_HELD))[1]) for key in wanted}
            await _put_mentions(connection, known, target)
            whose = select(collections.c.client).distinct().select_from(documents.join(collections, INSIDE))
            whose = whose.where(self._among(documents.c.id, [*there]))
            await note_changes(connection, list(await connection.scalars(whose)))

        await self._led(work, relaxed=True)

    # --- what the graph holds ----------------------------------------------------------------------------------------

    async def ungraphed(self, limit: int, now: int, turn: int = 0) -> list[Row]:
        """Documents of which the graph does not hold what it should, but for those that were given up or wait to be
        tried again; those that never failed first. Where there are more, of several spaces as many, of others at the
        next ``turn``."""
        query = _rows().where(UNGRAPHED, documents.c.next_at <= now)
        query = query.order_by(documents.c.next_at, documents.c.space, documents.c.id)
        async with self._database.read.connect() as connection:
            fresh = and_(UNGRAPHED, documents.c.next_at == 0)
            return await self._with_mentions(connection, await _in_turn(connection, query, fresh, limit, turn))

    async def living(self) -> int:
        """How many documents there are."""
        async with self._database.read.connect() as connection:
            query = select(func.count()).select_from(documents).where(~documents.c.deleted)
            return await connection.scalar(query) or 0

    async def last_row(self) -> int:
        """The largest id of a row; 0 where there is none."""
        async with self._database.read.connect() as connection:
            return await connection.scalar(select(func.max(documents.c.id))) or 0

    async def rows_after(self, after: int, limit: int) -> list[Row]:
        """All rows with ids above ``after``, in their order."""
        query = _rows().where(documents.c.id > after).order_by(documents.c.id).limit(limit)
        async with self._database.read.connect() as connection:
            return await self._with_mentions(connection, (await connection.execute(query)).all())

    async def told_of(self, ids: Sequence[int]) -> dict[int, bytes | None]:
        """Packed lists that the graph may have of rows that are there; None: nobody knows."""
        return dict(await self._column(documents.c.graphed_near, ids))

    async def told(self, ids: Sequence[int]) -> dict[int, Told]:
        """What the graph should have of rows that are there, and whether it still has to be told."""
        return {row: Told(near, bool(waits)) for row, near, waits in await self._column(documents.c.near, ids, PENDING)}

    async def orphans(self, entities: Sequence[str], besides: Sequence[int] = ()) -> set[str]:
        """Of these those that no document names, nor is to lose in the graph, but for rows ``besides`` that do not
        name them any more: who loses one later may name it again before."""
        each = self._each(entities)
        stays = or_(mentions.c.wanted, ~self._among(mentions.c.document, besides))
        query = select(each.c.value).where(~exists().where(mentions.c.entity == each.c.value, stays))
        async with self._database.read.connect() as connection:
            return set(await connection.scalars(query))

    async def put_intended(self, lists: Mapping[int, Sequence[Near]], rows: Sequence[Row] = ()) -> None:
        """Lists that the graph may have from now on, put before it is told; the mentions that it is to get or to lose
        it may have then too. Where nobody knows what the graph holds of a row, that stays so. ``rows``: as they are
        told, whatever was written of them since. Raises LeaseLost."""

        async def work(connection: AsyncConnection) -> None:
            there = await self._locked(connection, list(lists))
            sure = [row for row, one in there.items() if one.known]
            await _for_each(connection, PUT_INTENDED, [{"row": row, "list": pack_near(lists[row])} for row in sure])
            # What it holds as it should may stay: it will neither get nor lose it.
            settled = mentions.c.held == case((mentions.c.wanted, HELD), else_=NOT_HELD)
            unsettled = update(mentions).where(self._among(mentions.c.document, sure), ~settled)
            await connection.execute(unsettled.values(held=MAYBE_HELD))
            changed = [
                {"row": one.id, "name": mention.entity, "is_wanted": False, "is_held": MAYBE_HELD}
                for one in rows
                if one.id in sure and (there[one.id].version, there[one.id].wanted) != (one.version, one.wanted)
                for mention in one.mentions
                if mention.held != (HELD if mention.wanted else NOT_HELD)
            ]
            await _for_each(connection, NOTE_MENTION, changed)

        await self._led(work)

    async def put_graphed(self, done: Sequence[Graphed], now: int) -> None:
        """The graph holds what these rows said when they were read. Raises LeaseLost."""

        async def work(connection: AsyncConnection) -> None:
            there = await self._locked(connection, [one.id for one in done])
            new = [one for one in done if one.id in there and there[one.id].graphed < one.wanted]
            await _for_each(
                connection,
                PUT_GRAPHED,
                [{"row": one.id, "of": one.wanted, "list": one.near, "told": one.announced, "now": now} for one in new],
            )
            known = await self._mentions(connection, [one.id for one in new])
            target = dict(known)
            for one in new:
                for mention in one.mentions:
                    wanted, _ = known.get((one.id, mention.entity), (False, NOT_HELD))
                    target[one.id, mention.entity] = (wanted, HELD if mention.wanted else NOT_HELD)
            await _put_mentions(connection, known, {key: state for key, state in target.items() if any(state)})

        await self._led(work, relaxed=True)

    async def put_failed(self, ids: Sequence[int], error: str, next_at: int) -> None:
        """The graph did not take these: they are tried again then, or given up if this was often enough. Raises
        LeaseLost."""
        last = documents.c.attempts + 1 >= MAX_ATTEMPTS
        values = {"next_at": case((last, NEVER), else_=next_at), "attempts": documents.c.attempts + 1}
        async with self._leading() as connection:
            await self._locked(connection, ids)
            put = update(documents).where(self._among(documents.c.id, ids))
            await connection.execute(put.values(**values, error=error[:MAX_ERROR]))

    async def distrust(self, ids: Sequence[int]) -> None:
        """Nobody knows what the graph holds of these: they are told anew."""
        async with self._changing() as connection:
            await self._locked(connection, ids)
            await connection.execute(update(documents).where(self._among(documents.c.id, ids)).values(DISTRUSTED))

    async def distrust_all(self) -> int:
        """The same of all rows; answers how many there are."""
        count = 0
        async for ids in self._steps():
            await self.distrust(ids)
            count += len(ids)
        return count

    async def nothing_told(self) -> None:
        """The graph holds nothing of any row. Raises LeaseLost."""
        async for ids in self._steps():
            async with self._leading() as connection:
                await self._locked(connection, ids)
                mine = self._among(mentions.c.document, ids)
                await connection.execute(
                    update(documents).where(self._among(documents.c.id, ids)).values(graphed_near=b"")
                )
                await connection.execute(delete(mentions).where(mine, ~mentions.c.wanted))
                await connection.execute(update(mentions).where(mine).values(held=NOT_HELD))

    async def failures(self, client: str | None, limit: int) -> list[Failure]:
        """Documents (of one client) that were given up, by their rows."""
        query = select(
            collections.c.client, collections.c.name, documents.c.doc_id, documents.c.error, documents.c.attempts
        ).select_from(documents.join(collections, INSIDE))
        query = query.where(GIVEN_UP, *([] if client is None else [collections.c.client == client]))
        async with self._database.read.connect() as connection:
            found = await connection.execute(query.order_by(documents.c.id).limit(limit))
            return [Failure(*row) for row in found]

    async def retry_failed(self, client: str | None, collection: str | None = None) -> int:
        """Try documents (of one client, of collections of one name) again that were given up; answers how many."""
        query = select(documents.c.id).select_from(documents.join(collections, INSIDE)).where(GIVEN_UP)
        if client is not None:
            query = query.where(collections.c.client == client)
        if collection is not None:
            query = query.where(collections.c.name == collection)
        query = query.order_by(documents.c.id).limit(STEP).with_for_update(of=documents)
        count = 0
        while True:
            async with self._changing() as connection:
                ids = list(await connection.scalars(query))
                put = update(documents).where(self._among(documents.c.id, ids))
                await connection.execute(put.values(attempts=0, next_at=0))
            if not ids:
                return count
            count += len(ids)

    async def sweep(self, now: int) -> int:
        """Go on with deletions, a step of each: of the documents of deleted collections, of rows of documents that the
        graph lost long enough ago, of what is left of collections without rows. Answers how many documents were
        deleted or their rows went; with ``STEP`` of them there may be more."""
        its = documents.c.collection == collections.c.id
        dropped = select(collections.c.id).where(collections.c.deleted).limit(1)
        async with self._database.read.connect() as connection:
            unfinished = await connection.scalar(dropped.where(exists().where(its, ~documents.c.deleted)))
            empty = await connection.scalar(dropped.where(~exists().where(its)))
            oldest = select(documents.c.id).where(TOMBSTONE).order_by(documents.c.updated_at).limit(1)
            tombstone = await connection.scalar(oldest)
        count = 0 if unfinished is None else await self._bury_some(unfinished)
        if empty is not None:
            async with self._database.write.begin() as connection:
                await _versions(connection, 0)
                await connection.execute(delete(collections).where(collections.c.deleted, ~exists().where(its)))
                await connection.execute(delete(spaces).where(~exists().where(collections.c.space == spaces.c.id)))
        return count if tombstone is None else max(count, await self._sweep_rows(now))

    async def _sweep_rows(self, now: int) -> int:
        old = (
            select(documents.c.id)
            .where(TOMBSTONE, documents.c.updated_at < now - TOMBSTONE_MS, ~PENDING)
            .order_by(documents.c.updated_at, documents.c.id)
            .limit(STEP)
            .with_for_update(skip_locked=True)
        )
        async with self._changing() as connection:
            if not self._postgres:
                await connection.exec_driver_sql(MERGE_WORDS)
            return (await connection.execute(delete(documents).where(documents.c.id.in_(old)))).rowcount

    async def counts(self) -> list[CollectionCounts]:
        """How far the graph is behind each collection, by client and name; what is left to be told of deleted ones
        counts under their names."""
        living = select(documents.c.collection, func.count()).where(~documents.c.deleted)
        async with self._database.read.connect() as connection:
            known = (await connection.execute(select(collections))).all()
            of = await connection.execute(living.group_by(documents.c.collection))
            documents_of = {row[0]: row[1] for row in of}
            late = await _late(connection)
        found: dict[tuple[str, str], CollectionCounts] = {}
        for row in known:
            if row.deleted and row.id not in late:
                continue
            its = late.get(row.id, NO_BACKLOG)
            one = found.get((row.client, row.name), CollectionCounts(row.client, row.name, 0, 0, 0, None))
            found[row.client, row.name] = one._replace(
                documents=one.documents + (0 if row.deleted else documents_of.get(row.id, 0)),
                pending=one.pending + its.pending,
                failed=one.failed + its.failed,
                pending_since=_earlier(one.pending_since, its.pending_since),
            )
        return [found[key] for key in sorted(found)]

    async def backlogs(self) -> dict[str, Backlog]:
        """How far the graph is behind each client that it is behind of; reads rows of such documents alone."""
        async with self._database.read.connect() as connection:
            late = await _late(connection)
            known = select(collections.c.id, collections.c.client).where(self._among(collections.c.id, [*late]))
            clients = (await connection.execute(known)).all()
        found: dict[str, Backlog] = {}
        for number, client in clients:
            found[client] = _both(found.get(client, NO_BACKLOG), late[number])
        return found

    async def changes(self, client: str) -> int:
        """A number that is another one after each change of what answers about a client's documents are made of."""
        query = select(client_changes.c.changes).where(client_changes.c.client == client)
        async with self._database.read.connect() as connection:
            return await connection.scalar(query) or 0

    # --- one replica does it -----------------------------------------------------------------------------------------

    async def state(self) -> SyncState:
        """Whether and by whom the graph is kept in step."""
        state = sync_state.c
        query = select(
            *(state.enabled, state.owner, state.lease_until, last_version.c.version),
            *(state.asked, state.progress, state.verified_at, state.report),
        ).join(last_version, last_version.c.id == state.id)
        async with self._database.read.connect() as connection:
            return SyncState(*(await connection.execute(query)).one())

    async def take_lease(self) -> bool:
        """Become the one that keeps the graph in step, or stay it, for ``LEASE_MS``; whether that worked."""
        lapsed = or_(
            sync_state.c.owner.is_(None),
            sync_state.c.owner == self.replica,
            sync_state.c.lease_until < db_now(),
            sync_state.c.lease_until > db_now() + LEASE_MS,  # the clock went back since
        )
        mine = case((sync_state.c.owner == self.replica, sync_state.c.progress), else_=None)
        lease = {"owner": self.replica, "lease_until": db_now() + LEASE_MS}
        return await self._put_state(lapsed, **lease, progress=mine)  # nobody goes on with a look of another one

    async def release_lease(self) -> None:
        """Let another replica do it at once."""
        await self._put_state(sync_state.c.owner == self.replica, owner=None, lease_until=0)

    async def set_enabled(self, enabled: bool) -> None:
        """Keep the graph in step from now on, or let it be."""
        await self._put_state(true(), enabled=enabled)

    async def graph(self) -> str | None:
        """The mark of the graph that was told of documents; None before the first one."""
        async with self._database.read.connect() as connection:
            return cast("str | None", await connection.scalar(select(sync_state.c.graph)))

    async def put_graph(self, mark: str) -> None:
        """From now on the graph with this mark is told."""
        await self._put_state(sync_state.c.owner == self.replica, graph=mark)

    async def ask(self, kind: LookKind) -> bool:
        """Want a look at the graph; False where one goes on or is wanted already."""
        none = and_(sync_state.c.asked.is_(None), sync_state.c.progress.is_(None))
        return await self._put_state(none, asked=kind)

    async def put_progress(self, kind: LookKind, progress: str | None) -> None:
        """How far a look is, as JSON, or that it has ended; of the replica that has the lease. If one of the kind was
        wanted, this is it."""
        wanted = case((sync_state.c.asked == kind, None), else_=sync_state.c.asked)
        await self._put_state(sync_state.c.owner == self.replica, progress=progress, asked=wanted)

    async def put_verified(self, began_at: int, report: str) -> None:
        """What a look found, as JSON; with that it has ended."""
        await self._put_state(true(), verified_at=began_at, report=report, progress=None)

    async def _put_state(self, condition: ColumnElement[bool], **values: Any) -> bool:
        async with self._database.write.begin() as connection:
            return (await connection.execute(update(sync_state).where(condition).values(**values))).rowcount == 1

    # --- within a transaction ----------------------------------------------------------------------------------------

    def _writing(self, *, leading: bool) -> AbstractAsyncContextManager[AsyncConnection]:
        return self._leading() if leading else self._database.write.begin()

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction whose first statement may be a query: on SQLite nobody else writes from its begin on."""
        async with self._database.write.begin() as connection:
            if not self._postgres:
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @asynccontextmanager
    async def _leading(self) -> AsyncIterator[AsyncConnection]:
        """The same, during which nobody else takes the lease. Raises LeaseLost."""
        async with self._changing() as connection:
            await self._has_lease(connection)
            yield connection

    async def _led(self, work: Callable[[AsyncConnection], Coroutine[Any, Any, T]], *, relaxed: bool = False) -> T:
        """The same by ``Database.at_once``."""

        async def led(connection: AsyncConnection) -> T:
            await self._has_lease(connection)
            return await work(connection)

        return await self._database.at_once(led, relaxed=relaxed)

    async def _has_lease(self, connection: AsyncConnection) -> None:
        # A lease that has lapsed holds as long as nobody took it.
        if await connection.scalar(select(sync_state.c.owner).with_for_update(read=True)) != self.replica:
            raise LeaseLost("Another replica keeps the graph in step, or none does.")

    async def _locked(self, connection: AsyncConnection, ids: Sequence[int]) -> dict[int, Found[Any]]:
        """Rows that are there, which nobody else changes before the transaction ends. All lock them in this order."""
        known = documents.c.graphed_near.is_not(None).label("known")
        mine = documents.c
        query = select(mine.id, mine.deleted, mine.version, mine.related, mine.wanted, mine.graphed, known)
        query = query.where(self._among(documents.c.id, ids)).order_by(documents.c.id).with_for_update()
        return {row.id: row for row in await connection.execute(query)}

    async def _bury_some(self, collection: int) -> int:
        """Delete some documents of a collection; answers how many."""
        query = select(documents.c.id).where(documents.c.collection == collection, ~documents.c.deleted)
        async with self._database.write.begin() as connection:
            base = await _versions(connection, STEP)
            ids = list(await connection.scalars(query.order_by(documents.c.id).limit(STEP).with_for_update()))
            await self._bury(connection, ids, base, await connection.scalar(select(db_now())) or 0)
        return len(ids)

    async def _bury(self, connection: AsyncConnection, ids: Sequence[int], base: int, now: int) -> None:
        """Make rows those of deleted documents."""
        if not ids:
            return
        changes = [
            {"id": row, "version": base + number, "now": now, "nothing": b""} for number, row in enumerate(ids, 1)
        ]
        await connection.execute(BURY, changes)
        await connection.execute(delete(document_contents).where(self._among(document_contents.c.document, ids)))
        mine = self._among(mentions.c.document, ids)
        await connection.execute(delete(mentions).where(mine, mentions.c.held == NOT_HELD))
        await connection.execute(update(mentions).where(mine).values(wanted=False))
        await connection.execute(delete(node_changes).where(self._among(node_changes.c.document, ids)))
        for end in (relations.c.source, relations.c.target):
            await connection.execute(delete(relations).where(self._among(end, ids)))

    async def _mentions(self, connection: AsyncConnection, ids: Sequence[int]) -> _Mentions:
        found = await connection.execute(select(mentions).where(self._among(mentions.c.document, ids)))
        return {(row.document, row.entity): (row.wanted, row.held) for row in found}

    # --- queries -----------------------------------------------------------------------------------------------------

    async def _with_mentions(self, connection: AsyncConnection, found: Sequence[Found[Any]]) -> list[Row]:
        named: dict[int, list[Mentioned]] = defaultdict(list)
        for (row, entity), state in (await self._mentions(connection, [one.id for one in found])).items():
            named[row].append(Mentioned(entity, *state))
        return [Row._make([*one, named[one.id]]) for one in found]

    async def _column(self, wanted: ColumnElement[Any], ids: Sequence[int], *more: ColumnElement[Any]) -> list[Any]:
        """A column of rows that are there, and others, each after the id."""
        query = select(documents.c.id, wanted, *more).where(self._among(documents.c.id, ids))
        async with self._database.read.connect() as connection:
            return [tuple(row) for row in await connection.execute(query)]

    async def _steps(self) -> AsyncIterator[list[int]]:
        """The ids of all rows, some at a time; of those that are new meanwhile none."""
        last, after = await self.last_row(), 0
        while True:
            query = select(documents.c.id).where(documents.c.id > after, documents.c.id <= last)
            async with self._database.read.connect() as connection:
                ids = list(await connection.scalars(query.order_by(documents.c.id).limit(STEP)))
            if not ids:
                return
            yield ids
            after = ids[-1]

    def _of(self, collection: Collection, doc_ids: Sequence[str]) -> ColumnElement[bool]:
        # SQLite would read an id with NUL as what stands before it; none is written.
        some = self._among(documents.c.doc_id, [doc_id for doc_id in doc_ids if _storable(doc_id)])
        return and_(documents.c.collection == collection.id, some)

    def _among(self, where: ColumnElement[Any], values: Sequence[int] | Sequence[str]) -> ColumnElement[bool]:
        """As ``in_``, with one parameter however many values there are."""
        if self._postgres:
            kind = String() if isinstance(where.type, String) else BigInteger()
            return where == any_(literal([*values], ARRAY(kind)))
        return where.in_(select(self._each(values).c.value))

    def _each(self, values: Sequence[int] | Sequence[str]) -> TableValuedAlias:
        """The values as a table."""
        if self._postgres:
            return func.unnest(literal([*values], ARRAY(String()))).table_valued("value").render_derived()
        return func.json_each(msgspec.json.encode([*values]).decode()).table_valued("value")


async def _check_room(connection: AsyncConnection, client: str) -> None:
    """Raise InvalidRequest where a client has as many collections as it may."""
    mine = select(func.count()).where(collections.c.client == client, ~collections.c.deleted)
    if (await connection.scalar(mine) or 0) >= MAX_COLLECTIONS:
        raise InvalidRequest(
            f"collection: there may be {MAX_COLLECTIONS:,}, and so many there are; delete one first",
            field="collection",
            allowed=MAX_COLLECTIONS,
        )


async def note_changes(connection: AsyncConnection, clients: Sequence[str]) -> None:
    """Answers about documents of these clients may be others once the transaction is committed. It is to be its last
    statement: nobody waits for anything else with these rows locked."""
    await _for_each(connection, NOTE_CHANGE, [{"client": client} for client in sorted(clients)])


async def _versions(connection: AsyncConnection, count: int) -> int:
    """Take numbers for changes; answers the one before the first. Until the transaction ends nobody else gets any, and
    nobody makes a collection."""
    return int((await connection.execute(NEXT_VERSIONS, {"count": count})).scalar_one()) - count


async def _in_turn(
    connection: AsyncConnection, query: Select[Any], waits: ColumnElement[bool], limit: int, turn: int
) -> list[Found[Any]]:
    """At most so many rows of a query of documents; where there are more, as many of each of some spaces that wait."""
    found = list(await connection.execute(query.limit(limit)))
    if len(found) < limit or len(waiting := list(await connection.scalars(spaces_with(waits)))) <= 1:
        return found
    start = turn * SPACES % len(waiting)
    chosen = [*waiting, *waiting][start : start + min(SPACES, len(waiting))]
    found.clear()
    for left, space in zip(range(len(chosen), 0, -1), chosen, strict=True):
        mine = query.where(documents.c.space == space).limit(math.ceil((limit - len(found)) / left))
        found += await connection.execute(mine)
    return found


async def _for_each(
    connection: AsyncConnection, change: Update | Insert | Delete | TextClause, rows: Sequence[dict[str, Any]]
) -> None:
    if rows:
        await connection.execute(change, rows)


async def _put_mentions(connection: AsyncConnection, known: _Mentions, wanted: _Mentions) -> None:
    """Make the rows of mentions that are ``known`` those that are ``wanted``."""
    new = [(*key, *state) for key, state in wanted.items() if key not in known]
    names = "row", "name", "is_wanted", "is_held"
    await _for_each(connection, PUT_MENTION, [dict(zip(names, row, strict=True)) for row in new])
    changed = [(*key, *state) for key, state in wanted.items() if known.get(key, state) != state]
    await _for_each(connection, CHANGE_MENTION, [dict(zip(names, row, strict=True)) for row in changed])
    await _for_each(connection, DROP_MENTION, [{"row": key[0], "name": key[1]} for key in known.keys() - wanted.keys()])


async def _late(connection: AsyncConnection) -> dict[int, Backlog]:
    """By collection."""
    of = documents.c.collection + 0  # or SQLite reads all documents in the order of their collections
    given_up = documents.c.attempts >= MAX_ATTEMPTS
    anew = func.sum(case((documents.c.distrusted > documents.c.graphed, 1), else_=0))
    found: dict[int, Backlog] = {}
    # Each has an index of its own.
    for condition in (UNRELATED, and_(UNGRAPHED, ~UNRELATED)):
        query = select(of, given_up, func.count(), func.min(documents.c.changed_at), anew).where(condition)
        for collection, dead, count, since, again in await connection.execute(query.group_by(of, given_up)):
            written = count if condition is UNRELATED else count - int(again)
            some = Backlog(0, count, None, 0) if dead else Backlog(count, 0, since, written)
            found[collection] = _both(found.get(collection, NO_BACKLOG), some)
    return found


def _both(one: Backlog, other: Backlog) -> Backlog:
    return Backlog(
        pending=one.pending + other.pending,
        failed=one.failed + other.failed,
        pending_since=_earlier(one.pending_since, other.pending_since),
        written=one.written + other.written,
    )


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((time for time in (one, other) if time is not None), default=None)


def _named(client: str, name: str) -> tuple[ColumnElement[bool], ...]:
    return collections.c.client == client, collections.c.name == name, ~collections.c.deleted


def _collections() -> Select[Any]:
    """Columns as those of ``Collection``."""
    mine = collections.c
    columns = mine.id, mine.client, mine.name, spaces.c.name, mine.model, mine.dimension, mine.created_at
    return select(*columns).join(spaces, spaces.c.id == mine.space)


def _documents(viewer: Viewer, *, texts: bool = False) -> Select[Any]:
    contents = document_contents.c
    found = select(documents, contents.title, contents.text if texts else literal("").label("text"), contents.payload)
    return found.select_from(documents.join(collections, INSIDE).join(document_contents)).where(seen_by(viewer))


def _rows() -> Select[Any]:
    """Columns as those of ``Row``, but for the mentions."""
    mine = documents.c
    return select(
        mine.id,
        spaces.c.name,
        collections.c.client,
        collections.c.name,
        mine.doc_id,
        func.coalesce(document_contents.c.title, ""),
        mine.domain,
        mine.doc_type,
        mine.created_at,
        mine.changed_at,
        mine.version,
        mine.deleted,
        PENDING,
        and_(~UNRELATED, mine.announced < mine.version),
        mine.wanted,
        mine.near,
        mine.graphed_near,
        mine.attempts,
    ).select_from(ROWS)


def _space(name: str) -> ScalarSelect[int]:
    return select(spaces.c.id).where(spaces.c.name == name).scalar_subquery()


def _document_of(row: Found[Any]) -> Document:
    values = {name: getattr(row, name) for name in Document._fields}
    values["payload"] = msgspec.json.decode(row.payload)
    values["permissions"] = tuple(msgspec.json.decode(row.permissions))
    return Document(**values)


def _document_row(collection: Collection, one: NewDocument, now: int, viewer: Viewer) -> dict[str, Any]:
    return {
        "collection": collection.id,
        "doc_id": one.doc_id,
        "doc_type": one.doc_type,
        "permissions": msgspec.json.encode(one.permissions).decode(),
        "exported": one.exported,
        "now": now,
        "nothing": b"",
        "key": "" if viewer.key is None else _quoted(viewer.key),
    }


def _contents_row(one: NewDocument) -> dict[str, Any]:
    # PostgreSQL cannot hold the character NUL, and puts this in its place.
    return {
        "vector": one.vector.astype("<f4").tobytes(),
        "title": one.title.replace("\0", "\ufffd"),
        "payload": msgspec.json.encode(one.payload).decode(),
        "text": one.text.replace("\0", "\ufffd"),
    }


def _check(collection: Collection, new: Sequence[NewDocument]) -> None:
    """Raise InvalidRequest for what cannot be written."""
    seen: set[str] = set()
    for number, one in enumerate(new):
        field = f"documents[{number}]"
        if one.doc_id in seen:
            raise InvalidRequest(f"{field}.id: comes twice; each document must have its own", field=f"{field}.id")
        if not _storable(one.doc_id):
            raise InvalidRequest(f"{field}.id: must be Unicode text without the character NUL", field=f"{field}.id")
        if one.vector.shape != (collection.dimension,):
            raise InvalidRequest(
                f"{field}.vector: must have {collection.dimension} numbers, as all of the collection",
                field=f"{field}.vector",
                allowed=collection.dimension,
            )
        seen.add(one.doc_id)


def _storable(doc_id: str) -> bool:
    return "\0" not in doc_id and not _HALF.search(doc_id)


def _quoted(key: str) -> str:
    """The name of a key as it stands among permissions."""
    return msgspec.json.encode(key).decode()


def _no_collection() -> CollectionNotFound:
    return CollectionNotFound("There is no collection of this name.")
