"""A real Vectorizer server: what the adapter builds on, and what it stays away from, as this version does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from nexus import brute_force
from nexus.index_conformance import DIMENSION, IndexConformance, clustered, share
from nexus.vectorizer_server import (
    KEY,
    VectorizerServer,
    connected,
    needs_own_vectorizer,
    needs_vectorizer,
    vectorizer_server,
)
from prometheus_client import CollectorRegistry

from control_plane.nexus.index import IndexUnavailable, VectorIndex
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Vector
from control_plane.nexus.space import Space
from control_plane.nexus.vectorizer import Vectorizer

pytestmark = [needs_vectorizer, pytest.mark.timeout(600)]

NAME = "memvid-trap"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorizerServer]:
    with vectorizer_server(tmp_path_factory.mktemp("vectorizer") / "shared") as server:
        yield server


@pytest.fixture
def server(shared: VectorizerServer) -> VectorizerServer:
    with connected(shared) as store:
        store.keep_only([])
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[VectorizerServer]:
    """One that may be ended."""
    with vectorizer_server(tmp_path / "vectorizer") as server:
        yield server


class OnServer:
    """A server that outlives the process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: list[Vectorizer] = []

    def open(self) -> VectorIndex:
        self._opened.append(Vectorizer(self._url, KEY, NexusMetrics(CollectorRegistry()), pause=0.0))
        return self._opened[-1].index("client/model/32", DIMENSION)

    def close(self, space: Space) -> None: ...

    def end(self) -> None:
        for store in self._opened:
            store.close()


class TestServer(IndexConformance):
    """All of the port; but the server does not find everything."""

    documents = 2_000
    found_at_least = 0.97

    @pytest.fixture
    def shelf(self, server: VectorizerServer) -> Iterator[OnServer]:
        shelf = OnServer(server.url)
        yield shelf
        shelf.end()


class Told:
    """A space whose vectors a server has."""

    def __init__(self, server: VectorizerServer, store: Vectorizer) -> None:
        while server.ask("GET", "/status")["uptime_seconds"] < 2:  # it tells whole seconds
            time.sleep(0.05)
        self.vectors: dict[int, Vector] = dict(enumerate(clustered(1, 1_000, clusters=40)))
        self.store = store
        self.space = self.begin()
        assert self.space.catch_up(10_000) == 0

    def begin(self) -> Space:
        """As a new process does it."""
        space = Space(DIMENSION, exact_up_to=0, mirrored=True)
        space.put(self.vectors)
        self.known = space.use(self.store.index("client/model/32", DIMENSION))
        return space

    def check(self, *, asked: bool) -> None:
        """Of what it should be everything is found, or nearly everything where the server was asked."""
        questions = dict(enumerate(clustered(2, 20, clusters=40)))
        wanted = {one: brute_force.search(self.vectors, question, 10) for one, question in questions.items()}
        found = {one: self.space.search(question, 10) for one, question in questions.items()}
        assert self.space.in_use == asked
        assert share(wanted, found) >= (0.97 if asked else 1)


@needs_own_vectorizer
def test_a_server_that_was_stopped_has_all_as_it_is(own: VectorizerServer) -> None:
    with connected(own) as store:
        told = Told(own, store)
        told.check(asked=True)
        own.restart()
        told.check(asked=False)  # it is another one by now
        told.space = told.begin()
        assert told.known == 1_000
        told.check(asked=True)


@needs_own_vectorizer
def test_a_server_that_was_killed_is_noticed_and_told_again(own: VectorizerServer) -> None:
    with connected(own) as store:
        told = Told(own, store)
        own.restart(kill=True)
        told.check(asked=False)
        told.space = told.begin()
        assert told.known < 1_000  # it saves each some minutes
        assert told.space.catch_up(10_000) == 0
        told.check(asked=True)


@needs_own_vectorizer
def test_a_server_that_is_away_costs_no_answer(own: VectorizerServer) -> None:
    with connected(own) as store:
        told = Told(own, store)
        own.kill()
        questions = clustered(2, 20, clusters=40)
        found = [told.space.search(question, 10) for question in questions]
        assert found == [brute_force.search(told.vectors, question, 10) for question in questions]
        own.start()
        told.check(asked=False)


