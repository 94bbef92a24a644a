"""What goes over the wire of ``/v1/collections``: camelCase; times are ISO 8601 in UTC with milliseconds."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Raw, UnsetType, field

from common.contract import Wire

Mode = Literal["vector", "lexical", "hybrid"]
SyncStatus = Literal["synced", "pending", "failed"]
ALL = "*"
"""In place of a name: all collections of the client."""


class Asked(Wire, kw_only=True, forbid_unknown_fields=True):
    """The body of a request; a field that nobody knows is refused."""


class CollectionSettings(Asked, kw_only=True):
    """``PUT /v1/collections/{collection}``."""

    dimension: int | None = None
    """Of the vectors that documents bring along; None: texts are embedded by this server."""
    model: str | None = None
    """Whose vectors they are. Those of collections with the same model and dimension are compared with each other."""


class DocumentBody(Asked, kw_only=True):
    """``PUT /v1/collections/{collection}/documents/{id}``."""

    title: str = ""
    text: str = ""
    vector: Raw = Raw()
    """A list of numbers; it is read once its length is known."""
    payload: Raw = Raw()
    """An object; it is read once its size is known."""
    doc_type: str = ""
    permissions: list[str] = field(default_factory=list)
    """Names of the keys that see it; empty: all of its client."""


class BatchDocument(DocumentBody, kw_only=True):
    """One of several."""

    id: str


class Batch(Asked, kw_only=True):
    """``POST /v1/collections/{collection}/documents``."""

    documents: list[BatchDocument]


class Deletion(Asked, kw_only=True):
    """``POST /v1/collections/{collection}/deletions``."""

    ids: list[str]


class SearchQuestion(Asked, kw_only=True):
    """``POST /v1/collections/{collection}/search``."""

    query: str | None = None
    """Text of any kind, never query syntax."""
    vector: Raw = Raw()
    limit: int = 10
    mode: str = "hybrid"
    doc_type: str | None = None
    threshold: float | None = None
    """The least cosine that resembles."""
    collections: list[str] = field(default_factory=list)
    """Others of the same client that are searched as well; ``*``: all."""
    domains: list[str] = field(default_factory=list)
    """In documents of these alone; none: of any."""
    per_domain: int | None = None
    """Hits of one domain, at most."""


class SyncCounts(Wire, kw_only=True):
    """How many documents are how far; of those that the key sees."""

    synced: int
    pending: int
    failed: int


class CollectionLine(Wire, kw_only=True):
    """A collection."""

    name: str
    model: str
    """Whose vectors its documents have."""
    dimension: int
    created_at: str


class CollectionView(CollectionLine, kw_only=True):
    """A collection with its figures."""

    documents: int
    """That the key sees."""
    sync: SyncCounts


class CollectionPage(Wire, kw_only=True):
    """``GET /v1/collections``; ``nextCursor`` is None at the end."""

    collections: list[CollectionLine]
    next_cursor: str | None


class Sync(Wire, kw_only=True):
    """How far a document is on its way into the graph."""

    status: SyncStatus
    """``failed``: it was given up until somebody says so, or it changes."""
    synced_at: str | None
    """When the graph last had it as it was then."""
    attempts: int
    """That failed since."""
    error: str | None
    """Why the last one did."""


class DocumentView(Wire, kw_only=True):
    """A document."""

    id: str
    title: str
    payload: dict[str, Any]
    doc_type: str
    permissions: list[str]
    domain: str
    """Empty: not classified yet."""
    version: int
    """The number of its last change; later changes have higher ones."""
    created_at: str
    updated_at: str
    sync: Sync
    text: str | UnsetType = UNSET
    """Lists leave it out."""
    vector: list[float] | UnsetType = UNSET
    """Of unit length; only where it is asked for."""


class DocumentPage(Wire, kw_only=True):
    """``GET /v1/collections/{collection}/documents``, in the order in which they first came."""

    documents: list[DocumentView]
    next_cursor: str | None


class Written(Wire, kw_only=True):
    """A document that was written."""

    id: str
    version: int
    created: bool
    """It was not there before."""


class BatchWritten(Wire, kw_only=True):
    """Documents that were written, in the order of the request."""

    documents: list[Written]


class Deleted(Wire, kw_only=True):
    """How many documents there were to delete."""

    deleted: int


class Why(Wire, kw_only=True):
    """What speaks for a hit."""

    vector_score: float | None
    """The cosine to the question; None: it was not found by that."""
    lexical_score: float | None
    """How well words fit; compares hits of one answer only."""
    graph_score: float | None
    """Its own place among the best hits, and what it has of those that resemble it, name the same or are related to
    it; None: it is not among these, or one hop from them."""
    ranks: dict[str, int]
    """Its place among those that a way of searching found, by the name of the way; 1 is the best."""


class DocumentHit(Wire, kw_only=True):
    """A document that fits a question; ``score`` compares hits of one answer only."""

    collection: str
    id: str
    title: str
    score: float
    why: Why
    domain: str
    doc_type: str
    payload: dict[str, Any]


class DocumentHits(Wire, kw_only=True):
    """``POST /v1/collections/{collection}/search``; best hits first."""

    mode: Mode
    hits: list[DocumentHit]
    warnings: list[str]
    """``SEMANTIC_MODEL_MISSING``: collections were searched by words alone, as the question has no vector that fits
    theirs. ``SEMANTIC_UNAVAILABLE``: the engine gave no vector."""
