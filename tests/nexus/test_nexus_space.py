"""Lists and searches of a space are those of a plain computation over all pairs, whatever came in which order."""

from __future__ import annotations

import math
import resource
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from nexus import brute_force

from common.embedding.static import StaticEmbedder
from common.errors import InvalidRequest
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.read import read_graph
from control_plane.nexus import nearest
from control_plane.nexus.index import prints_of
from control_plane.nexus.lists import MAX_ID, scores_of
from control_plane.nexus.nearest import Nearest
from control_plane.nexus.records import Near, Vector, pack_near, unpack_near
from control_plane.nexus.space import SPARE, Space

Draw = Callable[[], Vector]


def unit(*numbers: float) -> Vector:
    """A vector in this direction."""
    found = np.array(numbers, np.float64)
    return (found / np.linalg.norm(found)).astype(np.float32)


def some(seed: int, dimension: int = 8, clusters: int = 5, spread: float = 0.3) -> Draw:
    """Draws vectors in clusters."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((clusters, dimension))

    def draw() -> Vector:
        return unit(
            *(unit(*middles[rng.integers(clusters)]) + rng.standard_normal(dimension) * spread / dimension**0.5)
        )

    return draw


class House:
    """A space with rows beside it, which get every list that the space tells, and what they should be."""

    def __init__(self, dimension: int = 8, *, top_k: int = 4, threshold: float = 0.75) -> None:
        self.dimension, self.top_k, self.threshold = dimension, top_k, threshold
        self.vectors: dict[int, Vector] = {}
        self.rows: dict[int, bytes] = {}
        self.pending: set[int] = set()
        self.space = self.open()

    def open(self) -> Space:
        """A space as a new process makes it."""
        space = Space(self.dimension, top_k=self.top_k, threshold=self.threshold)
        space.put(self.vectors)
        space.load_lists(self.rows.items())
        return space

    def put(self, vectors: dict[int, Vector | None]) -> None:
        """Documents change."""
        self.space.put(vectors)
        for one, vector in vectors.items():
            self.pending.add(one)
            self.vectors.pop(one, None)
            if vector is not None:
                self.vectors[one] = vector

    def relate(self, ids: Sequence[int]) -> dict[int, list[Near]]:
        """The space tells lists, and rows get them."""
        told = self.space.relate(ids)
        for one, near in told.items():
            self.rows[one] = pack_near(near)
        for one in ids:
            if one not in self.vectors:
                assert told[one] == []
                del self.rows[one]
        self.pending -= set(ids)
        return told

    def settle(self) -> None:
        """Everything is related."""
        self.relate(sorted(self.pending))

    def check(self) -> None:
        """Memory and rows are what they should be."""
        wanted = brute_force.lists(self.vectors, self.top_k, self.threshold)
        assert {one: self.space.near(one) for one in self.vectors} == wanted
        assert {one: unpack_near(row) for one, row in self.rows.items()} == wanted
        assert self.space.reverse(list(self.vectors)) == brute_force.reverse(self.vectors, self.top_k, self.threshold)
        assert len(self.space) == len(self.vectors)


def campaign(seed: int, house: House, draw: Draw, *, ids: int, steps: int) -> None:
    """Documents come, change, go, come back, in any groups; the process ends and begins again."""
    rng = np.random.default_rng(seed)

    def vector() -> Vector:
        """Some are equal to others'."""
        return house.vectors[int(rng.choice(list(house.vectors)))] if house.vectors and rng.random() < 0.2 else draw()

    for _ in range(steps):
        gone = rng.random() * 0.7
        changed = rng.choice(ids, int(rng.choice([1, 5, ids // 4, ids // 2])), replace=False).tolist()
        house.put({one: None if rng.random() < gone else vector() for one in changed})
        if rng.random() < 0.15:
            house.space = house.open()
        while house.pending and rng.random() < 0.8:
            house.relate(rng.permutation(sorted(house.pending))[: rng.integers(1, 40)].tolist())
        if not house.pending:
            house.relate([])
            house.check()
        question, allowed = draw(), rng.choice(ids, ids // 2, replace=False)
        for limit in (1, 10, 2 * ids):
            assert house.space.search(question, limit) == brute_force.search(house.vectors, question, limit)
        found = house.space.search(question, 5, allowed=allowed, threshold=0.3)
        assert found == brute_force.search(house.vectors, question, 5, allowed=allowed.tolist(), threshold=0.3)
    house.settle()
    house.check()


@pytest.fixture(scope="session")
def real_vectors(real_graphs: dict[str, Path]) -> list[Vector]:
    """Vectors of this repository's own example graph."""
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    made = frames(graph, generated_at="2026-01-02T00:00:00.000Z", layout="static-v2")
    texts = [frame.embed_text for frame in made if frame.embed_text is not None]
    return list(StaticEmbedder().embed(texts[:: max(1, len(texts) // 800)]).vectors)


@pytest.mark.parametrize(("top_k", "threshold"), [(4, 0.75), (20, 0.9), (1, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_after_any_changes_every_list_is_that_of_the_plain_computation(seed: int, top_k: int, threshold: float) -> None:
    house = House(top_k=top_k, threshold=threshold)
    campaign(seed, house, some(seed), ids=100, steps=12)


@pytest.mark.parametrize("seed", range(2))
def test_of_real_texts_too(seed: int, real_vectors: list[Vector]) -> None:
    rng = np.random.default_rng(seed)
    house = House(256, top_k=20)
    campaign(seed, house, lambda: real_vectors[rng.integers(len(real_vectors))], ids=250, steps=6)


def test_every_pair_of_real_texts_is_the_same_in_one_go_and_one_by_one(real_vectors: list[Vector]) -> None:
    one_by_one, at_once = House(256, top_k=20), House(256, top_k=20)
    for one, vector in enumerate(real_vectors):
        one_by_one.put({one: vector})
        one_by_one.settle()
    at_once.put(dict(enumerate(real_vectors)))
    at_once.settle()
    assert one_by_one.rows == at_once.rows
    at_once.check()


def test_a_score_is_the_rounded_sum_without_any_error() -> None:
    rng = np.random.default_rng(1)
    left = np.stack([unit(*rng.standard_normal(64)) for _ in range(2_000)])
    # Multiples of 1/128 with an odd number lie in the middle of two sixth decimals.
    left[:64] = 0
    left[:64, 0] = np.arange(1, 128, 2) / 128
    left[:64, 1] = np.sqrt(1 - left[:64, 0].astype(np.float64) ** 2)
    right = np.stack([unit(*rng.standard_normal(64)) for _ in range(2_000)])
    right[:64] = unit(1, *[0] * 63)
    exact = [
        sum(Fraction(a) * Fraction(b) for a, b in zip(one, other, strict=True))
        for one, other in zip(left.tolist(), right.tolist(), strict=True)
    ]
    assert scores_of(left, np.arange(2_000), right).tolist() == [round(one * 1_000_000) for one in exact]


def test_sums_beside_the_middle_of_two_scores_are_made_without_error() -> None:
    # The last two numbers bring each sum to within 1e-15 of such a middle, on either side.
    rng = np.random.default_rng(2)
    left, right = rng.random((2, 500, 64)).astype(np.float32) / 8
    left[:, 62:] = 2.0**-10, 2.0**-32
    right[:, 62:] = 0
    for row, other in zip(left, right, strict=True):
        have = sum(Fraction(a) * Fraction(b) for a, b in zip(row.tolist(), other.tolist(), strict=True))
        middle = Fraction(2 * int(have * 1_000_000) + 3, 2_000_000) + Fraction(int(rng.integers(-9, 10)), 10**16)
        other[62] = np.float32(float((middle - have) / Fraction(2.0**-10)))
        have += Fraction(float(other[62])) * Fraction(2.0**-10)
        other[63] = np.float32(float((middle - have) / Fraction(2.0**-32)))
    products = (left.astype(np.float64) * right).tolist()
    wanted = [round(round(math.fsum(row), 6) * 1_000_000) for row in products]
    assert scores_of(left, np.arange(500), right).tolist() == wanted
    assert [round(sum(row) * 1_000_000) for row in products] != wanted


def test_a_score_of_the_threshold_is_enough_and_a_millionth_less_is_not() -> None:
    house = House(2)
    at, below = 0.75, 0.749999
    house.put({1: unit(1, 0), 2: unit(at, (1 - at * at) ** 0.5), 3: unit(below, -((1 - below * below) ** 0.5))})
    house.settle()
    assert house.space.near(1) == [Near(2, 0.75)]
    assert house.space.near(2) == [Near(1, 0.75)]
    assert house.space.near(3) == []
    house.check()


def test_half_a_millionth_below_the_threshold_counts_as_it_is_rounded() -> None:
    # 95/128 is 0.7421875: the even neighbour is 0.742188.
    for threshold, there in ((0.742188, [Near(1, 0.742188)]), (0.742189, [])):
        house = House(2, threshold=threshold)
        house.put({1: np.array([1, 0], np.float32), 2: unit(95 / 128, (1 - (95 / 128) ** 2) ** 0.5)})
        house.settle()
        assert house.space.near(2) == there


def test_documents_that_are_all_the_same_name_their_neighbours() -> None:
    house = House(top_k=4)
    house.put(dict.fromkeys(range(10, 410), unit(1, *[0] * 7)))
    house.settle()
    assert [near.id for near in house.space.near(200)] == [199, 201, 198, 202]
    assert [near.id for near in house.space.near(10)] == [11, 12, 13, 14]
    assert max(map(len, house.space.reverse(range(10, 410)).values())) <= 6
    house.check()


def test_a_new_document_enters_lists_and_the_last_ones_leave() -> None:
    house = House(2, top_k=2)
    house.put({one: unit(1, one / 100) for one in (1, 2, 3)})
    house.settle()
    before = brute_force.lists(house.vectors, 2)
    house.put({4: unit(1, 0.012)})
    told = house.relate([4])
    after = brute_force.lists(house.vectors, 2)
    assert [near.id for near in after[1]] == [4, 2]
    assert told == {one: near for one, near in after.items() if near != before.get(one)}
    house.check()


def test_only_lists_that_change_are_told() -> None:
    house = House(2)
    house.put({1: unit(1, 0), 2: unit(1, 0.1), 3: unit(0, 1), 4: unit(0.1, 1)})
    house.settle()
    house.put({2: unit(1, 0.2)})
    assert set(house.relate([2])) == {1, 2}
    assert set(house.relate([3])) == {3}
    house.put({4: None})
    assert set(house.relate([4])) == {3, 4}
    house.check()


def test_a_list_that_lost_more_than_it_had_to_spare_is_made_anew() -> None:
    draw = some(3, clusters=1, spread=0.1)
    house = House(top_k=4)
    house.put({one: draw() for one in range(200)})
    house.settle()
    while len(house.vectors) > 3:
        best = [near.id for near in house.space.near(0)] or [1]
        house.put({one: draw() if one % 2 else None for one in best if one})
        house.settle()
        house.check()
        house.put(dict.fromkeys([one for one in house.vectors if one][: SPARE + 1]))
        house.settle()
    house.check()


def test_what_was_put_is_found_before_it_is_related() -> None:
    house = House(2)
    house.put({1: unit(1, 0), 2: unit(1, 0.01)})
    assert house.space.search(unit(1, 0), 5) == [Near(1, 1.0), Near(2, 0.99995)]
    assert house.space.near(1) == []
    told = house.relate([1])
    assert told == {1: [Near(2, 0.99995)]}
    house.put({2: None})
    assert house.space.search(unit(1, 0), 5) == [Near(1, 1.0)]
    assert house.space.near(1) == [Near(2, 0.99995)]
    assert house.relate([2]) == {1: [], 2: []}


def test_nobody_knows_an_id_that_never_came() -> None:
    space = Space(2)
    space.put({7: None})
    assert space.relate([7, 8]) == {7: [], 8: []}
    assert space.near(7) == []
    assert space.reverse([7]) == {7: []}
    assert len(space) == 0
    assert space.search(unit(1, 0), 5) == []


def test_a_list_that_is_to_be_made_anew_does_not_name_who_came_after_one_that_is_gone() -> None:
    house = House(2)
    house.put({1: unit(1, 0), 2: unit(1, 0.01), 3: unit(1, 0.02)})
    house.settle()
    house.put({1: unit(1, 0.03), 2: None})
    assert house.relate([2]) == {1: [Near(3, 0.9998)], 2: [], 3: [Near(1, 0.9998)]}
    house.put({4: unit(0, 1)})
    assert house.space.near(1) == [Near(3, 0.9998)]
    house.settle()
    house.check()


def test_one_that_comes_back_before_its_end_was_related_is_there() -> None:
    house = House(2)
    house.put({1: unit(1, 0), 2: unit(1, 0.01), 3: unit(1, 0.02)})
    house.settle()
    house.put({2: None})
    house.put({2: unit(0, 1)})
    house.settle()
    assert house.space.near(1) == [Near(3, 0.9998)]
    house.check()


def test_a_space_takes_no_more_memory_for_documents_that_come_and_go() -> None:
    house = House()
    draw = some(5)
    house.put({one: draw() for one in range(1_000)})
    house.settle()
    size = house.space.bytes
    for first in range(1_000, 5_000, 1_000):
        house.put(dict.fromkeys(range(first - 1_000, first)))
        house.settle()
        house.put({one: draw() for one in range(first, first + 1_000)})
        house.settle()
    assert house.space.bytes < 1.5 * size
    house.check()


def test_who_relates_nothing_needs_no_memory_for_what_is_gone() -> None:
    space, vector = Space(8), unit(*range(8))
    space.put(dict.fromkeys(range(1_000), vector))
    size = space.bytes
    for first in range(0, 9_000, 1_000):
        space.put(dict.fromkeys(range(first, first + 1_000)))
        space.put(dict.fromkeys(range(first + 1_000, first + 2_000), vector))
    assert space.bytes < 1.5 * size


def test_a_document_takes_little_more_memory_than_its_vector_and_its_list() -> None:
    space, draw = Space(256), some(5, 256)
    vectors = [draw() for _ in range(50)]
    space.put({one: vectors[one % 50] for one in range(5_000)})
    assert space.bytes / 5_000 < 1.25 * (256 * 4 + 20 * (4 + 8))


def test_vectors_of_many_dimensions_lie_in_several_blocks() -> None:
    house = House(16_384)
    rng = np.random.default_rng(1)
    several = np.tile(rng.standard_normal((2, 16_384)), (170, 1)) + rng.standard_normal((340, 16_384)) * 0.4
    vectors = (several / np.linalg.norm(several, axis=1, keepdims=True)).astype(np.float32)
    house.put(dict(enumerate(vectors)))
    house.settle()
    house.check()
    # Of the second block few are left, then none.
    for gone in ([*range(270, 340), *range(0, 200, 7)], range(256, 270)):
        house.put(dict.fromkeys(gone))
        house.settle()
        assert house.space.near(1) == brute_force.lists(house.vectors, house.top_k)[1]
        assert house.space.search(vectors[0], 30) == brute_force.search(house.vectors, vectors[0], 30)
        few = [1, 2, 250, 260]
        found = house.space.search(vectors[1], 3, allowed=np.array(few))
        assert found == brute_force.search(house.vectors, vectors[1], 3, allowed=few)
    house.check()


def test_a_new_process_has_the_lists_of_the_rows() -> None:
    house = House()
    draw = some(6)
    house.put({one: draw() for one in range(60)})
    house.settle()
    rows = dict(house.rows)
    house.put({1: draw(), 2: None, 70: draw()})
    house.space = house.open()
    there = {one: unpack_near(row) for one, row in rows.items()}
    for one in house.vectors.keys() & rows:
        assert house.space.near(one) == [near for near in there[one] if near.id != 2]
    house.settle()
    house.check()


def test_a_list_that_names_what_is_gone_is_told_without_being_asked_for() -> None:
    house = House(2, top_k=2)
    house.put({one: unit(1, one / 100) for one in range(1, 6)})
    house.settle()
    short = pack_near([Near(9, 0.9)])
    house.vectors[6] = unit(0, 1)
    house.rows[6] = short
    house.rows[99] = short  # a document that was never put
    full = pack_near([Near(9, 1.0), Near(2, 0.99995)])
    house.rows[1] = full
    house.space = house.open()
    assert house.space.near(6) == []
    assert house.space.near(1) == [Near(2, 0.99995)]
    assert house.space.near(99) == []
    del house.rows[99]
    assert set(house.relate([])) == {1, 6}
    house.check()
    assert house.relate([]) == {}


def test_who_has_a_document_in_its_list_is_told_best_first() -> None:
    house = House(2, top_k=1)
    house.put({1: unit(1, 0), 2: unit(1, 0.1), 3: unit(1, -0.2), 4: unit(0, 1)})
    house.settle()
    assert house.space.reverse([1, 2, 4]) == {1: [Near(2, 0.995037), Near(3, 0.980581)], 2: [Near(1, 0.995037)], 4: []}


def test_a_search_has_at_most_as_many_as_are_wanted() -> None:
    space = Space(2)
    space.put({one: unit(1, 0.1) for one in range(300)})
    assert [near.id for near in space.search(unit(1, 0), 3)] == [0, 1, 2]
    assert [near.id for near in space.search(unit(1, 0), 3, allowed=np.array([299, 7]))] == [7, 299]
    assert space.search(unit(1, 0), 3, allowed=np.array([], np.int64)) == []
    assert space.search(unit(1, 0), 3, allowed=np.array([300])) == []
    assert space.search(unit(1, 0), 0) == []
    assert space.search(unit(1, 0), 3, threshold=0.995038) == []
    assert len(space.search(unit(1, 0), 3, threshold=0.995037)) == 3


@pytest.mark.parametrize(
    ("one", "vector", "field"),
    [
        (1, np.ones(3, np.float32), "vector"),
        (1, np.ones((1, 2), np.float32), "vector"),
        (1, np.array([1, 1], np.float32), "vector"),
        (1, np.array([1, np.nan], np.float32), "vector"),
        (1, np.array([3e38, 3e38], np.float32), "vector"),
        (-1, unit(1, 0), "id"),
        (MAX_ID + 1, None, "id"),
    ],
)
def test_what_is_no_vector_of_this_space_is_refused(one: int, vector: Vector | None, field: str) -> None:
    space = Space(2)
    with pytest.raises(InvalidRequest) as refused:
        space.put({one: vector})
    assert refused.value.details["field"] == field
    assert "allowed" in refused.value.details
    assert len(space) == 0


def test_a_question_that_is_no_vector_of_this_space_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        Space(2).search(np.ones(2, np.float32), 1)


def test_the_greatest_ids_have_their_place() -> None:
    house = House(2, top_k=2)
    house.put(dict.fromkeys([0, 1, MAX_ID - 1, MAX_ID], unit(1, 0)))
    house.settle()
    house.check()


@pytest.mark.parametrize("exact_up_to", [10_000, 50])
def test_all_at_once_from_many_threads_ends_as_one_by_one(exact_up_to: int) -> None:
    rng, draw = np.random.default_rng(7), some(7)
    space = Space(8, top_k=4, exact_up_to=exact_up_to)
    steady = {one: draw() for one in range(100)}
    space.put(steady)
    space.catch_up(0)
    versions: dict[int, list[Vector]] = {one: [] for one in range(100, 200)}
    now: dict[int, Vector | None] = {}
    over = threading.Event()
    wrong: list[object] = []
    missed: list[int] = []
    asked = [0]

    def change() -> None:
        for _ in range(150):
            batch: dict[int, Vector | None] = {}
            for one in rng.choice(np.arange(100, 200), 20, replace=False).tolist():
                batch[one] = vector = None if rng.random() < 0.3 else draw()
                if vector is not None:
                    versions[one].append(vector)
            space.put(batch)
            now.update(batch)
        over.set()

    def relate() -> None:
        mine = np.random.default_rng(8)
        while not over.is_set():
            space.relate(mine.choice(200, 30, replace=False).tolist())

    def ask() -> None:
        question = some(9)()
        best = {near.id: near.score for near in brute_force.search(steady, question, 100)}
        while not over.is_set():
            found = {near.id: near.score for near in space.search(question, 200)}
            wrong.extend(one for one, value in best.items() if found.get(one, value) != value)
            missed.extend(best.keys() - found.keys())
            asked.append(len(best))
            for one, value in found.items():
                if one >= 100 and value not in [brute_force.score(question, vector) for vector in list(versions[one])]:
                    wrong.append((one, value))

    threads = [threading.Thread(target=work) for work in (change, relate, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(missed) <= (0.02 * sum(asked) if exact_up_to == 50 else 0)
    space.relate(range(200))
    space.catch_up(1_000)
    space.relate(range(200))
    alive = steady | {one: vector for one, vector in now.items() if vector is not None}
    assert len(space) == len(alive)
    wanted = brute_force.lists(alive, 4)
    if exact_up_to > len(alive):
        assert {one: space.near(one) for one in range(200)} == {one: wanted.get(one, []) for one in range(200)}
    else:
        assert share(wanted, {one: space.near(one) for one in alive}) > 0.95
        assert all(space.near(one) == [] for one in range(200) if one not in alive)


def test_what_is_told_and_found_while_others_come_and_go_is_true_of_those_it_names() -> None:
    draw = some(10, 64, clusters=3)
    vectors = {one: draw() for one in range(12_000)}  # an id has one vector here, or none
    question = vectors[0]
    space = Space(64)
    space.put({one: vectors[one] for one in range(2_000)})
    over = threading.Event()
    told: list[tuple[int, Near]] = []
    found: set[Near] = set()

    def change() -> None:
        for first in range(2_000, 12_000, 100):
            space.put({one: vectors[one] for one in range(first, first + 100)})
            space.put(dict.fromkeys(range(first - 50, first + 50)))
        over.set()

    def ask() -> None:
        while not over.is_set():
            found.update(space.search(question, 100))

    threads = [threading.Thread(target=work) for work in (change, ask)]
    for thread in threads:
        thread.start()
    while not over.is_set():
        for own, near in space.relate(range(0, 2_000, 5)).items():
            told += [(own, one) for one in near]
    for thread in threads:
        thread.join()
    told += [(own, one) for own, near in space.relate(range(2_000)).items() for one in near]
    assert len({one.id for _, one in told}) > 400
    assert [one for one in found if one.score != brute_force.score(question, vectors[one.id])] == []
    assert [one for one in set(told) if one[1].score != brute_force.score(vectors[one[0]], vectors[one[1].id])] == []


def test_a_search_takes_nobody_for_one_who_left_meanwhile_and_finds_others_instead() -> None:
    draw, far = some(17, 64, clusters=1, spread=0.1), unit(*[1] * 63, -70)
    question = draw()
    vectors = dict.fromkeys(range(19_000), far) | {one: draw() for one in range(20_000, 40_000)}
    space = Space(64)
    space.put({one: vectors[one] for one in range(19_000)})
    begun, over = threading.Event(), threading.Event()
    found: set[Near] = set()

    def change() -> None:
        for first in range(20_000, 40_000, 200):
            fresh = range(first, first + 200)
            for batch in ({one: vectors[one] for one in fresh}, dict.fromkeys(fresh)):
                space.put(batch)
                begun.clear()
                begun.wait()
        over.set()

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    while not over.is_set():
        begun.set()
        near = space.search(question, 20)
        assert len(near) == 20
        found.update(near)
    thread.join()
    assert [one for one in found if one.score != brute_force.score(question, vectors[one.id])] == []


# --- above the limit of exact comparison -----------------------------------------------------------------------------


def share(wanted: dict[int, list[Near]], found: dict[int, list[Near]]) -> float:
    """Of what should be found, with its score."""
    return sum(len(set(near) & set(found[one])) for one, near in wanted.items()) / sum(map(len, wanted.values()))


@pytest.fixture(scope="module")
def crowd() -> dict[int, Vector]:
    """2,000 documents in clusters of 50."""
    draw = some(11, 32, clusters=40)
    return {one: draw() for one in range(2_000)}


def indexed(vectors: dict[int, Vector]) -> Space:
    """A space whose index has everything."""
    space = Space(32, exact_up_to=100)
    space.put(vectors)
    assert space.catch_up(10_000) == 0
    return space


def test_an_index_finds_nearly_all_with_exact_scores(crowd: dict[int, Vector]) -> None:
    space = indexed(crowd)
    told = space.relate(list(crowd))
    assert share(brute_force.lists(crowd), told) > 0.97
    assert all(near.score == brute_force.score(crowd[one], crowd[near.id]) for one in range(50) for near in told[one])
    assert space.recall(range(0, 2_000, 10)) > 0.97


def test_what_the_index_lacks_is_compared_one_by_one(crowd: dict[int, Vector]) -> None:
    space = Space(32, exact_up_to=100)
    space.put(crowd)
    for brought, left in ((0, 2_000), (500, 1_500), (2_000, 0)):
        assert space.catch_up(brought) == left
        found = [space.search(crowd[one], 10) for one in range(0, 2_000, 50)]
        wanted = [brute_force.search(crowd, crowd[one], 10) for one in range(0, 2_000, 50)]
        assert share(dict(enumerate(wanted)), dict(enumerate(found))) > 0.97


def test_lists_follow_changes_above_the_limit(crowd: dict[int, Vector]) -> None:
    space, alive, draw = indexed(crowd), dict(crowd), some(11, 32, clusters=40)
    space.relate(list(crowd))
    rng = np.random.default_rng(3)
    for _ in range(6):
        changed = rng.choice(2_500, 300, replace=False).tolist()
        batch = {one: None if one % 3 == 0 else draw() for one in changed}
        space.put(batch)
        space.relate(changed)
        alive = {one: vector for one, vector in (alive | batch).items() if vector is not None}
    wanted = brute_force.lists(alive)
    found = {one: space.near(one) for one in alive}
    assert share(wanted, found) > 0.97
    assert all(near.id in alive for row in found.values() for near in row)
    assert all(
        near.score == brute_force.score(alive[one], alive[near.id])
        for one in changed[:50]
        if one in alive
        for near in found[one]
    )
    assert len(space) == len(alive)


def test_to_relate_again_what_did_not_change_loses_nothing() -> None:
    # All in one cluster: that one is in another's list does not make that other one of its own candidates.
    draw = some(12, 32, clusters=1, spread=0.5)
    vectors = {one: draw() for one in range(1_000)}
    space, wanted = indexed(vectors), brute_force.lists(vectors)
    space.relate(list(vectors))
    before = {one: space.near(one) for one in vectors}
    space.relate(range(0, 1_000, 3))
    after = {one: space.near(one) for one in vectors}
    assert 0.9 < share(wanted, before) <= share(wanted, after)
    assert all(len(after[one]) == len(before[one]) for one in vectors)
    assert all(after[one][-1].score >= before[one][-1].score for one in vectors)


def test_a_search_above_the_limit_keeps_to_what_is_allowed(crowd: dict[int, Vector]) -> None:
    space = indexed(crowd)
    for allowed in (range(0, 2_000, 2), range(1_990, 2_010)):
        wanted, found = {}, {}
        for one in range(0, 2_000, 40):
            wanted[one] = brute_force.search(crowd, crowd[one], 10, allowed=allowed)
            found[one] = space.search(crowd[one], 10, allowed=np.array(allowed))
        assert all(near.id in allowed for row in found.values() for near in row)
        assert share(wanted, found) > 0.97


def test_a_space_that_shrinks_is_exact_again(crowd: dict[int, Vector]) -> None:
    space = indexed(crowd)
    space.relate(list(crowd))
    space.put(dict.fromkeys(range(80, 2_000)))
    space.relate(range(80, 2_000))
    left = {one: crowd[one] for one in range(80)}
    assert {one: space.near(one) for one in left} == brute_force.lists(left)
    assert space.recall(range(80)) == 1.0


def test_below_the_limit_there_is_no_index(tmp_path: Path) -> None:
    space = Space(2, exact_up_to=2)
    space.put({1: unit(1, 0), 2: unit(1, 0.1)})
    size = space.bytes
    assert space.catch_up(10) == 0
    assert space.bytes == size
    space.save(tmp_path / "snapshot")
    assert list(tmp_path.iterdir()) == []
    assert space.restore(tmp_path / "snapshot") == 0
    assert space.recall([1, 2]) == 1.0
    assert space.recall([]) == 1.0


# --- the index by itself ---------------------------------------------------------------------------------------------


def test_who_left_the_index_and_came_back_is_named_again() -> None:
    draw = some(13, 16, clusters=30)
    vectors = np.stack([draw() for _ in range(500)])
    index, ids = Nearest(16), np.arange(500)
    index.add(ids, vectors)
    rng = np.random.default_rng(1)
    for _ in range(10):
        away = rng.permutation(ids)[:200]
        index.remove(away)
        assert len(index) == 300
        index.add(rng.permutation(away), vectors[away])
        # Keys may be those of others by now: only what is brought last counts.
        index.add(ids, vectors)
    rows, found, _ = index.search(vectors, 40)
    assert np.mean([one in found[rows == one] for one in range(500)]) > 0.97
    assert len(index) == 500


def test_an_index_of_nothing_names_nobody() -> None:
    index = Nearest(2)
    index.remove(np.array([5]))
    rows, found, _ = index.search(np.array([[1, 0]], np.float32), 5)
    assert (rows.tolist(), found.tolist()) == ([], [])
    index.add(np.array([5]), np.array([[1, 0]], np.float32))
    for many in (1, 2, 33, 64):
        rows, found, _ = index.search(np.tile(np.array([[1, 0]], np.float32), (many, 1)), 5)
        assert (rows.tolist(), found.tolist()) == (list(range(many)), [5] * many)


# --- snapshots -------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path, crowd: dict[int, Vector]) -> Path:
    """Of a space with everything in its index."""
    path = tmp_path / "spaces" / "one"
    indexed(crowd).save(path)
    return path


def opened(vectors: dict[int, Vector]) -> Space:
    """A space whose index has nothing."""
    space = Space(32, exact_up_to=100)
    space.put(vectors)
    return space


def finds_all(space: Space, vectors: dict[int, Vector]) -> bool:
    """Whether searches are right."""
    asked = list(vectors)[:: len(vectors) // 40]
    wanted = {one: brute_force.search(vectors, vectors[one], 10) for one in asked}
    return share(wanted, {one: space.search(vectors[one], 10) for one in asked}) > 0.97


def test_a_snapshot_spares_building_the_index(snapshot: Path, crowd: dict[int, Vector]) -> None:
    space = opened(crowd)
    assert space.restore(snapshot) == 2_000
    assert space.catch_up(0) == 0
    assert finds_all(space, crowd)
    assert space.restore(snapshot) == 0  # there is one


def test_what_changed_since_the_snapshot_is_brought_to_the_index(snapshot: Path, crowd: dict[int, Vector]) -> None:
    draw = some(14, 32)
    now = {one: draw() if one < 200 else vector for one, vector in crowd.items() if one >= 100}
    now |= {one: draw() for one in range(3_000, 3_050)}
    space = opened(now)
    assert space.restore(snapshot) == 1_800
    assert finds_all(space, now)
    assert space.catch_up(100) == 50
    assert space.catch_up(100) == 0
    assert finds_all(space, now)
    assert space.recall(list(now)[::10]) > 0.97


def flip(path: Path) -> None:
    """Change a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """As if only a part had been written."""
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    """As a file system may leave it that lost power."""
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("which", ["one", "one.*.index"])
def test_a_damaged_snapshot_counts_as_none(
    snapshot: Path, crowd: dict[int, Vector], which: str, damage: Callable[[Path], None]
) -> None:
    (file,) = snapshot.parent.glob(which)
    damage(file)
    space = opened(crowd)
    assert space.restore(snapshot) == 0
    assert finds_all(space, crowd)
    assert space.catch_up(10_000) == 0
    space.save(snapshot)
    assert opened(crowd).restore(snapshot) == 2_000


def test_a_snapshot_of_another_dimension_counts_as_none(snapshot: Path) -> None:
    assert Nearest.open(snapshot, 16) is None
    found = Nearest.open(snapshot, 32)
    assert found is not None
    (held,) = found.held(np.arange(2_000))
    assert len(found) == len(held.ids) == len(held.prints) == 2_000


def test_until_a_snapshot_is_whole_the_one_before_counts(snapshot: Path, crowd: dict[int, Vector]) -> None:
    # As a process leaves it that ends while it writes: an index that nothing names, and half a manifest.
    (snapshot.parent / "one.0123456789abcdef.index").write_bytes(b"half of an index")
    (snapshot.parent / "one.part").write_bytes(b"half")
    space = opened(crowd)
    assert space.restore(snapshot) == 2_000
    space.put({5_000: crowd[0]})
    space.catch_up(10)
    space.save(snapshot)
    assert sorted(file.name.count(".") for file in snapshot.parent.iterdir()) == [0, 2]
    again = opened(crowd | {5_000: crowd[0]})
    assert again.restore(snapshot) == 2_001


def test_a_snapshot_that_cannot_be_written_leaves_the_one_before(
    snapshot: Path, crowd: dict[int, Vector], tmp_path: Path
) -> None:
    space = opened(crowd)
    space.restore(snapshot)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        space.save(tmp_path / "file" / "one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="index"):
            space.save(snapshot)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (snapshot.parent / "one.part").mkdir()
    with pytest.raises(OSError, match="part"):
        space.save(snapshot)
    assert len(list(snapshot.parent.glob("one.*.index"))) == 1
    assert opened(crowd).restore(snapshot) == 2_000


def test_a_search_goes_on_while_a_snapshot_is_written(snapshot: Path, crowd: dict[int, Vector]) -> None:
    space = opened(crowd)
    space.restore(snapshot)
    over = threading.Event()

    def save() -> None:
        for _ in range(10):
            space.save(snapshot)
        over.set()

    thread = threading.Thread(target=save)
    thread.start()
    found, asked = 0, 0
    while not over.is_set() or not asked:
        found += space.search(crowd[asked % 2_000], 1)[0].score > 0.999
        asked += 1
    thread.join()
    assert found > 0.97 * asked
    assert opened(crowd).restore(snapshot) == 2_000


def test_a_print_tells_vectors_apart() -> None:
    draw = some(15)
    vectors = np.stack([draw() for _ in range(1_000)])
    prints = prints_of(vectors)
    assert len(set(prints)) == 1_000
    assert {len(one) for one in prints} == {nearest.PRINT}
