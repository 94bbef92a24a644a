"""The routes of ``/v1/collections``."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote

from litestar import Controller, Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath, FromQuery, QueryParameter

from common.errors import InvalidRequest, UnsupportedMediaType
from control_plane.nexus.incoming import (
    MAX_BATCH,
    MAX_DIMENSION,
    MAX_DOMAIN,
    MAX_DOMAINS,
    MAX_HITS,
    MAX_ID,
    MAX_NAMED,
    MAX_PERMISSIONS,
    MAX_QUERY,
    MAX_TEXT,
    MAX_TITLE,
)
from control_plane.nexus.messages import (
    BatchWritten,
    CollectionPage,
    CollectionView,
    Deleted,
    DocumentHits,
    DocumentPage,
    DocumentView,
    Written,
)
from control_plane.nexus.service import MAX_PAGE, Collections
from control_plane.operations.auth import AUDITED, EXPORT, NEEDS, READ
from control_plane.operations.keys import Caller
from control_plane.operations.openapi import REFUSALS, error_specs

_ID = Schema(type=OpenAPIType.STRING, min_length=1, max_length=MAX_ID)
_NULL = OpenAPIType.NULL
_DOC_TYPE = r"^[A-Za-z0-9._-]{0,64}$"
_VECTOR = Schema(
    type=[OpenAPIType.ARRAY, _NULL],
    items=Schema(type=OpenAPIType.NUMBER),
    min_items=1,
    max_items=MAX_DIMENSION,
    description="As many numbers as the collection's dimension says, not all zero; the length is made 1.",
)
_DOCUMENT = {
    "title": Schema(type=OpenAPIType.STRING, max_length=MAX_TITLE),
    "text": Schema(type=OpenAPIType.STRING, max_length=MAX_TEXT),
    "vector": _VECTOR,
    "payload": Schema(type=[OpenAPIType.OBJECT, _NULL], description="At most 64 KiB."),
    "docType": Schema(type=OpenAPIType.STRING, pattern=_DOC_TYPE),
    "permissions": Schema(
        type=OpenAPIType.ARRAY,
        items=Schema(type=OpenAPIType.STRING, pattern=r"^[A-Za-z0-9._-]{1,64}$"),
        max_items=MAX_PERMISSIONS,
        description="Names of the keys that see the document; none: all of the client.",
    ),
}


def _object(required: list[str], **properties: Schema) -> Schema:
    return Schema(type=OpenAPIType.OBJECT, required=required, properties={**properties}, additional_properties=False)


_COLLECTION = _object(
    [],
    dimension=Schema(type=[OpenAPIType.INTEGER, _NULL], minimum=1, maximum=MAX_DIMENSION),
    model=Schema(type=[OpenAPIType.STRING, _NULL], pattern=r"^[A-Za-z0-9._/@:-]{1,128}$"),
)
_BATCH = _object(
    ["documents"],
    documents=Schema(
        type=OpenAPIType.ARRAY, min_items=1, max_items=MAX_BATCH, items=_object(["id"], id=_ID, **_DOCUMENT)
    ),
)
_DELETION = _object(["ids"], ids=Schema(type=OpenAPIType.ARRAY, min_items=1, max_items=MAX_BATCH, items=_ID))
_QUESTION = _object(
    [],
    query=Schema(type=[OpenAPIType.STRING, _NULL], max_length=MAX_QUERY, description="Never query syntax."),
    vector=_VECTOR,
    limit=Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=MAX_HITS, default=10),
    mode=Schema(type=OpenAPIType.STRING, enum=["vector", "lexical", "hybrid"], default="hybrid"),
    docType=Schema(type=[OpenAPIType.STRING, _NULL], pattern=_DOC_TYPE),
    threshold=Schema(
        type=[OpenAPIType.NUMBER, _NULL], minimum=-1, maximum=1, description="The least cosine that the vector finds."
    ),
    collections=Schema(
        type=OpenAPIType.ARRAY,
        items=Schema(type=OpenAPIType.STRING),
        max_items=MAX_NAMED,
        description="Further collections of the client; `*`: all of them.",
    ),
    domains=Schema(
        type=OpenAPIType.ARRAY,
        items=Schema(type=OpenAPIType.STRING, min_length=1, max_length=MAX_DOMAIN),
        max_items=MAX_DOMAINS,
        description="In documents of these domains alone; none: of any. One that no document has finds nothing.",
    ),
    perDomain=Schema(
        type=[OpenAPIType.INTEGER, _NULL],
        minimum=1,
        maximum=MAX_HITS,
        description="Hits of one domain at most, up to `limit`, so that others are heard as well.",
    ),
)


def _taking(schema: Schema, *, required: bool = True) -> type[Operation]:
    """The service reads the body, so the framework does not see its shape."""

    @dataclass
    class Taking(Operation):
        def __post_init__(self) -> None:
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=schema)}, required=required
            )

    return Taking


def _errors(*codes: str) -> dict[int, ResponseSpec]:
    return error_specs(*REFUSALS, *codes, "QUEUE_UNAVAILABLE", "INTERNAL")


_BODY = ("INVALID_EXPORT_REQUEST", "PAYLOAD_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE")
_ADDRESS = re.compile(rb"/+v1/+collections/+[^/]+/+documents/(.+)")


def _doc_id(request: Request[Any, Any, Any], routed: str) -> str:
    """The id in the path as it was sent: routing takes slashes together, and an id may be ``https://…``."""
    found = _ADDRESS.search(request.scope.get("raw_path") or b"")
    if found is None:  # written in a way that routing alone understands
        return routed.removeprefix("/")
    try:
        return unquote(found[1].decode("ascii"), errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest("id: must be UTF-8, percent-encoded", field="id") from None


def _json(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """The body. Raises UnsupportedMediaType where it is said to be something else."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(
            "Content-Type must be application/json.", field="Content-Type", allowed=["application/json"]
        )
    return request.stream()


class CollectionController(Controller):
    """Collections of documents, and search over them."""

    path = "/v1/collections"
    tags = ("collections",)

    @put(
        "/{collection:str}",
        request_max_body_size=None,
        operation_class=_taking(_COLLECTION, required=False),
        opt={NEEDS: EXPORT, AUDITED: "collection.create"},
        operation_id="putCollection",
        summary="Make a collection",
        responses={
            200: ResponseSpec(data_container=CollectionView, description="It was there", generate_examples=False),
            201: ResponseSpec(data_container=CollectionView, description="It is new", generate_examples=False),
            **_errors(*_BODY, "COLLECTION_DIFFERS", "SEMANTIC_UNAVAILABLE"),
        },
    )
    async def make(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
    ) -> Response[CollectionView]:
        """Without a `dimension` texts are embedded here; with one documents bring vectors along. It belongs to the
        client of the key, also where the key is one of `admin`; keys of other clients do not find it."""
        found, created = await collections.put(caller, collection, _json(request))
        return Response(found, status_code=201 if created else 200)

    @get(
        opt={NEEDS: READ},
        operation_id="listCollections",
        summary="List collections, by name",
        responses=_errors("INVALID_EXPORT_REQUEST"),
    )
    async def list_collections(
        self,
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        cursor: FromQuery[str | None] = None,
        limit: Annotated[int, QueryParameter(description=f"1 to {MAX_PAGE}")] = 50,
    ) -> CollectionPage:
        """Those of the key's client. ``nextCursor`` begins the next page; null at the end."""
        return await collections.page(caller, cursor, limit)

    @get(
        "/{collection:str}",
        opt={NEEDS: READ, AUDITED: "collection.read"},
        operation_id="getCollection",
        summary="One collection",
        responses=_errors("COLLECTION_NOT_FOUND"),
    )
    async def read_collection(
        self, collections: NamedDependency[Collections], caller: NamedDependency[Caller], collection: FromPath[str]
    ) -> CollectionView:
        """With the figures of the documents that the key sees."""
        return await collections.collection(caller, collection)

    @delete(
        "/{collection:str}",
        opt={NEEDS: EXPORT, AUDITED: "collection.delete"},
        operation_id="deleteCollection",
        summary="Delete a collection",
        responses=_errors("COLLECTION_NOT_FOUND"),
    )
    async def drop(
        self, collections: NamedDependency[Collections], caller: NamedDependency[Caller], collection: FromPath[str]
    ) -> None:
        """With all of its documents, also those that the key does not see."""
        await collections.drop(caller, collection)

    @get(
        "/{collection:str}/documents",
        opt={NEEDS: READ, AUDITED: "collection.read"},
        operation_id="listDocuments",
        summary="List documents",
        responses=_errors("INVALID_EXPORT_REQUEST", "COLLECTION_NOT_FOUND"),
    )
    async def list_documents(
        self,
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
        cursor: FromQuery[str | None] = None,
        limit: Annotated[int, QueryParameter(description=f"1 to {MAX_PAGE}")] = 50,
    ) -> DocumentPage:
        """Without their texts. ``nextCursor`` begins the next page; null at the end."""
        return await collections.listing(caller, collection, cursor, limit)

    @post(
        "/{collection:str}/documents",
        status_code=200,
        request_max_body_size=None,
        operation_class=_taking(_BATCH),
        opt={NEEDS: EXPORT, AUDITED: "document.write"},
        operation_id="putDocuments",
        summary="Write several documents",
        responses=_errors(*_BODY, "COLLECTION_NOT_FOUND", "DOCUMENT_NOT_FOUND", "SEMANTIC_UNAVAILABLE"),
    )
    async def write_all(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
    ) -> Response[BatchWritten]:
        """All of them, or none. What is there under an id is replaced as a whole."""
        found = await collections.write_all(caller, collection, _json(request))
        return Response(found, headers=collections.quotas(caller))

    @put(
        "/{collection:str}/documents/{doc_id:path}",
        request_max_body_size=None,
        operation_class=_taking(_object([], **_DOCUMENT)),
        opt={NEEDS: EXPORT, AUDITED: "document.write"},
        operation_id="putDocument",
        summary="Write a document",
        responses={
            200: ResponseSpec(data_container=Written, description="It was replaced", generate_examples=False),
            201: ResponseSpec(data_container=Written, description="It is new", generate_examples=False),
            **_errors(*_BODY, "COLLECTION_NOT_FOUND", "DOCUMENT_NOT_FOUND", "SEMANTIC_UNAVAILABLE"),
        },
    )
    async def write(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
        doc_id: FromPath[str],
    ) -> Response[Written]:
        """With a text, a vector, or both. The id is the rest of the path, slashes included. One that the key does not
        see is not replaced (404)."""
        found = await collections.write(caller, collection, _doc_id(request, doc_id), _json(request))
        return Response(found, status_code=201 if found.created else 200, headers=collections.quotas(caller))

    @get(
        "/{collection:str}/documents/{doc_id:path}",
        opt={NEEDS: READ, AUDITED: "collection.read"},
        operation_id="getDocument",
        summary="One document",
        responses=_errors("INVALID_EXPORT_REQUEST", "COLLECTION_NOT_FOUND", "DOCUMENT_NOT_FOUND"),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
        doc_id: FromPath[str],
        *,
        vector: Annotated[bool, QueryParameter(description="With its vector")] = False,
    ) -> DocumentView:
        """One that the key does not see is not there."""
        return await collections.read(caller, collection, _doc_id(request, doc_id), vector=vector)

    @delete(
        "/{collection:str}/documents/{doc_id:path}",
        opt={NEEDS: EXPORT, AUDITED: "document.delete"},
        operation_id="deleteDocument",
        summary="Delete a document",
        responses={
            204: ResponseSpec(None, description="It is deleted"),
            **_errors("INVALID_EXPORT_REQUEST", "COLLECTION_NOT_FOUND", "DOCUMENT_NOT_FOUND"),
        },
    )
    async def delete_document(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
        doc_id: FromPath[str],
    ) -> Response[None]:
        """One that the key does not see is not there."""
        await collections.delete(caller, collection, _doc_id(request, doc_id))
        return Response(None, status_code=204, headers=collections.quotas(caller))

    @post(
        "/{collection:str}/deletions",
        status_code=200,
        request_max_body_size=None,
        operation_class=_taking(_DELETION),
        opt={NEEDS: EXPORT, AUDITED: "document.delete"},
        operation_id="deleteDocuments",
        summary="Delete several documents",
        responses=_errors(*_BODY, "COLLECTION_NOT_FOUND"),
    )
    async def delete_all(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
    ) -> Response[Deleted]:
        """Those of them that are there. Not below `documents`: any text there is the id of a document."""
        found = await collections.delete_all(caller, collection, _json(request))
        return Response(found, headers=collections.quotas(caller))

    @post(
        "/{collection:str}/search",
        status_code=200,
        request_max_body_size=None,
        operation_class=_taking(_QUESTION),
        opt={NEEDS: READ, AUDITED: "collection.search"},
        operation_id="searchCollection",
        summary="Search a collection",
        responses=_errors(*_BODY, "COLLECTION_NOT_FOUND", "SEMANTIC_UNAVAILABLE", "TIMEOUT"),
    )
    async def search(
        self,
        request: Request[Any, Any, Any],
        collections: NamedDependency[Collections],
        caller: NamedDependency[Caller],
        collection: FromPath[str],
    ) -> DocumentHits:
        """By a `query`, by a `vector`, or by both; best first. `hybrid` also goes one hop from the best hits: to what
        resembles them, what names the same rare things, and what a graph told to be related to them. A
        collection whose vectors are of another model than the question's is searched by words alone, which `warnings`
        says."""
        return await collections.search(caller, collection, _json(request))
