"""Rows of collections and documents, as the rest of this part knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

TOP_K = 20
"""So many others a document has in its own list at most."""
THRESHOLD = 0.75
"""Of the cosine: what is below resembles nothing."""


class Near(NamedTuple):
    """One of a document's list of those that it resembles most."""

    id: int
    score: float
    """Cosine, six decimals."""


NEAR = np.dtype([("id", "<i8"), ("score", "<f8")])
"""One of a packed list."""


def pack_near(near: Sequence[Near]) -> bytes:
    """A list as the column ``near`` has it."""
    return np.array([tuple(one) for one in near], dtype=NEAR).tobytes()


def unpack_near(data: bytes) -> list[Near]:
    """A list from the column ``near``."""
    return [Near(int(one[0]), float(one[1])) for one in np.frombuffer(data, dtype=NEAR)]


MAX_COLLECTIONS = 1_000
"""Of one client."""


class Viewer(NamedTuple):
    """Who asks, as far as that decides what is there for them."""

    client: str | None
    """None: sees the documents of all clients."""
    key: str | None
    """The name of the key. None: sees every document of its client."""


class Collection(NamedTuple):
    """Documents of one client under a name."""

    id: int
    client: str
    name: str
    space: str
    """Documents of equal spaces are compared with each other."""
    model: str
    """Whose vectors they have: ``provider/name`` of an engine of this server, or the name that their writer gave."""
    dimension: int
    created_at: int


class NewDocument(NamedTuple):
    """A document that is to be written."""

    doc_id: str
    title: str
    text: str
    payload: Mapping[str, Any]
    doc_type: str
    permissions: Sequence[str]
    """Names of the keys that see it; empty: all of its client."""
    vector: Vector
    """Of unit length."""
    exported: str = ""
    """Of what an export wrote: a hash that tells whether another export has the same. Empty: a client wrote it."""


class Document(NamedTuple):
    """A document as it stands."""

    id: int
    collection: int
    doc_id: str
    title: str
    text: str
    payload: Mapping[str, Any]
    doc_type: str
    permissions: Sequence[str]
    created_at: int
    updated_at: int
    version: int
    domain: str
    """Empty: not classified yet."""
    related: int
    """The version that the engine has compared with the others."""
    wanted: int
    graphed: int
    """The graph is as it should be where this is ``wanted``."""
    synced_at: int | None
    attempts: int
    error: str | None
    """Why the graph did not take it the last time."""

    @property
    def status(self) -> str:
        """``synced``, ``pending``, or ``failed`` once it was given up."""
        if self.related >= self.version and self.graphed >= self.wanted:
            return "synced"
        return "failed" if self.attempts >= MAX_ATTEMPTS else "pending"


MAX_ATTEMPTS = 4
"""The first one and three retries; then it is a dead letter until somebody says so, or it changes."""


class Written(NamedTuple):
    """A document that was written."""

    doc_id: str
    id: int
    version: int
    created: bool
    """It was not there before, or had been deleted."""


class VectorRow(NamedTuple):
    """A document's last change, for who keeps vectors in memory."""

    id: int
    version: int
    deleted: bool
    vector: bytes
    """float32, little-endian; empty where it was deleted."""


class Unrelated(NamedTuple):
    """A change that was not compared with other documents yet."""

    id: int
    version: int
    deleted: bool
    space: str
    collection: str
    """The name."""
    doc_type: str
    title: str
    text: str
    """As much of it as the rules look at. This, the title and the type are empty where it was deleted."""


class Related(NamedTuple):
    """A change that was compared and classified."""

    id: int
    version: int
    domain: str
    entities: frozenset[str]
    """``kind:name`` of what it names."""


NOT_HELD, MAYBE_HELD, HELD = 0, 1, 2
"""Whether the graph has a mention. Maybe: it was to be told or to lose it, and nobody noted that this ended."""


class Mentioned(NamedTuple):
    """An entity beside a document."""

    entity: str
    wanted: bool
    """The document names it."""
    held: int
    """``HELD`` and so on; says nothing where nobody knows what the graph holds of the document."""


class Row(NamedTuple):
    """A document, what the graph should hold of it, and what it was told."""

    id: int
    space: str
    client: str
    collection: str
    """The name."""
    doc_id: str
    title: str
    """Empty where it was deleted, as are type and domain."""
    domain: str
    doc_type: str
    created_at: int
    changed_at: int
    """When the first change was made that the graph has not got; of one that is not pending, that it got last."""
    version: int
    deleted: bool
    pending: bool
    """The graph has not got the last change, or the change was not compared yet."""
    news: bool
    """The last change was compared, and nobody outside was told that the graph has it."""
    wanted: int
    near: bytes
    """Packed; the list that the graph should have. Empty where it was deleted."""
    told: bytes | None
    """Packed; the list that the graph may have. None: nobody knows what it holds, of mentions either."""
    attempts: int
    mentions: Sequence[Mentioned]


class Graphed(NamedTuple):
    """A document that the graph has been told of."""

    id: int
    wanted: int
    near: bytes
    mentions: Sequence[Mentioned]
    """All three as the row said that the graph was told of."""
    announced: int
    """The version that outside was told of with that; 0: none."""


class Told(NamedTuple):
    """The list of a document, as a look at the graph needs it of the other ends of pairs."""

    near: bytes
    """Packed."""
    pending: bool


class CollectionCounts(NamedTuple):
    """How far the graph is behind a collection."""

    client: str
    name: str
    documents: int
    """That live."""
    pending: int
    """Changes, deletions too, that the graph has not got and still will be told."""
    failed: int
    """Those that were given up."""
    pending_since: int | None
    """When the one that waits longest was made, in milliseconds since 1970."""


class Backlog(NamedTuple):
    """What the graph has not got of a client's documents."""

    pending: int
    """As of ``CollectionCounts``, as the following two."""
    failed: int
    pending_since: int | None
    written: int
    """Of ``pending``, without those that are told anew as nobody knows what the graph holds of them."""


class Failure(NamedTuple):
    """A document that the graph did not take, and that is not tried again by itself."""

    client: str
    collection: str
    doc_id: str
    error: str
    attempts: int


LookKind = Literal["verify", "rebuild"]
"""A look that compares the graph with the rows; one that makes the graph empty and has every row told anew."""


class SyncState(NamedTuple):
    """What all replicas share about keeping the graph in step."""

    enabled: bool
    owner: str | None
    """The replica that does it, as long as its lease lasts."""
    lease_until: int
    """By the database's clock, in milliseconds since 1970."""
    last_version: int
    asked: LookKind | None
    """The kind of look at the graph that somebody wants and that has not begun."""
    progress: str | None
    """Of the look that goes on, as JSON."""
    verified_at: int | None
    """When the last one began, in milliseconds since 1970."""
    report: str | None
    """What it found, as JSON."""
