"""What graphs told of relationships and nodes, and the events that are to be told outside, in the database.

Everything that a graph says has an origin (who made the change) and a version (a number that grows with the changes of
that thing). Of two changes of the same thing the one with the higher version holds, and where both have the same, that
of the origin whose name sorts last; so all servers that hear of the same changes, in any order and however often, end
with the same. What this server made itself (origin ``memvid-export``) is not applied when it comes back.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    collate,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from common.errors import ExportError, InvalidRequest
from control_plane.errors import DocumentNotFound
from control_plane.jobs.database import Database
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Viewer
from control_plane.nexus.signing import WINDOW_SECONDS
from control_plane.nexus.store import note_changes, seen_by
from control_plane.nexus.tables import collections, documents, node_changes, outbound, relations, webhook_nonces

ORIGIN = "memvid-export"
"""The origin of what this server, or another one like it, made itself."""
NONCE_MS = 3 * 1_000 * WINDOW_SECONDS
"""So long a nonce is known. A message from the future is in time for two windows; the third is for servers whose clocks
differ."""
MAX_RELATIONS = 10_000
"""Relationships that begin at a document, and that end at it; deleted ones count until they have to make room."""
MAX_SHOWN = 100
"""Relationships of a document that its payload shows."""
MAX_WAITING = 100_000
"""Events that are still to be sent; one for which there is no room is given up at once. Servers that write at the same
moment may pass it by one each."""
MAX_DEAD = 100_000
"""Events that were given up; beyond, the oldest of them go."""
LONGEST_WAIT_MS = 3_600_000
"""No event waits longer for its next try; one that seems to was sent before the clock went back."""
FULL = "full"
"""Why an event was given up at once."""
_IDS = 500
"""Of documents, in one query."""

Action = Literal["upsert", "delete"]
Scalar = str | int | float | bool | None
Properties = dict[str, Scalar | list[Scalar]]


class DocumentRef(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A document of the client that a change is about."""

    collection: str
    id: str


class _Change(msgspec.Struct, rename="camel", kw_only=True, forbid_unknown_fields=True, frozen=True):
    event_id: str
    origin: str
    """Who made the change."""
    version: int
    action: Action
    client: str
    properties: Properties = {}
    """All that there are: what is not among them is gone."""


class RelationshipChange(_Change, kw_only=True, frozen=True):
    """``POST /webhooks/nexus/relationship``: a relationship is there, or is not, from now on."""

    source: DocumentRef
    target: DocumentRef
    type: str


class NodeChange(_Change, kw_only=True, frozen=True):
    """``POST /webhooks/nexus/node``: the node of a document has these properties; ``delete``: none. The document itself
    stays: its rows are the truth."""

    document: DocumentRef


class OwnEvent(NamedTuple):
    """A change that this server made, and that is to be told outside."""

    kind: str
    """Such as ``document.synced``."""
    client: str
    version: int
    """Grows with the changes of that thing."""
    fields: Mapping[str, Any]
    """What else is told, by its name on the wire."""


class Outcome(NamedTuple):
    """What became of a change."""

    applied: bool
    reason: Literal["own", "stale", "replayed"] | None = None
    """Why it was not applied: this server made it itself, or knows a later one; or the message is one that came
    before."""


class Waiting(NamedTuple):
    """An event that is to be sent."""

    id: int
    body: str
    """JSON."""
    attempts: int
    """That failed."""


class Unsent(NamedTuple):
    """An event that was not taken."""

    id: int
    attempts: int
    error: str
    next_at: int | None
    """When it is tried again; None: never."""


class DeadLetter(NamedTuple):
    """An event that was given up."""

    id: int
    body: str
    created_at: int
    attempts: int
    error: str


class OutboundCounts(NamedTuple):
    """How many events there are."""

    waiting: int
    dead: int


