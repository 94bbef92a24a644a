"""What clients do with collections and their documents.

A collection belongs to the client of the key that made it, and is there for keys of that client alone: ``admin`` acts
within its own client here, as any key does, but sees each of its documents, whatever their permissions say.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
from anyio import CapacityLimiter, move_on_after, to_thread
from litestar.exceptions import HTTPException

from common.errors import InvalidRequest, PayloadTooLarge
from control_plane.cursors import cursor_of, parse_cursor
from control_plane.errors import CollectionNotFound, DocumentNotFound, SemanticUnavailable, TimedOut
from control_plane.jobs.records import iso
from control_plane.jobs.store import now_ms
from control_plane.nexus import incoming
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.finding import DEPTH, Finder, HasSpaces, Hit, Wanted
from control_plane.nexus.incoming import Incoming, Question
from control_plane.nexus.messages import (
    ALL,
    BatchWritten,
    CollectionLine,
    CollectionPage,
    CollectionView,
    Deleted,
    DocumentHit,
    DocumentHits,
    DocumentPage,
    DocumentView,
    Sync,
    SyncCounts,
    SyncStatus,
    Why,
    Written,
)
from control_plane.nexus.pace import Pace
from control_plane.nexus.records import MAX_COLLECTIONS, Collection, Document, NewDocument, Vector, Viewer
from control_plane.nexus.sight import Sight
from control_plane.nexus.store import HIDDEN, CollectionStore
from control_plane.nexus.texts import Texts
from control_plane.operations.keys import Caller
from control_plane.operations.shares import Shares
from control_plane.reading.ask import AWAY

MAX_WRITES = 64
"""Requests that bring documents, at once."""
MAX_BODY = 16 << 20
"""Bytes of a request that brings documents; so many for each of ``MAX_WRITES`` is the most that waits in memory."""
MAX_ASKED = 4 << 20
"""Bytes of any other."""
BODY_SECONDS = 60.0
"""That a body may take to come."""
MAX_PAGE = 100
THREADS = 2
"""Requests whose documents are read and embedded at once; others wait their turn."""
QUESTIONS = 4
"""Questions that are embedded at once; others wait their turn."""
SEARCH_SECONDS = 20.0
"""That a search may wait and take."""
_COLLECTION_CURSOR = re.compile(r"(0):([A-Za-z0-9._-]{1,128})")
_DOCUMENT_CURSOR = re.compile(r"([0-9]{1,15}):([0-9]{1,18})")

T = TypeVar("T")


class Collections:
    """Collections, their documents, and search over them."""

    def __init__(
        self,
        store: CollectionStore,
        sight: Sight,
        spaces: HasSpaces,
        events: BackStore,
        *,
        texts: Texts,
        wake: Callable[[], None],
        places: Shares,
        pace: Pace,
        room: Callable[[int], None],
    ) -> None:
        """``wake`` hears that documents were written; ``places`` are ``MAX_WRITES``; ``room`` raises where the disk has
        none for so many bytes."""
        self._store = store
        self._sight = sight
        self._events = events
        self._finder = Finder(store, sight, spaces)
        self._texts = texts
        self._wake = wake
        self._places = places
        self._pace = pace
        self._room = room
        self._threads = CapacityLimiter(THREADS)
        self._questions = CapacityLimiter(QUESTIONS)

    # --- collections -------------------------------------------------------------------------------------------------

    async def put(self, caller: Caller, name: str, body: AsyncIterator[bytes]) -> tuple[CollectionView, bool]:
        """Make a collection; answers it, and whether it is new. Raises InvalidRequest, CollectionDiffers."""
        incoming.check_collection(name)
        wanted = incoming.settings_of(await _whole(body, MAX_ASKED))
        if wanted.dimension is not None:
            model, dimension = wanted.model or name, wanted.dimension
        else:
            model, dimension = await self._thread(self._texts.model)
        collection, created = await self._store.put_collection(caller.client, name, model, dimension)
        return await self._view(collection, _viewer(caller)), created

    async def collection(self, caller: Caller, name: str) -> CollectionView:
        """One, with the figures of what the caller sees. Raises CollectionNotFound."""
        return await self._view(await self._store.collection(caller.client, name), _viewer(caller))

    async def page(self, caller: Caller, cursor: str | None, limit: int) -> CollectionPage:
        """Those of the caller's client, by name."""
        limit = min(max(limit, 1), MAX_PAGE)
        after = parse_cursor(cursor, _COLLECTION_CURSOR)[1] if cursor else ""
        found = await self._store.collections(caller.client, after, limit + 1)
        following = cursor_of(0, found[limit - 1].name) if len(found) > limit else None
        return CollectionPage(collections=[_line(one) for one in found[:limit]], next_cursor=following)

    async def drop(self, caller: Caller, name: str) -> None:
        """Delete a collection and all of its documents, also those that the caller does not see. Raises
        CollectionNotFound."""
        await self._store.drop_collection(await self._store.collection(caller.client, name))
        self._wake()

    async def _view(self, collection: Collection, viewer: Viewer) -> CollectionView:
        counts = await self._sight.counts(collection.id, viewer)
        line = _line(collection)
        return CollectionView(
            **msgspec.structs.asdict(line),
            documents=counts.documents,
            sync=SyncCounts(
                synced=counts.documents - counts.pending - counts.failed, pending=counts.pending, failed=counts.failed
            ),
        )

    # --- documents ---------------------------------------------------------------------------------------------------

    async def write(self, caller: Caller, name: str, doc_id: str, body: AsyncIterator[bytes]) -> Written:
        """Write a document in place of what has its id. Raises CollectionNotFound, InvalidRequest, PayloadTooLarge,
        RateLimited, QueueUnavailable, SemanticUnavailable, and DocumentNotFound where the id is that of a document that
        the caller does not see."""
        try:
            [written] = await self._write(
                caller, name, body, lambda data, dimension: [incoming.document_of(doc_id, data, dimension)]
            )
        except DocumentNotFound:
            raise DocumentNotFound(f"id: {HIDDEN}", field="id") from None
        return written

    async def write_all(self, caller: Caller, name: str, body: AsyncIterator[bytes]) -> BatchWritten:
        """Write several documents, or none. Raises as ``write``."""
        return BatchWritten(documents=await self._write(caller, name, body, incoming.batch_of))

    async def _write(
        self,
        caller: Caller,
        name: str,
        body: AsyncIterator[bytes],
        read: Callable[[bytes, int], Sequence[Incoming]],
    ) -> list[Written]:
        self._pace.check(caller.client)
        collection = await self._store.collection(caller.client, name)
        with self._places.place(caller.client):
            data = await _whole(body, MAX_BODY)

            def complete() -> list[NewDocument]:
                self._room(len(data))
                return self._texts.complete(collection, read(data, collection.dimension))

            documents = await self._thread(complete)
            written = await self._store.write(collection, documents, now=now_ms(), viewer=_viewer(caller))
        self._pace.count(caller.client, len(written))
        self._wake()
        return [Written(id=one.doc_id, version=one.version, created=one.created) for one in written]

    async def read(self, caller: Caller, name: str, doc_id: str, *, vector: bool) -> DocumentView:
        """One document, with its vector where that is wanted. Raises CollectionNotFound, DocumentNotFound; the latter
        for one that the caller does not see, too: nothing tells the two apart."""
        collection = await self._store.collection(caller.client, name)
        found = await self._store.get(collection, [doc_id], _viewer(caller))
        if not found:
            raise _no_document()
        [view] = await self._shown(found, _viewer(caller))
        view.text = found[0].text
        if vector:
            numbers = await self._sight.vector(found[0].id)
            if numbers is None:  # deleted since
                raise _no_document()
            view.vector = numbers.tolist()
        return view

    async def _shown(self, found: Sequence[Document], viewer: Viewer) -> list[DocumentView]:
        """Without their texts; what the graph told of them is in their payloads, as ``graph``."""
        told = await self._events.graph_payload([one.id for one in found], viewer)
        return [_shown(one, {incoming.TOLD: told[one.id]} if one.id in told else {}) for one in found]

    async def listing(self, caller: Caller, name: str, cursor: str | None, limit: int) -> DocumentPage:
        """The documents that the caller sees. Raises CollectionNotFound, InvalidRequest."""
        collection = await self._store.collection(caller.client, name)
        limit = min(max(limit, 1), MAX_PAGE)
        of, after = parse_cursor(cursor, _DOCUMENT_CURSOR) if cursor else (collection.id, "0")
        if of != collection.id:
            raise InvalidRequest("cursor is one of another collection.", field="cursor")
        found = await self._store.listing(collection, _viewer(caller), after=int(after), limit=limit + 1)
        following = cursor_of(collection.id, found[limit - 1].id) if len(found) > limit else None
        return DocumentPage(documents=await self._shown(found[:limit], _viewer(caller)), next_cursor=following)

    async def delete(self, caller: Caller, name: str, doc_id: str) -> None:
        """Delete a document. Raises CollectionNotFound, DocumentNotFound, RateLimited."""
        self._pace.check(caller.client)
        if not await self._delete(caller, name, [doc_id]):
            raise _no_document()

    async def delete_all(self, caller: Caller, name: str, body: AsyncIterator[bytes]) -> Deleted:
        """Delete those of several that are there for the caller. Raises CollectionNotFound, InvalidRequest,
        RateLimited."""
        self._pace.check(caller.client)
        return Deleted(deleted=await self._delete(caller, name, incoming.ids_of(await _whole(body, MAX_ASKED))))

    async def _delete(self, caller: Caller, name: str, doc_ids: Sequence[str]) -> int:
        collection = await self._store.collection(caller.client, name)
        deleted = await self._store.delete(collection, doc_ids, now=now_ms(), viewer=_viewer(caller))
        self._pace.count(caller.client, len(doc_ids))
        if deleted:
            self._wake()
        return deleted

    def quotas(self, caller: Caller) -> dict[str, str]:
        """Headers that say how many documents the caller's client may still change."""
        return self._pace.headers(caller.client)

    # --- search ------------------------------------------------------------------------------------------------------

    async def search(self, caller: Caller, name: str, body: AsyncIterator[bytes]) -> DocumentHits:
        """What fits a question. Raises CollectionNotFound, InvalidRequest, SemanticUnavailable, TimedOut."""
        collection = await self._store.collection(caller.client, name)
        question = incoming.question_of(await _whole(body, MAX_ASKED), collection.dimension)
        with move_on_after(SEARCH_SECONDS):
            return await self._search(caller, collection, question)
        raise TimedOut("Too many questions are asked at once; try again.")

    async def _search(self, caller: Caller, collection: Collection, question: Question) -> DocumentHits:
        searched = await self._searched(collection, question)
        warnings: dict[str, None] = {}
        vectors = await self._vectors(collection, searched, question, warnings) if question.mode != "lexical" else {}
        viewer = _viewer(caller)
        wanted = Wanted(
            list(searched.values()),
            viewer,
            question.doc_type,
            question.query,
            vectors,
            question.threshold,
            question.limit if question.mode != "hybrid" and question.per_domain is None else DEPTH,
            question.domains,
        )
        legs = [leg for leg in self._finder.legs if question.mode in ("hybrid", leg)]
        hits = await self._finder.find(wanted, legs, limit=question.limit, per_domain=question.per_domain)
        found = await self._store.by_ids([hit.id for hit in hits], viewer)
        names = {one.id: one.name for one in searched.values()}
        return DocumentHits(
            mode=question.mode,
            hits=[_hit(hit, found[hit.id], names) for hit in hits if hit.id in found],
            warnings=list(warnings),
        )

    async def _searched(self, collection: Collection, question: Question) -> dict[str, Collection]:
        """By name."""
        found = {collection.name: collection}
        if ALL in question.others:
            found |= {one.name: one for one in await self._store.collections(collection.client, "", MAX_COLLECTIONS)}
        for number, name in enumerate(question.others):
            if name not in found and name != ALL:
                try:
                    found[name] = await self._store.collection(collection.client, name)
                except CollectionNotFound:
                    field = f"collections[{number}]"
                    raise CollectionNotFound(f"{field}: there is no collection of this name", field=field) from None
        return found

    async def _vectors(
        self, collection: Collection, searched: Mapping[str, Collection], question: Question, warnings: dict[str, None]
    ) -> dict[str, Vector]:
        """The question's vectors by the space that they belong to; ``warnings`` hears why a space has none."""
        found = {} if question.vector is None else {collection.space: question.vector}
        others = [one for one in searched.values() if one.space not in found]
        why = "they have vectors of another model"
        if question.query is not None and others:
            try:
                ask = partial(self._texts.question, question.query, others)
                found |= await to_thread.run_sync(ask, limiter=self._questions)
            except InvalidRequest as error:  # no engine runs here
                why = error.message
            except AWAY as error:
                if question.mode == "vector":
                    message = f"The engine gave no vector ({error.message}); lexical and hybrid need none."
                    raise SemanticUnavailable(message, field="mode") from error
                warnings["SEMANTIC_UNAVAILABLE"] = None
                return found
        if question.mode == "vector" and not found:
            raise InvalidRequest(
                f"vector: must be given, as no text is embedded for these collections: {why}", field="vector"
            )
        if any(one.space not in found for one in searched.values()):
            warnings["SEMANTIC_MODEL_MISSING"] = None
        return found

    async def _thread(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=self._threads)


