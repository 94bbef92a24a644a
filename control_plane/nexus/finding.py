"""Search over collections: by vector, by words, or both, and how their answers become one.

Each way of searching, a *leg*, gives rows in its own order, with its own scores; the legs are joined by reciprocal rank
fusion, which needs no common scale. What a viewer may not see is taken out before anything is counted or cut off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from anyio import CapacityLimiter, to_thread

from control_plane.nexus.records import Collection, Vector, Viewer
from control_plane.nexus.sight import Scope, Sight
from control_plane.nexus.space import Space
from control_plane.nexus.store import CollectionStore
from control_plane.reading.search import STOP_WORDS

DEPTH = 200
"""Of each leg, before they are joined."""
RANKS = 60
"""Added to a rank before it is inverted: what two legs find passes what one finds best (Cormack and others, 2009)."""
AROUND = 4
"""A vector is first compared with all of its space, for so many times what is wanted: mostly enough is in scope."""
THREADS = 4
"""Comparisons with spaces at once; others wait their turn."""


class HasSpaces(Protocol):
    """Where spaces are in memory."""

    async def space(self, name: str) -> Space:
        """A space with every row that was committed before."""
        ...


class Wanted(NamedTuple):
    """What is searched for, and where."""

    collections: Sequence[Collection]
    viewer: Viewer
    doc_type: str | None
    query: str | None
    vectors: Mapping[str, Vector]
    """The question's, by the space that they can be compared in."""
    threshold: float
    depth: int
    """Rows that each leg is to find."""

    @property
    def scope(self) -> Scope:
        """Rows that may be found."""
        return Scope([one.id for one in self.collections], self.viewer, self.doc_type)


class Leg(NamedTuple):
    """What one way of searching found: rows and scores, best first."""

    name: str
    found: Sequence[tuple[int, float]]


class Hit(NamedTuple):
    """A row that was found."""

    id: int
    score: float
    scores: Mapping[str, float]
    """By leg."""
    ranks: Mapping[str, int]
    """By leg, 1 for the best."""


class Finder:
    """The legs."""

    def __init__(self, store: CollectionStore, sight: Sight, spaces: HasSpaces) -> None:
        self._store = store
        self._sight = sight
        self._spaces = spaces
        self._threads = CapacityLimiter(THREADS)
        self.legs: Mapping[str, Callable[[Wanted], Awaitable[Sequence[tuple[int, float]]]]] = {
            "vector": self.by_vector,
            "lexical": self.by_words,
        }

    async def find(self, wanted: Wanted, legs: Sequence[str]) -> list[Hit]:
        """What these legs find, best first."""
        return fused([Leg(name, await self.legs[name](wanted)) for name in legs])

    async def by_vector(self, wanted: Wanted) -> list[tuple[int, float]]:
        """By cosine, in the spaces that the question has a vector for."""
        found: list[tuple[int, float]] = []
        for name in dict.fromkeys(one.space for one in wanted.collections):
            if (vector := wanted.vectors.get(name)) is not None:
                found += await self._near(await self._spaces.space(name), vector, wanted)
        return sorted(found, key=lambda one: (-one[1], one[0]))[: wanted.depth]

    async def _near(self, space: Space, vector: Vector, wanted: Wanted) -> list[tuple[int, float]]:
        most = AROUND * wanted.depth

        def search() -> list[tuple[int, float]]:
            return [(near.id, near.score) for near in space.search(vector, most, threshold=wanted.threshold)]

        near = await to_thread.run_sync(search, limiter=self._threads)
        inside = await self._sight.among([row for row, _ in near], wanted.scope)
        found = [one for one in near if one[0] in inside]
        if len(found) >= wanted.depth or len(near) < most:
            return found[: wanted.depth]
        allowed = await self._sight.rows(wanted.scope)

        def search_allowed() -> list[tuple[int, float]]:
            again = space.search(vector, wanted.depth, allowed=allowed, threshold=wanted.threshold)
            return [(near.id, near.score) for near in again]

        return await to_thread.run_sync(search_allowed, limiter=self._threads)

    async def by_words(self, wanted: Wanted) -> list[tuple[int, float]]:
        """By words of title and text, but for those that every text has."""
        if not wanted.query:
            return []
        telling = " ".join(word for word in wanted.query.split() if word.lower() not in STOP_WORDS)
        collections, most = [one.id for one in wanted.collections], wanted.depth
        while True:
            found = await self._store.words(collections, telling or wanted.query, wanted.viewer, most)
            ended = len(found) < most
            if wanted.doc_type is not None:
                inside = await self._sight.among([row for row, _ in found], wanted.scope)
                found = [one for one in found if one[0] in inside]
            if ended or len(found) >= wanted.depth:
                return found[: wanted.depth]
            most *= 8


def fused(legs: Sequence[Leg]) -> list[Hit]:
    """The rows of all legs, best first, equal ones by id. Where there is one leg, its scores are the hits'."""
    ranks: dict[int, dict[str, int]] = {}
    scores: dict[int, dict[str, float]] = {}
    for leg in legs:
        for rank, (row, score) in enumerate(leg.found, 1):
            ranks.setdefault(row, {})[leg.name] = rank
            scores.setdefault(row, {})[leg.name] = score
    hits = [
        Hit(
            row,
            round(sum(1 / (RANKS + rank) for rank in own.values()), 6) if len(legs) > 1 else scores[row][legs[0].name],
            scores[row],
            own,
        )
        for row, own in ranks.items()
    ]
    return sorted(hits, key=lambda hit: (-hit.score, min(hit.ranks.values()), hit.id))
