"""What is known around a document, and what is there twice: read from rows, so that any replica answers, whether or not
the graph does.

A document's own list has the best twenty of both directions: whoever has it in its list without being in that one is
less similar than all twenty there, or would be there. Answers about one document are kept until something of its client
changes, as long as an hour: then they cost one small query.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter
from sqlalchemy import func, select

from common.contract import Wire
from common.errors import InvalidRequest
from control_plane.errors import DocumentNotFound
from control_plane.jobs.database import Database
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.finding import Finder, Wanted
from control_plane.nexus.incoming import MAX_ID, check_domain
from control_plane.nexus.kept import Kept
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import THRESHOLD, TOP_K, Collection, Document, Near, Viewer, unpack_near
from control_plane.nexus.sight import Sight
from control_plane.nexus.store import CollectionStore, seen_by
from control_plane.nexus.tables import collections, documents, mentions
from control_plane.operations.auth import AUDITED, NEEDS, READ
from control_plane.operations.keys import Caller
from control_plane.operations.openapi import REFUSALS, error_specs

MAX_COLLECTIONS = 1_000
"""That a client's documents are looked for in."""
MAX_GROUPS = 100
MAX_SHOWN = 50
"""Documents of a group that are named."""
PAGE = 5_000


class EntityLine(Wire):
    """Something that a document names."""

    kind: str
    """``identifier``, ``path``, ``url`` or ``name``."""
    name: str
    documents: int
    """That name it, of those that the key sees."""


class RelatedLine(Wire):
    """A document beside another one."""

    collection: str
    id: str
    title: str
    score: float
    """Cosine."""
    domain: str
    doc_type: str


class DocumentContext(Wire):
    """``GET /v1/collections/{collection}/context``."""

    id: str
    domain: str
    """Empty: not classified yet."""
    entities: list[EntityLine]
    """Those that most documents name come first."""
    related: list[RelatedLine]
    graph: dict[str, Any]
    """What the graph told: ``properties`` of the node, and ``relationships``."""


class Member(Wire):
    """A document that is there more than once."""

    collection: str
    id: str
    title: str


class Group(Wire):
    """Documents that are the same, or nearly: each resembles another one of them so much."""

    size: int
    collections: list[str]
    documents: list[Member]
    """The first fifty."""


class DuplicateGroups(Wire):
    """``GET /v1/duplicates``."""

    threshold: float
    groups: list[Group]
    """The largest come first."""
    total: int
    """Groups there are; a hundred are shown."""


class Sought(NamedTuple):
    """What of the documents around one is asked for."""

    limit: int = 10
    elsewhere: bool = False
    """Those of other collections."""
    domain: str | None = None
    """Those of this one, the nearest of all collections with comparable vectors, however near they are."""


