"""The adapter of Vectorizer against a server that fails as servers and proxies do: answers stay whole and right."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from nexus import brute_force
from nexus.index_conformance import clustered
from nexus.told_server import Answer, Seen
from nexus.vectorizer_twin import Points, Twin, answer
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from common.errors import InvalidRequest
from control_plane.nexus.index import IndexLost, IndexUnavailable
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Vector
from control_plane.nexus.space import Space
from control_plane.nexus.vectorizer import WORN, Vectorizer, VectorizerIndex

NAME = "client/model/16"
DIMENSION = 16
Wrong = Callable[[Seen, Twin], Answer | None]


class Stand:
    """A space with its index on a server, and what its documents are."""

    def __init__(self, twin: Twin, *, pause: float = 0.0, seconds: float = 10.0, key: str | None = None) -> None:
        self.twin = twin
        self.registry = CollectorRegistry()
        self.server = Vectorizer(twin.url, key, NexusMetrics(self.registry), pause=pause, seconds=seconds)
        self.vectors: dict[int, Vector] = {}
        self.space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        self.pending: set[int] = set()

    def index(self) -> VectorizerIndex:
        return self.server.index(NAME, DIMENSION)

    @property
    def points(self) -> Points:
        """What the server has."""
        (found,) = self.twin.collections.values()
        return found

    def put(self, vectors: dict[int, Vector | None]) -> None:
        """Documents change."""
        self.space.put(vectors)
        self.pending |= vectors.keys()
        whole = self.vectors | vectors
        self.vectors = {one: vector for one, vector in whole.items() if vector is not None}

    def fill(self, count: int = 150) -> None:
        """So many documents, all of them on the server."""
        self.put(dict(enumerate(clustered(1, count, clusters=12, dimension=DIMENSION))))
        self.space.use(self.index())
        assert self.space.catch_up(10_000) == 0

    def mend(self) -> None:
        """Bring the server what it lacks."""
        for _ in range(50):
            try:
                if not self.space.in_use:
                    self.space.use(self.index())
                if not self.space.catch_up(10_000):
                    break
            except IndexUnavailable:
                pass
        assert self.points.vectors.keys() == {str(one) for one in self.vectors}
        for one, vector in self.vectors.items():
            assert np.allclose(self.points.vectors[str(one)], vector, atol=1e-5)

    def check(self) -> None:
        """What is asked and listed is right, whatever the server does."""
        self.space.relate(sorted(self.pending))
        self.pending.clear()
        assert {one: self.space.near(one) for one in self.vectors} == brute_force.lists(self.vectors)
        for question in clustered(2, 5, clusters=12, dimension=DIMENSION):
            assert self.space.search(question, 10) == brute_force.search(self.vectors, question, 10)

    def errors(self, code: str) -> float:
        """That were counted."""
        return self.registry.get_sample_value("vectorizer_nexus_errors_total", {"code": code}) or 0.0


@pytest.fixture
def twin() -> Iterator[Twin]:
    twin = Twin()
    with twin.running():
        yield twin


@contextmanager
def standing(twin: Twin, **how: float) -> Iterator[Stand]:
    stand = Stand(twin, **how)
    try:
        yield stand
    finally:
        twin.over.set()
        stand.server.close()


@pytest.fixture
def stand(twin: Twin) -> Iterator[Stand]:
    with standing(twin) as stand:
        yield stand


def silent(_: Seen, twin: Twin) -> None:
    """Nothing, for longer than anybody waits."""
    twin.over.wait(60)


def cut(seen: Seen, twin: Twin) -> Answer:
    """Half of an answer."""
    whole = twin.usual(seen)
    return whole._replace(body=whole.body[: len(whole.body) // 2])


WRONG: dict[str, Wrong] = {
    "nothing": lambda *_: None,
    "overloaded": lambda *_: Answer(503, b"", headers={"Retry-After": "0"}),
    "too many": lambda *_: answer({"error_type": "queue_full", "message": "full", "status_code": 429}, 429),
    "broken": lambda *_: answer({"error_type": "internal_error", "message": "out of the blue"}, 500),
    "no key": lambda *_: answer({"error": "unauthorized"}, 401),
    "a page": lambda *_: Answer(200, b"<html>It works!</html>", "text/html"),
    "no text": lambda *_: Answer(200, b"\xff\xfe"),
    "an error under 200": lambda *_: answer({"error_type": "bad_request", "message": "Search failed"}),
    "half of it": cut,
    "cut off": lambda seen, twin: cut(seen, twin)._replace(length=100_000, over=True),
    "of another kind": lambda *_: answer({"result": [{"id": None}], "results": [{"index": "0"}]}),
    "gone": lambda *_: answer({"error_type": "collection_not_found", "message": "Collection not found"}, 404),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_while_it_cannot_be_asked_answers_are_right_and_then_it_is_asked_again(
    twin: Twin, stand: Stand, wrong: Wrong
) -> None:
    stand.fill()
    stand.put({3: None, 4: stand.vectors[5], 400: stand.vectors[6]})
    twin.answer = lambda seen: wrong(seen, twin)
    with capture_logs() as logs:
        stand.check()
        with pytest.raises(IndexUnavailable):
            stand.space.use(stand.index())
        stand.check()
    assert stand.errors("INDEX_UNAVAILABLE") >= 1
    assert sum(one["log_level"] == "warning" for one in logs) == 1 + int(stand.errors("INDEX_LOST"))
    assert stand.errors("INDEX_LOST") == (wrong is WRONG["gone"])
    twin.answer = twin.usual
    stand.mend()
    stand.check()


def test_who_asks_waits_once_and_for_a_bounded_time(twin: Twin) -> None:
    with standing(twin, seconds=0.3, pause=60) as stand:
        stand.fill()
        twin.answer = lambda seen: silent(seen, twin)
        before = len(twin.seen)
        stand.check()
        stand.check()
        with pytest.raises(IndexUnavailable, match=r"not asked for .* has not answered within 0\.3 s"):
            stand.index().search(stand.vectors[1][None], 1)
        assert len(twin.seen) == before + 1
        assert stand.errors("INDEX_UNAVAILABLE") == 1


@pytest.mark.parametrize(("said", "waits"), [("30", "30"), ("86400", "60"), ("Wed, 21 Oct 2026 07:28:00 GMT", "5")])
def test_it_is_not_asked_before_the_time_that_it_says(twin: Twin, said: str, waits: str) -> None:
    with standing(twin, pause=5) as stand:
        stand.fill()
        twin.answer = lambda _: Answer(429, b"{}", headers={"Retry-After": said})
        assert stand.space.search(stand.vectors[1], 1)[0].id == 1
        twin.answer = twin.usual
        with pytest.raises(IndexUnavailable, match=f"not asked for {waits} s: .* answers 429"):
            stand.index().search(stand.vectors[1][None], 1)
        stand.check()


@pytest.mark.parametrize("applied", [False, True])
def test_faults_at_any_moment_lose_nothing(twin: Twin, stand: Stand, applied: bool) -> None:
    """Any request may fail, before or after it has happened, and the server may lose what it has."""
    chance = random.Random(applied)
    drawn = iter(clustered(3, 4_000, clusters=12, dimension=DIMENSION))

    def odd(seen: Seen) -> Answer | None:
        if chance.random() > 0.15:
            return twin.usual(seen)
        if applied:
            twin.usual(seen)
        return chance.choice([*WRONG.values()])(seen, twin)

    stand.fill()
    for turn in range(12):
        twin.answer = odd
        ids = chance.sample(range(200), 40)
        stand.put({one: None if chance.random() < 0.3 else next(drawn) for one in ids})
        for _ in range(3):
            try:
                if not stand.space.in_use:
                    stand.space.use(stand.index())
                stand.space.catch_up(30)
            except IndexUnavailable:
                pass
        if turn % 4 == 1:
            twin.restart()
        if turn % 4 == 2:
            twin.collections.clear()
        if turn % 4 == 3:
            stand.space = Space(DIMENSION, exact_up_to=0, mirrored=True)  # our process ends
            stand.space.put(stand.vectors | {one: None for one in range(200) if one not in stand.vectors})
            stand.pending = set(stand.vectors)
        stand.check()
        if turn % 3 == 2:
            twin.answer = twin.usual
            stand.mend()
            stand.check()


def test_what_it_does_not_confirm_is_looked_at_by_itself_and_brought_again(twin: Twin, stand: Stand) -> None:
    def picky(seen: Seen) -> Answer:
        found = twin.usual(seen)
        if seen.path != "/insert_vectors":
            return found
        body = json.loads(found.body)
        for item in body["results"]:
            if item["index"] % 3 == 0:
                item |= {"status": "error", "error": "Storage error: disk full", "vector_ids": []}
            if item["index"] % 3 == 1:
                item["vector_ids"] = ["7777"]
        return answer(body)

    twin.answer = picky
    stand.put(dict(enumerate(clustered(1, 300, clusters=12, dimension=DIMENSION))))
    stand.space.use(stand.index())
    with pytest.raises(IndexLost, match="256 vectors, not 85"):
        stand.space.catch_up(1_000)
    stand.check()
    twin.answer = twin.usual
    stand.mend()
    stand.check()


def test_what_it_refuses_stays_out_and_the_rest_is_brought(twin: Twin, stand: Stand) -> None:
    def full(seen: Seen) -> Answer:
        if seen.path != "/insert_vectors":
            return twin.usual(seen)
        body = seen.body
        good, bad = body["vectors"][::2], body["vectors"][1::2]
        told = json.loads(twin.usual(seen._replace(raw=json.dumps(body | {"vectors": good}).encode())).body)
        for item in told["results"]:
            item["index"] *= 2
        refused = {"status": "error", "error": "Storage error: disk full", "error_type": "storage_error"}
        told["results"] += [{"index": 2 * at + 1, "client_id": one["id"]} | refused for at, one in enumerate(bad)]
        return answer(told)

    twin.answer = full
    stand.put(dict(enumerate(clustered(1, 300, clusters=12, dimension=DIMENSION))))
    stand.space.use(stand.index())
    assert [stand.space.catch_up(1_000) for _ in range(3)] == [150, 75, 37]
    stand.check()

    def closed(seen: Seen) -> Answer:
        found = full(seen)
        return answer({"results": []}) if seen.path == "/insert_vectors" else found

    twin.answer = closed
    with pytest.raises(IndexUnavailable, match="takes no vector: nothing is said"):
        stand.space.catch_up(1_000)
    stand.check()
    twin.answer = twin.usual
    stand.mend()


def test_names_of_nobody_are_passed_over(twin: Twin, stand: Stand) -> None:
    stand.fill()

    def odd(seen: Seen) -> Answer:
        if not seen.path.endswith("/search/batch"):
            return twin.usual(seen)
        named: list[object] = ["7", "x", "", "-1", -1, 1 << 63, 9_999, "9" * 40, 17]
        found = [{"id": one, "score": 1.0} for one in named]
        return answer({"result": [{"result": found}] * len(seen.body["searches"])})

    twin.answer = odd
    stand.put({one: vector for one, vector in stand.vectors.items() if one % 7 == 0} | {5: None})
    stand.check()
    assert stand.space.in_use
    assert stand.errors("INDEX_LOST") == 0


def test_too_few_answers_are_none(twin: Twin, stand: Stand) -> None:
    stand.fill()
    twin.answer = lambda seen: answer({"result": []}) if "/search/" in seen.path else twin.usual(seen)
    stand.check()
    assert stand.errors("INDEX_UNAVAILABLE") >= 1


# --- what others did to the server -----------------------------------------------------------------------------------


def emptied(stand: Stand) -> None:
    stand.twin.collections.clear()


def of_before(stand: Stand) -> None:
    """It was killed, and has what it saved: as many vectors, one of which is another by now."""
    stand.points.put("7", clustered(9, 1, clusters=1, dimension=DIMENSION)[0], {"print": "00" * 8})
    stand.twin.restart()


def more(stand: Stand) -> None:
    stand.points.put("7777", stand.vectors[1], {})


def fewer(stand: Stand) -> None:
    stand.points.take_out("7")


def others(stand: Stand) -> None:
    """Another collection of that name."""
    (name,) = stand.twin.collections
    stand.twin.collections[name] = Points(8)


@pytest.mark.parametrize("done", [emptied, of_before, more, fewer, others])
@pytest.mark.parametrize("asked", [True, False], ids=["at the next question", "after a new start"])
def test_a_server_that_is_not_what_it_was_is_noticed_and_mended(
    stand: Stand, done: Callable[[Stand], None], asked: bool
) -> None:
    stand.fill()
    stand.check()
    done(stand)
    if not asked:
        stand.space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        stand.space.put(stand.vectors)
    stand.pending = set(stand.vectors)
    stand.check()
    assert not stand.space.in_use
    assert stand.errors("INDEX_LOST") == asked
    stand.mend()
    stand.pending = set(stand.vectors)
    stand.check()
    assert stand.space.in_use


def test_prints_that_are_none_are_brought_anew(stand: Stand) -> None:
    stand.fill(50)
    odd = [None, {}, {"print": 5}, {"print": "xyz"}, {"print": "00"}, {"other": "00" * 8}]
    for one, payload in enumerate(odd):
        stand.points.payloads[str(one)] = payload
    stand.space = Space(DIMENSION, exact_up_to=0, mirrored=True)
    stand.space.put(stand.vectors)
    assert stand.space.use(stand.index()) == 44
    stand.mend()
    stand.pending = set(stand.vectors)
    stand.check()


def test_deleted_documents_leave_it_whenever_they_are_deleted(stand: Stand) -> None:
    stand.fill(100)
    stand.put({1: None})
    stand.space.leave()
    stand.put({2: None, 3: stand.vectors[4]})
    stand.mend()
    # Before the process has begun, of which rows tell; and long before.
    for gone, tells in ((5, True), (6, False)):
        del stand.vectors[gone]
        stand.space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        stand.space.put(stand.vectors | ({gone: None} if tells else {}))
        inserted = sum(one.path == "/insert_vectors" for one in stand.twin.seen)
        stand.mend()
        again = sum(one.path == "/insert_vectors" for one in stand.twin.seen) - inserted
        assert again == (0 if tells else 1)


def test_a_deletion_that_does_not_happen_is_made_again(twin: Twin, stand: Stand) -> None:
    stand.fill(100)
    stand.put({1: None})
    twin.answer = lambda seen: answer({"deleted": 1}) if seen.path == "/batch_delete" else twin.usual(seen)
    with pytest.raises(IndexUnavailable, match="still has 1 vectors"):
        stand.space.catch_up(0)
    stand.check()
    twin.answer = twin.usual
    stand.mend()


def test_a_collection_of_which_more_is_dead_than_alive_is_made_anew(twin: Twin, stand: Stand) -> None:
    stand.fill(50)
    index = stand.index()
    assert sum(len(held.ids) for held in index.held(np.arange(50))) == 50
    ids = np.arange(1_000, 1_001 + WORN)
    index.add(ids, np.tile(stand.vectors[1], (len(ids), 1)))
    with pytest.raises(IndexLost, match="10,001 dead vectors beside 50"):
        index.remove(ids)
    assert twin.collections == {}
    assert list(index.held(np.arange(50))) == []
    assert (len(stand.points.vectors), len(stand.points.dead)) == (0, 0)


def test_a_server_that_makes_no_collection_is_away(twin: Twin, stand: Stand) -> None:
    twin.answer = lambda seen: answer({}, 404) if seen.method == "PUT" else twin.usual(seen)
    with pytest.raises(IndexUnavailable, match="answers 404") as told:
        stand.space.use(stand.index())
    assert not isinstance(told.value, IndexLost)
    assert stand.errors("INDEX_UNAVAILABLE") == 1


def test_collections_of_spaces_that_are_gone_are_deleted_and_no_others(twin: Twin, stand: Stand) -> None:
    stand.fill(5)
    names = ["client/model/16", "client/other/16", "x/y/3"]
    for name in names[1:]:
        assert list(stand.server.index(name, 3).held(np.arange(0))) == []
    twin.collections["somebody's own"] = Points(3)
    stand.server.keep_only(names[:2])
    assert len(twin.collections) == 3
    assert "somebody's own" in twin.collections
    assert list(stand.server.index(names[2], 3).held(np.arange(0))) == []  # is made again


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_path_and_a_key_go_with_every_request(twin: Twin) -> None:
    twin.url += "/store/"
    twin.answer = lambda seen: twin.usual(seen._replace(path=seen.path.removeprefix("/store")))
    server = Vectorizer(twin.url, "vk_0123", NexusMetrics(CollectorRegistry()))
    assert list(server.index(NAME, DIMENSION).held(np.arange(3))) == []
    server.close()
    assert {one.path.split("/")[1] for one in twin.seen} == {"store"}
    assert {one.headers["x-api-key"] for one in twin.seen} == {"vk_0123"}


@pytest.mark.parametrize(("url", "key"), [("ftp://host", None), ("http://a:b@host", None), ("http://host", "a b")])
def test_a_wrong_address_is_refused(url: str, key: str | None) -> None:
    with pytest.raises(InvalidRequest):
        Vectorizer(url, key, NexusMetrics(CollectorRegistry()))


def test_requests_are_bound_in_size(twin: Twin) -> None:
    server = Vectorizer(twin.url, None, NexusMetrics(CollectorRegistry()))
    index = server.index("client/model/1024", 1_024)
    assert list(index.held(np.arange(0))) == []
    vectors = clustered(1, 300, clusters=3, dimension=1_024)
    assert index.add(np.arange(300), vectors).all()
    rows = index.search(vectors, 3).rows
    assert np.bincount(rows).tolist() == [3] * 300
    server.close()
    assert max(len(one.raw) for one in twin.seen) < 1 << 20


def test_searches_beside_writes_are_right(twin: Twin, stand: Stand) -> None:
    stand.fill()
    drawn = clustered(5, 600, clusters=12, dimension=DIMENSION)
    steady = dict(stand.vectors)
    over = threading.Event()
    wrong: list[object] = []

    def ask() -> None:
        while not over.is_set():
            for question in drawn[:5]:
                found = [near for near in stand.space.search(question, 1_000) if near.id in steady]
                if found != brute_force.search(steady, question, 1_000):
                    wrong.append(found)

    thread = threading.Thread(target=ask)
    thread.start()
    for start in range(0, 600, 50):
        stand.put({10_000 + one: drawn[one] for one in range(start, start + 50)})
        stand.space.catch_up(1_000)
        stand.put({10_000 + one: None for one in range(start, start + 25)})
        stand.space.catch_up(1_000)
    over.set()
    thread.join()
    assert wrong == []
    assert stand.space.in_use
    assert stand.errors("INDEX_LOST") == 0
