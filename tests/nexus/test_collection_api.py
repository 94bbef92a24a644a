"""Collections and documents over HTTP: what is written is read, found and deleted, by whoever may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pytest
from live_server import Server
from nexus.shelf import Person, Shelf, cosines, directions, shelf
from postgres import Postgres

from common.embedding.static import StaticEmbedder

STATIC = "static/wordllama-l2-supercat-256"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Iterator[Shelf]:
    """A server over each database."""
    url = postgres_server.new_database() if request.param == "postgresql" else None
    with shelf(tmp_path_factory.mktemp("shelf"), url) as found:
        yield found
    if url is not None:
        postgres_server.drop(url)


@pytest.fixture
def red(there: Shelf) -> Iterator[Person]:
    person = there.as_("red")
    yield person
    for one in person.ask("GET", "", params={"limit": 100})["collections"]:
        person.ask("DELETE", f"/{one['name']}", 204)


def test_a_collection_is_made_once_and_stays_what_it_was_made_as(red: Person) -> None:
    made = red.make("books", 3, model="ours/small:v1")
    assert made.pop("createdAt").startswith("20")
    sync = {"synced": 0, "pending": 0, "failed": 0}
    assert made == {"name": "books", "model": "ours/small:v1", "dimension": 3, "documents": 0, "sync": sync}
    again = red.ask("PUT", "/books", json={"dimension": 3, "model": "ours/small:v1"})
    assert again == red.ask("GET", "/books")
    for other in ({"dimension": 4, "model": "ours/small:v1"}, {"dimension": 3, "model": "x"}, {"dimension": 3}, {}):
        differs = red.refused("PUT", "/books", 409, json=other)
        assert differs["code"] == "COLLECTION_DIFFERS"
        assert differs["details"] == {"model": "ours/small:v1", "dimension": 3}
    assert red.make("plain", 3)["model"] == "plain"
    assert red.ask("PUT", "/texts", 201)["model"] == STATIC
    assert red.ask("PUT", "/texts", json={})["dimension"] == 256


def test_a_deleted_collection_is_gone_and_its_name_is_free(red: Person, there: Shelf) -> None:
    red.make("books", 2)
    red.write("books", [{"id": "a", "vector": [1, 0], "text": "unicorn"}])
    woken = there.woken
    red.ask("DELETE", "/books", 204)
    assert there.woken > woken
    for method, path in (("GET", "/books"), ("GET", "/books/documents"), ("GET", "/books/documents/a")):
        assert red.refused(method, path, 404)["code"] == "COLLECTION_NOT_FOUND"
    assert red.refused("DELETE", "/books", 404)["code"] == "COLLECTION_NOT_FOUND"
    red.make("books", 3)
    assert red.listed("books") == []
    assert red.found("books", query="unicorn") == []


def test_what_is_written_is_read_back(red: Person, there: Shelf) -> None:
    red.make("books", 2)
    given = {
        "title": "A title",
        "text": "Words of a text.",
        "vector": [3, 4],
        "payload": {"pages": 12, "tags": ["a", None], "nested": {"half": 0.5, "large": 9007199254740993}},
        "docType": "contract",
        "permissions": ["red", "red2", "red"],
    }
    woken = there.woken
    written = red.ask("PUT", "/books/documents/a", 201, json=given)
    assert there.woken == woken + 1
    assert (written["id"], written["created"]) == ("a", True)
    read = red.document("books", "a")
    assert read["createdAt"] == read["updatedAt"]
    assert {
        name: read[name] for name in ("title", "text", "payload", "docType", "permissions", "domain", "version")
    } == {
        "title": "A title",
        "text": "Words of a text.",
        "payload": given["payload"],
        "docType": "contract",
        "permissions": ["red", "red2"],
        "domain": "",
        "version": written["version"],
    }
    assert read["sync"] == {"status": "pending", "syncedAt": None, "attempts": 0, "error": None}
    assert "vector" not in read
    assert red.document("books", "a", vector=True)["vector"] == [float(np.float32(0.6)), float(np.float32(0.8))]
    counted = red.ask("GET", "/books")
    assert (counted["documents"], counted["sync"]) == (1, {"synced": 0, "pending": 1, "failed": 0})


def test_a_document_is_replaced_as_a_whole(red: Person) -> None:
    red.make("books", 2)
    first = red.ask("PUT", "/books/documents/a", 201, json={"vector": [1, 0], "title": "first", "payload": {"a": 1}})
    before = red.document("books", "a")
    second = red.ask("PUT", "/books/documents/a", 200, json={"vector": [0, 1], "text": "second"})
    assert (second["created"], second["version"] > first["version"]) == (False, True)
    after = red.document("books", "a", vector=True)
    assert (after["title"], after["text"], after["payload"]) == ("", "second", {})
    assert (after["vector"], after["createdAt"]) == ([0.0, 1.0], before["createdAt"])
    assert red.found("books", query="first") == []
    assert red.found("books", query="second", mode="lexical") == ["a"]
    red.ask("DELETE", "/books/documents/a", 204)
    assert red.ask("PUT", "/books/documents/a", 201, json={"vector": [1, 0]})["created"]


ODD_IDS = [
    "a/b",
    "a//b",
    "/a",
    "a/",
    "../a/..",
    "...a",
    "https://example.org/a?b=c#d",
    "delete",
    "documents",
    "/documents/x",
    "a b",
    "ü/日本/🙂",
    "100%25",
    "{doc_id}",
    "*",
    "'; DROP TABLE documents; --",
    "x" * 256,
]


def test_any_printable_text_is_an_id_on_every_route(red: Person) -> None:
    red.make("documents", 2)  # whose name is that of a part of the path
    for doc_id in ODD_IDS:
        path = f"/documents/documents/{quote(doc_id, safe='')}"
        assert red.ask("PUT", path, 201, json={"vector": [1, 0], "title": "one"})["id"] == doc_id
        assert red.document("documents", doc_id)["title"] == "one"
        assert [one["created"] for one in red.write("documents", [{"id": doc_id, "vector": [1, 0]}])] == [False]
        assert red.listed("documents") == red.found("documents", vector=[1, 0]) == [doc_id]
        red.ask("DELETE", path, 204)
        assert red.refused("GET", path, 404)["code"] == "DOCUMENT_NOT_FOUND"
    red.write("documents", [{"id": doc_id, "vector": [1, 0]} for doc_id in ODD_IDS])
    assert red.ask("POST", "/documents/deletions", json={"ids": [*ODD_IDS, "another"]}) == {"deleted": len(ODD_IDS)}
    assert red.listed("documents") == []


def test_slashes_of_an_id_need_no_escaping(red: Person) -> None:
    red.make("books", 2)
    red.write("books", [{"id": doc_id, "vector": [1, 0], "title": doc_id} for doc_id in ("https://a.b/c", "d/e")])
    for doc_id in ("https://a.b/c", "d/e"):
        assert red.ask("GET", f"/books/documents/{doc_id}")["title"] == doc_id
    for path in ("/v1//collections/books/documents/d/e", "/v1/collections/books/d%6Fcuments/d/e"):
        answer = red.http.get(path)
        assert (answer.status_code, answer.json()["title"]) == (200, "d/e")


def test_a_batch_is_written_as_a_whole_or_not_at_all(red: Person) -> None:
    red.make("books", 2)
    documents = [{"id": f"d{n}", "vector": [n + 1, 1]} for n in range(5)]
    for wrong in ({"id": "d3", "vector": [1]}, {"id": "d3"}, {"id": "d0", "vector": [1, 1]}):
        refused = red.refused("POST", "/books/documents", 400, json={"documents": [*documents[:3], wrong]})
        assert refused["details"]["field"].startswith("documents[3].")
        assert red.listed("books") == []
    written = red.write("books", documents)
    assert [one["id"] for one in written] == [f"d{n}" for n in range(5)]
    assert all(one["created"] for one in written)
    versions = [one["version"] for one in written]
    assert versions == sorted(set(versions))


def test_a_thousand_documents_come_at_once_and_are_listed_in_pages(red: Person) -> None:
    red.make("books", 2)
    ids = [f"d{n:04}" for n in range(1_000)]
    red.write("books", [{"id": doc_id, "vector": [1, 1], "text": "long " * 20} for doc_id in ids])
    assert red.listed("books") == ids
    first = red.ask("GET", "/books/documents", params={"limit": 3})["documents"]
    assert [one["id"] for one in first] == ids[:3]
    assert "text" not in first[0]
    assert red.ask("POST", "/books/deletions", json={"ids": ids[1:]}) == {"deleted": 999}
    assert red.ask("GET", "/books/documents") == {
        "documents": [{name: value for name, value in red.document("books", ids[0]).items() if name != "text"}],
        "nextCursor": None,
    }


def test_collections_are_listed_by_name_in_pages(red: Person) -> None:
    names = [f"c{n}" for n in range(7)]
    for name in reversed(names):
        red.make(name, 2)
    found, cursor = [], {}
    while True:
        page = red.ask("GET", "", params={"limit": 3, **cursor})
        found += [one["name"] for one in page["collections"]]
        if page["nextCursor"] is None:
            break
        cursor = {"cursor": page["nextCursor"]}
    assert found == names


def test_nothing_of_another_client_is_there(red: Person, there: Shelf) -> None:
    red.make("books", 2)
    red.write("books", [{"id": "a", "vector": [1, 0], "text": "unicorn"}])
    for name in ("blue", "operator"):
        other = there.as_(name)
        assert other.ask("GET", "")["collections"] == []
        for method, path, body in (
            ("GET", "/books", None),
            ("DELETE", "/books", None),
            ("GET", "/books/documents", None),
            ("GET", "/books/documents/a", None),
            ("PUT", "/books/documents/a", {"vector": [1, 0]}),
            ("DELETE", "/books/documents/a", None),
            ("POST", "/books/documents", {"documents": [{"id": "b", "vector": [1, 0]}]}),
            ("POST", "/books/deletions", {"ids": ["a"]}),
            ("POST", "/books/search", {"query": "unicorn"}),
        ):
            theirs = other.refused(method, path, 404, json=body)
            nobodys = other.refused(method, path.replace("books", "none"), 404, json=body)
            assert theirs == nobodys
            assert theirs["code"] == "COLLECTION_NOT_FOUND"
        other.make("books", 2)  # of the same name and model, and yet apart
        other.write("books", [{"id": "mine", "vector": [1, 0], "text": "unicorn"}])
        assert other.found("books", query="unicorn", vector=[1, 0], collections=["*"]) == ["mine"]
        assert red.found("books", query="unicorn", vector=[1, 0], collections=["*"]) == ["a"]
        other.ask("DELETE", "/books", 204)


class TestPermissions:
    """Documents that some keys of the client see."""

    @pytest.fixture
    def mixed(self, red: Person) -> Person:
        red.make("books", 2)
        documents = [("all", []), ("red", ["red"]), ("red2", ["red2"]), ("both", ["red", "red2"]), ("Red", ["Red"])]
        red.write(
            "books",
            [
                {"id": doc_id, "vector": [1, n / 10], "text": f"unicorn {doc_id}", "permissions": keys}
                for n, (doc_id, keys) in enumerate(documents)
            ],
        )
        return red

    SEEN: ClassVar = {
        "red": ["all", "red", "both"],
        "red2": ["all", "red2", "both"],
        "Red": ["all", "Red"],
        "r": ["all"],
        "re_": ["all"],
        "chief": ["all", "red", "red2", "both", "Red"],
    }

    def test_only_what_a_key_sees_is_in_its_answers(self, mixed: Person, there: Shelf) -> None:
        assert mixed.listed("books") == self.SEEN["red"]
        for key, seen in self.SEEN.items():
            self._check(there.as_(key), seen)

    def _check(self, person: Person, seen: list[str]) -> None:
        assert person.listed("books") == seen
        assert person.ask("GET", "/books")["documents"] == len(seen)
        assert sum(person.ask("GET", "/books")["sync"].values()) == len(seen)
        assert person.found("books", vector=[1, 0], mode="vector") == seen  # the further down, the further away
        for question in ({"query": "unicorn", "mode": "lexical"}, {"query": "unicorn", "vector": [1, 0]}):
            assert sorted(person.found("books", **question)) == sorted(seen)
        for most in (1, 2):  # what is hidden takes no place of what is not
            assert person.found("books", vector=[1, 0], mode="vector", limit=most) == seen[:most]
            assert len(person.found("books", query="unicorn", mode="lexical", limit=most)) == min(most, len(seen))
        for doc_id in self.SEEN["chief"]:
            if doc_id in seen:
                assert person.document("books", doc_id)["id"] == doc_id
            else:
                hidden = person.refused("GET", f"/books/documents/{doc_id}", 404)
                assert hidden == person.refused("GET", "/books/documents/never", 404)
                assert hidden["code"] == "DOCUMENT_NOT_FOUND"

    def test_what_a_key_does_not_see_it_cannot_change(self, mixed: Person, there: Shelf) -> None:
        other = there.as_("red2")
        replaced = other.refused("PUT", "/books/documents/red", 404, json={"vector": [0, 1]})
        assert (replaced["code"], replaced["details"]) == ("DOCUMENT_NOT_FOUND", {"field": "id"})
        batch = [{"id": "new", "vector": [0, 1]}, {"id": "red", "vector": [0, 1]}]
        for some, place in ((batch, 1), (batch[1:], 0)):
            refused = other.refused("POST", "/books/documents", 404, json={"documents": some})
            assert refused["code"] == "DOCUMENT_NOT_FOUND"
            assert refused["details"] == {"field": f"documents[{place}].id"}
        assert other.refused("DELETE", "/books/documents/red", 404)["code"] == "DOCUMENT_NOT_FOUND"
        assert other.ask("POST", "/books/deletions", json={"ids": ["red", "both"]}) == {"deleted": 1}
        assert mixed.listed("books") == ["all", "red"]
        assert mixed.document("books", "red")["text"] == "unicorn red"

    def test_permissions_change_with_the_document(self, mixed: Person, there: Shelf) -> None:
        other = there.as_("red2")
        assert "red" not in other.found("books", vector=[1, 0.1], mode="vector")
        mixed.write("books", [{"id": "red", "vector": [1, 0.1], "text": "now for all"}])
        assert other.found("books", vector=[1, 0.1], mode="vector")[0] == "red"
        assert other.found("books", query="now", mode="lexical") == ["red"]
        mixed.write("books", [{"id": "red", "vector": [1, 0.1], "permissions": ["red"]}])
        assert "red" not in other.found("books", vector=[1, 0.1], mode="vector")

    def test_one_may_write_for_others(self, mixed: Person, there: Shelf) -> None:
        mixed.ask("PUT", "/books/documents/gift", 201, json={"vector": [1, 1], "permissions": ["red2"]})
        assert mixed.refused("GET", "/books/documents/gift", 404)["code"] == "DOCUMENT_NOT_FOUND"
        assert there.as_("red2").document("books", "gift")["permissions"] == ["red2"]


class TestVectors:
    """Search by vector, against a computation of all cosines."""

    COUNT, DIMENSION = 600, 8

    @pytest.fixture
    def many(self, red: Person) -> tuple[Person, Any]:
        rows = directions(self.COUNT, self.DIMENSION)
        red.make("large", self.DIMENSION, model="same")
        red.make("small", self.DIMENSION, model="same")
        red.make("other", self.DIMENSION)
        documents = [
            {
                "id": f"{n}",
                "vector": (row * 10.0 ** (n % 7)).tolist(),
                "docType": "rare" if n % 50 == 0 else "",
                "permissions": ["red2"] if n % 3 == 0 else [],
            }
            for n, row in enumerate(rows)
        ]
        red.write("large", documents[:-20])
        red.write("small", documents[-20:])
        red.write("other", documents)
        return red, rows

    def _nearest(self, rows: Any, question: Any, among: list[int]) -> list[tuple[str, float]]:
        found = cosines(rows[among], question)
        order = sorted(range(len(among)), key=lambda place: -found[place])
        return [(str(among[place]), float(found[place])) for place in order]

    def _same(self, hits: list[dict[str, Any]], expected: list[tuple[str, float]]) -> None:
        assert [hit["id"] for hit in hits] == [doc_id for doc_id, _ in expected]
        for hit, (_, cosine) in zip(hits, expected, strict=True):
            assert hit["score"] == hit["why"]["vectorScore"] == pytest.approx(cosine, abs=2e-6)
            assert hit["why"]["lexicalScore"] is None

    def test_the_nearest_in_scope_are_found_in_their_order(self, many: tuple[Person, Any], there: Shelf) -> None:
        _, rows = many
        question = directions(1, self.DIMENSION, seed=1)[0]
        asked: dict[str, Any] = {"vector": (question * 1e-9).tolist(), "mode": "vector"}
        large, small = range(self.COUNT - 20), range(self.COUNT - 20, self.COUNT)
        free = [n for n in large if n % 3]
        # Few of the space, most of it, and what nothing else is left of.
        cases: list[tuple[str, str, list[int], dict[str, Any]]] = [
            ("red", "large", free, {"limit": 10}),
            ("red", "large", free, {"limit": 100}),
            ("red", "small", [n for n in small if n % 3], {"limit": 5}),
            ("red", "small", [n for n in small if n % 3], {"limit": 100}),
            ("red2", "small", [*small], {"limit": 100}),
            ("red", "large", [n for n in free if n % 50 == 0], {"limit": 3, "docType": "rare"}),
            ("red", "small", [n for n in range(self.COUNT) if n % 3], {"limit": 50, "collections": ["large"]}),
            ("chief", "large", [*range(self.COUNT)], {"limit": 50, "collections": ["small", "small"]}),
        ]
        for key, collection, among, more in cases:
            hits = there.as_(key).search(collection, **asked, **more)["hits"]
            self._same(hits, self._nearest(rows, question, among)[: more["limit"]])
            assert [hit["why"]["ranks"] for hit in hits] == [{"vector": n + 1} for n in range(len(hits))]

    def test_a_threshold_cuts_off_what_is_further_away(self, many: tuple[Person, Any]) -> None:
        red, rows = many
        question = directions(1, self.DIMENSION, seed=2)[0]
        expected = self._nearest(rows, question, [n for n in range(self.COUNT - 20) if n % 3])
        least = round((expected[6][1] + expected[7][1]) / 2, 6)
        found = red.search("large", vector=question.tolist(), mode="vector", threshold=least, limit=100)
        self._same(found["hits"], expected[:7])

    def test_a_collection_of_another_model_has_nothing_to_say_to_a_vector(self, many: tuple[Person, Any]) -> None:
        red, _ = many
        asked = {"vector": [1.0] * self.DIMENSION, "mode": "vector", "limit": 100}
        both = red.search("large", **asked, collections=["other"])
        assert {hit["collection"] for hit in both["hits"]} == {"large"}
        assert both["warnings"] == ["SEMANTIC_MODEL_MISSING"]
        assert red.search("large", **asked)["warnings"] == []

    def test_a_deleted_or_moved_document_is_not_where_it_was(self, many: tuple[Person, Any]) -> None:
        red, rows = many
        asked = {"vector": rows[1].tolist(), "mode": "vector", "limit": 1}
        assert red.found("large", **asked) == ["1"]
        red.write("large", [{"id": "1", "vector": (-rows[1]).tolist()}])
        assert red.found("large", **asked) != ["1"]
        assert red.found("large", **{**asked, "vector": (-rows[1]).tolist()}) == ["1"]
        red.ask("DELETE", "/large/documents/1", 204)
        assert red.found("large", **{**asked, "vector": (-rows[1]).tolist()}) != ["1"]


def test_words_of_title_and_text_are_found_whatever_else_is_asked(red: Person) -> None:
    red.make("books", 2)
    red.write(
        "books",
        [
            {"id": "title", "vector": [1, 0], "title": "Leasing of unicorns", "docType": "law"},
            {"id": "text", "vector": [1, 0], "text": "Whoever rents out unicorns", "payload": {"kept": True}},
            {"id": "none", "vector": [1, 0], "text": "Horses, and the who"},
        ],
    )
    hits = red.search("books", query="unicorns", mode="lexical")["hits"]
    assert {hit["id"] for hit in hits} == {"title", "text"}
    assert [hit["why"]["ranks"] for hit in hits] == [{"lexical": 1}, {"lexical": 2}]
    assert all(hit["score"] == hit["why"]["lexicalScore"] for hit in hits)
    assert hits[0]["score"] >= hits[1]["score"]
    [text] = [hit for hit in hits if hit["id"] == "text"]
    assert (text["payload"], text["collection"], text["docType"], text["domain"]) == ({"kept": True}, "books", "", "")
    assert red.found("books", query="unicorns", mode="lexical", docType="law") == ["title"]
    assert set(red.found("books", query="WHO and the unicorns", mode="lexical")) == {"title", "text"}
    assert red.found("books", query="out of", mode="lexical") == ["text"]  # there is no other word
    for odd in ('"', "unicorns AND (", "NEAR(", "*", "a" * 2_000, "':*&|!", "\x00", "col:unicorns -horses"):
        assert set(red.found("books", query=odd, mode="lexical")) <= {"title", "text", "none"}


def test_a_rare_type_is_found_behind_hundreds_of_better_matches(red: Person) -> None:
    red.make("books", 2)
    red.write("books", [{"id": f"{n}", "vector": [1, 0], "text": "unicorn"} for n in range(900)])
    worse = {"vector": [1, 0], "text": "unicorn " + "and many other words " * 30, "docType": "rare"}
    red.write("books", [{"id": "rare", **worse}])
    assert red.found("books", query="unicorn", mode="lexical", limit=5, docType="rare") == ["rare"]


def test_hybrid_joins_both_by_their_ranks(red: Person) -> None:
    red.make("books", 2)
    red.write(
        "books",
        [
            {"id": "both", "vector": [1, 0.2], "text": "a unicorn among horses"},
            {"id": "near", "vector": [1, 0.1], "text": "something else"},
            {"id": "word", "vector": [-1, 0.1], "text": "unicorn unicorn"},
        ],
    )
    answer = red.search("books", query="unicorn", vector=[1, 0], threshold=0.5)
    hits = {hit["id"]: hit for hit in answer["hits"]}
    assert (answer["mode"], answer["warnings"], set(hits)) == ("hybrid", [], {"both", "near", "word"})
    by_words = red.found("books", query="unicorn", mode="lexical")
    for doc_id, hit in hits.items():
        ranks = {"vector": ["near", "both"].index(doc_id) + 1} if doc_id != "word" else {}
        ranks |= {"lexical": by_words.index(doc_id) + 1} if doc_id in by_words else {}
        assert hit["why"]["ranks"] == ranks
        assert hit["score"] == pytest.approx(sum(1 / (60 + rank) for rank in ranks.values()), abs=1e-6)
        assert (hit["why"]["vectorScore"] is None) == (doc_id == "word")
    assert answer["hits"][0]["id"] == "both"
    assert red.found("books", query="unicorn", vector=[1, 0], threshold=0.5, limit=1) == ["both"]


def test_search_goes_over_the_collections_that_are_named(red: Person) -> None:
    for name in ("one", "two", "three"):
        red.make(name, 2, model="same")
        red.write(name, [{"id": "a", "vector": [1, 0], "text": f"unicorn {name}"}])

    def found(**more: Any) -> set[str]:
        return {hit["collection"] for hit in red.search("one", query="unicorn", vector=[1, 0], **more)["hits"]}

    assert found() == {"one"}
    assert found(collections=["two"]) == {"one", "two"}
    assert found(collections=["*"]) == {"one", "two", "three"}
    missing = red.refused("POST", "/one/search", 404, json={"query": "x", "collections": ["*", "two", "four"]})
    assert (missing["code"], missing["details"]) == ("COLLECTION_NOT_FOUND", {"field": "collections[2]"})


class TestTexts:
    """A collection whose texts the server embeds."""

    def test_a_text_gets_the_vector_of_the_servers_engine(self, red: Person) -> None:
        red.ask("PUT", "/texts", 201)
        texts = ["The tenant pays rent.", "A cat sleeps on the sofa.", "def parse_graph(path): ..."]
        own = np.eye(256)[5].tolist()
        documents: list[dict[str, Any]] = [{"id": f"{n}", "text": text} for n, text in enumerate(texts)]
        red.write("texts", [documents[0], {"id": "own", "text": "Anything", "vector": own}, *documents[1:]])
        expected = StaticEmbedder().embed(texts).vectors
        for document, vector in zip(documents, expected, strict=True):
            assert red.document("texts", document["id"], vector=True)["vector"] == vector.tolist()
        assert red.document("texts", "own", vector=True)["vector"] == own
        answer = red.search("texts", query="money for a flat", mode="vector", limit=1)
        question = StaticEmbedder().embed(["money for a flat"], purpose="query").vectors[0]
        assert [hit["id"] for hit in answer["hits"]] == ["0"]
        assert answer["hits"][0]["score"] == pytest.approx(float(expected[0] @ question), abs=2e-6)

    def test_a_long_text_has_the_vector_of_its_beginning(self, red: Person) -> None:
        red.ask("PUT", "/texts", 201)
        text = "unicorn rents " * 70_000
        red.write("texts", [{"id": "long", "text": text}])
        expected = StaticEmbedder().embed([text]).vectors[0].tolist()
        assert red.document("texts", "long", vector=True)["vector"] == expected
        assert red.document("texts", "long")["text"] == text

    def test_a_collection_with_vectors_of_its_own_wants_them(self, red: Person) -> None:
        red.make("books", 256)
        wrong = red.refused("POST", "/books/documents", 400, json={"documents": [{"id": "a", "text": "Words"}]})
        assert wrong["details"]["field"] == "documents[0].vector"
        assert STATIC in wrong["message"]
        alone = red.refused("PUT", "/books/documents/a", 400, json={"text": "Words"})
        assert alone["details"]["field"] == "vector"
        red.write("books", [{"id": "a", "text": "unicorn", "vector": [1] * 256}])
        asked = red.refused("POST", "/books/search", 400, json={"query": "unicorn", "mode": "vector"})
        assert asked["details"]["field"] == "vector"
        hybrid = red.search("books", query="unicorn")
        assert ([hit["id"] for hit in hybrid["hits"]], hybrid["warnings"]) == (["a"], ["SEMANTIC_MODEL_MISSING"])

    def test_each_collection_is_compared_with_the_vector_that_fits_it(self, red: Person) -> None:
        red.ask("PUT", "/texts", 201)
        red.make("books", 2)
        red.write("texts", [{"id": "text", "text": "rent for a flat"}])
        red.write("books", [{"id": "book", "vector": [1, 0]}])
        asked: dict[str, Any] = {"query": "rent for a flat", "mode": "vector"}
        both = red.search("books", **asked, vector=[1, 0], collections=["texts"])
        assert {hit["id"]: hit["score"] for hit in both["hits"]} == pytest.approx({"text": 1, "book": 1}, abs=1e-6)
        assert both["warnings"] == []
        theirs = red.search("books", **asked, collections=["texts"])
        assert ([hit["id"] for hit in theirs["hits"]], theirs["warnings"]) == (["text"], ["SEMANTIC_MODEL_MISSING"])


def test_what_was_done_is_noted(red: Person, there: Shelf) -> None:
    there.notes.clear()
    red.make("books", 2)
    red.write("books", [{"id": "a", "vector": [1, 0]}])
    red.document("books", "a")
    red.search("books", query="x")
    red.ask("DELETE", "/books/documents/a", 204)
    red.refused("DELETE", "/books/documents/a", 404)
    red.ask("DELETE", "/books", 204)
    red.ask("GET", "")
    assert [(note.key, note.client, note.action, note.outcome) for note in there.notes] == [
        ("red", "red", "collection.create", "ok"),
        ("red", "red", "document.write", "ok"),
        ("red", "red", "collection.read", "ok"),
        ("red", "red", "collection.search", "ok"),
        ("red", "red", "document.delete", "ok"),
        ("red", "red", "document.delete", "DOCUMENT_NOT_FOUND"),
        ("red", "red", "collection.delete", "ok"),
    ]


def test_a_whole_server_embeds_and_finds_texts(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1).start()
    try:
        path = "/v1/collections/texts"
        assert server.client.put(path).status_code == 201
        for doc_id, text in (("rent", "The tenant pays rent."), ("cat", "A cat sleeps on the sofa.")):
            answer = server.client.put(f"{path}/documents/{doc_id}", json={"text": text})
            assert (answer.status_code, answer.json()["created"]) == (201, True)
        question = {"query": "money for a flat", "mode": "vector", "limit": 1}
        found = server.client.post(f"{path}/search", json=question).json()
        assert ([hit["id"] for hit in found["hits"]], found["warnings"]) == (["rent"], [])
        assert server.client.get("/v1/collections").json()["collections"][0]["model"] == STATIC
    finally:
        server.close()