class Contexts:
    """Answers for one client at a time."""

    def __init__(
        self,
        database: Database,
        store: CollectionStore,
        sight: Sight,
        finder: Finder,
        events: BackStore,
        *,
        metrics: NexusMetrics,
    ) -> None:
        self._database = database
        self._store = store
        self._sight = sight
        self._finder = finder
        self._events = events
        self._kept = Kept(DocumentContext, metrics)

    async def around(self, caller: Caller, name: str, doc_id: str, sought: Sought = Sought()) -> DocumentContext:  # noqa: B008
        """What is around a document. Raises CollectionNotFound, DocumentNotFound, InvalidRequest."""
        if not 1 <= sought.limit <= TOP_K:
            raise InvalidRequest(f"limit: must be 1 to {TOP_K}", field="limit", allowed=TOP_K)
        if sought.domain is not None:
            check_domain("domain", sought.domain)
        if len(doc_id) > MAX_ID:
            raise _no_document()
        viewer = Viewer(caller.client, None if caller.sees_all else caller.key)

        async def made() -> DocumentContext:
            return await self._around(viewer, await self._store.collection(caller.client, name), doc_id, sought)

        change = await self._store.changes(caller.client)
        return await self._kept.get((viewer, name, doc_id, sought), change, made)

    async def _around(self, viewer: Viewer, collection: Collection, doc_id: str, sought: Sought) -> DocumentContext:
        found = await self._store.get(collection, [doc_id], viewer)
        if not found:
            raise _no_document()
        document = found[0]
        if sought.elsewhere or sought.domain is not None:
            near = await self._compared(collection, document, viewer, sought)
        else:
            near = (await self._finder.nearest([document.id], viewer, sought.limit)).get(document.id, [])
        named = await self._names(collection.client)
        others = await self._store.by_ids([one.id for one in near], viewer)
        told = await self._events.graph_payload([document.id], viewer)
        return DocumentContext(
            id=document.doc_id,
            domain=document.domain,
            entities=await self._entities(document.id, viewer),
            related=[_line(one, others[one.id], named) for one in near if one.id in others],
            graph=told.get(document.id, {"properties": {}, "relationships": []}),
        )

    async def duplicates(self, caller: Caller, threshold: float) -> DuplicateGroups:
        """What several collections have. Raises InvalidRequest."""
        if not THRESHOLD <= threshold <= 1:
            raise InvalidRequest(f"threshold: must be {THRESHOLD} to 1", field="threshold", allowed=[THRESHOLD, 1])
        viewer = Viewer(caller.client, None if caller.sees_all else caller.key)
        named = await self._names(caller.client)
        spaces = dict.fromkeys(one.space for one in await self._all(caller.client))
        groups: list[list[int]] = []
        for space in spaces:
            groups += await self._groups(space, viewer, threshold)
        shown = await self._store.by_ids([row for group in groups for row in group], viewer)
        several = []
        for group in groups:
            there = [shown[row] for row in group if row in shown]
            if len({one.collection for one in there}) > 1:
                several.append(there)
        several.sort(key=lambda group: (-len(group), group[0].id))
        return DuplicateGroups(
            threshold=threshold,
            groups=[
                Group(
                    size=len(group),
                    collections=sorted({named[one.collection] for one in group if one.collection in named}),
                    documents=[
                        Member(named[one.collection], one.doc_id, one.title)
                        for one in group[:MAX_SHOWN]
                        if one.collection in named
                    ],
                )
                for group in several[:MAX_GROUPS]
            ],
            total=len(several),
        )

    async def _compared(
        self, collection: Collection, document: Document, viewer: Viewer, sought: Sought
    ) -> Sequence[Near]:
        """The nearest of the client's collections with comparable vectors."""
        searched = [
            one
            for one in await self._all(collection.client)
            if one.space == collection.space and not (sought.elsewhere and one.id == collection.id)
        ]
        vector = await self._sight.vector(document.id)
        if not searched or vector is None:
            return []
        least, domains = (THRESHOLD, ()) if sought.domain is None else (-1.0, (sought.domain,))
        wanted = Wanted(searched, viewer, None, None, {collection.space: vector}, least, sought.limit + 1, domains)
        found = [Near(*one) for one in await self._finder.by_vector(wanted) if one[0] != document.id]
        return found[: sought.limit]

    async def _groups(self, space: str, viewer: Viewer, threshold: float) -> list[list[int]]:
        """Rows that hang together, of those that the viewer sees."""
        pairs: list[tuple[int, int]] = []
        after = 0
        while page := await self._store.lists(space, after, PAGE):
            after = page[-1][0]
            pairs += [(row, near.id) for row, data in page for near in unpack_near(data) if near.score >= threshold]
        ends = sorted({end for pair in pairs for end in pair})
        seen: set[int] = set()
        for start in range(0, len(ends), PAGE):
            seen |= await self._store.visible(space, viewer, ends[start : start + PAGE])
        return await asyncio.to_thread(_together, [pair for pair in pairs if seen.issuperset(pair)])

    async def _entities(self, row: int, viewer: Viewer) -> list[EntityLine]:
        own = select(mentions.c.entity).where(mentions.c.document == row, mentions.c.wanted).scalar_subquery()
        query = (
            select(mentions.c.entity, func.count())
            .join(documents, documents.c.id == mentions.c.document)
            .join(collections, collections.c.id == documents.c.collection)
            .where(mentions.c.entity.in_(own), mentions.c.wanted, seen_by(viewer))
            .group_by(mentions.c.entity)
        )
        async with self._database.read.connect() as connection:
            found = sorted((-count, entity) for entity, count in await connection.execute(query))
        named = [(*entity.partition(":")[::2], -count) for count, entity in found]
        return [EntityLine(kind, name, count) for kind, name, count in named]

    async def _all(self, client: str) -> list[Collection]:
        return await self._store.collections(client, "", MAX_COLLECTIONS)

    async def _names(self, client: str) -> Mapping[int, str]:
        return {one.id: one.name for one in await self._all(client)}


