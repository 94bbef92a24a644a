"""What is known around a document, and what is there twice: read from rows, so that any replica answers, whether or not
the graph does.

A document's own list has the best twenty of both directions: whoever has it in its list without being in that one is
less similar than all twenty there, or would be there. Answers about one document are kept until something of its client
changes, as long as an hour: then they cost one small query.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from anyio import CapacityLimiter, move_on_after, to_thread
from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter

from common.contract import Wire
from common.errors import InvalidRequest
from control_plane.errors import DocumentNotFound, RateLimited, TimedOut
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.finding import Finder, Wanted
from control_plane.nexus.groups import Groups, Together
from control_plane.nexus.incoming import MAX_ID, check_domain
from control_plane.nexus.kept import Kept
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import MAX_COLLECTIONS, THRESHOLD, TOP_K, Collection, Document, Near, Viewer
from control_plane.nexus.sight import PAGE, Sight
from control_plane.nexus.store import CollectionStore
from control_plane.operations.auth import AUDITED, NEEDS, READ
from control_plane.operations.keys import Caller
from control_plane.operations.openapi import REFUSALS, error_specs

MAX_GROUPS = 100
MAX_SHOWN = 50
"""Documents of a group that are named."""
MAX_ANEW = 100
"""Documents of a space, for one report, whose lists are made anew, as others that the viewer does not see fill them."""
TURN_SECONDS = 3.0
"""That a report may wait for another one."""
REPORT_SECONDS = 60.0
"""That it may take."""


class EntityLine(Wire):
    """Something that a document names."""

    kind: str
    """``identifier``, ``path``, ``url`` or ``name``."""
    name: str
    documents: int
    """That name it, of those that the key sees; of a name that more than 1,000 have, of a thousand of them."""


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
        store: CollectionStore,
        sight: Sight,
        finder: Finder,
        events: BackStore,
        *,
        metrics: NexusMetrics,
    ) -> None:
        self._store = store
        self._sight = sight
        self._finder = finder
        self._events = events
        self._kept = Kept(DocumentContext, metrics)
        self._report = asyncio.Lock()
        self._thread = CapacityLimiter(1)

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
        others = await self._store.by_ids([one.id for one in near], viewer)
        named = await self._sight.names([one.collection for one in others.values()])
        told = await self._events.graph_payload([document.id], viewer)
        return DocumentContext(
            id=document.doc_id,
            domain=document.domain,
            entities=[_entity(*one) for one in await self._sight.entities(document.id, viewer)],
            related=[_line(one, others[one.id], named) for one in near if one.id in others],
            graph=told.get(document.id, {"properties": {}, "relationships": []}),
        )

    async def duplicates(self, caller: Caller, threshold: float) -> DuplicateGroups:
        """What several collections have. One report is made at a time. Raises InvalidRequest, RateLimited, TimedOut."""
        if not THRESHOLD <= threshold <= 1:
            raise InvalidRequest(f"threshold: must be {THRESHOLD} to 1", field="threshold", allowed=[THRESHOLD, 1])
        viewer = Viewer(caller.client, None if caller.sees_all else caller.key)
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._report.acquire()
        except TimeoutError as error:
            raise RateLimited("Another report of duplicates is being made. Try again later.", limit=1) from error
        try:
            with move_on_after(REPORT_SECONDS):
                return await self._duplicates(caller.client, viewer, threshold)
        finally:
            self._report.release()
        raise TimedOut(f"The report takes more than {REPORT_SECONDS:.0f} seconds now; a higher threshold takes less.")

    async def _duplicates(self, client: str, viewer: Viewer, threshold: float) -> DuplicateGroups:
        found: list[Together] = []
        total = 0
        for space in dict.fromkeys(one.space for one in await self._all(client)):
            groups, count = await self._groups(space, viewer, threshold)
            found = sorted([*found, *groups], key=lambda one: (-one.size, one.rows[0]))[:MAX_GROUPS]
            total += count
        named = await self._sight.names(sorted({number for group in found for number in group.collections}))
        shown = [await self._shown(group, named, viewer) for group in found]
        return DuplicateGroups(threshold=threshold, groups=shown, total=total)

    async def _shown(self, group: Together, named: Mapping[int, str], viewer: Viewer) -> Group:
        there = await self._store.by_ids(group.rows, viewer)
        shown = [there[row] for row in group.rows if row in there]
        return Group(
            size=group.size,
            collections=sorted(named[number] for number in group.collections if number in named),
            documents=[
                Member(named[one.collection], one.doc_id, one.title) for one in shown if one.collection in named
            ],
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

    async def _groups(self, space: str, viewer: Viewer, threshold: float) -> tuple[list[Together], int]:
        """Of the rows that the viewer sees the largest groups, and how many there are."""
        rows, inside = await self._sight.inside(space, viewer)
        if not len(rows):
            return [], 0
        groups = Groups(rows, inside)
        short: list[int] = []
        after = 0
        while page := await self._store.lists(space, after, PAGE):
            after = page[-1][0]
            found = await to_thread.run_sync(groups.take, page, threshold, limiter=self._thread)
            short += found[: MAX_ANEW - len(short)]
        for row, near in (await self._finder.nearest_of(short, space, rows, threshold)).items():
            groups.add(row, near)
        return await to_thread.run_sync(groups.several, MAX_GROUPS, MAX_SHOWN, limiter=self._thread)

    async def _all(self, client: str) -> list[Collection]:
        return await self._store.collections(client, "", MAX_COLLECTIONS)


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
        responses=_errors("TIMEOUT"),
    )
    async def duplicates(
        self,
        contexts: NamedDependency[Contexts],
        caller: NamedDependency[Caller],
        *,
        threshold: Annotated[float, QueryParameter(description="The least cosine, 0.75 to 1")] = 0.95,
    ) -> DuplicateGroups:
        """Such as code that one repository copied from another. Of more than twenty copies of one document each is in
        the group of those that it is nearest to. One report is made at a time, and it may take a minute."""
        return await contexts.duplicates(caller, threshold)


def _no_document() -> DocumentNotFound:
    return DocumentNotFound("There is no document of this id.")


def _entity(entity: str, count: int) -> EntityLine:
    kind, _, name = entity.partition(":")
    return EntityLine(kind, name, count)


def _line(near: Near, document: Document, names: Mapping[int, str]) -> RelatedLine:
    return RelatedLine(
        names.get(document.collection, ""),
        document.doc_id,
        document.title,
        near.score,
        document.domain,
        document.doc_type,
    )
