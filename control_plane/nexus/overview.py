"""What goes over the wire of ``/v1/nexus``: how the sync stands, and what was asked of it."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import field

from common.contract import Wire
from control_plane.nexus.messages import Asked

EXAMPLES = 20
"""Differences that a report tells one by one."""

Kind = Literal["verify", "rebuild"]
"""A look that compares the graph with the rows; one that makes the graph empty and tells it every row."""


class CollectionLag(Wire):
    """A collection, and how far the graph is behind it."""

    client: str
    name: str
    documents: int
    pending: int
    """That the graph does not have as they are, and will be told."""
    failed: int
    """That were given up."""
    oldest_pending_seconds: float | None


class Look(Wire):
    """A look that goes on, or that waits: then both figures are 0."""

    kind: Kind
    done: int
    total: int


class LookReport(Wire):
    """What a look found."""

    kind: Kind
    started_at: int
    """Milliseconds since 1970."""
    seconds: float = 0.0
    documents: int = 0
    """Rows that were compared."""
    pending: int = 0
    """Rows that were left out: the graph is to be told of them anyway."""
    pairs: int = 0
    """SIMILAR_TO that were compared, each once for both of its ends."""
    mentions: int = 0
    different: dict[str, int] = field(default_factory=dict)
    """How many of what: ``document``, ``pair``, ``mention`` missing, wrong or left over, ``entity`` left over."""
    examples: list[str] = field(default_factory=list)
    repaired: int = 0
    """Documents that are told anew, or were removed."""
    error: str | None = None
    """Why it ended before its end."""

    def differs(self, kind: str, what: str) -> None:
        """Count a difference."""
        self.different[kind] = self.different.get(kind, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)


class SpacesSize(Wire):
    """Of documents that are compared with each other."""

    count: int
    bytes: int
    """That they take in the memory of the replica that answers."""


class OutboundSize(Wire):
    """Events for outside."""

    waiting: int
    dead: int


class Overview(Wire):
    """``GET /v1/nexus``."""

    enabled: bool
    leads: bool
    """The replica that answers is the one that keeps the graph in step; it alone knows ``graph`` and ``trouble``."""
    owner: str | None
    """The replica that keeps the graph in step; None: none does."""
    graph: str
    """What answers; empty: not asked yet."""
    trouble: str | None
    """Why the graph is behind, where it is not for work."""
    documents: int
    """Of all collections, as the following."""
    pending: int
    failed: int
    oldest_pending_seconds: float | None
    collections: list[CollectionLag]
    """Those that are furthest behind come first; at most 1,000."""
    progress: Look | None
    last: LookReport | None
    spaces: SpacesSize
    outbound: OutboundSize


class Enabled(Wire):
    """``POST /v1/nexus/enable`` and ``/disable``."""

    enabled: bool


class Trigger(Asked):
    """``POST /v1/nexus/trigger``."""

    collection: str | None = None
    """Only of collections with this name; None: of all."""


class Retried(Wire):
    """How many documents, or events, are tried again that were given up."""

    retried: int


class LookAsked(Wire):
    """``POST /v1/nexus/verify`` and ``/rebuild``."""

    asked: Kind


class DeadLetter(Wire):
    """A document that the graph refused until it was given up."""

    client: str
    collection: str
    id: str
    attempts: int
    error: str


class DeadLetters(Wire):
    """``GET /v1/nexus/failures``."""

    failures: list[DeadLetter]


class DeadEvent(Wire):
    """An event that whoever is told did not take until it was given up."""

    id: int
    created_at: int
    """Milliseconds since 1970."""
    attempts: int
    error: str
    event: dict[str, Any]
    """As it is sent."""


class DeadEvents(Wire):
    """``GET /v1/nexus/events``."""

    events: list[DeadEvent]