def test_after_many_changes_answers_are_right(server: VectorizerServer) -> None:
    """Each changed vector leaves a dead one in the server, which takes the place of a candidate."""
    with connected(server) as store:
        told = Told(server, store)
        for turn in range(3, 9):
            drawn = dict(enumerate(clustered(turn, 1_000, clusters=40)))
            told.vectors |= drawn
            told.space.put(drawn)
            assert told.space.catch_up(10_000) == 0
        told.check(asked=True)
        told.space.relate(list(told.vectors))
        wanted = brute_force.lists(told.vectors)
        assert share(wanted, {one: told.space.near(one) for one in told.vectors}) > 0.97
        # As servers have it: this few are all looked at.
        usual = Space(DIMENSION, mirrored=True)
        usual.put(told.vectors)
        assert usual.use(store.index("client/model/32", DIMENSION)) == 1_000
        usual.relate(list(told.vectors))
        assert {one: usual.near(one) for one in told.vectors} == wanted


# --- what the server does wrong --------------------------------------------------------------------------------------


def point(one: int, vector: Vector, **payload: Any) -> dict[str, Any]:
    return {"id": str(one), "embedding": vector.tolist(), "payload": payload}


@pytest.fixture
def many(server: VectorizerServer) -> Vector:
    """A collection of 300 vectors in one cluster."""
    vectors = clustered(5, 300, clusters=1, spread=0.3)
    fill(server, vectors)
    return vectors


def fill(server: VectorizerServer, vectors: Vector) -> None:
    size = {"size": vectors.shape[1], "distance": "Cosine"}
    server.ask("PUT", f"/qdrant/collections/{NAME}", {"vectors": size})
    body = {"collection": NAME, "vectors": [point(one, vector) for one, vector in enumerate(vectors)]}
    assert server.ask("POST", "/insert_vectors", body)["inserted"] == len(vectors)


def named(server: VectorizerServer, vector: Vector, limit: int) -> list[int]:
    """By the search that the adapter uses."""
    body = {"searches": [{"vector": vector.tolist(), "limit": limit, "with_payload": False, "with_vector": False}]}
    (found,) = server.ask("POST", f"/qdrant/collections/{NAME}/points/search/batch", body)["result"]
    return [one["id"] for one in found["result"]]


def test_trap_a_collection_is_only_made_with_the_dimension_of_its_embedder(server: VectorizerServer) -> None:
    body = {"name": NAME, "dimension": 256, "metric": "cosine"}
    assert "provider_dimension_mismatch" in str(server.ask("POST", "/collections", body, status=400))


def test_trap_vectors_for_no_collection_make_one_of_512_dimensions(server: VectorizerServer) -> None:
    body = {"collection": NAME, "vectors": [point(1, np.ones(3, np.float32))]}
    told = server.ask("POST", "/insert_vectors", body)
    assert (told["inserted"], told["failed"], told["results"][0]["status"]) == (0, 1, "error")
    assert server.ask("GET", f"/collections/{NAME}")["dimension"] == 512


def test_trap_what_fails_by_item_is_answered_with_200(server: VectorizerServer, many: Vector) -> None:
    body = {"collection": NAME, "vectors": [point(900, many[0]), point(901, many[0, :5])]}
    told = server.ask("POST", "/insert_vectors", body)
    assert [(one["index"], one["status"]) for one in told["results"]] == [(0, "ok"), (1, "error")]
    told = server.ask("POST", "/batch_delete", {"collection": "memvid-none", "ids": ["1"]})
    assert (told["deleted"], told["results"][0]["error"]) == (0, "Collection not found: memvid-none")


def test_trap_dead_vectors_take_the_places_of_others(server: VectorizerServer, many: Vector) -> None:
    nearest = named(server, many[0], 60)
    assert len(nearest) == 60
    server.ask("POST", "/batch_delete", {"collection": NAME, "ids": [str(one) for one in nearest[:40]]})
    assert len(named(server, many[0], 60)) <= 25
    changed = [point(one, -many[one]) for one in nearest[40:]]
    server.ask("POST", "/insert_vectors", {"collection": NAME, "vectors": changed})
    assert len(named(server, many[0], 60)) <= 5