def _errors(*codes: str) -> dict[int, ResponseSpec]:
    return error_specs(*REFUSALS, "INVALID_EXPORT_REQUEST", *codes, "QUEUE_UNAVAILABLE", "INTERNAL")


class ContextController(Controller):
    """What is around documents."""

    path = "/v1/collections"
    tags = ("collections",)

    @get(
        "/{collection:str}/context",
        opt={NEEDS: READ, AUDITED: "collection.search"},
        operation_id="getContext",
        summary="What is around a document",
        responses=_errors("COLLECTION_NOT_FOUND", "DOCUMENT_NOT_FOUND"),
    )
    async def context(
        self,
        contexts: NamedDependency[Contexts],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
        *,
        id_: Annotated[str, QueryParameter(name="id", description="The document's id")],
        limit: Annotated[int, QueryParameter(description=f"Related documents, 1 to {TOP_K}")] = 10,
        elsewhere: Annotated[bool, QueryParameter(description="Related ones of other collections only")] = False,
        domain: Annotated[str | None, QueryParameter(description="Related ones of this domain only")] = None,
    ) -> DocumentContext:
        """Its domain, what it names, what resembles it, what the graph told of it. ``elsewhere`` finds what other
        collections, such as other repositories, have of the same. ``domain=legal`` asks what in ``legal`` is nearest to
        it, in all collections of the client whose vectors can be compared with its own: few documents of different
        domains resemble each other enough to be related, so these are listed however near they are, and ``score`` says
        how near."""
        return await contexts.around(caller, collection, id_, Sought(limit, elsewhere, domain))


class DuplicatesController(Controller):
    """What is there twice."""

    path = "/v1/duplicates"
    tags = ("collections",)

    @get(
        opt={NEEDS: READ, AUDITED: "collection.search"},
        operation_id="listDuplicates",
        summary="Documents that several collections have",
        responses=_errors(),
    )
    async def duplicates(
        self,
        contexts: NamedDependency[Contexts],
        caller: NamedDependency[Caller],
        *,
        threshold: Annotated[float, QueryParameter(description="The least cosine, 0.75 to 1")] = 0.95,
    ) -> DuplicateGroups:
        """Such as code that one repository copied from another. Of more than twenty copies of one document each is in
        the group of those that it is nearest to."""
        return await contexts.duplicates(caller, threshold)


def _no_document() -> DocumentNotFound:
    return DocumentNotFound("There is no document of this id.")


def _line(near: Near, document: Document, names: Mapping[int, str]) -> RelatedLine:
    return RelatedLine(
        names.get(document.collection, ""),
        document.doc_id,
        document.title,
        near.score,
        document.domain,
        document.doc_type,
    )


def _together(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected parts, each in order of its rows."""
    above: dict[int, int] = {}

    def top(row: int) -> int:
        while (up := above.setdefault(row, row)) != row:
            above[row] = above[up]
            row = up
        return row

    for one, other in pairs:
        first, second = sorted((top(one), top(other)))
        above[second] = first
    found: dict[int, list[int]] = defaultdict(list)
    for row in sorted(above):
        found[top(row)].append(row)
    return list(found.values())