class BackStore:
    """Relationships and properties that graphs told, and the events for outside."""

    def __init__(self, database: Database, metrics: NexusMetrics, *, sends: bool) -> None:
        """``sends``: changes are told outside; otherwise no events are written."""
        self._database = database
        self._metrics = metrics
        self._sends = sends
        self.written = asyncio.Event()
        """Set where this process wrote an event that is to be sent."""

    # --- what graphs told --------------------------------------------------------------------------------------------

    async def take(self, change: RelationshipChange | NodeChange, *, nonce: str, now: int) -> Outcome:
        """Take a change that came with a nonce at ``now`` (milliseconds); what is applied becomes an event as well.

        Raises DocumentNotFound, and InvalidRequest where a document has as many relationships as it may; the nonce is
        used all the same.
        """
        refused: ExportError | None = None
        applied, waits = False, 0
        async with self._database.write.begin() as connection:
            if not await _first_time(connection, nonce, now):
                return Outcome(False, "replayed")
            if change.origin == ORIGIN:
                return Outcome(False, "own")
            try:
                applied = await _apply(connection, change, now)
            except ExportError as error:
                refused = error
            if applied and self._sends:
                waits = await self._put_events(connection, [_told(change)], now)
            if applied:
                await note_changes(connection, [change.client])
        if refused is not None:
            raise refused
        if waits:
            self.written.set()
        return Outcome(applied, None if applied else "stale")

    async def sweep(self, now: int) -> int:
        """Forget nonces of messages that are out of time by now (milliseconds); answers how many."""
        async with self._database.write.begin() as connection:
            past = delete(webhook_nonces).where(webhook_nonces.c.seen_at < now - NONCE_MS)
            return (await connection.execute(past)).rowcount

    async def graph_payload(self, ids: Sequence[int], viewer: Viewer) -> dict[int, dict[str, Any]]:
        """What graphs told of these documents, which the viewer sees: ``properties`` of the node; ``relationships``
        with documents that the viewer sees as well, the ``MAX_SHOWN`` changed last; and in ``more`` whether there are
        others. Documents of which they told nothing are not in the answer."""
        found: dict[int, dict[str, Any]] = {}
        async with self._database.read.connect() as connection:
            for start in range(0, len(ids), _IDS):
                some = ids[start : start + _IDS]
                told = select(node_changes.c.document, node_changes.c.properties)
                for row in await connection.execute(told.where(node_changes.c.document.in_(some))):
                    if properties := msgspec.json.decode(row.properties):
                        _part(found, row.document)["properties"] = properties
                for row in await connection.execute(_shown(some, viewer)):
                    part = _part(found, row.document)
                    if row.place > MAX_SHOWN:
                        part["more"] = True
                    else:
                        part["relationships"].append(
                            {
                                "type": row.type,
                                "collection": row.name,
                                "id": row.doc_id,
                                "properties": msgspec.json.decode(row.properties),
                                "origin": row.origin,
                                "version": row.version,
                                "direction": row.direction,
                            }
                        )
        return found

    # --- events for outside ------------------------------------------------------------------------------------------

    async def announce(self, events: Sequence[OwnEvent], now: int) -> None:
        """Tell outside, where anybody is told, what this server did, at ``now`` (milliseconds)."""
        if not (self._sends and events):
            return
        bodies = [
            {
                "kind": event.kind,
                "eventId": str(uuid.uuid4()),
                "origin": ORIGIN,
                "version": event.version,
                "client": event.client,
                **event.fields,
            }
            for event in events
        ]
        if await self._database.at_once(lambda connection: self._put_events(connection, bodies, now), relaxed=True):
            self.written.set()

    async def due(self, now: int, limit: int) -> list[Waiting]:
        """Events that are to be sent now, in the order in which they were written."""
        query = select(outbound.c.id, outbound.c.body, outbound.c.attempts)
        time_has_come = or_(outbound.c.next_at <= now, outbound.c.next_at > now + LONGEST_WAIT_MS)
        query = query.where(outbound.c.dead.is_(False), time_has_come).order_by(outbound.c.id).limit(limit)
        async with self._database.read.connect() as connection:
            return [Waiting(*row) for row in await connection.execute(query)]

    async def settle(self, sent: Sequence[int], failed: Sequence[Unsent]) -> None:
        """Note what became of events: those that were taken go."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(outbound).where(outbound.c.id.in_(sent)))
            for one in failed:
                values = {"attempts": one.attempts, "error": one.error, "next_at": one.next_at or 0}
                values["dead"] = one.next_at is None
                await connection.execute(update(outbound).where(outbound.c.id == one.id).values(values))
            if any(one.next_at is None for one in failed):
                await self._trim(connection)

        await self._database.at_once(work, relaxed=True)

    async def dead_letters(self, after: int, limit: int) -> list[DeadLetter]:
        """Events that were given up, by their ids, above ``after``."""
        columns = [outbound.c[name] for name in DeadLetter._fields]
        query = select(*columns).where(outbound.c.dead, outbound.c.id > after).order_by(outbound.c.id).limit(limit)
        async with self._database.read.connect() as connection:
            return [DeadLetter(*row) for row in await connection.execute(query)]

    async def retry_dead(self) -> int:
        """Let the oldest events that were given up be sent after all, as many as there is room for; answers how
        many."""
        async with self._database.write.begin() as connection:
            room = MAX_WAITING - await _waiting(connection)
            dead = select(outbound.c.id).where(outbound.c.dead).order_by(outbound.c.id).limit(room)
            values = {"dead": False, "attempts": 0, "next_at": 0, "error": None}
            count = (await connection.execute(update(outbound).where(outbound.c.id.in_(dead)).values(values))).rowcount
        if count:
            self.written.set()
        return count

    async def outbound_counts(self) -> OutboundCounts:
        """How many events wait, and how many were given up."""
        query = select(outbound.c.dead, func.count()).group_by(outbound.c.dead)
        async with self._database.read.connect() as connection:
            counts = {bool(dead): count for dead, count in await connection.execute(query)}
        return OutboundCounts(counts.get(False, 0), counts.get(True, 0))

    async def _put_events(self, connection: AsyncConnection, bodies: Sequence[Mapping[str, Any]], now: int) -> int:
        """Write one or more events; answers for how many there was room."""
        room = MAX_WAITING - await _waiting(connection)
        rows = [
            {
                "body": msgspec.json.encode(body).decode(),
                "created_at": now,
                "attempts": 0,
                "next_at": 0,
                "dead": place >= room,
                "error": FULL if place >= room else None,
            }
            for place, body in enumerate(bodies)
        ]
        await connection.execute(insert(outbound), rows)
        if (full := len(rows) - room) > 0:
            self._metrics.outbound.labels(FULL).inc(min(full, len(rows)))
            await self._trim(connection)
        return min(room, len(rows))

    async def _trim(self, connection: AsyncConnection) -> None:
        kept = select(outbound.c.id).where(outbound.c.dead).order_by(outbound.c.id.desc()).offset(MAX_DEAD)
        gone = await connection.execute(delete(outbound).where(outbound.c.id.in_(kept)))
        self._metrics.outbound.labels("dropped").inc(gone.rowcount)


async def _first_time(connection: AsyncConnection, nonce: str, now: int) -> bool:
    """Whether a nonce was not known yet; from now on it is."""
    made = _insert(connection, webhook_nonces).values(nonce=nonce, seen_at=now)
    made = made.on_conflict_do_nothing(index_elements=["nonce"])
    return await connection.scalar(made.returning(webhook_nonces.c.nonce)) is not None


async def _apply(connection: AsyncConnection, change: RelationshipChange | NodeChange, now: int) -> bool:
    """Whether a change was newer than what was known. Raises DocumentNotFound, InvalidRequest."""
    row: dict[str, Any] = {
        "properties": "{}" if change.action == "delete" else msgspec.json.encode(change.properties).decode(),
        "origin": change.origin,
        "version": change.version,
        "updated_at": now,
    }
    if isinstance(change, NodeChange):
        row |= await _found(connection, change.client, document=change.document)
        return await _put_newer(connection, node_changes, ["document"], row)
    row |= await _found(connection, change.client, source=change.source, target=change.target)
    row |= {"type": change.type, "deleted": change.action == "delete"}
    key = ["source", "target", "type"]
    same = and_(*(relations.c[name] == row[name] for name in key))
    if await connection.scalar(select(relations.c.id).where(same)) is None:
        for end in ("source", "target"):
            await _make_room(connection, end, row[end])
    return await _put_newer(connection, relations, key, row)


async def _found(connection: AsyncConnection, client: str, **refs: DocumentRef) -> dict[str, int]:
    """Rows of documents, by the names of the arguments; they do not go, nor are they deleted, before the transaction
    ends. Raises DocumentNotFound."""
    any_of = or_(*(and_(collections.c.name == ref.collection, documents.c.doc_id == ref.id) for ref in refs.values()))
    query = (
        select(collections.c.name, documents.c.doc_id, documents.c.id)
        .join(collections, collections.c.id == documents.c.collection)
        .where(seen_by(Viewer(client, None)), any_of)
        # In the order in which whoever deletes them locks them.
        .order_by(documents.c.id)
        .with_for_update(read=True, key_share=True, of=documents)
    )
    there = {(row.name, row.doc_id): row.id for row in await connection.execute(query)}
    for field, ref in refs.items():
        if (ref.collection, ref.id) not in there:
            raise DocumentNotFound(f"{field}: there is no such document of this client.", field=field)
    return {field: there[ref.collection, ref.id] for field, ref in refs.items()}


async def _make_room(connection: AsyncConnection, end: Literal["source", "target"], document: int) -> None:
    """Raises InvalidRequest."""
    mine = relations.c[end] == document
    some = select(relations.c.id).where(mine).limit(MAX_RELATIONS).subquery()
    if (await connection.scalar(select(func.count()).select_from(some)) or 0) < MAX_RELATIONS:
        return
    oldest = select(relations.c.id).where(mine, relations.c.deleted)
    oldest = oldest.order_by(relations.c.updated_at, relations.c.id).limit(1)
    gone = await connection.execute(delete(relations).where(relations.c.id.in_(oldest)))
    if not gone.rowcount:
        message = f"{end}: this document has {MAX_RELATIONS:,} relationships on this side, which is the most."
        raise InvalidRequest(message, field=end, allowed=MAX_RELATIONS)


async def _put_newer(connection: AsyncConnection, table: Table, key: list[str], row: dict[str, Any]) -> bool:
    """Write a row where there is none, or an older one; answers whether it was written."""
    # Everywhere the same order, whatever the language of the database.
    origin = collate(table.c.origin, "C" if connection.dialect.name == "postgresql" else "BINARY")
    older = or_(table.c.version < row["version"], and_(table.c.version == row["version"], origin < row["origin"]))
    changed = {name: value for name, value in row.items() if name not in key}
    made = _insert(connection, table).values(row).on_conflict_do_update(index_elements=key, set_=changed, where=older)
    return await connection.scalar(made.returning(table.c.version)) is not None


def _insert(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


async def _waiting(connection: AsyncConnection) -> int:
    some = select(outbound.c.id).where(outbound.c.dead.is_(False)).limit(MAX_WAITING).subquery()
    return await connection.scalar(select(func.count()).select_from(some)) or 0


def _told(change: RelationshipChange | NodeChange) -> dict[str, Any]:
    """A change as it is told outside: its origin and version go with it, so that whoever made it knows it again."""
    told: dict[str, Any] = msgspec.to_builtins(change)
    thing = "node" if isinstance(change, NodeChange) else "relationship"
    return {"kind": f"{thing}.{told.pop('action')}", **told}


def _part(found: dict[int, dict[str, Any]], document: int) -> dict[str, Any]:
    return found.setdefault(document, {"properties": {}, "relationships": [], "more": False})


def _shown(ids: Sequence[int], viewer: Viewer) -> Select[Any]:
    """Relationships of documents, those that changed last first, numbered from 1 on for each; one more than are
    shown."""
    # One from a document to itself is shown once.
    ways = union_all(
        _edges("out", relations.c.source, relations.c.target, ids),
        _edges("in", relations.c.target, relations.c.source, ids).where(relations.c.source != relations.c.target),
    ).subquery()
    last = ways.c.updated_at.desc(), ways.c.id.desc()
    placed = (
        select(
            ways,
            documents.c.doc_id,
            collections.c.name,
            func.row_number().over(partition_by=ways.c.document, order_by=last).label("place"),
        )
        .join(documents, documents.c.id == ways.c.other)
        .join(collections, collections.c.id == documents.c.collection)
        .where(seen_by(viewer))
        .subquery()
    )
    return select(placed).where(placed.c.place <= MAX_SHOWN + 1).order_by(placed.c.document, placed.c.place)


def _edges(direction: str, this: ColumnElement[int], other: ColumnElement[int], ids: Sequence[int]) -> Select[Any]:
    columns = [relations.c[name] for name in ("id", "type", "properties", "origin", "version", "updated_at")]
    ends = this.label("document"), other.label("other"), literal(direction).label("direction")
    return select(*ends, *columns).where(this.in_(ids), relations.c.deleted.is_(False))
