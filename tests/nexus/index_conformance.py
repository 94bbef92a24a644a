"""What every index must do that a space uses, in memory or in a server."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pytest
from nexus import brute_force

from control_plane.nexus.index import VectorIndex, prints_of
from control_plane.nexus.lists import MAX_ID
from control_plane.nexus.records import Near, Vector
from control_plane.nexus.space import Space

DIMENSION = 32


def clustered(seed: int, count: int, *, clusters: int, dimension: int = DIMENSION, spread: float = 0.45) -> Vector:
    """Unit vectors around some middles, as texts of a few themes have them."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((clusters, dimension))
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    noise = rng.standard_normal((count, dimension)) * spread / dimension**0.5
    found = middles[rng.integers(clusters, size=count)] + noise
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def share(wanted: dict[int, list[Near]], found: dict[int, list[Near]]) -> float:
    """Of what should be found, with its score."""
    return sum(len(set(near) & set(found[one])) for one, near in wanted.items()) / sum(map(len, wanted.values()))


class Shelf(Protocol):
    """Where an index lies."""

    def open(self) -> VectorIndex:
        """The index of a space, as a process finds it that has begun: the space is to ``use`` it."""
        ...

    def close(self, space: Space) -> None:
        """The process ends."""
        ...


def empty(index: VectorIndex) -> VectorIndex:
    """An index that was asked what it holds, and holds nothing."""
    assert sum(len(held.ids) for held in index.held(np.arange(3))) == 0
    return index


class IndexConformance:
    """To be inherited by a class with a fixture ``shelf``."""

    documents = 800
    found_at_least = 1.0
    """Of what should be found."""

    @pytest.fixture
    def index(self, shelf: Shelf) -> VectorIndex:
        return empty(shelf.open())

    def test_it_names_the_nearest(self, index: VectorIndex) -> None:
        vectors = clustered(1, 600, clusters=30)
        ids = np.arange(600) + 5
        assert index.add(ids, vectors).all()
        rows, found, scores = index.search(vectors[:100], 40)
        assert np.abs(scores - (vectors[rows] * vectors[found - 5]).sum(axis=1)).max() < 0.01
        similarities = vectors[:100] @ vectors.T
        nearest = np.argsort(-similarities, axis=1)[:, :20]
        named = [set(found[rows == row].tolist()) for row in range(100)]
        assert all(len(one) == np.count_nonzero(rows == row) <= 40 for row, one in enumerate(named))
        hits = sum(len(named[row] & {one + 5 for one in nearest[row].tolist()}) for row in range(100))
        assert hits >= min(0.99, self.found_at_least) * 2_000

    def test_what_was_removed_and_put_anew_is_named_as_it_is_now(self, index: VectorIndex) -> None:
        old, new = clustered(2, 300, clusters=20), clustered(3, 300, clusters=20)
        ids = np.arange(300)
        index.add(ids, old)
        index.remove(ids[:200])
        index.add(ids[:100], new[:100])
        now = {one: new[one] if one < 100 else old[one] for one in [*range(100), *range(200, 300)]}
        hits = [one in index.search(vector[None], 60).ids for one, vector in now.items()]
        assert np.mean(hits) >= self.found_at_least
        _, found, _ = index.search(old[:50], 60)
        assert not set(found.tolist()) & set(range(100, 200))

    def test_nothing_is_named_where_nothing_is(self, index: VectorIndex) -> None:
        vectors = clustered(4, 5, clusters=1)
        for asked in (vectors, vectors[:0]):
            assert [part.tolist() for part in index.search(asked, 10)] == [[], [], []]
        index.remove(np.array([], np.int64))
        index.remove(np.array([5, MAX_ID]))
        assert index.add(np.array([], np.int64), vectors[:0]).tolist() == []
        index.add(np.array([0, MAX_ID]), vectors[:2])
        rows, found, _ = index.search(vectors[:1], 10)
        assert (rows.tolist(), sorted(found.tolist())) == ([0, 0], [0, MAX_ID])

    @pytest.mark.parametrize("clusters", [120, 4], ids=["small clusters", "large clusters"])
    def test_lists_and_searches_are_those_of_the_plain_computation(self, shelf: Shelf, clusters: int) -> None:
        """New, changed and deleted documents, some of them equal, and lists longer than what an index is asked for."""
        rng = np.random.default_rng(5)
        drawn = iter(clustered(6, 4 * self.documents, clusters=clusters))
        alive = {one: next(drawn) for one in range(self.documents)}
        alive |= {self.documents + one: alive[one] for one in range(0, 600, 3)}
        space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        space.put(alive)
        space.use(shelf.open())
        assert space.catch_up(100_000) == 0
        space.relate(list(alive))
        for _ in range(3):
            changed = rng.choice(self.documents + 300, self.documents // 10, replace=False).tolist()
            batch: dict[int, Vector | None] = {one: None if one % 4 == 0 else next(drawn) for one in changed}
            alive = {one: vector for one, vector in (alive | batch).items() if vector is not None}
            space.put(batch)
            space.catch_up(self.documents // 20)  # not all
            space.relate(changed)
        assert space.catch_up(100_000) == 0
        space.relate(changed)
        found = {one: space.near(one) for one in alive}
        wanted = brute_force.lists(alive)
        assert share(wanted, found) >= self.found_at_least
        if self.found_at_least == 1:
            assert found == wanted
        questions = {one: next(drawn) for one in range(40)}
        best = {one: brute_force.search(alive, question, 10) for one, question in questions.items()}
        assert share(best, {one: space.search(questions[one], 10) for one in questions}) >= self.found_at_least

    def test_what_it_has_is_known_again_and_the_rest_is_brought(self, shelf: Shelf) -> None:
        vectors = dict(enumerate(clustered(7, 1_200, clusters=40)))
        first = Space(DIMENSION, exact_up_to=0, mirrored=True)
        first.put(vectors)
        first.use(shelf.open())
        assert first.catch_up(1_000) == 200
        shelf.close(first)
        fresh = clustered(8, 100, clusters=40)
        now = {one: vector for one, vector in vectors.items() if one >= 50}
        now |= {50 + one: vector for one, vector in enumerate(fresh)}
        space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        space.put(now | dict.fromkeys(range(50)))
        assert space.use(shelf.open()) == 850
        assert space.catch_up(0) == 300
        assert space.catch_up(1_000) == 0
        asked = list(now)[::25]
        wanted = {one: brute_force.search(now, now[one], 10) for one in asked}
        assert share(wanted, {one: space.search(now[one], 10) for one in asked}) >= self.found_at_least
        # What is gone has left it.
        shelf.close(space)
        ids = np.arange(1_300)
        prints = dict(zip(now, prints_of(np.stack(list(now.values()))), strict=True))
        held = {
            one: own for some in shelf.open().held(ids) for one, own in zip(some.ids.tolist(), some.prints, strict=True)
        }
        assert held == prints