def test_trap_its_own_search_names_at_most_100_and_sends_their_vectors(server: VectorizerServer, many: Vector) -> None:
    body = {"vector": many[0].tolist(), "limit": 200}
    found = server.ask("POST", f"/collections/{NAME}/search", body)["results"]
    assert len(found) == 100
    assert len(found[0]["vector"]) == DIMENSION
    assert len(named(server, many[0], 200)) == 200


def test_trap_a_vector_by_its_id_is_always_the_same_one(server: VectorizerServer, many: Vector) -> None:
    one, other = (server.ask("GET", f"/collections/{NAME}/vectors/{of}")["vector"] for of in (1, 2))
    assert one == other
    body = {"ids": [1, 2, 9_999], "with_payload": True, "with_vector": True}
    found = server.ask("POST", f"/qdrant/collections/{NAME}/points", body)["result"]
    assert [point["id"] for point in found] == ["1", "2"]
    assert [np.allclose(point["vector"], many[int(point["id"])], atol=0.01) for point in found] == [True, True]


def test_trap_pages_of_a_listing_overlap_and_have_all_vectors(server: VectorizerServer, many: Vector) -> None:
    first = server.ask("POST", f"/qdrant/collections/{NAME}/points/scroll", {"limit": 10, "with_vector": False})
    points, after = first["result"]["points"], first["result"]["next_page_offset"]
    assert [len(one["vector"]) for one in points] == [DIMENSION] * 10
    second = server.ask("POST", f"/qdrant/collections/{NAME}/points/scroll", {"limit": 10, "offset": after})
    assert second["result"]["points"][0]["id"] == points[-1]["id"]


@needs_own_vectorizer
def test_trap_what_was_written_is_lost_when_the_server_is_killed_and_nothing_tells(own: VectorizerServer) -> None:
    fill(own, clustered(5, 50, clusters=1))
    own.restart(kill=True)
    own.ask("GET", f"/collections/{NAME}", status=404)


@needs_own_vectorizer
def test_trap_dead_vectors_are_gone_once_it_starts_anew(own: VectorizerServer) -> None:
    vectors = clustered(5, 300, clusters=1, spread=0.3)
    fill(own, vectors)
    gone = [str(one) for one in named(own, vectors[0], 40)]
    own.ask("POST", "/batch_delete", {"collection": NAME, "ids": gone})
    assert len(named(own, vectors[0], 60)) <= 25
    own.restart()
    assert len(named(own, vectors[0], 60)) == 60


@needs_own_vectorizer
def test_trap_a_key_that_asks_too_often_is_unknown_for_the_rest_of_the_minute(tmp_path: Path) -> None:
    server = VectorizerServer(tmp_path / "vectorizer", auth=True)
    server.start()
    try:
        lines = (server.folder / "data" / ".root_credentials").read_text().splitlines()
        password = next(line.removeprefix("password=") for line in lines if line.startswith("password="))
        root = server.ask("POST", "/auth/login", {"username": "root", "password": password})["access_token"]
        made = httpx.post(
            f"{server.url}/auth/keys",
            json={"name": "memvid", "permissions": ["Read", "Write"]},
            headers={"Authorization": f"Bearer {root}"},
            trust_env=False,
        )
        store = Vectorizer(server.url, made.json()["api_key"], NexusMetrics(CollectorRegistry()), pause=0.0)
        index = store.index("client/model/32", DIMENSION)
        assert list(index.held(np.arange(3))) == []
        assert index.add(np.arange(3), clustered(1, 3, clusters=1)).all()
        with pytest.raises(IndexUnavailable, match=r"answers 401: .*valid JWT token or API key"):
            [store.life() for _ in range(100)]
        store.close()
    finally:
        server.kill()


def test_trap_only_the_server_of_3_5_0_is_known(server: VectorizerServer) -> None:
    assert server.ask("GET", "/status")["version"] == "3.5.0"
