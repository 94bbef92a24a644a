"""The graph port: documents, what resembles them, what they mention; a projection that can be made anew from rows.

Nodes are ``Document`` and ``Entity``, edges ``SIMILAR_TO`` (undirected: it is there for both ends or for none) and
``MENTIONS`` (from a document to an entity).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from common.errors import ExportError, Retry


class GraphUnavailable(ExportError):
    """The graph database cannot be reached, is overloaded, or answered what nobody understands; the same may work
    later, and nothing says how much of a change it holds."""

    code = "GRAPH_UNAVAILABLE"
    retry = Retry.later


class GraphRefused(ExportError):
    """The graph database does not take a change, and would not take it the next time."""

    code = "GRAPH_REFUSED"
    retry = Retry.never


class DocumentNode(NamedTuple):
    """A document as the graph has it."""

    id: int
    """Of its row: never used again."""
    vector_id: str
    """The id that its writer gave it."""
    client: str
    collection: str
    title: str
    domain: str
    doc_type: str
    created_at: int
    """Milliseconds since 1970."""
    version: int
    """The change of the row that this is: it only grows."""


class Similar(NamedTuple):
    """Two documents that resemble each other; ``a`` < ``b``."""

    a: int
    b: int
    score: float
    """Cosine, six decimals."""


class Mention(NamedTuple):
    """A document names an entity."""

    document: int
    entity: str
    """``kind:name``, the key of the entity: ``identifier:parse_graph``, ``path:src/a.py``, ``url:https://…``,
    ``name:Ada Lovelace``."""


class Change(NamedTuple):
    """What a graph is told at once. Every part may be there already, or be gone already; applying it twice is the
    same as applying it once, and so is applying it after a half of it got there.

    The order is that of the fields: documents, pairs and mentions that are to be there, then those that are not.
    """

    documents: Sequence[DocumentNode] = ()
    similar: Sequence[Similar] = ()
    """A document at an end that is not there yet gets a bare node, which a later change fills."""
    mentions: Sequence[Mention] = ()
    """Their entities are made where they are not there."""
    dissimilar: Sequence[tuple[int, int]] = ()
    """Pairs, the smaller id first."""
    unmentioned: Sequence[Mention] = ()
    removed: Sequence[int] = ()
    """Documents, with all their edges."""
    forgotten: Sequence[str] = ()
    """Entities, with all their edges."""


class Held(NamedTuple):
    """What the graph holds of a document."""

    node: DocumentNode | None
    """None: a bare node, or one of which something is not as it was written."""
    similar: Mapping[int, float]
    """Score by the id of the other end. Both directions were read, and only what agrees is here."""
    mentions: frozenset[str]
    """Keys of entities."""
    lopsided: frozenset[int] = frozenset()
    """Other ends of pairs that the graph holds in one direction only, or with two scores."""


class GraphStore(Protocol):
    """A graph database. Its methods block, and are called from threads, one change at a time; reads may come beside.

    All raise GraphUnavailable and GraphRefused.
    """

    def prepare(self) -> None:
        """Make what the graph needs before its first change: tables, indexes. Again is the same."""
        ...

    def apply(self, change: Change) -> None:
        """Make a change. Once this returns the change outlives the graph database's end."""
        ...

    def read(self, ids: Sequence[int]) -> dict[int, Held]:
        """What the graph holds of these documents; those that are not there are not in the answer."""
        ...

    def documents(self, after: int, limit: int) -> list[int]:
        """Ids of document nodes above ``after``, in order, bare ones too."""
        ...

    def entities(self, after: str, limit: int) -> list[str]:
        """Keys of entities above ``after``, in order of their code points."""
        ...

    def clear(self) -> None:
        """Remove every document, entity and edge that this port made."""
        ...

    def probe(self) -> str:
        """What answers, with its version."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
