"""Search over collections: by vector, by words, or both and the graph, and how their answers become one.

Each way of searching, a *leg*, gives rows in its own order, with its own scores; the legs are joined by reciprocal rank
fusion, which needs no common scale. What a viewer may not see is taken out before anything is counted or cut off.

The third leg goes one hop from the best rows of the two others, the *seeds*: to those that they resemble most, to those
that name the same rare things, and to those that a graph told to be related to them. All of that is in rows, so any
replica answers, whether or not the graph does; and as both ends are what the viewer sees, no way leads through what it
does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from anyio import CapacityLimiter, to_thread
from numpy.typing import NDArray

from control_plane.nexus.records import THRESHOLD, TOP_K, Collection, Near, Vector, Viewer
from control_plane.nexus.sight import Scope, Sight
from control_plane.nexus.space import Space
from control_plane.nexus.store import CollectionStore
from control_plane.reading.search import STOP_WORDS

DEPTH = 200
"""Of each leg, before they are joined."""
DEEPER, DEEPEST = 8, 12_800
"""So many times as deep each time where too many hits are of the same domains."""
RANKS = 60
"""Added to a rank before it is inverted: what two legs find passes what one finds best (Cormack and others, 2009)."""
AROUND = 4
"""A vector is first compared with all of its space, for so many times what is wanted: mostly enough is in scope."""
THREADS = 4
"""Comparisons with spaces at once; others wait their turn."""
SEEDS = 10
SHARE = 0.3
"""Of what a seed counts, for what is one hop from it; ``docs/decisions.md`` says what else was tried."""
RESEMBLING = 5
"""Of each seed's own list; whoever has it in its list without being in that one is less similar than all there."""
RARE = 10
"""Documents that name a thing, at most: what more of them name says little."""
RELATED = 50
"""Documents that a graph told to be related to a seed; of one with more, a hub, none is reached."""


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
    domains: Sequence[str] = ()
    """None of them: any."""

    @property
    def scope(self) -> Scope:
        """Rows that may be found."""
        return Scope([one.id for one in self.collections], self.viewer, self.doc_type, self.domains)


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

    async def find(
        self, wanted: Wanted, legs: Sequence[str], *, limit: int, per_domain: int | None = None
    ) -> list[Hit]:
        """The best hits of these legs; where they are several, with the graph. Where so many of one domain are not
        enough, the legs go deeper, down to ``DEEPEST``."""
        while True:
            hits = await self._fused(wanted, legs)
            if per_domain is None:
                return hits[:limit]
            found = await self._heard(hits, limit, per_domain)
            more = any(hit.ranks.get(leg) == wanted.depth for hit in hits for leg in legs)
            if len(found) == limit or wanted.depth >= DEEPEST or not more:
                return found
            wanted = wanted._replace(depth=min(DEEPER * wanted.depth, DEEPEST))

    async def _heard(self, hits: Sequence[Hit], limit: int, per_domain: int) -> list[Hit]:
        domains = await self._sight.domains([hit.id for hit in hits])
        heard: dict[str, int] = {}
        found: list[Hit] = []
        for hit in hits:
            domain = domains.get(hit.id, "")
            heard[domain] = heard.get(domain, 0) + 1
            if heard[domain] <= per_domain and len(found) < limit:
                found.append(hit)
        return found

    async def _fused(self, wanted: Wanted, legs: Sequence[str]) -> list[Hit]:
        found = [Leg(name, await self.legs[name](wanted)) for name in legs]
        if len(found) > 1:
            seeds = [hit.id for hit in fused(found)[:SEEDS]]
            found.append(Leg("graph", await self.by_graph(seeds, wanted)))
        return fused(found)

    async def by_graph(self, seeds: Sequence[int], wanted: Wanted) -> list[tuple[int, float]]:
        """By what ``reached`` says of those that are in scope; nothing where no hop leads there."""
        score = reached(
            seeds,
            await self.nearest(seeds, wanted.viewer, RESEMBLING),
            await self._sight.naming(seeds, wanted.scope, RARE),
            await self._sight.told(seeds, wanted.viewer, RELATED),
        )
        inside = await self._sight.among([*score], wanted.scope)
        if inside <= set(seeds) and all(score[row] == 1 / place for place, row in enumerate(seeds, 1)):
            return []
        found = [(row, round(value, 6)) for row, value in score.items() if row in inside]
        return sorted(found, key=lambda one: (-one[1], one[0]))[: wanted.depth]

    async def nearest(self, rows: Sequence[int], viewer: Viewer, most: int) -> dict[int, list[Near]]:
        """The ``most`` (up to ``TOP_K``) that each row resembles best, of those that the viewer sees."""
        lists = await self._store.near_of(rows)
        seen = await self._sight.among(sorted({near.id for own in lists.values() for near in own}), Scope(None, viewer))
        found: dict[int, list[Near]] = {}
        for row, own in lists.items():
            found[row] = [near for near in own if near.id in seen][:most]
            if len(found[row]) < most and len(own) == TOP_K:  # others have taken the place of some in it
                found[row] = (await self._anew(row, viewer))[:most]
        return found

    async def _anew(self, row: int, viewer: Viewer) -> list[Near]:
        """A row's list as it were if there were only what the viewer sees."""
        vector, space = await self._sight.vector(row), await self._sight.space(row)
        if vector is None:  # deleted since
            return []
        found = await self._near(await self._spaces.space(space), vector, Scope(None, viewer), TOP_K + 1, THRESHOLD)
        others = [Near(*one) for one in found if one[0] != row]
        return sorted(others, key=lambda near: (-near.score, abs(near.id - row), near.id))[:TOP_K]

    async def nearest_of(
        self, rows: Sequence[int], space: str, allowed: NDArray[np.int64], threshold: float
    ) -> dict[int, list[Near]]:
        """Lists of rows as they were if there were only the ``allowed`` ones of their space, from a threshold on."""
        found: dict[int, list[Near]] = {}
        for row in rows:
            vector = await self._sight.vector(row)
            if vector is not None:
                where = await self._spaces.space(space)
                search = partial(where.search, vector, TOP_K + 1, allowed=allowed, threshold=threshold)
                near = await to_thread.run_sync(search, limiter=self._threads)
                found[row] = [one for one in near if one.id != row]
        return found

    async def by_vector(self, wanted: Wanted) -> list[tuple[int, float]]:
        """By cosine, in the spaces that the question has a vector for."""
        found: list[tuple[int, float]] = []
        for name in dict.fromkeys(one.space for one in wanted.collections):
            if (vector := wanted.vectors.get(name)) is not None:
                space = await self._spaces.space(name)
                found += await self._near(space, vector, wanted.scope, wanted.depth, wanted.threshold)
        return sorted(found, key=lambda one: (-one[1], one[0]))[: wanted.depth]

    async def _near(
        self, space: Space, vector: Vector, scope: Scope, depth: int, threshold: float
    ) -> list[tuple[int, float]]:
        most = AROUND * depth

        def search() -> list[tuple[int, float]]:
            return [(near.id, near.score) for near in space.search(vector, most, threshold=threshold)]

        near = await to_thread.run_sync(search, limiter=self._threads)
        inside = await self._sight.among([row for row, _ in near], scope)
        found = [one for one in near if one[0] in inside]
        if len(found) >= depth or len(near) < most:
            return found[:depth]
        allowed = await self._sight.rows(scope)

        def search_allowed() -> list[tuple[int, float]]:
            again = space.search(vector, depth, allowed=allowed, threshold=threshold)
            return [(near.id, near.score) for near in again]

        return await to_thread.run_sync(search_allowed, limiter=self._threads)

    async def by_words(self, wanted: Wanted) -> list[tuple[int, float]]:
        """By words of title and text, but for those that every text has."""
        if not wanted.query:
            return []
        telling = " ".join(word for word in wanted.query.split() if word.lower() not in STOP_WORDS)
        inside = [one.id for one in wanted.collections]
        return await self._store.words(
            inside,
            telling or wanted.query,
            wanted.viewer,
            wanted.depth,
            doc_type=wanted.doc_type,
            domains=wanted.domains,
        )


def reached(
    seeds: Sequence[int],
    near: Mapping[int, Sequence[Near]],
    groups: Sequence[Sequence[int]],
    related: Mapping[int, Sequence[int]],
) -> dict[int, float]:
    """What rows count: a seed one divided by its place; and each row that is one hop from it a ``SHARE`` of that, times
    the cosine where it is ``near``, divided among the others of a group that names the same, and whole where it is
    ``related``. What comes from several seeds, or in several ways, is added."""
    score: dict[int, float] = {}
    naming: dict[int, list[Sequence[int]]] = {}
    for group in groups:
        for row in group:
            naming.setdefault(row, []).append(group)
    for place, seed in enumerate(seeds, 1):
        score[seed] = score.get(seed, 0.0) + 1 / place
        hops = [*near.get(seed, ()), *((row, 1.0) for row in related.get(seed, ()))]
        hops += [(row, 1 / (len(group) - 1)) for group in naming.get(seed, ()) for row in group if row != seed]
        for row, much in hops:
            score[row] = score.get(row, 0.0) + SHARE * much / place
    return score


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