async def _whole(body: AsyncIterator[bytes], most: int) -> bytes:
    """A body. Raises InvalidRequest, PayloadTooLarge."""
    held = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in body:
                held += chunk
                if len(held) > most:
                    raise PayloadTooLarge(f"The body may have at most {most:,} bytes.", field="$", limit=most)
    except TimeoutError as error:
        raise InvalidRequest(f"The body is not there after {BODY_SECONDS:.0f} seconds.", field="$") from error
    except HTTPException as error:
        raise InvalidRequest("The body ended before its announced length.", field="$") from error
    return bytes(held)


def _viewer(caller: Caller) -> Viewer:
    return Viewer(caller.client, None if caller.sees_all else caller.key)


def _no_document() -> DocumentNotFound:
    return DocumentNotFound("There is no document of this id.")


def _line(collection: Collection) -> CollectionLine:
    return CollectionLine(
        name=collection.name,
        model=collection.model,
        dimension=collection.dimension,
        created_at=iso(collection.created_at),
    )


def _shown(document: Document, told: Mapping[str, Any]) -> DocumentView:
    """Without its text."""
    return DocumentView(
        id=document.doc_id,
        title=document.title,
        payload={**document.payload, **told},
        doc_type=document.doc_type,
        permissions=list(document.permissions),
        domain=document.domain,
        version=document.version,
        created_at=iso(document.created_at),
        updated_at=iso(document.updated_at),
        sync=Sync(
            status=cast("SyncStatus", document.status),
            synced_at=None if document.synced_at is None else iso(document.synced_at),
            attempts=document.attempts,
            error=document.error,
        ),
    )


def _hit(hit: Hit, document: Document, names: Mapping[int, str]) -> DocumentHit:
    return DocumentHit(
        collection=names[document.collection],
        id=document.doc_id,
        title=document.title,
        score=hit.score,
        why=Why(
            vector_score=hit.scores.get("vector"),
            lexical_score=hit.scores.get("lexical"),
            graph_score=hit.scores.get("graph"),
            ranks=dict(hit.ranks),
        ),
        domain=document.domain,
        doc_type=document.doc_type,
        payload=dict(document.payload),
    )
